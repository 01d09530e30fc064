"""Rules of the scenes, on a small set of clocks, keycaps, faces and things that the tests draw and on the real one."""

from __future__ import annotations

import collections
import json
import math
import random

import emoji_data  # makes the recipe importable
import numpy as np
import pytest
from art import TEST_ARTIST, TRAIN_ARTISTS, Art, render_artist, write_archive
from concepts import load_concepts, may_be_confused, parse_concepts
from examples import SPLITS, Drawing, Example, Placed, Scene
from observer import overview_ref
from PIL import Image
from preset import PRESET
from scenes import (
    ALIKE,
    CLEAR,
    DISTINCT,
    FAMILIES,
    GLANCE,
    GRID_SIDES,
    GROUP,
    HELD_OUT_ROWS,
    ROWS,
    SIDE,
    SIDES,
    STEP,
    THINGS,
    THINGS_AT,
    SceneMaker,
    draw_scene,
    family,
    far_places,
    find_groups,
    glimpse,
    has_plain_name,
    place_name,
    place_phrase,
    shrink,
    thing_phrase,
    value_phrase,
    with_article,
)
from splits import split_codes

from vretrver_hf.tools import VisualTools


ARTISTS = ("noto", "twemoji", TEST_ARTIST)
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
FACES = "winking sleepy happy sad tired calm proud shy bored busy brave curious".split()
THING_NAMES = "anchor basket camera drum engine flute guitar hammer inkpot jacket kite ladder magnet nut oar".split()
GROUPS = {
    "groups": {"0": "smileys-emotion", "5": "travel-places", "7": "objects", "8": "symbols"},
    "subgroups": {"1": "face-smiling", "2": "time", "3": "keycap", "4": "tool"},
}


def emojibase() -> list[dict]:
    """Clocks, keycaps, faces and things."""
    entries = []
    for number, hour in enumerate(HOURS):
        entries.append({"label": f"{hour} o’clock", "hexcode": f"{0x1F550 + number:X}", "group": 5, "subgroup": 2})
    for digit in range(10):
        entries.append({"label": f"keycap: {digit}", "hexcode": f"{0x30 + digit:04X}-20E3", "group": 8, "subgroup": 3})
    for number, face in enumerate(FACES):
        entries.append({"label": f"{face} face", "hexcode": f"{0x1F600 + number:X}", "group": 0, "subgroup": 1})
    for number, (one, two) in enumerate((one, two) for one in THING_NAMES for two in ("red", "old", "big")):
        entries.append({"label": f"{two} {one}", "hexcode": f"{0x1F6A0 + number:X}", "group": 7, "subgroup": 4})
    return entries


def drawing(code: str, artist: str) -> str:
    """A grey disc, a blue square or a yellow disc with a mark that turns with the code, or a patch of dark colours."""
    number = int(code.split("-")[0], 16)
    mark = f'<path d="M12 12V5" stroke="#555" stroke-width="1.2" transform="rotate({number * 47 % 360} 12 12)"/>'
    if number >= 0x1F6A0:
        rng = random.Random(f"{artist}/{code}")
        colours = [f"#{rng.randrange(70):02x}{rng.randrange(256):02x}{rng.randrange(70):02x}" for _ in range(4)]
        body = "".join(
            f'<rect x="{3 + 9 * (place % 2)}" y="{3 + 9 * (place // 2)}" width="9" height="9" fill="{colour}"/>'
            for place, colour in enumerate(colours)
        )
    elif number >= 0x1F600:
        body = f'<circle cx="12" cy="12" r="11" fill="#fd5"/>{mark}'
    elif number >= 0x1F550:
        body = f'<circle cx="12" cy="12" r="11" fill="#ccc"/>{mark}'
    else:
        body = f'<rect x="1" y="1" width="22" height="22" fill="#9bd"/>{mark}'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{body}</svg>'


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory) -> tuple[Art, dict]:
    """The small set by three artists."""
    folder = tmp_path_factory.mktemp("scenes")
    concepts = parse_concepts(emojibase(), GROUPS)
    members = {f"svg/{artist}.json": {code: drawing(code, artist) for code in concepts} for artist in ARTISTS}
    write_archive(folder / "art.zip", members)
    for artist in ARTISTS:
        render_artist(folder / "art.zip", artist, folder / "images", size=72)
    return Art.load(folder, ARTISTS), concepts


@pytest.fixture(scope="session", params=["small", "real"])
def data(request) -> tuple[Art, dict]:
    if request.param == "small":
        return request.getfixturevalue("small_scenes")
    folder = emoji_data.REAL_DATA
    if not (folder / "images" / f"{TEST_ARTIST}.json").exists():
        pytest.skip("the real data are not built: run recipes/emoji/build_data.py")
    return Art.load(folder), load_concepts(folder)


@pytest.fixture(scope="session")
def makers(data) -> dict[tuple[str, str], SceneMaker]:
    """By kind and split."""
    splits = {"detail": ("train", "test_combination", "test_artist"), "overview": SPLITS}
    return {(kind, split): SceneMaker(*data, kind, split) for kind in splits for split in splits[kind]}


def drawings(scene: Scene) -> list[Drawing]:
    return [thing.drawing for thing in scene.objects]


def spots(scene: Scene) -> list[tuple[int, int, int]]:
    return [thing[1:] for thing in scene.objects]


def middle(thing: Placed) -> tuple[float, float]:
    return thing.left + thing.side / 2, thing.top + thing.side / 2


def stands_in_rows(scene: Scene, rows: tuple[int, ...]) -> bool:
    """Whether each thing stands in its own cell of such rows."""
    if sum(rows) != len(scene.objects):
        return False
    cells = [(row, column, count) for row, count in enumerate(rows) for column in range(count)]
    return all(
        (int(y * len(rows) / SIDE), int(x * count / SIDE)) == (row, column)
        for (row, column, count), (x, y) in zip(cells, map(middle, scene.objects), strict=True)
    )


def check_scene(scene: Scene) -> None:
    """Nothing overlaps, nothing is cut off."""
    boxes = [thing.box for thing in scene.objects]
    assert all(min(box) >= 0 and max(box) <= SIDE for box in boxes)
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def check_example(example: Example, art: Art, concepts: dict) -> None:
    """What holds for all scenes."""
    scenes = [entry.image for entry in example.candidates]
    targets = [scene.objects[scene.target].drawing for scene in scenes]
    assert len(scenes) == 5 and len({scene.target for scene in scenes}) == 1
    assert len({tuple(spots(scene)) for scene in scenes}) == 1
    assert len({art.image(*target).tobytes() for target in targets}) == 5
    assert [entry.code for entry in example.candidates] == [target.code for target in targets]
    assert example.query.code == targets[example.positive].code and example.query.image is None
    artists = {one.artist for scene in scenes for one in drawings(scene)}
    assert len(artists) == 1
    assert artists <= ({TEST_ARTIST} if example.split == "test_artist" else set(TRAIN_ARTISTS))
    positive = concepts[example.query.code]
    for place, (target, relevance) in enumerate(zip(targets, example.relevance, strict=True)):
        other = concepts[target.code]
        if place == example.positive:
            assert relevance == 3
        else:
            assert target.code not in art.twins(target.artist, positive.code)
            assert relevance == (2 if other.base == positive.base else int(other.subgroup == positive.subgroup))
    check_scene(scenes[0])
    check_wording(example, positive)


def check_wording(example: Example, concept) -> None:
    """The query is worded as its split is, and names the place or not, as its kind says."""
    scene = example.candidates[example.positive].image
    wording = THINGS_AT if example.kind.endswith("/place") else THINGS
    templates = wording.held_out if example.split == "test_combination" else wording.train
    arguments = thing_phrase(concept), place_phrase(scene, scene.target)
    assert example.query.text in {template.format(*arguments) for template in templates}
    assert len(example.query.text.split()) < 20


@pytest.mark.parametrize("split", ["train", "test_combination", "test_artist"])
class TestDetails:
    N = 600

    @pytest.fixture
    def examples(self, makers, split) -> list[Example]:
        return makers["detail", split].make(self.N, seed=3)

    def test_candidates_differ_in_the_target_alone(self, examples, data, split):
        known = split_codes(data[1], "train")
        for example in examples:
            check_example(example, *data)
            scene = example.candidates[0].image
            for other in (entry.image for entry in example.candidates[1:]):
                differing = [a != b for a, b in zip(drawings(scene), drawings(other), strict=True)]
                assert differing.count(True) == 1 and differing[scene.target]
            assert known.issuperset(one.code for entry in example.candidates for one in drawings(entry.image))

    def test_a_target_is_alone_or_its_place_tells_it(self, examples, data, split):
        concepts = data[1]
        for example in examples:
            _, name, half = example.kind.split("/")
            scene = example.candidates[0].image
            families = [family(concepts[one.code]) for one in drawings(scene)]
            assert {family(concepts[entry.code]) for entry in example.candidates} == {name}
            assert set(families) == {name, None}
            decoys = [place for place, one in enumerate(families) if one == name and place != scene.target]
            assert bool(decoys) == (half == "place")
            for place in decoys:
                assert not self._border(scene, scene.target, place)
                assert scene.objects[place].side == scene.objects[scene.target].side

    def _border(self, scene: Scene, one: int, other: int) -> bool:
        """Whether two things stand in the same third of a third, or in two with a common border."""
        thirds = [[int(3 * value / SIDE) for value in middle(scene.objects[place])] for place in (one, other)]
        return abs(thirds[0][0] - thirds[1][0]) + abs(thirds[0][1] - thirds[1][1]) <= 1

    def test_named_places_are_clear(self, examples, split):
        for example in examples:
            scene = example.candidates[0].image
            if example.kind.endswith("/place"):
                for value in middle(scene.objects[scene.target]):
                    assert min(abs(value - SIDE / 3), abs(value - 2 * SIDE / 3)) >= CLEAR

    def test_held_out_layouts_are_not_those_of_training(self, examples, split):
        rows, others = (HELD_OUT_ROWS, ROWS) if split == "test_combination" else (ROWS, HELD_OUT_ROWS)
        shift = 3 if split == "test_combination" else 0
        for example in examples:
            scene = example.candidates[0].image
            assert any(stands_in_rows(scene, one) for one in rows)
            assert not any(stands_in_rows(scene, one) for one in others)
            assert {thing.side for thing in scene.objects} <= {side - shift for side in SIDES}
            assert all(thing.left % STEP == thing.top % STEP == 0 for thing in scene.objects)

    def test_kinds_places_and_positions_are_balanced(self, examples, split):
        kinds = collections.Counter(example.kind for example in examples)
        assert set(kinds) == {f"detail/{name}/{half}" for name in FAMILIES for half in ("place", "blob")}
        assert all(abs(count - self.N / 6) < 46 for count in kinds.values())  # 5 standard deviations
        named = [entry.candidates[0].image for entry in examples if entry.kind.endswith("/place")]
        places = collections.Counter(place_name(scene, scene.target) for scene in named)
        assert len(places) == 9 and min(places.values()) > 10
        positions = collections.Counter(example.positive for example in examples)
        assert all(abs(positions[place] - self.N / 5) < 49 for place in range(5))


def test_training_and_test_share_no_side():
    assert not {side - 3 for side in SIDES} & set(SIDES)
    assert not {side - 12 for side in GRID_SIDES} & set(GRID_SIDES)
    assert not set(ROWS) & set(HELD_OUT_ROWS)
    for wording in (THINGS, THINGS_AT):
        known = {word for template in THINGS.train + THINGS_AT.train for word in template.split()}
        assert not set(wording.train) & set(wording.held_out)
        assert {word.rstrip(":") for template in wording.held_out for word in template.split()} <= known


@pytest.mark.parametrize("split", SPLITS)
class TestOverviews:
    N = 400

    @pytest.fixture
    def examples(self, makers, split) -> list[Example]:
        return makers["overview", split].make(self.N, seed=3)

    def test_only_one_candidate_shows_what_is_asked_where_it_is_asked(self, examples, data, split):
        concepts = data[1]
        for example in examples:
            check_example(example, *data)
            right = example.candidates[example.positive].image
            asked = drawings(right)[right.target]
            for place, one in enumerate(drawings(right)):
                assert place == right.target or not may_be_confused(concepts[asked.code], concepts[one.code])
            swapped = 0
            for entry in example.candidates:
                scene = entry.image
                assert len(scene.objects) == 9 and stands_in_rows(scene, (3, 3, 3))
                if scene is right:
                    continue
                assert not may_be_confused(concepts[asked.code], concepts[entry.code])
                differing = [p for p, one in enumerate(drawings(scene)) if one != drawings(right)[p]]
                if len(differing) == 1:
                    assert differing == [scene.target] and asked not in drawings(scene)
                    continue
                swapped += 1  # the same nine, two of them the other way round
                (other,) = set(differing) - {scene.target}
                assert drawings(scene)[other] == asked and other in far_places(scene.target)
                assert collections.Counter(drawings(scene)) == collections.Counter(drawings(right))
            assert not swapped or example.kind == "overview/place"

    def test_both_halves_and_swaps_occur(self, examples, split):
        kinds = collections.Counter(example.kind for example in examples)
        assert set(kinds) == {"overview/place", "overview/any"}
        assert min(kinds.values()) > self.N / 2 - 50  # 5 standard deviations
        named = [example for example in examples if example.kind == "overview/place"]
        swapped = sum(
            example.candidates[example.positive].image.objects[0] != entry.image.objects[0]
            for example in named
            for entry in example.candidates
            if entry.image.target != 0
        )
        assert swapped > 20

    def test_codes_and_sides_are_those_of_the_split(self, examples, data, split):
        concepts = data[1]
        wanted = split_codes(concepts, "train" if split == "test_combination" else split)
        train = split_codes(concepts, "train")
        for example in examples:
            codes = {one.code for entry in example.candidates for one in drawings(entry.image)}
            assert example.query.code in wanted
            assert split != "train" or codes <= train
            sides = {thing.side for thing in example.candidates[0].image.objects}
            assert sides <= {side - 12 * (split == "test_combination") for side in GRID_SIDES}

    def test_what_is_left_out_does_not_change_the_splits(self, data, split):
        concepts = data[1]
        things = {code: concept for code, concept in concepts.items() if has_plain_name(concept)}
        assert things and split_codes(things, split) == split_codes(concepts, split) & things.keys()


@pytest.mark.parametrize(("kind", "split"), [("detail", "train"), ("overview", "train"), ("overview", "test_concept")])
class TestMaking:
    def test_twice_is_the_same_and_another_seed_is_not(self, makers, data, kind, split):
        examples = makers[kind, split].make(50, seed=7)
        assert SceneMaker(*data, kind, split).make(50, seed=7) == examples
        assert makers[kind, split].make(50, seed=8) != examples
        assert len({example.qid for example in examples}) == 50

    def test_json_round_trip(self, makers, kind, split):
        for example in makers[kind, split].make(10, seed=7):
            assert Example.from_dict(json.loads(json.dumps(example.to_dict()))) == example

    @pytest.mark.parametrize(("count", "hardness"), [(2, 1.0), (8, 1.0), (5, 0.0)])
    def test_other_counts_and_easier_questions(self, data, kind, split, count, hardness):
        maker = SceneMaker(*data, kind, split, num_candidates=count, hardness=hardness)
        for example in maker.make(40, seed=7):
            assert len(example.candidates) == len({entry.code for entry in example.candidates}) == count
            if hardness == 0:  # nothing has changed places
                scene = example.candidates[0].image
                for other in (entry.image for entry in example.candidates):
                    assert sum(a != b for a, b in zip(drawings(scene), drawings(other), strict=True)) <= 1


class TestGroups:
    def test_members_are_alike_at_a_glance_and_distinct_seen_closely(self, makers, data):
        art = data[0]
        for by_artist in makers["detail", "train"].questions.groups.values():
            for group in (group for groups in by_artist.values() for group in groups):
                pixels = [art.image(group.artist, code) for code in group.codes]
                glances = [glimpse(one, group.side).ravel() for one in pixels]
                close = [shrink(one, 24).ravel() for one in pixels]
                pairs = [(a, b) for a in range(GROUP) for b in range(a)]
                assert len(set(group.codes)) == GROUP and group.side in SIDES
                assert np.mean([np.linalg.norm(glances[a] - glances[b]) for a, b in pairs]) <= ALIKE + 1e-6
                assert min(np.linalg.norm(close[a] - close[b]) for a, b in pairs) >= DISTINCT

    @staticmethod
    def _art(tmp_path, pixels: list[np.ndarray], twins: list[list[str]]) -> Art:
        np.save(tmp_path / "noto.npy", np.array(pixels, np.uint8))
        codes = [f"c{number}" for number in range(len(pixels))]
        same = {code: frozenset(group) - {code} for group in twins for code in group}
        return Art(tmp_path, {"noto": codes}, {"noto": same})

    @staticmethod
    def _face(turn: int, colour: int = 200, mark: int = 0, size: int = 10) -> np.ndarray:
        """A square of one colour with a mark at one of eight places."""
        face = np.full((72, 72, 3), colour, np.uint8)
        angle = 2 * math.pi * turn / 8
        x, y = (round(36 + 18 * value - size / 2) for value in (math.cos(angle), math.sin(angle)))
        face[y : y + size, x : x + size] = mark
        return face

    def test_another_colour_is_no_rival_and_a_stronger_mark_is_drawn_smaller(self, tmp_path):
        sides = []
        for mark, size in ((152, 10), (120, 10), (0, 30)):
            faces = [self._face(turn, mark=mark, size=size) for turn in range(8)]
            art = self._art(tmp_path, [*faces, self._face(0, colour=90)], [])
            groups = find_groups(art, "noto", "face", art.codes["noto"])
            assert all(group.codes == tuple(f"c{turn}" for turn in range(8)) for group in groups)
            sides.append([group.side for group in groups])
        assert sides == [[48], [36], []]

    def test_twins_and_near_twins_never_compete(self, tmp_path):
        faces = [self._face(turn, mark=120) for turn in range(8)]
        almost = faces[0].copy()
        almost[0, 0] = 0
        art = self._art(tmp_path, [*faces, almost], [])
        assert all({"c0", "c8"} - set(group.codes) for group in find_groups(art, "noto", "face", art.codes["noto"]))
        twins = self._art(tmp_path, faces, [["c0", "c1"]])  # seven are left
        assert find_groups(twins, "noto", "face", twins.codes["noto"]) == []

    def test_sizes_are_those_of_the_preset(self):
        tools = VisualTools(None, [Image.new("RGB", (SIDE, SIDE))], preset=PRESET)
        assert SIDE / tools.select_images([1]).refs[0].width == GLANCE
        assert SIDE / overview_ref(SIDE).width == 2 * STEP


class TestWords:
    @pytest.mark.parametrize(
        ("left", "top", "name"),
        [(0, 0, "upper left"), (480, 20, "top"), (960, 0, "upper right"), (20, 480, "left"), (480, 480, "middle")]
        + [(900, 400, "right"), (0, 960, "lower left"), (500, 900, "bottom"), (672, 672, "lower right")]
        + [(311, 0, "upper left"), (312, 0, "top")],  # 24 is half the side, 336 the border
    )
    def test_places(self, left, top, name):
        scene = Scene((Placed(Drawing("noto", "a"), 0, 0, 48), Placed(Drawing("noto", "b"), left, top, 48)), 0, 1008)
        assert place_name(scene, 1) == name
        assert name in place_phrase(scene, 1)

    @pytest.mark.parametrize(("place", "far"), [(0, [2, 4, 5, 6, 7, 8]), (3, [1, 2, 5, 7, 8]), (4, [0, 2, 6, 8])])
    def test_far_places(self, place, far):
        assert far_places(place) == far

    @pytest.mark.parametrize(
        ("noun", "said"),
        [
            ("fox", "a fox"),
            ("owl", "an owl"),
            ("unicorn", "a unicorn"),
            ("unamused face", "an unamused face"),
            ("hourglass", "an hourglass"),
            ("globe showing Americas", "a globe showing Americas"),
            ("french fries", "french fries"),
            ("cactus", "a cactus"),
            ("cooked rice", "cooked rice"),
            ("the flag of Fiji", "the flag of Fiji"),
        ],
    )
    def test_articles(self, noun, said):
        assert with_article(noun) == said

    def test_values_and_things(self, small_scenes):
        concepts = small_scenes[1]
        said = {code: (family(one), value_phrase(one), thing_phrase(one)) for code, one in concepts.items()}
        assert said["1f551"] == ("clock", "two o’clock", "a clock showing two o’clock")
        assert said["0037-20e3"] == ("keycap", "7", "a keycap showing 7")
        assert said["1f600"] == ("face", "a winking face", "a winking face")
        assert said["1f6a1"] == (None, "an old anchor", "an old anchor")


class TestPixels:
    def test_drawings_stand_at_their_places_on_white(self, small_scenes):
        art, _ = small_scenes
        face, key = Drawing("noto", "1f600"), Drawing("noto", "0031-20e3")
        scene = Scene((Placed(face, 96, 192, 48), Placed(key, 600, 30, 36)), 1, SIDE)
        pixels = draw_scene(art, scene)
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        expected = Image.fromarray(art.image(*face)).resize((48, 48), Image.Resampling.BICUBIC)
        assert (pixels[192:240, 96:144] == np.asarray(expected)).all()
        assert (pixels[35, 605] == (0x99, 0xBB, 0xDD)).all()  # the key's blue, off its mark
        rest = np.ones((SIDE, SIDE), bool)
        rest[192:240, 96:144] = rest[30:66, 600:636] = False
        assert (pixels[rest] == 255).all()
        assert (draw_scene(art, scene, 84)[17:20, 9:11, 2] < 255).all() and draw_scene(art, scene, 84).shape[0] == 84


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "split", "complaint"),
        [
            ("grid", "train", "kind 'grid' must be one of"),
            ("detail", "test", "split 'test' one of"),
            ("detail", "test_concept", "no held-out concepts"),
        ],
    )
    def test_unknown_names(self, small_scenes, kind, split, complaint):
        with pytest.raises(ValueError, match=complaint):
            SceneMaker(*small_scenes, kind, split)

    def test_too_many_candidates(self, small_scenes):
        maker = SceneMaker(*small_scenes, "detail", num_candidates=GROUP + 1)
        with pytest.raises(ValueError, match=f"1 to {GROUP}, got {GROUP + 1}"):
            maker.make(1, 0)

    def test_too_few_drawings(self, small_scenes):
        art, concepts = small_scenes
        few = {code: concept for code, concept in concepts.items() if family(concept) is None}
        with pytest.raises(ValueError, match="no artist drew enough"):
            SceneMaker(art, few)
