"""Rules of the worked example's data, on a small set that the tests draw, and on the real one where it is built."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


from emoji_data import CLONE, GROUPS, RECIPE, person, small_archive  # isort: skip (makes the recipe importable)

import art as art_module
from art import (
    ARTISTS,
    TEST_ARTIST,
    TRAIN_ARTISTS,
    Art,
    Package,
    look_alikes,
    normalize_code,
    render,
    slugify,
    svgs,
    write_archive,
)
from concepts import contradicts, load_concepts, may_be_confused, parse_concepts
from examples import SPLITS
from knowledge import flag_code, read_countries, read_glosses
from splits import pictures, split_codes, splits_of
from tasks import KINDS, TASKS


pytest_plugins = ["emoji_data"]


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


def _flag(name: str, code: str) -> dict:
    return {"label": f"flag: {name}", "hexcode": code, "group": 9, "subgroup": 98}


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
            ("waxing crescent moon", "1F312", "moon", {"phase": "waxing crescent"}),
            ("up-left arrow", "2196", "arrow", {"direction": "up-left"}),
            ("backhand index pointing down", "1F447", "pointing hand", {"direction": "down"}),
            ("woman dancing", "1F483", "dancing", {"gender": "woman"}),
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
        assert woman.held_out_captions == (
            "a woman scientist, medium-dark skin",
            "a woman scientist whose skin is medium-dark",
        )
        assert default.captions[0] == "a woman scientist with yellow skin"
        assert default.short_captions == ("a woman scientist", "woman scientist")
        assert dog.captions == dog.held_out_captions == ("dog",)

    def test_two_tones_are_left_and_right(self):
        entry = person("handshake", "1F91D", 23, "1F91D")
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

    def test_plurals_are_the_same_word(self):
        entries = [
            {"label": label, "hexcode": code, "group": 3, "subgroup": 34}
            for label, code in (("ticket", "1F3AB"), ("admission tickets", "1F39F"))
        ]
        assert may_be_confused(*parse_concepts(entries, GROUPS).values())

    def test_flags_that_look_alike_never_compete(self):
        labels = {"1F1F3-1F1F4": "Norway", "1F1E7-1F1FB": "Bouvet Island", "1F1F8-1F1EA": "Sweden"}
        known = {normalize_code(code): {"languages": [], "currencies": []} for code in labels}
        entries = [_flag(name, code) for code, name in labels.items()]
        bouvet, norway, sweden = parse_concepts(entries, GROUPS, known).values()
        assert may_be_confused(norway, bouvet) and may_be_confused(bouvet, norway)
        assert not may_be_confused(norway, sweden)

    @pytest.mark.parametrize(
        ("one", "other", "differ", "why"),
        [
            ("man, woman, boy", "adult, adult, child", False, "a man and a woman are two adults"),
            ("man, woman, boy", "adult, child", True, "two adults are not one"),
            ("man, boy", "man, girl", True, "a boy is no girl"),
        ],
    )
    def test_families(self, one, other, differ, why):
        entries = [
            {"label": f"family: {members}", "hexcode": code, "group": 1, "subgroup": 23}
            for members, code in ((one, "1F468-200D-1F466"), (other, "1F9D1-200D-1F9D2"))
        ]
        assert contradicts(*parse_concepts(entries, GROUPS).values()) is differ, why

    def test_country_names_in_a_sentence(self):
        labels = {"Netherlands": "1F1F3-1F1F1", "Cook Islands": "1F1E8-1F1F0", "Peru": "1F1F5-1F1EA"}
        entries = [_flag(name, code) for name, code in labels.items()]
        captions = {concept.captions[0] for concept in parse_concepts(entries, GROUPS).values()}
        assert captions == {"the flag of the Netherlands", "the flag of the Cook Islands", "the flag of Peru"}

    def test_complete_captions_name_one_concept(self, concepts):
        counts = Counter(
            text for concept in concepts.values() for text in {*concept.captions, *concept.held_out_captions}
        )
        assert [text for text, count in counts.items() if count > 1] == []
        variants = Counter((c.base, tuple(sorted(c.attributes.items()))) for c in concepts.values())
        assert [variant for variant, count in variants.items() if count > 1] == []


def _tar(files: dict[str, str]) -> tarfile.TarFile:
    """An opened package with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    buffer.seek(0)
    return tarfile.open(fileobj=buffer)


class TestKnowledge:
    def _countries(self, code: str, **changes) -> dict:
        """What is taken over of one country, all else as in Peru."""
        country = {
            "name": "Peru",
            "continent": "SA",
            "capital": "Lima",
            "languages": ["es", "ay"],
            "currency": ["PEN"],
        }
        package = {
            "countries": {code: country | changes},
            "continents": {"SA": "South America", "AN": "Antarctica"},
            "languages": {"es": {"name": "Spanish"}, "ay": {"name": "Aymara"}, "km": {"name": "Cambodian"}},
            "currencies": {"PEN": {"name": "Peruvian Sol"}, "USD": {"name": "US Dollar (Next day)"}},
        }
        tar = _tar({f"{name}.min.json": json.dumps(value) for name, value in package.items()})
        (facts,) = read_countries(tar).values()
        return facts

    def test_facts_by_name(self):
        assert self._countries("PE", currency=["USD", "PEN"]) == {
            "capital": "Lima",
            "continent": "South America",
            "language": "Spanish",
            "currency": "US Dollar",
            "languages": ["Spanish", "Aymara"],
            "currencies": ["Peruvian Sol", "US Dollar"],
        }
        assert self._countries("PE", languages=["km"])["language"] == "Khmer"

    @pytest.mark.parametrize(
        ("code", "changes", "kind", "why"),
        [
            ("PE", {}, "currency", "the country's name gives the Peruvian Sol away"),
            ("PE", {"capital": ""}, "capital", "there is none"),
            ("PE", {"continents": ["SA", "AN"]}, "continent", "it lies on two"),
            ("PE", {"continent": "AN"}, "continent", "Antarctica is no answer"),
            ("ZA", {}, "capital", "South Africa has three"),
        ],
    )
    def test_facts_that_are_not_asked_for(self, code, changes, kind, why):
        assert kind not in self._countries(code, **changes), why

    def test_the_code_of_a_flag(self):
        assert flag_code("PE") == "1f1f5-1f1ea"

    def test_glosses(self):
        """A bat is an animal here though the club comes first; a poodle is a kind of dog."""
        tar = _tar(
            {
                "dict/index.noun": "  1 a licence\n"
                "bat n 2 1 @ 2 2 00000030 00000010  \n"
                "dog n 1 2 @ ~ 1 1 00000040  \n"
                "poodle n 1 1 @ 1 1 00000050  \n"
                "abacus n 2 1 @ 2 2 00000060 00000070  \n"
                "polar_bear n 1 1 @ 1 1 00000080  \n",
                "dict/data.noun": "  1 a licence\n"
                "00000005 05 n 01 animal 0 000 | a living thing\n"
                '00000010 05 n 01 bat 0 001 @ 00000005 n 0000 | a small flyer (of the night); "bats hang"; a mammal\n'
                "00000030 06 n 01 bat 0 001 @ 00000090 n 0000 | a club of wood\n"
                "00000040 05 n 02 dog 0 hound 1 001 @ 00000005 n 0000 | a pet that barks\n"
                "00000050 05 n 01 poodle 0 001 @ 00000040 n 0000 | a curly one of them\n"
                "00000060 06 n 01 abacus 0 001 @ 00000090 n 0000 | a tablet on a column\n"
                "00000070 06 n 01 abacus 0 001 @ 00000090 n 0000 | what one counts with\n"
                "00000080 05 n 01 polar_bear 0 001 @ 00000005 n 0000 | a bear of the ice\n"
                "00000090 06 n 01 thing 0 000 | a thing\n",
            }
        )
        names = ("bat", "dog", "poodle", "polar bear", "zebra")
        words = {name: (name, "animals-nature") for name in names} | {"abacus": ("abacus", "objects")}
        assert read_glosses(tar, words) == {
            "bat": {"gloss": "a small flyer", "kinds": []},
            "dog": {"gloss": "a pet that barks", "kinds": ["poodle"]},
            "poodle": {"gloss": "a curly one of them", "kinds": []},
            "abacus": {"gloss": "what one counts with", "kinds": []},  # its second sense is the one meant
        }

    def test_they_reach_the_concepts(self, small_data):
        concepts = load_concepts(small_data)
        dog, flag = concepts["1f414"], concepts[flag_code("AE")]
        assert dog.gloss == "a tame animal that barks" and dog.kinds == {"1f415"} and dog.country is None
        assert flag.country.facts["capital"] == "Port AE" and flag.country.has("language", "Elvish")
        assert not flag.country.has("language", "Dwarvish") and not flag.country.has("capital", "Port AF")


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
        small_archive(archive)
        assert "up to date" not in self._run(first, archive, "1")
        shutil.copytree(first / "images", second / "images")
        assert self._run(second, archive, "2").count("up to date") == len(ARTISTS)
        names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
        sets = [f"examples/{task}.{split}.jsonl" for task in (*TASKS, *KINDS) for split in splits_of(task)[1:]]
        assert [name for name in names if name.endswith(".jsonl")] == sorted(sets)
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

    def test_a_foreign_step_and_a_missing_archive_are_named(self, tmp_path):
        command = [sys.executable, str(RECIPE / "build_data.py"), "--out", str(tmp_path)]
        for arguments, complaint in (
            (["--steps", "rendre"], "rendre"),
            (["--from-archive", str(tmp_path / "none.zip")], "none.zip"),
        ):
            wide = {**os.environ, "COLUMNS": "500"}  # or a long path is broken between lines
            done = subprocess.run(command + arguments, capture_output=True, text=True, env=wide)
            assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr

    def test_the_archive_depends_on_its_contents_alone(self, small_data, tmp_path):
        archive = tmp_path / "art.zip"
        members = {"svg/noto.json": svgs(small_data / "art.zip", "noto")}
        write_archive(archive, members)
        first = archive.read_bytes()
        os.utime(archive, (0, 0))
        write_archive(archive, members)
        assert archive.read_bytes() == first
