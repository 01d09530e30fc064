"""A small set of drawings by five artists and one who is held out, for tests of the worked example.

PYTEST_DONT_REWRITE: it asserts nothing.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

from art import ARTISTS, Art, render_artist, write_archive
from concepts import load_concepts, parse_concepts
from knowledge import flag_code


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
ANIMALS = (
    *("dog", "guide dog", "cat", "fox", "lion", "tiger", "horse", "zebra", "cow", "pig", "goat", "camel", "mouse"),
    *("ant", "badger", "crab", "deer", "eagle", "frog", "gecko", "heron", "ibis", "jackal", "koala", "lizard", "mole"),
    *("newt", "otter", "panda", "quail", "raven", "seal", "toad", "urchin", "viper", "whale", "yak", "bison", "crow"),
    *("duck", "emu", "finch", "goose", "hare", "jay", "kiwi", "lynx", "moose"),
)
GLOSSES = {
    "dog": "a tame animal that barks",
    "guide dog": "one that leads the blind",
    "cat": "a small hunter of mice that purrs",
    "fox": "a red hunter with a bushy tail",
    "lion": "a large hunter with a mane",
    "tiger": "a large striped hunter",
    "horse": "what a rider sits on",
    "zebra": "a striped grazer",
    "cow": "who gives milk",
    "pig": "who likes mud",
    "goat": "a bearded climber with horns",
    "camel": "the ship of the desert",
    "mouse": "a small rodent",
}
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
COUNTRIES = tuple(f"{first}{second}" for first in "ABCD" for second in "EFGHIJ")
CONTINENTS, LANGUAGES, MONEY = ("Africa", "Asia", "Europe"), ("Elvish", "Dwarvish", "Latin"), ("Crown", "Groat")
FACES = "winking sleepy happy sad tired calm proud shy bored busy brave curious angry loving silly worried".split()
CLONE = "1f415"  # the second animal: one artist draws it exactly like the first
GROUPS = {
    "groups": {
        "0": "smileys-emotion",
        "1": "people-body",
        "2": "component",
        "3": "animals-nature",
        "5": "travel-places",
        "8": "symbols",
        "9": "flags",
    },
    "subgroups": {
        "1": "face-smiling",
        "16": "hand-fingers-open",
        "23": "person",
        "25": "person-role",
        "32": "skin-tone",
        "34": "animal-mammal",
        "50": "time",
        "80": "keycap",
        "90": "geometric",
        "98": "country-flag",
    },
}


def person(label: str, code: str, subgroup: int, head: str, tags: tuple[str, ...] = ()) -> dict:
    """An Emojibase entry with its five skin tones, which stand behind the first code point."""
    rest = code[len(head) :]
    skins = [
        {"label": f"{label}: {name} skin tone", "hexcode": f"{head}-{tone}{rest}", "tone": number}
        for number, (tone, name) in enumerate(zip(TONES, TONE_NAMES, strict=True), start=1)
    ]
    return {"label": label, "hexcode": code, "group": 1, "subgroup": subgroup, "tags": list(tags), "skins": skins}


def emojibase() -> list[dict]:
    entries = [{"label": "dark skin tone", "hexcode": "1F3FF", "group": 2, "subgroup": 32}]
    entries.append({"label": "regional indicator A", "hexcode": "1F1E6"})
    for head, gender in (("1F9D1", ""), ("1F468", "man "), ("1F469", "woman ")):
        entries.append(person(gender.strip() or "person", head, 23, head))
        for job, code in JOBS.items():
            entries.append(person(gender + job, f"{head}-200D-{code}", 25, head, (f"uses {code.lower()}", "work")))
    for number, colour in enumerate(("red", "curly", "white")):
        for head, who in (("1F9D1", "person"), ("1F468", "man"), ("1F469", "woman")):
            entries.append(
                person(f"{who}: {colour} hair", f"{head}-200D-{('1F9B0', '1F9B1', '1F9B3')[number]}", 23, head)
            )
    entries.append(_handshake())
    for number, name in enumerate(NUMBERS):
        for start, time in ((0x1F550, f"{name} o’clock"), (0x1F55C, f"{name}-thirty")):
            entries.append({"label": time, "hexcode": f"{start + number:X}", "group": 5, "subgroup": 50})
    for start, shape in ((0x1F7E0, "circle"), (0x1F7F0, "square")):
        for number, colour in enumerate(COLOURS):
            label = f"{colour} {shape}"
            entries.append({"label": label, "hexcode": f"{start + number:X}", "group": 8, "subgroup": 90})
    for country in COUNTRIES:
        code = flag_code(country).upper()
        entries.append({"label": f"flag: Land of {country}", "hexcode": code, "group": 9, "subgroup": 98})
    for number, animal in enumerate(ANIMALS):
        code = f"{0x1F414 + number:X}"
        entries.append({"label": animal, "hexcode": code, "group": 3, "subgroup": 34, "tags": [f"{animal} sound"]})
    return entries


def keys_and_faces() -> list[dict]:
    """More that scenes can ask for, for those tests that need it."""
    keys = [
        {"label": f"keycap: {digit}", "hexcode": f"{0x30 + digit:04X}-20E3", "group": 8, "subgroup": 80}
        for digit in range(10)
    ]
    faces = [
        {"label": f"{face} face", "hexcode": f"{0x1F600 + number:X}", "group": 0, "subgroup": 1}
        for number, face in enumerate(FACES)
    ]
    return keys + faces


def _handshake() -> dict:
    """A pair of hands with every pair of skin tones."""
    entry = person("handshake", "1F91D", 16, "1F91D")
    for left, one in enumerate(TONES, start=1):
        for right, other in enumerate(TONES, start=1):
            if left != right:
                code, label = (
                    f"1FAF1-{one}-200D-1FAF2-{other}",
                    f"handshake: {TONE_NAMES[left - 1]}, {TONE_NAMES[right - 1]}",
                )
                entry["skins"].append({"label": f"{label} skin tone", "hexcode": code, "tone": [left, right]})
    return entry


def knowledge() -> dict[str, dict]:
    """Facts about made-up countries, and definitions of the animals."""
    countries = {
        flag_code(country): {
            "capital": f"Port {country}",
            "continent": CONTINENTS[number % 3],
            "language": LANGUAGES[number % 2],
            "currency": MONEY[number % 2],
            "languages": [LANGUAGES[number % 2], *LANGUAGES[2:]][: 1 + number % 4 // 3],
            "currencies": [MONEY[number % 2]],
        }
        for number, country in enumerate(COUNTRIES)
    }
    codes = {animal: f"{0x1F414 + number:x}" for number, animal in enumerate(ANIMALS)}
    glosses = {
        codes[animal]: {"gloss": GLOSSES.get(animal, f"what lives in cage {number}"), "kinds": []}
        for number, animal in enumerate(ANIMALS)
    }
    glosses[codes["dog"]]["kinds"] = [codes["guide dog"]]
    return {"facts/countries.json": countries, "glosses/wordnet.json": glosses}


def drawing(code: str, artist: str) -> str:
    """
    A drawing that differs by code and artist, except that one artist cannot tell the first two animals apart.

    Clocks, keys and faces are shapes with a hand, which are alike at a glance; all else is coloured blocks.
    """
    if artist == "twemoji" and code == "1f414":
        code = CLONE
    if "1f550" <= code <= "1f567":
        turn = 15 * (int(code, 16) - 0x1F550)
        hand = f'<path d="M4 4V1.5" stroke="#555" stroke-width="0.4" transform="rotate({turn} 4 4)"/>'
        marks = f'<circle cx="4" cy="4" r="3.7" fill="#{180 + 10 * ARTISTS.index(artist):02x}cccc"/>{hand}'
    elif code.endswith("-20e3") or "1f600" <= code <= "1f60f":
        corner, colour = ("0.4", "#9bd") if code.endswith("-20e3") else ("3", "#fd5")
        turn = 47 * int(code.split("-")[0], 16)
        hand = f'<path d="M4 4V1.5" stroke="#555" stroke-width="0.4" transform="rotate({turn} 4 4)"/>'
        marks = f'<rect x="0.4" y="0.4" width="7.2" height="7.2" rx="{corner}" fill="{colour}"/>{hand}'
    else:
        rng = random.Random(f"{artist}/{code}")
        marks = "".join(
            f'<rect x="{x}" y="{y}" width="2" height="2" fill="#{rng.randrange(1 << 24):06x}"/>'
            for x in range(0, 8, 2)
            for y in range(0, 8, 2)
        )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{marks}</svg>'


def small_archive(path: Path, more: Sequence[dict] = ()) -> None:
    data = [*emojibase(), *more]
    codes = sorted(parse_concepts(data, GROUPS))
    members = {"manifest.json": {"packages": {}}, "emojibase/data.json": data, "emojibase/groups.json": GROUPS}
    members |= knowledge()
    members |= {f"svg/{artist}.json": {code: drawing(code, artist) for code in codes} for artist in ARTISTS}
    write_archive(path, members)


def build_small(folder: Path, more: Sequence[dict] = ()) -> Path:
    small_archive(folder / "art.zip", more)
    for artist in ARTISTS:
        render_artist(folder / "art.zip", artist, folder / "images", size=24)
    return folder


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """A data folder of the small set."""
    return build_small(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module", params=["small", "real"])
def data_dir(request) -> Path:
    """The small set, then the real one where it is built."""
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
