"""The released files, with the rows that break hasty readers."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import zipfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vretrver_hf import Item
from vretrver_hf.data.examples import load_examples
from vretrver_hf.data.vretrver import ImageRoot, PromptTemplate, read_row, stream_rows
from vretrver_hf.images import ImageLimits, ItemError


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def evaluation_row(hits=(("h1.png", ""), ("", "b"), ("3.png", "c")), **info) -> dict:
    """
    A row of the released evaluation files: no query picture, a text-only candidate between two with pictures, a text
    that names the prompt's own headings, and coarse results of which the third is the right one.
    """
    texts = ["Candidates:(1) <image>x Guidelines: none", "b", "c"]
    shown = f"Candidates:(1) <image>{texts[0]}(2) {texts[1]}(3) <image>{texts[2]}"
    return {
        "data_source": "mbeir_cirr_task7",
        "prompt": [
            {"role": "system", "content": "You rank."},
            {"role": "user", "content": f"Query: Candidates: of what? {shown}\n\nGuidelines: rank all."},
        ],
        "images": [{"image": "1.png"}, {"image": "3.png"}],
        "ability": "rerank",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {
            "qid": "9:1",
            "ground_truth_position": 3,
            "num_candidates": 3,
            "query_image": "",
            "query_text": "Candidates: of what?",
            "candidate_images": ["1.png", "", "3.png"],
            "candidate_texts": texts,
            "images": ["1.png", "3.png"],
        }
        | info,
        "hit": [{"candidate_images": image, "candidate_texts": text} for image, text in hits],
    }


class TestRows:
    def test_images_and_texts_stay_in_step(self):
        row = read_row(evaluation_row(), "/r")
        assert row.query == Item(text="Candidates: of what?")
        assert [(item.image, item.text) for item in row.candidates] == [
            ("/r/1.png", "Candidates:(1) <image>x Guidelines: none"),
            (None, "b"),
            ("/r/3.png", "c"),
        ]
        assert [(item.image, item.text) for item in row.hits] == [("/r/h1.png", None), (None, "b"), ("/r/3.png", "c")]
        assert row.positives == [2] and row.hit_positives == [2]

    @pytest.mark.parametrize(
        ("hits", "found"),
        [
            ([("1.png", "c"), ("3.png", "")], []),  # half of the right one is not the right one
            ([("3.png", "c"), ("x.png", ""), ("3.png", "c")], [0, 2]),  # the pool holds it twice
            ([("", "b")], []),  # fewer hits than any window
        ],
    )
    def test_the_positive_among_the_hits(self, hits, found):
        row = read_row(evaluation_row(hits))
        assert row.hit_positives == found and len(row.hits) == len(hits)

    @pytest.mark.parametrize("hits", [[], None])
    def test_no_hits(self, hits):
        row = read_row(evaluation_row() | {"hit": hits})
        assert row.hits is None and row.hit_positives == []

    def test_hits_inside_extra_info(self):
        row = evaluation_row()
        row["extra_info"]["hit"] = row.pop("hit")
        assert len(read_row(row).hits) == 3

    @pytest.mark.parametrize("place", ["hit", "extra_info.hit"])
    @pytest.mark.parametrize(
        ("hit", "reason"),
        [
            ("3.png", "hit[1] must be a mapping, got '3.png'"),
            ({"candidate_images": "", "candidate_texts": ""}, "hit[1]: an item needs text, an image, or both"),
            ({"candidate_images": 3}, "hit[1].candidate_images: the path of a picture must be a string, got int"),
            ({"candidate_images": "/etc/hosts"}, "hit[1].candidate_images: the picture '/etc/hosts' lies outside of"),
            ({"candidate_images": "a.mp4"}, "hit[1].candidate_images: '/nowhere/a.mp4' is a video"),
            ({"candidate_texts": 3}, "hit[1].candidate_texts must be a string, got 3"),
        ],
    )
    def test_bad_hits(self, hit, reason, place):
        row, hits = evaluation_row(), [{"candidate_texts": "good"}, hit]
        if place == "hit":
            row["hit"] = hits
        else:
            del row["hit"]
            row["extra_info"]["hit"] = hits
        with pytest.raises(ValueError, match=f"^{re.escape(place.removesuffix('hit') + reason)}"):
            read_row(row, "/nowhere")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"query_image": 3}, "extra_info.query_image: the path of a picture must be a string, got int"),
            ({"query_image": "/etc/hosts"}, "extra_info.query_image: the picture '/etc/hosts' lies outside of"),
            ({"query_text": 3}, "extra_info.query_text must be a string, got 3"),
            ({"query_text": ""}, "extra_info.query_text and query_image: query: an item needs text"),
            (
                {"candidate_images": ["1.png", "/etc/hosts", "3.png"]},
                "extra_info.candidate_images[1]: the picture '/etc/hosts' lies outside of",
            ),
            (
                {"candidate_images": ["1.png", 3, "3.png"]},
                "extra_info.candidate_images[1]: the path of a picture must be a string, got int",
            ),
            (
                {"candidate_images": ["1.png", "a.mp4", "3.png"]},
                "extra_info.candidate_images[1]: '/nowhere/a.mp4' is a video",
            ),
            ({"candidate_images": "123"}, "extra_info.candidate_images must be a list, got '123'"),
            ({"candidate_texts": ["a", 3, "c"]}, "extra_info.candidate_texts[1] must be a string, got 3"),
            (
                {"candidate_texts": ["a", "", "c"]},
                "extra_info.candidate_texts[1] and extra_info.candidate_images[1]: candidate 2: an item needs text",
            ),
            ({"candidate_ids": ["a", 3, "c"]}, "extra_info.candidate_ids[1] must be a string, got 3"),
            ({"candidate_ids": ["a"]}, "extra_info.candidate_ids has 1 entries for 3 candidates; write ''"),
        ],
    )
    def test_a_mistake_is_told_with_its_field(self, change, reason):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
            read_row(evaluation_row(**change) | {"images": None}, "/nowhere")

    def test_a_stored_picture_that_is_none_is_told_with_its_place(self):
        row = evaluation_row() | {"images": [{"image": "1.png"}, {"image": ["no", "picture"]}]}
        with pytest.raises(ValueError, match=r"^images\[1\]: an item's image must be a path, bytes"):
            read_row(row)


def compacted(content: str | None, paths: list, texts: list, count: int, **info) -> dict:
    """A row whose lists leave out what candidates do not have, and the prompt that shows whose their entries are."""
    row = evaluation_row(candidate_images=paths, candidate_texts=texts, num_candidates=count, **info)
    prompt = None if content is None else [{"role": "user", "content": content}]
    return row | {"prompt": prompt, "images": [{"image": path} for path in paths if path]}


class TestCompacted:
    SHOWN = "Query: (1) <image>a cat? Candidates:(1) <image>(2) a cat(3) <image>a dog\n\nGuidelines: rank all."
    PATHS, TEXTS = ["1.png", "3.png"], ["a cat", "a dog"]
    PLACED = ((None, "1.png"), ("a cat", None), ("a dog", "3.png"))

    @pytest.mark.parametrize("paths", [PATHS, ["1.png", "", "3.png"]])
    @pytest.mark.parametrize("texts", [TEXTS, ["", "a cat", "a dog"]])
    def test_entries_are_placed_by_the_prompts_marks(self, paths, texts):
        row = read_row(compacted(self.SHOWN, paths, texts, 3))
        assert [(item.text, item.image) for item in row.candidates] == list(self.PLACED)
        assert row.positives == [2]
        assert PromptTemplate(row.prompt, row.candidates).show(row.candidates) == row.prompt

    def test_the_relevant_hit_is_that_of_the_placed_candidate(self):
        hits = [{"candidate_images": "3.png", "candidate_texts": "a dog"}, {"candidate_images": "3.png"}]
        assert read_row(compacted(self.SHOWN, self.PATHS, self.TEXTS, 3) | {"hit": hits}).hit_positives == [0]

    def test_stored_pictures_go_with_their_entries(self):
        row = compacted(self.SHOWN, self.PATHS, self.TEXTS, 3)
        row["images"] = [{"image": {"bytes": png(color)}} for color in ("red", "green")]
        assert [item.image for item in read_row(row).candidates] == [png("red"), None, png("green")]

    def test_mistakes_name_the_entry_and_not_the_candidate(self):
        with pytest.raises(ValueError, match=r"^extra_info.candidate_images\[1\]: the picture '/etc/hosts' lies"):
            read_row(compacted(self.SHOWN, ["1.png", "/etc/hosts"], self.TEXTS, 3), "/nowhere")

    @pytest.mark.parametrize(
        ("content", "paths", "texts"),
        [
            (None, PATHS, TEXTS),  # nothing says whose they are
            ("Candidates:(1) <image>(2) a cat\n\nGuidelines", PATHS, TEXTS),  # two candidates, and there are three
            ("Candidates:(1) <image>(2) a cat(3) a dog\n", PATHS, TEXTS),  # a picture that no mark stands for
            (SHOWN, PATHS, ["a cat"]),  # the third one's text is in no list
            (SHOWN, PATHS, ["a dog", "a cat"]),  # in another order than the prompt
            (SHOWN, ["1.png", ""], TEXTS),  # short, and blank where nobody knows of whom
        ],
    )
    def test_whose_nobody_can_say_is_refused(self, content, paths, texts):
        with pytest.raises(ValueError, match=r"extra_info.candidate_\w+ has \d entries for 3 candidates; write ''"):
            read_row(compacted(content, paths, texts, 3))

    def test_two_ways_to_read_it_are_refused(self):
        """Either candidate may have the picture, for the other's text may be the same words as the mark."""
        shown = "Candidates:(1) <image>(2) <image>\n\nGuidelines"
        with pytest.raises(ValueError, match="candidate_texts has 1 entries for 2 candidates"):
            read_row(compacted(shown, ["1.png"], ["<image>"], 2, ground_truth_position=1))

    def test_no_texts_make_it_slow(self):
        """40 candidates with a mark or a text each have 2 ** 40 ways, and none of them ends well."""
        shown = "".join(f"({number}) <image>" for number in range(1, 41)) + "(41) <image> and more"
        row = compacted(shown, ["1.png"] * 20, ["<image>"] * 21, 41)
        with pytest.raises(ValueError, match="candidate_texts has 21 entries for 41 candidates"):
            read_row(row)

    parts = st.sampled_from(["a", "(2) b", "<image>", "a(3)", "<image>a"])
    words = st.lists(parts, min_size=1, max_size=2).map("".join)
    shown = st.lists(
        st.tuples(st.booleans(), st.none() | words).filter(lambda pair: pair[0] or pair[1]), min_size=1, max_size=5
    )

    @given(shown)
    def test_no_entry_goes_to_another_candidate(self, shown):
        """Placed as it was, or refused."""
        pictures = [f"{number}.png" if has else None for number, (has, _) in enumerate(shown)]
        listed = "".join(f"({n}) {'<image>' if has else ''}{text or ''}" for n, (has, text) in enumerate(shown, 1))
        paths, texts = [path for path in pictures if path], [text for _, text in shown if text]
        row = compacted(f"{listed}\n\nGuidelines", paths, texts, len(shown), ground_truth_position=1)
        if not paths or not texts:  # an empty list says that none has any
            return
        try:
            read = read_row(row)
        except ValueError as error:
            assert f"entries for {len(shown)} candidates" in str(error)
        else:
            assert [(item.image, item.text) for item in read.candidates] == [
                (path, text) for path, (_, text) in zip(pictures, shown, strict=True)
            ]


class TestStreaming:
    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder"])
    def test_yields_every_row(self, tmp_path, kind):
        rows = [evaluation_row(qid=f"9:{number}") for number in range(5)]
        if kind == "jsonl":
            source = tmp_path / "rows.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            source = tmp_path / ("rows.parquet" if kind == "parquet" else "data/test-00000.parquet")
            source.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(source)
            source = source if kind == "parquet" else source.parent
        read = list(stream_rows(source, image_root=tmp_path / "pictures"))
        assert [row.query_id for row in read] == [f"9:{number}" for number in range(5)]
        assert read[4] == read_row(rows[4], tmp_path / "pictures")

    def test_pictures_lie_beside_a_local_file(self, tmp_path):
        datasets.Dataset.from_list([evaluation_row()]).to_parquet(tmp_path / "rows.parquet")
        (row,) = stream_rows(tmp_path / "rows.parquet")
        assert row.candidates[0].image == str(tmp_path / "1.png")

    def test_a_bad_row_is_named(self, tmp_path):
        rows = [evaluation_row(), evaluation_row(ground_truth_position=4)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(
            ValueError, match=r"rows.parquet, row 1: extra_info.ground_truth_position must be .* got 4"
        ):
            list(stream_rows(tmp_path / "rows.parquet"))

    def test_a_row_that_names_a_file_elsewhere_is_named(self, tmp_path):
        (tmp_path / "secret.png").write_bytes(png("red"))
        folder = tmp_path / "data"
        folder.mkdir()
        rows = [evaluation_row(), evaluation_row(candidate_images=[str(tmp_path / "secret.png"), "", "3.png"])]
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        field = r"extra_info.candidate_images\[0\]"
        reason = f"rows.parquet, row 1: {field}: the picture '.*/secret.png' lies outside of image_root"
        with pytest.raises(ValueError, match=reason):
            list(stream_rows(folder / "rows.parquet"))
        examples = load_examples(folder / "rows.parquet")
        with pytest.raises(ValueError, match=reason):
            examples[1]
        assert len(list(stream_rows(folder / "rows.parquet", image_root=tmp_path))) == 2

    def test_rows_of_the_hub_name_no_files(self, monkeypatch, tmp_path):
        hosted = datasets.Dataset.from_list([evaluation_row()])
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming=False: hosted)
        field = r"extra_info.candidate_images\[0\]"
        reason = f"someone/rows, row 0: {field}: the picture '1.png' is a file: give image_root"
        with pytest.raises(ValueError, match=reason):
            load_examples("someone/rows")[0]
        with pytest.raises(ValueError, match=reason):
            list(stream_rows("someone/rows"))
        (example,) = load_examples("someone/rows", image_root=tmp_path)
        assert example.candidates[0].image == str(tmp_path / "1.png")


class TestImageRoot:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        tmp_path = tmp_path / "root"
        (tmp_path / "sets" / "cirr").mkdir(parents=True)
        (tmp_path / "sets" / "cirr" / "1.png").write_bytes(png("red"))
        with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
            archive.writestr("cirr/2.png", png("green"))
            archive.writestr("more/cirr/3.png", png("blue"))
        return tmp_path

    def test_a_folder(self, root):
        assert ImageRoot(root).find("sets/cirr/1.png") == str(root / "sets/cirr/1.png")

    def test_an_archive_in_it_or_as_it(self, root):
        for place in (root, root / "more.zip"):
            assert ImageRoot(place).find("cirr/2.png") == png("green")
            assert ImageRoot(place).find("cirr/3.png") == png("blue")  # the archive was made of a folder of its name

    @pytest.mark.parametrize("path", ["cirr/4.png", "deep/down/cirr/4.png", "/home/someone/deep/down/cirr/4.png"])
    def test_an_archive_further_down(self, root, path):
        """Named from where the archive lies, or from the root."""
        (root / "deep" / "down").mkdir(parents=True)
        with zipfile.ZipFile(root / "deep" / "down" / "cirr.zip", "w") as archive:
            archive.writestr("cirr/4.png", png("blue"))
        assert ImageRoot(root).find(path) == png("blue")
        assert ImageRoot(root).find("deep/cirr/4.png") == str(root / "deep/cirr/4.png")  # the archive lies elsewhere

    def test_the_paths_of_another_machine(self, root):
        assert ImageRoot(root).find("/home/someone/data/sets/cirr/1.png") == str(root / "sets/cirr/1.png")
        assert ImageRoot(root).find("/home/someone/data/cirr/2.png") == png("green")

    def test_what_is_missing_keeps_its_name(self, root):
        assert ImageRoot(root).find("none.png") == str(root / "none.png")
        assert ImageRoot(root).find("/elsewhere/none.png") == "/elsewhere/none.png"
        assert ImageRoot().find("none.png") == "none.png"

    @pytest.mark.parametrize(
        "path", ["{}/secret.png", "../secret.png", "sets/../../secret.png", "{}/root/../secret.png", "../none.png"]
    )
    def test_no_row_chooses_what_else_is_read(self, root, path):
        (root.parent / "secret.png").write_bytes(png("red"))
        path = path.format(root.parent)
        with pytest.raises(ItemError, match=f"the picture '{path}' lies outside of image_root '{root}'"):
            ImageRoot(root).find(path)

    def test_unless_the_operator_allows_it(self, root):
        (root.parent / "secret.png").write_bytes(png("red"))
        path = str(root.parent / "secret.png")
        for allowed in ("/", root.parent):
            assert ImageRoot(allowed).find(path) == path

    def test_a_link_below_the_root_is_the_operators(self, root):
        (root.parent / "elsewhere").mkdir()
        (root.parent / "elsewhere" / "4.png").write_bytes(png("red"))
        (root / "linked").symlink_to(root.parent / "elsewhere")
        assert ImageRoot(root).find("linked/4.png") == str(root / "linked/4.png")

    def test_ways_through_the_root_stay_in_it(self, root, monkeypatch):
        assert ImageRoot(root).find("sets/../sets/cirr/1.png") == str(root / "sets/cirr/1.png")
        assert ImageRoot(root).find(f"../{root.name}/sets/cirr/1.png") == str(root / "sets/cirr/1.png")
        monkeypatch.chdir(root)
        assert ImageRoot("sets").find("cirr/1.png") == "sets/cirr/1.png"
        with pytest.raises(ItemError, match="outside of image_root 'sets'"):
            ImageRoot("sets").find("../more.zip")

    def test_tails_do_not_climb_out(self, root):
        (root.parent / "secret.png").write_bytes(png("red"))
        assert ImageRoot(root).find("/nowhere/../secret.png") == "/secret.png"

    def test_a_member_too_large_for_a_picture(self, root, monkeypatch):
        monkeypatch.setattr("vretrver_hf.data.vretrver.DEFAULT_LIMITS", ImageLimits(max_bytes=50))
        with pytest.raises(ItemError, match=r"cirr/2.png in .*more.zip has \d+ bytes, more than the 50"):
            ImageRoot(root).find("cirr/2.png")

    def test_in_a_worker(self, root):
        first = ImageRoot(root)
        assert first.find("cirr/2.png") == png("green")
        assert copy.deepcopy(first).find("cirr/2.png") == png("green")

    def test_no_archive(self, root):
        (root / "notes.txt").write_text("hello")
        with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
            ImageRoot(root / "notes.txt")

    def test_examples_read_from_archives(self, root):
        row = evaluation_row(candidate_images=["cirr/2.png", "", "/x/cirr/3.png"]) | {"images": None}
        datasets.Dataset.from_list([row]).to_parquet(root / "rows.parquet")
        (example,) = load_examples(root / "rows.parquet")
        assert [item.image for item in example.candidates] == [png("green"), None, png("blue")]


class TestPromptTemplate:
    def test_the_rows_own_candidates_give_the_rows_own_prompt(self):
        row = read_row(evaluation_row())
        assert PromptTemplate(row.prompt, row.candidates).show(row.candidates) == row.prompt

    def test_other_candidates_in_the_same_words(self):
        row = read_row(evaluation_row())
        system, user = PromptTemplate(row.prompt, row.candidates).show([Item(text="n"), Item(image="9.png")])
        assert system == row.prompt[0]
        assert user["content"] == "Query: Candidates: of what? Candidates:(1) n(2) <image>\n\nGuidelines: rank all."

    @pytest.mark.parametrize("separator", ["", "\n", " \n\n"])
    @pytest.mark.parametrize("lead", ["", " "])
    def test_any_layout(self, separator, lead):
        items = [Item(text="a (2) b", image="1.png"), Item(image="2.png"), Item(text="c")]
        shown = [f"(1){lead}<image>a (2) b", f"(2){lead}<image>", f"(3){lead}c"]
        prompt = [{"role": "user", "content": "Candidates:\n" + separator.join(shown) + "\nGuidelines"}]
        template = PromptTemplate(prompt, items)
        assert template.show(items) == prompt
        assert template.show(items[2:])[0]["content"] == f"Candidates:\n(1){lead}c\nGuidelines"

    def test_a_prompt_of_other_candidates(self):
        row = read_row(evaluation_row())
        with pytest.raises(ValueError, match="prompt does not show the row's 2 candidates"):
            PromptTemplate(row.prompt, [Item(text="other"), Item(text="b")])
        with pytest.raises(ValueError, match="0 candidates"):
            PromptTemplate(row.prompt, [])

    texts = st.text(st.sampled_from("ab(12) <image>:\\.*"), max_size=12)
    items = st.lists(
        st.tuples(texts, st.booleans()).filter(lambda pair: pair[0].strip() or pair[1]), min_size=1, max_size=6
    )

    @given(items, items)
    def test_whatever_the_texts_say(self, first, second):
        def show(items):
            return "".join(
                f"({n}) {'<image>' if item.image else ''}{item.text or ''}\n" for n, item in enumerate(items, 1)
            )

        one, two = (
            [Item(text=t.strip() or None, image="p.png" if p else None) for t, p in x] for x in (first, second)
        )
        prompt = [{"role": "user", "content": f"Query: q\nCandidates:\n{show(one)}Guidelines: rank"}]
        shown = PromptTemplate(prompt, one).show(two)[0]["content"]
        if len(one) > 1:  # with a single candidate nobody can see what stands between two
            assert shown == f"Query: q\nCandidates:\n{show(two)}Guidelines: rank"


@pytest.mark.skipif(
    not os.environ.get("RELEASED_EVAL_FILE"), reason="set RELEASED_EVAL_FILE to a released parquet file"
)
def test_a_released_file():
    for row in stream_rows(os.environ["RELEASED_EVAL_FILE"]):
        if row.prompt is not None:
            assert PromptTemplate(row.prompt, row.candidates).show(row.candidates) == row.prompt
