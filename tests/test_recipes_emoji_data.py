"""Rules of the worked example's data, on a small set that the tests draw, and on the real one where it is built."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

import art as art_module  # noqa: E402
from art import (  # noqa: E402
    ARTISTS,
    TEST_ARTIST,
    TRAIN_ARTISTS,
    Art,
    Package,
    look_alikes,
    normalize_code,
    render,
    render_artist,
    slugify,
    svgs,
    write_archive,
)
from concepts import QUERIES, contradicts, load_concepts, may_be_confused, parse_concepts, phrasing  # noqa: E402
from examples import SPLITS, Example  # noqa: E402
from tasks import TASKS, make_examples, pictures, split_codes  # noqa: E402


REAL_DATA = Path(os.environ.get("EMOJI_DATA", RECIPE / "data"))
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")
JOBS = {
    "scientist": "1F52C",
    "cook": "1F373",
    "farmer": "1F33E",
    "judge": "2696-FE0F",
    "pilot": "2708-FE0F",
    "singer": "1F3A4",
    "student": "1F393",
    "teacher": "1F3EB",
    "artist": "1F3A8",
    "mechanic": "1F527",
    "astronaut": "1F680",
    "firefighter": "1F692",
    "technologist": "1F4BB",
    "office worker": "1F4BC",
    "factory worker": "1F3ED",
    "health worker": "2695-FE0F",
}
ANIMALS = ("dog", "guide dog", "cat", "fox", "lion", "tiger", "horse", "zebra", "cow", "pig", "goat", "camel", "mouse")
CLONE = "1f415"  # the second animal: one artist draws it exactly like the first
GROUPS = {
    "groups": {"1": "people-body", "2": "component", "3": "animals-nature"},
    "subgroups": {"23": "person", "25": "person-role", "32": "skin-tone", "34": "animal-mammal"},
}


def _person(label: str, code: str, subgroup: int, head: str, tags: tuple[str, ...] = ()) -> dict:
    """An Emojibase entry with its five skin tones, which stand behind the first code point."""
    rest = code[len(head) :]
    skins = [
        {"label": f"{label}: {name} skin tone", "hexcode": f"{head}-{tone}{rest}", "tone": number}
        for number, (tone, name) in enumerate(zip(TONES, TONE_NAMES, strict=True), start=1)
    ]
    return {"label": label, "hexcode": code, "group": 1, "subgroup": subgroup, "tags": list(tags), "skins": skins}


def _emojibase() -> list[dict]:
    entries = [{"label": "dark skin tone", "hexcode": "1F3FF", "group": 2, "subgroup": 32}]
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    for head, gender in (("1F9D1", ""), ("1F468", "man "), ("1F469", "woman ")):
        entries.append(_person(gender.strip() or "person", head, 23, head))
        for job, code in JOBS.items():
            entries.append(_person(gender + job, f"{head}-200D-{code}", 25, head, (f"uses {code.lower()}", "work")))
    for number, animal in enumerate(ANIMALS):
        code = f"{0x1F414 + number:X}"
        entries.append({"label": animal, "hexcode": code, "group": 3, "subgroup": 34, "tags": [f"{animal} sound"]})
    return entries


def _drawing(code: str, artist: str) -> str:
    """A drawing that differs by code and artist, except that one artist cannot tell the first two animals apart."""
    if artist == "twemoji" and code == "1f414":
        code = CLONE
    rng = random.Random(f"{artist}/{code}")
    marks = "".join(
        f'<rect x="{x}" y="{y}" width="2" height="2" fill="#{rng.randrange(1 << 24):06x}"/>'
        for x in range(0, 8, 2)
        for y in range(0, 8, 2)
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{marks}</svg>'


def _archive(path: Path, keep: slice = slice(None)) -> None:
    data = _emojibase()
    codes = sorted(parse_concepts(data, GROUPS))[keep]
    members = {"manifest.json": {"packages": {}}, "emojibase/data.json": data, "emojibase/groups.json": GROUPS}
    members |= {f"svg/{artist}.json": {code: _drawing(code, artist) for code in codes} for artist in ARTISTS}
    write_archive(path, members)


def _build(folder: Path) -> Path:
    _archive(folder / "art.zip")
    for artist in ARTISTS:
        render_artist(folder / "art.zip", artist, folder / "images", size=24)
    return folder


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    return _build(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module", params=["small", "real"])
def data_dir(request) -> Path:
    if request.param == "small":
        return request.getfixturevalue("small_data")
    if not (REAL_DATA / "images" / f"{ARTISTS[-1]}.json").exists():
        pytest.skip("the real data are not built: run recipes/emoji/build_data.py")
    return REAL_DATA


@pytest.fixture(scope="module")
def art(data_dir) -> Art:
    return Art.load(data_dir)


@pytest.fixture(scope="module")
def concepts(data_dir) -> dict:
    return load_concepts(data_dir)


class TestArt:
    def test_codes_join_without_variation_selectors(self):
        assert normalize_code("1F441-FE0F-200D-1F5E8-FE0F") == "1f441-200d-1f5e8"

    @pytest.mark.parametrize(
        ("label", "slug"),
        [
            ("flag: Côte d’Ivoire", "flag-cote-divoire"),  # accents and apostrophes go
            ("flag: Bosnia & Herzegovina", "flag-bosnia-and-herzegovina"),  # & is spelled out
            ("Japanese “here” button", "japanese-here-button"),  # quotes go
            ("Mrs. Claus", "mrs-claus"),  # dots go
            ("keycap: #", "keycap-#"),  # the two keys that are no letters stay
        ],
    )
    def test_slugs(self, label, slug):
        assert slugify(label) == slug

    def test_render_centres_on_white(self):
        red = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 18"><path fill="#f00" d="M0 0h36v18H0z"/></svg>'
        picture = render(red, 40)
        assert picture.shape == (40, 40, 3) and picture.dtype == np.uint8
        assert (picture[10:30] == (255, 0, 0)).all()  # 36:18 fills the width and half of the height
        assert (picture[:10] == 255).all() and (picture[30:] == 255).all()

    def test_render_keeps_tall_drawings_whole(self):
        tall = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 20"><path d="M0 0h10v20H0z"/></svg>'
        assert (render(tall, 40)[:, 10:30] == 0).all()

    def test_look_alikes(self):
        pixels = np.full((5, 24, 24, 3), 200, dtype=np.uint8)
        pixels[1] = 190  # 10 levels away: another picture
        pixels[2, 0, 0] = 205  # one thumbnail cell is 5 levels away: the same picture
        pixels[4, 3, 3] = 0  # one black dot: another picture
        assert look_alikes(pixels) == [[0, 2, 3]]

    def test_iconify_icons_by_table_name_and_mirror(self):
        icons = {
            "icons": {"dog": {"body": "<path/>"}, "flag-for-france": {"body": "<g/>", "width": 20}},
            "aliases": {"god": {"parent": "dog", "hFlip": True}},
            "width": 16,
            "height": 16,
        }
        by_table = art_module._iconify_svgs(icons, {"1f415-fe0f": "god"}, {})
        assert 'viewBox="0 0 16 16"' in by_table["1f415"] and "translate(16 0) scale(-1 1)" in by_table["1f415"]
        by_name = art_module._iconify_svgs(icons, {}, {"1f415": "dog", "1f1eb-1f1f7": "flag: France", "1": "cat"})
        assert by_name.keys() == {"1f415", "1f1eb-1f1f7"}
        assert 'viewBox="0 0 20 16"' in by_name["1f1eb-1f1f7"]

    def test_a_tarball_that_is_not_the_pinned_one_is_refused(self, tmp_path):
        path = tmp_path / "thing-1.0.0.tgz"
        manifest = json.dumps({"name": "thing", "version": "1.0.1"}).encode()
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("package/package.json")
            info.size = len(manifest)
            tar.addfile(info, io.BytesIO(manifest))
        with pytest.raises(RuntimeError, match="holds thing@1.0.1, not thing@1.0.0"):
            art_module._check_tarball(Package("thing", "1.0.0", "0" * 64), path)
        with pytest.raises(RuntimeError, match="0000 is pinned"):
            art_module._check_tarball(Package("thing", "1.0.1", "0" * 64), path)

    def test_twins_are_by_artist(self, small_data):
        small = Art.load(small_data)
        assert small.twins("twemoji", "1f414") == {CLONE}
        assert small.twins("noto", "1f414") == frozenset()
        assert (small.image("twemoji", "1f414") == small.image("twemoji", CLONE)).all()

    def test_no_picture_is_blank(self, art):
        for artist in ARTISTS:
            assert len(art.codes[artist]) == len(art.pixels(artist))
            blank = [code for code in art.codes[artist] if art.image(artist, code).min() > 240]
            assert not blank, f"{artist}: {blank}"


class TestConcepts:
    @pytest.mark.parametrize(
        ("label", "code", "base", "attributes"),
        [
            ("person: red hair", "1F9D1-200D-1F9B0", "1f9d1", {"hair": "red"}),
            ("woman: blond hair", "1F471-200D-2640-FE0F", "1f9d1", {"hair": "blond", "gender": "woman"}),
            ("man judge", "1F468-200D-2696-FE0F", "1f9d1-200d-2696", {"gender": "man"}),
            ("old woman", "1F475", "1f9d3", {"gender": "woman"}),
            ("man running: facing right", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F", "1f3c3", None),
            ("kiss: woman, man", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1f48f", {"gender": "woman and man"}),
            ("men holding hands", "1F46C", "1f9d1-200d-1f91d-200d-1f9d1", {"gender": "man and man"}),
            ("family: man, boy", "1F468-200D-1F466", "1f46a", {"members": "man, boy"}),
            ("three-thirty", "1F55E", "clock", {"time": "three-thirty"}),
            ("green heart", "1F49A", "heart", {"colour": "green"}),
            ("keycap: 7", "0037-FE0F-20E3", "keycap", {"key": "7"}),
        ],
    )
    def test_structure(self, label, code, base, attributes):
        entry = {"label": label, "hexcode": code, "group": 1, "subgroup": 23}
        (concept,) = parse_concepts([entry], GROUPS).values()
        assert concept.base == base
        assert concept.attributes == (attributes or {"facing": "right", "gender": "man"})

    def test_parts_are_no_concepts(self, small_data):
        assert {"1f3ff", "1f1e6"}.isdisjoint(load_concepts(small_data))

    def test_wordings(self, small_data):
        concepts = load_concepts(small_data)
        woman, default, dog = concepts["1f469-1f3fe-200d-1f52c"], concepts["1f469-200d-1f52c"], concepts["1f414"]
        assert woman.captions == (
            "a woman scientist with medium-dark skin",
            "a medium-dark-skinned woman scientist",
            "woman scientist: medium-dark skin tone",
        )
        assert woman.short_captions == ()
        assert default.captions[0] == "a woman scientist with yellow skin"
        assert default.short_captions == ("a woman scientist", "woman scientist")
        assert dog.captions == ("dog",)

    def test_two_tones_are_left_and_right(self):
        entry = _person("handshake", "1F91D", 23, "1F91D")
        entry["skins"].append({"label": "x", "hexcode": "1FAF1-1F3FB-200D-1FAF2-1F3FF", "tone": [1, 5]})
        entry["skins"].append({"label": "y", "hexcode": "1FAF1-1F3FF-200D-1FAF2-1F3FB", "tone": [5, 1]})
        concepts = parse_concepts([entry], GROUPS)
        mixed, swapped = concepts["1faf1-1f3fb-200d-1faf2-1f3ff"], concepts["1faf1-1f3ff-200d-1faf2-1f3fb"]
        assert mixed.captions[0].endswith("with light skin on the left and dark skin on the right")
        assert not contradicts(mixed, swapped)
        assert contradicts(mixed, concepts["1f91d-1f3fb"])

    @pytest.mark.parametrize(
        ("one", "other", "confused", "why"),
        [
            ("1f469-200d-1f52c", "1f468-200d-1f52c", False, "woman and man"),
            ("1f469-200d-1f52c", "1f9d1-200d-1f52c", True, "a neutral scientist may be a woman"),
            ("1f469-200d-1f52c", "1f9d1-1f3ff-200d-1f52c", False, "neutral, but of another skin"),
            ("1f469", "1f469-200d-1f52c", True, "a woman scientist is a woman"),
            ("1f469-1f3ff", "1f469-200d-1f52c", False, "a plain woman of another skin"),
            ("1f469-200d-1f52c", "1f469-200d-1f373", False, "two professions"),
            ("1f414", "1f415", True, "a guide dog is a dog"),
            ("1f414", "1f416", False, "a cat is no dog"),
        ],
    )
    def test_may_be_confused(self, small_data, one, other, confused, why):
        concepts = load_concepts(small_data)
        assert may_be_confused(concepts[one], concepts[other]) is confused, why
        assert may_be_confused(concepts[other], concepts[one]) is confused, why

    def test_unsaid_skin_tells_nothing_apart(self, small_data):
        concepts = load_concepts(small_data)
        default, dark = concepts["1f469-200d-1f52c"], concepts["1f469-1f3ff-200d-1f52c"]
        assert not may_be_confused(default, dark)
        assert may_be_confused(default, dark, ignore=("skin",))

    def test_complete_captions_name_one_concept(self, concepts):
        counts = Counter(text for concept in concepts.values() for text in concept.captions)
        assert [text for text, count in counts.items() if count > 1] == []
        variants = Counter((c.base, tuple(sorted(c.attributes.items()))) for c in concepts.values())
        assert [variant for variant, count in variants.items() if count > 1] == []

    def test_phrasing_draws_complete_wordings(self, concepts):
        rng = random.Random(0)
        for concept in list(concepts.values())[::50]:
            query = phrasing(concept, rng)
            assert any(text in query for text in concept.captions)


class TestSplits:
    def test_they_are_disjoint_and_cover_everything(self, concepts):
        train, combination, concept = (split_codes(concepts, split) for split in SPLITS[:3])
        assert train and combination and concept
        assert not train & combination and not train & concept and not combination & concept
        assert train | combination | concept == set(concepts)
        assert split_codes(concepts, "test_artist") == train

    def test_held_out_combinations_are_made_of_known_parts(self, concepts):
        train = [concepts[code] for code in split_codes(concepts, "train")]
        known = {(c.base, key, value) for c in train for key, value in c.attributes.items()}
        for code in split_codes(concepts, "test_combination"):
            concept = concepts[code]
            assert len(concept.attributes) >= 2
            assert all((concept.base, key, value) in known for key, value in concept.attributes.items())

    def test_held_out_concepts_leave_no_variant_behind(self, concepts):
        held_out = split_codes(concepts, "test_concept")
        bases = {concepts[code].base for code in held_out}
        assert held_out == {code for code, concept in concepts.items() if concept.base in bases}
        assert "1f9d1" not in bases  # with plain people, hair would vanish from training

    def test_another_split_seed_holds_out_other_codes(self, concepts):
        assert split_codes(concepts, "test_combination", 1) != split_codes(concepts, "test_combination")

    def test_held_out_pictures_have_no_twin_in_training(self, art, concepts):
        train = split_codes(concepts, "train")
        for split in ("test_combination", "test_concept"):
            assert not [p for p in pictures(art, concepts, split) if art.twins(*p) & train]

    def test_training_never_shows_the_test_artist(self, art, concepts):
        assert {artist for artist, _ in pictures(art, concepts, "train")} == set(TRAIN_ARTISTS)
        assert {artist for artist, _ in pictures(art, concepts, "test_artist")} == {TEST_ARTIST}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
class TestExamples:
    N = 1500

    @pytest.fixture
    def examples(self, art, concepts, task, split):
        return make_examples(art, concepts, task, split, self.N, seed=7)

    def test_rules(self, examples, art, concepts, task, split):
        positives = split_codes(concepts, split)
        allowed = positives if split == "train" else set(concepts)
        if split in ("test_combination", "test_artist"):
            allowed = allowed - split_codes(concepts, "test_concept")
        for example in examples:
            codes = [entry.code for entry in example.candidates]
            positive = concepts[codes[example.positive]]
            assert len(set(example.candidates)) == len(set(codes)) == 5
            assert positive.code in positives
            assert allowed.issuperset(codes)
            self._check_relevance(example, [concepts[code] for code in codes], positive)
            for entry in example.candidates:
                assert entry.image is None or entry.image.code == entry.code
                assert entry.text is None or entry.text in concepts[entry.code].captions
            self._check_pixels(example, art, codes, positive.code)
            for code in codes:
                assert code == positive.code or not may_be_confused(positive, concepts[code]), example
            self._check_shape(example, positive.code)

    def _check_relevance(self, example, shown, positive):
        for concept, grade in zip(shown, example.relevance, strict=True):
            same_subgroup = int(concept.subgroup == positive.subgroup)
            expected = 3 if concept is positive else 2 if concept.base == positive.base else same_subgroup
            assert grade == expected

    def _check_pixels(self, example, art, codes, positive):
        images = [entry.image for entry in example.candidates if entry.image]
        assert len({art.image(*image).tobytes() for image in images}) == len(images)
        if example.query.image:  # nothing may look like the query in the query artist's own hand
            assert art.twins(example.query.image.artist, positive).isdisjoint(codes)

    def _check_shape(self, example, positive):
        artists = {entry.image.artist for entry in example.candidates if entry.image}
        assert len(artists) == (0 if example.task == "i2t" else 1)
        if example.task == "t2i":
            assert example.query.text and example.query.image is None
        else:
            assert example.query.text is None and example.query.image.code == positive
            assert example.query.image.artist not in artists
        drawn_by = artists or {example.query.image.artist}
        assert drawn_by <= ({TEST_ARTIST} if example.split == "test_artist" else set(TRAIN_ARTISTS))

    def test_positions_are_uniform_and_negatives_hard(self, examples, task, split):
        counts = Counter(example.positive for example in examples)
        assert all(abs(counts[position] - self.N / 5) < 75 for position in range(5))  # 5 standard deviations: 77
        hard = sum(1 in e.relevance or 2 in e.relevance for e in examples)
        assert hard > 0.9 * self.N

    def test_twice_is_the_same_and_another_seed_is_not(self, examples, art, concepts, task, split):
        assert make_examples(art, concepts, task, split, self.N, seed=7) == examples
        assert make_examples(art, concepts, task, split, 20, seed=8) != examples[:20]
        assert len({example.qid for example in examples}) == self.N

    def test_json_round_trip(self, examples, task, split):
        for example in examples[:20]:
            assert Example.from_dict(json.loads(json.dumps(example.to_dict()))) == example


class TestQueries:
    def test_a_query_fits_no_negative(self, art, concepts):
        """Every name, short name and keyword in a query belongs to the positive alone."""
        kinds = Counter()
        for example in make_examples(art, concepts, "t2i", "train", 3000, seed=3):
            shown = [concepts[entry.code] for entry in example.candidates]
            positive, text = shown.pop(example.positive), example.query.text
            if text in {query.format(wording) for query in QUERIES for wording in positive.captions}:
                kinds["complete"] += 1
            elif text in {query.format(wording) for query in QUERIES for wording in positive.short_captions}:
                kinds["short"] += 1
                assert not any(may_be_confused(positive, other, ("skin",)) for other in shown)
            else:
                used = [tag for tag in positive.tags if tag in text]
                kinds["keywords"] += 1
                assert used and all(any(tag not in other.tags for tag in used) for other in shown)
        assert all(kinds[kind] > 30 for kind in ("complete", "short", "keywords")), kinds

    def test_text_candidates_share_one_wording(self, art, concepts):
        names = {concept.captions[-1] for concept in concepts.values() if len(concept.captions) > 1}
        phrases = {text for concept in concepts.values() for text in concept.captions[:-1]}
        for example in make_examples(art, concepts, "i2t", "train", 500, seed=0):
            texts = [entry.text for entry in example.candidates]
            assert names.isdisjoint(texts) or phrases.isdisjoint(texts)

    def test_unknown_names_and_empty_art_are_refused(self, small_data):
        art, concepts = Art.load(small_data), load_concepts(small_data)
        with pytest.raises(ValueError, match="task 'i2v' must be one of"):
            make_examples(art, concepts, "i2v", "train", 1, 0)
        with pytest.raises(ValueError, match="no picture can be asked for"):
            make_examples(Art(small_data, {"noto": []}, {"noto": {}}), concepts, "t2i", "train", 1, 0)
        few = Art(small_data, {"noto": ["1f414", "1f416"]}, {"noto": {}})
        with pytest.raises(ValueError, match="noto drew too little"):
            make_examples(few, concepts, "t2i", "train", 5, 0)


class TestBuild:
    def _run(self, out: Path, archive: Path, hash_seed: str) -> str:
        command = [sys.executable, str(RECIPE / "build_data.py"), "--out", str(out), "--from-archive", str(archive)]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command += ["--num-examples", "50", "--sheet", str(out / "sheets")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_two_builds_are_equal_and_what_is_rendered_is_kept(self, tmp_path):
        archive, first, second = tmp_path / "art.zip", tmp_path / "a", tmp_path / "b"
        _archive(archive, keep=slice(None, None, 2))  # half is enough, and quicker to render at full size
        assert "up to date" not in self._run(first, archive, "1")
        shutil.copytree(first / "images", second / "images")
        assert self._run(second, archive, "2").count("up to date") == len(ARTISTS)
        names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
        assert [name for name in names if name.endswith(".jsonl")] == [
            f"examples/{task}.{split}.jsonl" for task in sorted(TASKS) for split in sorted(SPLITS[1:])
        ]
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

    def test_a_foreign_step_and_a_missing_archive_are_named(self, tmp_path):
        command = [sys.executable, str(RECIPE / "build_data.py"), "--out", str(tmp_path)]
        for arguments, complaint in (
            (["--steps", "rendre"], "rendre"),
            (["--from-archive", str(tmp_path / "none.zip")], "none.zip"),
        ):
            done = subprocess.run(command + arguments, capture_output=True, text=True)
            assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr

    def test_the_archive_depends_on_its_contents_alone(self, small_data, tmp_path):
        archive = tmp_path / "art.zip"
        members = {"svg/noto.json": svgs(small_data / "art.zip", "noto")}
        write_archive(archive, members)
        first = archive.read_bytes()
        os.utime(archive, (0, 0))
        write_archive(archive, members)
        assert archive.read_bytes() == first
