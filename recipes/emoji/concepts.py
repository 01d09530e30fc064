"""What the pictures show: names, structured attributes and natural wordings of every emoji."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from art import TRAIN_ARTISTS, normalize_code, read_member, svgs


TONES = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones by Emojibase's number; 0 is the default that every artist paints yellow."""
PERSON = "1f9d1"
"""Base of a plain person, of whom nothing but hair, gender and skin is known."""
PEOPLE = frozenset(
    "person person-gesture person-role person-fantasy person-activity person-sport person-resting family".split()
)
"""Subgroups that show whole people."""

_GENDERS = {"1f468": "man", "1f469": "woman", "2642": "man", "2640": "woman"}
_AGES = {"man": "adult", "woman": "adult", "boy": "child", "girl": "child"}
_HAIR = {"1f9b0": "red", "1f9b1": "curly", "1f9b2": "bald", "1f9b3": "white"}
# Code points of their own that are the man and the woman of a neutral one.
_RELATED = {
    "1f471": (PERSON, {"hair": "blond"}),
    "1f474": ("1f9d3", {"gender": "man"}),
    "1f475": ("1f9d3", {"gender": "woman"}),
    "1f466": ("1f9d2", {"gender": "boy"}),
    "1f467": ("1f9d2", {"gender": "girl"}),
    "1f934": ("1fac5", {"gender": "man"}),
    "1f478": ("1fac5", {"gender": "woman"}),
    "1f385": ("1f9d1-200d-1f384", {"gender": "man"}),
    "1f936": ("1f9d1-200d-1f384", {"gender": "woman"}),
    "1f9d5": ("1f9d5", {"gender": "woman"}),
    "1f483": ("dancing", {"gender": "woman"}),
    "1f57a": ("dancing", {"gender": "man"}),
    "1f930": ("1fac4", {"gender": "woman"}),
    "1fac3": ("1fac4", {"gender": "man"}),
    "1f46b": ("1f9d1-200d-1f91d-200d-1f9d1", {"gender": "woman and man"}),
    "1f46c": ("1f9d1-200d-1f91d-200d-1f9d1", {"gender": "man and man"}),
    "1f46d": ("1f9d1-200d-1f91d-200d-1f9d1", {"gender": "woman and woman"}),
}
_COLOURED = re.compile(
    r"(red|orange|yellow|green|light blue|blue|purple|brown|black|grey|pink|white) (heart|circle|square|book)"
)
_MOON = frozenset(f"{code:x}" for code in range(0x1F311, 0x1F319))
_POINTING = re.compile(
    r"(backhand index pointing) (up|down|left|right)|((?:up|down)(?:-left|-right)?|left|right) arrow"
)
# People holding hands, kiss, couple with heart, handshake, people with bunny ears, wrestling.
_PAIRS = frozenset(("1f9d1-200d-1f91d-200d-1f9d1", "1f48f", "1f491", "1f91d", "1f46f", "1f93c"))
_WITH_THE = frozenset(
    "Bahamas|British Indian Ocean Territory|Comoros|European Union|Gambia|Isle of Man|Maldives|Netherlands|Philippines"
    "|Caribbean Netherlands|Seychelles|United Arab Emirates|United Kingdom|United Nations|United States".split("|")
)
LOOK_ALIKE_FLAGS = tuple(
    frozenset("-".join(f"{0x1F1E6 + ord(letter) - ord('A'):x}" for letter in country) for country in group.split())
    for group in ("AU HM", "BV NO SJ", "CP FR MF WF", "DG IO", "EA ES", "ID MC", "LU NL", "NI SV", "RO TD", "UM US")
)
"""Flags that are the same by law, or so nearly that no small picture tells."""
_PLURAL = ("people ", "men ", "women ")
_NO_ARTICLE = frozenset(("Santa Claus", "Mrs. Claus", "Mx Claus", "breast-feeding", "horse racing"))


@dataclass(frozen=True)
class Country:
    """
    What is known of a country.

    Args:
        name (`str`): As people say it within a sentence: `"the Netherlands"`.
        facts (`dict[str, str]`): What can be asked for: `capital`, `continent`, `language`, `currency`.
        languages (`frozenset[str]`): Every official language.
        currencies (`frozenset[str]`): Every currency.
    """

    name: str
    facts: dict[str, str]
    languages: frozenset[str]
    currencies: frozenset[str]

    def has(self, kind: str, value: str) -> bool:
        """Whether the value is right for this country, be it asked for or not."""
        many = {"language": self.languages, "currency": self.currencies}.get(kind, ())
        return value == self.facts.get(kind) or value in many


@dataclass(frozen=True, eq=False)
class Concept:
    """
    One emoji, whoever draws it.

    Args:
        code (`str`): Lower-case code points without `fe0f`, joined by `-`.
        name (`str`): Its name in Emojibase, such as `"woman scientist: dark skin tone"`.
        base (`str`): What it shares with its variants: its code without skin, gender and hair, or a family's name.
        attributes (`dict[str, str]`):
            What tells it from its variants: `skin`, `gender`, `hair`, `facing`, `members`, `colour`, `time`, `key`,
            `phase`, `direction`. A key that is absent is not stated: the picture may show anything there.
        role (`str`): The name without the skin tone, such as `"woman scientist"`.
        group (`str`): Unicode group, such as `"people-body"`.
        subgroup (`str`): Unicode subgroup, such as `"person-role"`.
        tags (`tuple[str, ...]`): Emojibase keywords.
        country (`Country`, *optional*): What is known of the country whose flag it is.
        gloss (`str`, *optional*): How a dictionary defines the word.
        kinds (`frozenset[str]`, *optional*): Codes of its kinds, of which that definition is true as well.
    """

    code: str
    name: str
    base: str
    attributes: dict[str, str]
    role: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    country: Country | None = None
    gloss: str | None = None
    kinds: frozenset[str] = frozenset()

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Complete wordings: each states every attribute, the default skin included."""
        noun = self.noun
        skin = self.attributes.get("skin")
        if skin is None:
            return tuple(dict.fromkeys((noun, self.name)))
        wordings = [f"{noun} {_with_skin(noun, skin, self.is_pair)}"]
        article, _, rest = noun.partition(" ")
        if article in ("a", "an") and not self.is_pair:
            wordings.append(f"a {skin}-skinned {rest}")
        colon = "," if ": " in self.role else ":"
        wordings.append(self.name if skin != "yellow" else f"{self.role}{colon} yellow skin tone")
        return tuple(wordings)

    @cached_property
    def short_captions(self) -> tuple[str, ...]:
        """Wordings that leave the default skin unsaid, as people do; empty for every other concept."""
        if self.attributes.get("skin") != "yellow":
            return ()
        return tuple(dict.fromkeys((self.noun, self.name)))

    @cached_property
    def held_out_captions(self) -> tuple[str, ...]:
        """Complete wordings that training never reads, out of words that it does; for what no skin tells apart, the
        ones that it reads."""
        noun = self.noun
        skin = self.attributes.get("skin")
        if skin is None:
            return self.captions
        if ", " in skin:
            left, right = skin.split(", ")
            return (f"{noun}, {left} skin on the left, {right} skin on the right",)
        return f"{noun}, {skin} skin", f"{noun} whose skin is {skin}"

    @cached_property
    def noun(self) -> str:
        """The role as people say it, such as `"a woman scientist"`."""
        return _noun(self.role, self.subgroup)

    @property
    def is_pair(self) -> bool:
        """Whether two people or two hands are shown, each with a skin tone."""
        return self.base in _PAIRS

    @cached_property
    def keywords(self) -> frozenset[str]:
        """Tags and words of the name: a keyword query fits whoever has it here."""
        return self.words | frozenset(self.tags)

    @cached_property
    def words(self) -> frozenset[str]:
        """Words of its name, lower-case and in the singular."""
        return frozenset(
            word.removesuffix("s") if len(word) > 3 else word for word in re.findall(r"[\w#*]+", self.name.lower())
        )


def load_concepts(data_dir: str | Path) -> dict[str, Concept]:
    """
    Every concept that at least one training artist draws, from a data folder's archive.

    Args:
        data_dir (`str` or `Path`): The folder that `build_data.py` filled.

    Returns:
        `dict[str, Concept]`: Code to concept, sorted by code.
    """
    archive = Path(data_dir) / "art.zip"
    drawn = set().union(*(svgs(archive, artist) for artist in TRAIN_ARTISTS))
    concepts = parse_concepts(
        read_member(archive, "emojibase/data.json"),
        read_member(archive, "emojibase/groups.json"),
        read_member(archive, "facts/countries.json"),
        read_member(archive, "glosses/wordnet.json"),
    )
    return {code: concept for code, concept in concepts.items() if code in drawn}


def parse_concepts(
    data: list[dict],
    groups: dict,
    countries: dict[str, dict] | None = None,
    glosses: dict[str, dict] | None = None,
) -> dict[str, Concept]:
    """
    Concepts out of Emojibase's entries and what is known about them.

    Args:
        data (`list[dict]`): `en/data.json`.
        groups (`dict`): `meta/groups.json`.
        countries (`dict[str, dict]`, *optional*): What `read_countries` found.
        glosses (`dict[str, dict]`, *optional*): What `read_glosses` found.

    Returns:
        `dict[str, Concept]`: Code to concept, sorted by code. Loose skin tones, hair styles and regional indicators,
        which are parts and not pictures, are left out.
    """
    concepts = {}
    for entry in data:
        if "group" in entry and groups["groups"][str(entry["group"])] != "component":
            for concept in _parse_entry(entry, groups):
                country, gloss = (known.get(concept.code) for known in (countries or {}, glosses or {}))
                concepts[concept.code] = replace(
                    concept,
                    country=country and _country(concept, country),
                    gloss=gloss and gloss["gloss"],
                    kinds=frozenset(gloss["kinds"] if gloss else ()),
                )
    return dict(sorted(concepts.items()))


def caption(concept: Concept, rng: random.Random) -> str:
    """
    A complete description in a random wording, for captioning and for text candidates.

    Args:
        concept (`Concept`): What to describe.
        rng (`random.Random`): Source of randomness.

    Returns:
        `str`: Such as `"a dark-skinned woman scientist"`.
    """
    return _pick(concept.captions, rng)


def contradicts(one: Concept, other: Concept, ignore: tuple[str, ...] = ()) -> bool:
    """
    Whether no picture can be both: some attribute is stated by both and differs.

    A neutral "scientist" does not contradict "woman scientist", since its picture may well be a woman, nor a family of
    two adults one of a woman and a man; nor does light skin beside dark skin contradict the same two in the other
    order, which few readers tell apart.

    Args:
        one, other (`Concept`): Concepts of the same kind.
        ignore (`tuple[str, ...]`, *optional*): Attributes that are left unsaid.

    Returns:
        `bool`: Whether they contradict each other.
    """
    theirs = other.attributes
    for key, value in one.attributes.items():
        if key in ignore or theirs.get(key, value) == value:
            continue
        if _parts(value) == _parts(theirs[key]):
            continue
        if key == "members" and "adult" in value + theirs[key] and _parts(value, _AGES) == _parts(theirs[key], _AGES):
            continue
        return True
    return False


def may_be_confused(one: Concept, other: Concept, ignore: tuple[str, ...] = ()) -> bool:
    """
    Whether a description of one may be true of the other's picture, so that they must not compete in one query.

    Args:
        one, other (`Concept`): Two concepts.
        ignore (`tuple[str, ...]`, *optional*): Attributes that the description leaves unsaid.

    Returns:
        `bool`: True for variants that do not contradict each other, for a plain person and anybody alike, for flags
        that look alike, and for names of which one holds all words of the other ("dog", "guide dog").
    """
    if one.country and any(one.code in group and other.code in group for group in LOOK_ALIKE_FLAGS):
        return True
    people = one.subgroup in PEOPLE and other.subgroup in PEOPLE
    if one.base == other.base or (people and PERSON in (one.base, other.base)):
        return not contradicts(one, other, ignore)
    return not people and (one.words <= other.words or other.words <= one.words)


def _parts(value: str, names: dict[str, str] | None = None) -> list[str]:
    return sorted((names or {}).get(part, part) for part in value.split(", "))


def _pick(choices: tuple[str, ...], rng: random.Random) -> str:
    return choices[int(rng.random() * len(choices))]


def _parse_entry(entry: dict, groups: dict) -> list[Concept]:
    subgroup = groups["subgroups"][str(entry["subgroup"])]
    base, attributes = _parse_code(normalize_code(entry["hexcode"]))
    role, attributes = entry["label"], dict(attributes)
    if match := _COLOURED.fullmatch(role):
        base, attributes = match[2], {"colour": match[1]}
    elif role.endswith(("o’clock", "-thirty")):
        base, attributes = "clock", {"time": role}
    elif role.startswith("keycap: "):
        base, attributes = "keycap", {"key": role.removeprefix("keycap: ")}
    elif role.startswith("family: "):
        base, attributes = "1f46a", {"members": role.removeprefix("family: ")}
    elif base in _MOON:
        base, attributes = "moon", {"phase": role.removesuffix(" moon")}
    elif match := _POINTING.fullmatch(role):
        base, attributes = ("pointing hand" if match[1] else "arrow"), {"direction": match[2] or match[3]}
    concepts = []
    for variant in (entry, *entry.get("skins", ())):
        skin = _skin(variant) if entry.get("skins") else None
        concepts.append(
            Concept(
                code=normalize_code(variant["hexcode"]),
                name=variant["label"],
                base=base,
                attributes=attributes | ({"skin": skin} if skin else {}),
                role=role,
                group=groups["groups"][str(entry["group"])],
                subgroup=subgroup,
                tags=tuple(entry.get("tags", ())),
            )
        )
    return concepts


def _country(concept: Concept, known: dict) -> Country:
    facts = {kind: known[kind] for kind in ("capital", "continent", "language", "currency") if kind in known}
    name = _country_name(concept.role.partition(": ")[2])
    return Country(name, facts, frozenset(known["languages"]), frozenset(known["currencies"]))


def _country_name(name: str) -> str:
    """
    >>> _country_name("Cook Islands"), _country_name("Peru")
    ('the Cook Islands', 'Peru')
    """
    ends = name.endswith((" Islands", " Republic", " Territories"))
    return f"the {name}" if name in _WITH_THE or (ends and not name.startswith("South ")) else name


def _skin(variant: dict) -> str:
    tone = variant.get("tone", 0)
    return ", ".join(TONES[number] for number in tone) if isinstance(tone, list) else TONES[tone]


def _parse_code(code: str) -> tuple[str, dict[str, str]]:
    """Base and attributes of a code without skin tones."""
    attributes = {}
    if code.endswith("-200d-27a1"):
        code, attributes["facing"] = code.removesuffix("-200d-27a1"), "right"
    parts = code.split("-200d-")
    if len(parts) > 1 and parts[-1] in ("2640", "2642"):
        attributes["gender"] = _GENDERS[parts.pop()]
    people = [part for part in parts if part in _GENDERS]
    if people and len(parts) > 2 and parts[1] == "2764":  # couples; families were told apart by their names
        attributes["gender"] = " and ".join(_GENDERS[part] for part in people)
        return ("1f48f" if "1f48b" in parts else "1f491"), attributes
    if people:
        attributes["gender"] = _GENDERS[people[0]]
        parts[0] = PERSON
    if parts[0] == PERSON and len(parts) == 2 and parts[1] in _HAIR:
        attributes["hair"] = _HAIR[parts.pop()]
    base, more = _RELATED.get("-200d-".join(parts), ("-200d-".join(parts), {}))
    return base, more | attributes


def _noun(role: str, subgroup: str) -> str:
    """
    A name as people say it.

    >>> _noun("woman: red hair", "person"), _noun("flag: France", "country-flag")
    ('a woman with red hair', 'the flag of France')
    """
    head, _, tail = role.partition(": ")
    if head == "flag":
        return f"the flag of {_country_name(tail)}"
    if head == "keycap":
        return f"the keycap {tail}"
    if head == "family" and tail:
        return f"a family of {_listed(tail)}"
    if head == "kiss":
        return f"{_listed(tail) if tail else 'two people'} kissing"
    if head == "couple with heart":
        return f"{_listed(tail) if tail else 'a couple'} with a heart"
    if tail == "bald":
        return f"a bald {head}"
    if tail == "beard":
        return f"a {head} with a beard"
    if tail.endswith(" hair"):
        return f"a {head} with {tail}"
    if role == "woman and man holding hands":
        return "a woman and a man holding hands"
    if subgroup in PEOPLE and role not in _NO_ARTICLE and not role.startswith(_PLURAL):
        return _article(role.replace(": ", " "))
    return role


def _listed(members: str) -> str:
    """
    >>> _listed("man, woman, girl")
    'a man, a woman and a girl'
    """
    *first, last = (_article(member) for member in members.split(", "))
    return f"{', '.join(first)} and {last}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _with_skin(noun: str, skin: str, is_pair: bool) -> str:
    if ", " in skin:
        left, right = skin.split(", ")
        return f"with {left} skin on the left and {right} skin on the right"
    if is_pair:
        return f"both with {skin} skin"
    return f"{'and' if ' with ' in noun else 'with'} {skin} skin"
