from __future__ import annotations

import base64
import dataclasses
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image, ImageDraw

from vretrver_hf.agent import Event
from vretrver_hf.html import LiveTrace, items_fragment, ranking_fragment, ranking_html, rankings_html, trace_css
from vretrver_hf.items import Item
from vretrver_hf.parsing import parse_ranking, parse_turn
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset, last_word, malformed_observation
from vretrver_hf.ranking import Ranking
from vretrver_hf.tools import VisualTools
from vretrver_hf.trajectory import Trajectory, Turn


VOID = {"meta", "img"}
GREEN, RED, BLUE = (20, 160, 60), (200, 30, 30), (30, 60, 200)


class Page(HTMLParser):
    """The elements and the text of a page; insists that every element is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    def pictures(self, alt: str = "") -> list[Image.Image]:
        sources = [found["src"] for found in self.find("img") if alt in found["alt"]]
        return [Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def picture(size=(1000, 800), color=RED) -> Image.Image:
    """Plain, with a green patch at 100..300 x 100..300."""
    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).rectangle((100, 100, 299, 299), fill=GREEN)
    return image


def play(query, candidates, texts, indices=None, preset="release", finish="answer") -> Trajectory:
    """What the agent loop records of these model turns, with the real parser and tools; a token is a character."""
    preset = get_preset(preset)
    indices = list(range(len(candidates))) if indices is None else indices
    shown = [candidates[index] for index in indices]
    images = [item.load_image() if item.image is not None else None for item in (query, *shown)]
    tools = VisualTools(images[0], images[1:], preset=preset)
    turns = [Turn("prompt", [0] * 1000, "prompt", seconds=0.5)]
    for text in texts:
        parsed = parse_turn(text)
        turn = Turn("assistant", [1] * len(text), text, num_sampled=len(text), seconds=1.25, kind=parsed.kind)
        turn.thought, turn.problem = parsed.thought, parsed.problem
        turns.append(turn)
        if parsed.kind == "malformed":
            turns.append(Turn("observation", [2] * 10, malformed_observation(parsed.problem), valid=False))
        elif parsed.call:
            turn.call = dataclasses.asdict(parsed.call)
            seen = tools.call(parsed.call.name, parsed.call.arguments)
            turn.valid = seen.valid
            turns.append(Turn("observation", [2] * 10, seen.text, images=list(seen.refs), valid=seen.valid))
    answers = [turn.text for turn in turns if turn.kind == "answer"]
    ranking = parse_ranking(answers[-1] if answers else "", len(shown))
    return Trajectory(
        "0", len(shown), indices, preset.to_dict(), turns, finish, ranking.order, ranking.status, ranking.problems
    )


def make_ranking(query, candidates, texts, order=None, **kwargs) -> Ranking:
    trajectory = play(query, candidates, texts, **kwargs)
    return Ranking(query, candidates, order or trajectory.order, trajectory.status, [trajectory])


def call(name, thought="t", **arguments) -> str:
    return format_turn(thought, format_call(name, arguments))


def answer(*numbers, thought="t") -> str:
    return format_turn(thought, format_answer([number - 1 for number in numbers]))


QUERY = Item(text="a green patch", image=picture(color=BLUE))
CANDIDATES = [Item(text="first", id="a"), Item(image=picture(), id="1"), Item(text="third", image=picture((600, 300)))]


class TestWholePage:
    @pytest.fixture
    def page(self):
        texts = [
            call("select_images", "Let me see both.", target_images=[0, 2]),
            call("crop_image", "Now the patch.", bbox_2d=[100, 100, 300, 300], target_image=2),
            answer(2, 3, 1, thought="2 has it."),
        ]
        return Page(ranking_html(make_ranking(QUERY, CANDIDATES, texts)))

    def test_loads_and_runs_nothing(self, page):
        assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
        for _, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
            assert attributes.get("href", "#").startswith("#")
        assert "default-src 'none'" in page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]

    def test_is_made_for_small_and_dark_screens(self):
        text = ranking_html(make_ranking(QUERY, CANDIDATES, [answer(1, 2, 3)]))
        assert text.startswith("<!DOCTYPE html>")
        assert "width=device-width" in text and "prefers-color-scheme: dark" in text

    def test_every_picture_has_words(self, page):
        assert len(page.find("img")) > 5
        assert all(found["alt"].strip() for found in page.find("img"))
        assert page.find("html", lang="en")

    def test_links_lead_somewhere(self, page):
        targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
        assert {found["href"][1:] for found in page.find("a")} == targets

    def test_pictures_are_reduced(self, page):
        assert max(max(image.size) for image in page.pictures()) == 512

    def test_tells_the_story_in_order(self, page):
        parts = ["a green patch", "Candidates, as given"]
        parts += ["Let me see both.", "Looks again at the query and candidate 2"]
        parts += ["Now the patch.", "Looks at a region of candidate 2"]
        parts += ["2 has it.", "Answers", "[2, 3, 1]", "1 was 2"]
        places = [page.words.index(part) for part in parts]
        assert places == sorted(places)

    def test_status_and_cost(self, page):
        """3 model turns of 1.25 s and a prompt of 0.5 s; 1,000 + 2 × 10 tokens read."""
        assert "Status ok." in page.words
        for cost in ("windows 1", "tool calls 2", "tokens read 1,020", "seconds 4.2"):
            assert cost in page.words

    def test_old_and_new_ranks(self, page):
        final = page.words[page.words.rindex("Final order") :]
        places = [final.index(place) for place in ("1 was 2, up 1", "2 was 3, up 1", "3 was 1, down 2")]
        assert places == sorted(places)

    def test_ids_are_shown_where_they_say_more_than_the_position(self, page):
        given = page.words[page.words.index("Candidates, as given") : page.words.rindex("What the model did")]
        assert "1 a first" in given
        assert "2 1" not in given  # the id "1" was made of the 0-based position


class TestEvidence:
    @pytest.mark.parametrize(
        ("preset", "box"),
        [
            ("release", [100, 100, 300, 300]),
            ("release", [0.1, 0.125, 0.3, 0.375]),
            ("foveated", [0.1, 0.125, 0.3, 0.375]),
            (get_preset("foveated", coordinates="thousand"), [100, 125, 300, 375]),
        ],
    )
    def test_boxes_by_hand(self, preset, box):
        """The model asks for 100..300 of 1000 x 800; 10 % of the sides pad it to 0..400 x 20..380."""
        texts = [call("crop_image", bbox_2d=box, target_image=2), answer(2, 3, 1)]
        page = Page(ranking_html(make_ranking(QUERY, CANDIDATES, texts, preset=preset)))
        assert page.find("svg")[0]["viewbox"] == "0 0 1000 800"
        (asked,), (shown,) = page.find("rect", class_="asked"), page.find("rect", class_="shown")
        assert [asked[name] for name in ("x", "y", "width", "height")] == ["100", "100", "200", "200"]
        assert [shown[name] for name in ("x", "y", "width", "height")] == ["0", "20", "400", "360"]

    def test_the_crop_is_what_the_model_saw(self):
        texts = [call("crop_image", bbox_2d=[200, 200, 400, 400], target_image=2), answer(2, 3, 1)]
        preset = get_preset("release", crop_padding=0.0)
        page = Page(ranking_html(make_ranking(QUERY, CANDIDATES, texts, preset=preset)))
        (crop,) = page.pictures(alt="Region of candidate 2 as the model saw it")
        # 200..400 of the picture: its upper left quarter is green, the rest red.
        width, height = crop.size
        for place, color in [((0.25, 0.25), GREEN), ((0.75, 0.25), RED), ((0.25, 0.75), RED)]:
            found = crop.convert("RGB").getpixel((int(place[0] * width), int(place[1] * height)))
            assert max(abs(a - b) for a, b in zip(found, color, strict=True)) < 12

    def test_small_originals_keep_their_shape(self):
        candidates = [Item(image=Image.new("RGB", (40, 20))), Item(text="b")]
        texts = [call("crop_image", bbox_2d=[0, 0, 40, 20], target_image=1), answer(1, 2)]
        page = Page(ranking_html(make_ranking(QUERY, candidates, texts)))
        marked = next(found for found in page.find("img") if "region marked" in found["alt"])
        assert (marked["width"], marked["height"]) == ("288", "144")

    @pytest.mark.parametrize(
        "text",
        [
            call("crop_image", bbox_2d=[300, 300, 100, 100], target_image=2),  # reversed
            call("crop_image", bbox_2d=[1, 2, 3], target_image=2),
            call("crop_image", bbox_2d="all of it", target_image=2),
            call("select_images", target_images=[1]),  # the candidate has no picture
            call("look_closely"),  # no such tool
        ],
    )
    def test_calls_that_are_not_carried_out(self, text):
        ranking = make_ranking(QUERY, CANDIDATES, [text, answer(2, 3, 1)])
        page = Page(ranking_html(ranking))
        assert "Makes a call that is not carried out" in page.words
        assert f"It is told: {ranking.trajectories[0].turns[2].text}" in page.words
        assert "1 (1 not carried out)" in page.words
        assert not page.find("svg")

    def test_malformed_turns(self):
        ranking = make_ranking(QUERY, CANDIDATES, ["<think>t</think> I would say 2.", answer(2, 3, 1)])
        page = Page(ranking_html(ranking))
        assert "Writes a turn that cannot be used" in page.words
        assert "Problem: there is no <tool_call> and no <answer>." in page.words
        assert "I would say 2." in page.words

    def test_sloppy_turns(self):
        page = Page(ranking_html(make_ranking(QUERY, CANDIDATES, ["<answer>[2, 3, 1]</answer>"])))
        assert "Not quite the expected form: there is no <think> before the action." in page.words

    def test_repairs(self):
        page = Page(ranking_html(make_ranking(QUERY, CANDIDATES, [answer(2, 2)])))
        assert "Status repaired." in page.words
        assert "Mended: 1 repeated number dropped; 2 missing candidates appended in input order." in page.words

    @pytest.mark.parametrize(
        ("finish", "words"),
        [
            ("no_answer", "calls and turns were used up"),
            ("length", "context was full"),
            ("cancelled", "was cancelled"),
        ],
    )
    def test_no_answer(self, finish, words):
        ranking = make_ranking(QUERY, CANDIDATES, [call("select_images", target_images=[2])], finish=finish)
        page = Page(ranking_html(ranking))
        assert "Status fallback." in page.words and words in page.words

    def test_the_last_word(self):
        ranking = make_ranking(QUERY, CANDIDATES, [call("select_images", target_images=[2]), answer(2, 3, 1)])
        turns = ranking.trajectories[0].turns
        turns[1].valid = False
        turns[2] = Turn("observation", [2], last_word(3), valid=False)
        page = Page(ranking_html(ranking))
        assert "not carried out" in page.words and "It is told: No tool calls are left." in page.words


class TestWindows:
    def test_numbers_are_those_of_the_page(self):
        """Windows of 3 over 5 candidates: the second shows 1, 2 and the winner of the first, 5, as its number 3."""
        candidates = [Item(text=f"text {number}", image=picture((400, 400))) for number in range(1, 6)]
        look = call("crop_image", bbox_2d=[0, 0, 100, 100], target_image=3)
        trajectories = [
            play(QUERY, candidates, [answer(3, 1, 2)], indices=[2, 3, 4]),
            play(QUERY, candidates, [look, answer(3, 1, 2)], indices=[0, 1, 4]),
        ]
        page = Page(ranking_html(Ranking(QUERY, candidates, [4, 0, 1, 2, 3], "ok", trajectories)))
        assert "Window 1 of 2" in page.words and "Window 2 of 2" in page.words
        assert "Looks at a region of candidate 5 (here number 3)" in page.words
        assert "Order of this window, best first: 3 candidate 5 1 2" in page.words
        assert "1 was 5, up 4" in page.words and "2 was 1, down 1" in page.words

    def test_one_window_is_not_renumbered(self):
        page = Page(ranking_html(make_ranking(QUERY, CANDIDATES, [answer(2, 3, 1)])))
        assert "One window" in page.words and "afresh" not in page.words


class TestUntrustedWords:
    NASTY = "</p></style><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"'&lt;"

    def test_everything_is_text(self):
        nasty = self.NASTY
        query = Item(text=nasty, id=nasty)
        candidates = [Item(text=nasty, image=picture(), id=nasty), Item(text="b", id="b" + nasty)]
        texts = [
            f"{nasty} neither call nor answer",
            format_turn(nasty, format_call(nasty, {nasty: nasty})),
            call("crop_image", nasty, bbox_2d=[0, 0, 9, 9], target_image=1),
            f"<think>{nasty}</think><answer>{nasty} 2, 1</answer>",
        ]
        ranking = make_ranking(query, candidates, texts)
        ranking.trajectories[0].problems.append(nasty)
        page = Page(ranking_html(ranking))
        assert not page.find("script")
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert all(found["src"].startswith("data:image/webp") for found in page.find("img"))
        assert page.text.count(nasty) >= 9
        assert len(page.find("p")) < 40 and "49" not in page.text

    def test_an_error_is_text(self):
        ranking = Ranking(Item(text="q"), [Item(text="a")], [0], "fallback", [], error="<script>1</script>")
        page = Page(ranking_html(ranking))
        assert not page.find("script") and "It failed: <script>1</script>" in page.words

    def test_every_character_can_be_written(self):
        ranking = Ranking(Item(text="q"), [Item(text="a\0\u202e", id="\ud800.png")], [0], "ok", [])
        ranking_html(ranking).encode("utf-8")


class TestFewOrMissing:
    @pytest.mark.parametrize("candidates", [[], [Item(text="only")]])
    def test_nothing_to_compare(self, candidates):
        page = Page(ranking_html(Ranking(Item(text="q"), candidates, list(range(len(candidates))), "ok", [])))
        assert "no model ran" in page.words
        assert "What the model did" not in page.words

    def test_only_text(self):
        page = Page(ranking_html(make_ranking(Item(text="q"), [Item(text="a"), Item(text="b")], [answer(2, 1)])))
        assert not page.find("img")

    def test_a_picture_that_is_gone(self, tmp_path):
        path = tmp_path / "gone.png"
        picture().save(path)
        candidates = [Item(image=path), Item(text="b")]
        texts = [call("crop_image", bbox_2d=[0, 0, 100, 100], target_image=1), answer(1, 2)]
        ranking = make_ranking(Item(text="q"), candidates, texts)
        path.unlink()
        page = Page(ranking_html(ranking))
        assert page.words.count("can no longer be read") == 3  # as a candidate, as evidence, in the final order

    def test_fifty_photographs_make_a_page_that_can_be_mailed(self):
        noise = Image.effect_noise((640, 480), 60).convert("RGB")  # the hardest to compress
        candidates = [Item(image=noise) for _ in range(50)]
        text = ranking_html(make_ranking(QUERY, candidates, [answer(*range(1, 51))]))
        assert len(text) < 5 * 2**20


class TestSeveral:
    @pytest.fixture
    def rankings(self):
        look = call("crop_image", bbox_2d=[100, 100, 300, 300], target_image=2)
        return [make_ranking(QUERY, CANDIDATES, [look, answer(*order)]) for order in ((2, 3, 1), (3, 1, 2))]

    def test_right_and_wrong(self, rankings):
        """The second candidate fits both queries; the second ranking has it last of three."""
        page = Page(rankings_html(rankings, title="Two queries", positives=[1, 1]))
        assert "Two queries 1 of 2 right" in page.words
        assert "Right: candidate 2, which fits the query, came first." in page.words
        assert "Wrong: candidate 2, which fits the query, came only at place 3." in page.words

    def test_without_known_answers_nothing_is_judged(self, rankings):
        page = Page(rankings_html(rankings))
        assert "Ranking 1" in page.words and "Ranking 2" in page.words
        assert "right" not in page.words.lower() and "wrong" not in page.words.lower()

    def test_each_has_its_evidence_and_links_lead_to_it(self, rankings):
        page = Page(rankings_html(rankings, headings=["first", "second"]))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)) == 8  # two articles of three parts
        assert {found["href"][1:] for found in page.find("a")} == set(ids)
        assert len(page.find("svg")) == 2 and page.words.count("Final order") == 4  # in the links and as headings

    def test_headings_go_down_one_level_at_a_time(self, rankings):
        for text in (ranking_html(rankings[0]), rankings_html(rankings)):
            levels = [int(tag[1]) for tag, _ in Page(text).elements if tag in ("h1", "h2", "h3", "h4")]
            assert levels[0] == 1 and levels.count(1) == 1
            assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))

    def test_loads_and_runs_nothing(self, rankings):
        nasty = TestUntrustedWords.NASTY
        rankings.append(make_ranking(Item(text=nasty), CANDIDATES, [answer(1, 2, 3)]))
        page = Page(rankings_html(rankings, title=nasty, headings=[nasty] * 3))
        assert not page.find("script")
        assert all(found["src"].startswith("data:image/webp") for found in page.find("img"))
        assert "default-src 'none'" in page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]

    @pytest.mark.parametrize("short", [{"headings": ["one"]}, {"positives": [0]}])
    def test_one_each(self, rankings, short):
        with pytest.raises(ValueError):
            rankings_html(rankings, **short)

    def test_none(self):
        assert "Rankings" in Page(rankings_html([])).words


class TestPieces:
    """What the Space and the viewer put into pages of their own."""

    def test_a_trace_under_way(self):
        preset = get_preset("release")
        live = LiveTrace(QUERY, CANDIDATES, preset)
        tools = VisualTools(QUERY.load_image(), [None, CANDIDATES[1].load_image(), None], preset=preset)
        arguments = {"bbox_2d": [100, 100, 300, 300], "target_image": 2}
        seen = tools.call("crop_image", arguments)
        assert live.add(Event("window", "0", order=(0, 1, 2)))
        assert not live.add(Event("thought", "0", text="Now <the> patch."))
        assert not live.add(Event("call", "0", call={"name": "crop_image", "arguments": arguments}))
        assert live.add(Event("observation", "0", text=seen.text, valid=True, refs=tuple(seen.refs)))
        page = Page(live.html("at work"))
        assert "Now <the> patch. Looks at a region of candidate 2" in page.words and page.words.endswith("at work")
        assert page.find("rect", class_="asked")[0]["x"] == "100"
        assert live.add(Event("answer", "0", order=(1, 2, 0), status="ok"))
        assert "Answers [2, 3, 1]" in Page(live.html()).words

    def test_a_turn_that_is_no_use(self):
        live = LiveTrace(QUERY, CANDIDATES, get_preset("release"))
        live.add(Event("window", "0", order=(0, 1, 2)))
        live.add(Event("observation", "0", text="Malformed turn.", valid=False))
        live.add(Event("answer", "0", order=(0, 1, 2), status="fallback"))
        words = Page(live.html()).words
        assert "cannot be used" in words and "It is told: Malformed turn." in words and "no usable answer" in words

    def test_pieces_have_one_root_and_no_styles(self):
        ranking = make_ranking(QUERY, CANDIDATES, [answer(2, 3, 1)])
        for piece in (ranking_fragment(ranking, title="T", positive=1, key="a-"), items_fragment(QUERY, CANDIDATES)):
            page = Page(piece)
            assert page.elements[0] == ("div", {"class": "vretrver"}) and not page.find("style")
        assert "Right: candidate 2" in Page(ranking_fragment(ranking, positive=1)).words

    def test_styles_stay_inside(self):
        rules = re.sub(r"/\*.*?\*/", "", trace_css(), flags=re.DOTALL)
        depth, outside = 0, ""
        for letter in rules:
            depth += (letter == "{") - (letter == "}")
            outside += letter if depth == 0 and letter != "}" else ""
        assert all(".vretrver" in part or "@media" in part for part in outside.split("\n") if part.strip())
