"""
Composed edits: a picture and, in words, what is to be different about it.

A concept has features, such as its skin, its hair and what the person is. An edit changes one or two of them; its
answer is the concept with the new values. Its rivals are the corners around that answer: the picture as it was, one of
two changes left out, another value, the right change in something else.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from art import Art
from concepts import PEOPLE, PERSON, TONES, Concept, may_be_confused
from examples import Drawing, Entry
from matching import STYLES, in_style
from splits import HELD_OUT_COMBINATIONS, SPLIT_SEED, fraction, split_artists, split_codes
from stock import Draw, NothingToAsk, Question, Stock, pick
from wordings import CLOCKS, EDITS, HALF_HOURS, KEYS, MEMBERS, MOONS, ORDERS, TURNS


STRUCTURES = {
    "person": 0.5,
    "pair": 0.1,
    "hand": 0.08,
    "clock": 0.08,
    "colour": 0.07,
    "key": 0.04,
    "moon": 0.04,
    "arrow": 0.04,
    "family": 0.05,
}
"""What can be edited, and its share of the questions."""
SKINNED = ("person", "pair", "hand")
"""Structures with combinations to hold out. Of others but the next, pairs of a picture and its edit are held out."""
STEPPED = ("clock", "key", "moon", "arrow")
"""Structures whose one feature goes along a scale. Only wordings are held out: eight phases and five steps make forty
pairs, and who knows those of training by heart has never seen a held-out one right, only wrong."""
TWO_CHANGES, ORDER_SHARE = 0.45, 0.35
"""Shares of edits with two changes, and of those worded as an order."""
TRIES = 8
"""Rivals that are tried for each that is wanted."""
AS_BEFORE = 0.7
"""Share of the edits with one change in which the picture as it was is a candidate."""

_NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
_TIMES = tuple(time for number in _NUMBERS for time in (f"{number} o’clock", f"{number}-thirty"))
_PHASES = "new|waxing crescent|first quarter|waxing gibbous|full|waning gibbous|last quarter|waning crescent".split(
    "|"
)
_TURNS = "up up-right right down-right down down-left left up-left".split()
_KEYS = tuple(str(number) for number in range(11))
SCALES = {"time": _TIMES, "phase": tuple(_PHASES), "direction": tuple(_TURNS), "key": _KEYS, "skin": TONES}
"""Values in their order; all but keys and skins begin anew after the last."""

_SHAPES = ("heart", "circle", "square", "book")
_GENDERS = {"boy": "man", "girl": "woman"}
_COUPLES = {"man and man": "two men", "woman and woman": "two women", "woman and man": "a woman and a man"}
_AGES = {
    "1f476": {"": "a baby"},
    "1f9d2": {"": "a child", "man": "a boy", "woman": "a girl"},
    "1f9d3": {"": "an old person", "man": "an old man", "woman": "an old woman"},
}
_ROLES = {
    "1f9d4": "with a beard",
    "1f470": "with a veil",
    "1f472": "with a skullcap",
    "1f473": "wearing a turban",
    "1f935": "in a tuxedo",
    "1f9d5": "with a headscarf",
    "1f9d1-200d-1f37c": "feeding a baby",
    "1f574": "levitating in a suit",
    "1f486": "getting a massage",
    "1f487": "getting a haircut",
    "1f9d1-200d-1f9af": "with a white cane",
    "1f9d1-200d-1f9bc": "in a motorized wheelchair",
    "1f9d1-200d-1f9bd": "in a manual wheelchair",
    "1f9d6": "in a steamy room",
    "1f6a3": "rowing a boat",
    "1f6b5": "mountain biking",
    "26f9": "bouncing a ball",
    "1f481": "tipping a hand",
    "1f645": "gesturing no",
    "1f64b": "raising a hand",
    "1f6c0": "taking a bath",
    "1f6cc": "in bed",
    "1f9d8": "in the lotus position",
}
"""What people are or do whose name is no phrase as it is."""
WORN = frozenset("1f9d4 1f470 1f472 1f473 1f935 1f9d5 1f9d1-200d-1f9af".split())
"""What a person has on: nobody loses it by becoming a cook, and a cook who puts it on is still one."""
_NO_ROLES = frozenset("1f9cd 1f931 1fac4 1fac5 1f3c7 1f9cf 1f9d1-200d-1f384 1f9dc 1fac8 1f9cc".split())


class Features:
    """
    Concepts by what can be changed about them.

    Args:
        concepts (`dict[str, Concept]`): All concepts.
    """

    def __init__(self, concepts: dict[str, Concept]) -> None:
        self.concepts = concepts
        mirrored = {concept.base for concept in concepts.values() if "facing" in concept.attributes}
        self.of = {code: _features(concept, mirrored) for code, concept in concepts.items()}
        """Code to features: the concept's attributes, and `what` it is apart from them."""
        self.structure = {code: _structure(concept) for code, concept in concepts.items()}
        self.roles = _roles(concepts)
        """Base to how people say that someone is that, or does it."""
        self._codes = {_key(features): code for code, features in self.of.items()}
        self._variants: dict[tuple, list[str]] = {}
        for code, features in self.of.items():
            for key in features:
                self._variants.setdefault(self._rest(code, key), []).append(code)

    def variants(self, code: str, key: str) -> list[str]:
        """Everything that differs in this feature alone, itself included."""
        return self._variants.get(self._rest(code, key), [])

    def replace(self, code: str, changes: dict[str, str]) -> str | None:
        """The code with other values of some features, where there is one."""
        return self._codes.get(_key({**self.of[code], **changes}))

    def differing(self, one: str, other: str) -> int:
        """In how many features two differ."""
        mine, theirs = self.of[one], self.of[other]
        return sum(mine.get(key) != theirs.get(key) for key in mine.keys() | theirs.keys())

    def may_be_confused(self, one: str, other: str) -> bool:
        """Whether two may not compete: as in general, but who faces right is not who faces left."""
        facing = {self.of[code].get("facing") for code in (one, other)}
        return len(facing - {None}) < 2 and may_be_confused(self.concepts[one], self.concepts[other])

    def _rest(self, code: str, key: str) -> tuple:
        # Hands are compared with hands of their sort, and a heart never turns into a moon.
        structure, concept = self.structure[code], self.concepts[code]
        sort = concept.subgroup if structure == "hand" else ""
        return key, structure, sort, _key({**self.of[code], key: ""})


def _key(features: dict[str, str]) -> frozenset:
    """What tells concepts apart; what is taken for granted is left out."""
    return frozenset(item for item in features.items() if item[1] and item != ("facing", "left"))


def _features(concept: Concept, mirrored: set[str]) -> dict[str, str]:
    features = {"what": concept.base, **concept.attributes}
    if "gender" in features:
        features["gender"] = _GENDERS.get(features["gender"], features["gender"])
    if concept.base == PERSON:
        features.setdefault("hair", "")
    if concept.base in mirrored:
        features.setdefault("facing", "left")
    if concept.is_pair and features.get("gender") in ("man", "woman"):
        features["gender"] = f"{features['gender']} and {features['gender']}"
    if concept.is_pair and "skin" in features:
        skins = features.pop("skin").split(", ")
        features["left skin"], features["right skin"] = skins[0], skins[-1]
    return features


def _structure(concept: Concept) -> str:
    """Which of `STRUCTURES` it is, or "" where nothing can be edited."""
    for key, structure in (("members", "family"), ("time", "clock"), ("key", "key"), ("phase", "moon")):
        if key in concept.attributes:
            return structure
    if concept.is_pair:
        return "pair"
    if concept.base in _SHAPES:
        return "colour"
    if concept.base == "arrow":
        return "arrow"
    if "skin" in concept.attributes:
        return "person" if concept.subgroup in PEOPLE else "hand"
    return ""


def _roles(concepts: dict[str, Concept]) -> dict[str, str]:
    roles = {base: names[""] for base, names in _AGES.items()}
    roles |= _ROLES
    for concept in concepts.values():
        base = concept.base
        wanted = concept.subgroup in PEOPLE - {"person", "family"} and "skin" in concept.attributes
        if base in roles or base in _NO_ROLES or not wanted or concept.is_pair or "facing" in concept.attributes:
            continue
        role = re.sub(r"^(person|man|woman) ", "", concept.role)
        roles[base] = role if re.match(r"\w+ing\b", role) else _article(role)
    return roles


# --- questions -------------------------------------------------------------------------------------------------------


_CHANGED = {
    "person": {"skin": 3, "gender": 2, "hair": 1.5, "what": 3, "facing": 1},
    "pair": {"left skin": 2, "right skin": 2, "gender": 2},
    "hand": {"skin": 1, "direction": 1},
    "colour": {"colour": 2, "what": 1},
    "clock": {"time": 1},
    "key": {"key": 1},
    "moon": {"phase": 1},
    "arrow": {"direction": 1},
    "family": {"members": 1},
}
"""Features that an edit of a structure changes, and how often."""
_KEPT = {structure: tuple(keys) for structure, keys in _CHANGED.items()} | {
    "pair": ("left skin", "right skin", "gender", "what"),
    "hand": ("skin", "what"),
}
"""Features in which a rival may differ that the edit does not touch."""


@dataclass(frozen=True)
class Edit:
    """
    What was, and what is to be.

    Args:
        artist (`str`): Who drew both.
        source (`str`): The code that the query shows.
        target (`str`): The code that is asked for.
        keys (`tuple[str, ...]`): The features that change.
    """

    artist: str
    source: str
    target: str
    keys: tuple[str, ...]


class Edits:
    """
    A picture and what is to change, and pictures by the same artist.

    Args:
        stock (`Stock`): What there is.
        side (`str`, *optional*, defaults to `"picture"`):
            What the candidates are: `"picture"`, `"text"`, or `"both"`, a picture with a text that leaves the skin or
            the colour to it.
    """

    def __init__(self, stock: Stock, side: str = "picture") -> None:
        self.stock, self.side, self.features = stock, side, Features(stock.concepts)
        self._words = Words(self.features, stock.split)
        self._drawn = {artist: stock.shown.intersection(stock.art.codes[artist]) for artist in stock.artists}
        self._sources = stock.shown if stock.split == "test_concept" else split_codes(stock.concepts, "train")
        self._options = functools.lru_cache(maxsize=None)(self._find_options)
        self._draws = dict(self._find_draws())
        if not self._draws:
            raise NothingToAsk("there is nothing to edit")
        self._shares = [self._share(*drawn) for drawn in self._draws]

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        edit = self._draw_edit(rng)
        others = self._rivals(edit, count, rng, hardness)
        text = self._words.say(edit.source, edit.target, edit.keys, rng)
        query = Entry(text, Drawing(edit.artist, edit.source), edit.source)
        style = int(rng.random() * STYLES)
        entries = [self._entry(edit.artist, code, style) for code in (edit.target, *others)]
        grades = [self._grade(edit.target, code) for code in others]
        kind = _kind(self.features.structure[edit.target], edit.keys)
        return Question(f"edit/{kind}", query, entries[0], entries[1:], grades)

    def _find_draws(self) -> Iterator[tuple[tuple[str, str], Draw]]:
        """For each structure and feature, the pictures to which a change of that feature can lead."""
        stock = self.stock
        known = [
            Drawing(artist, code) for artist in stock.artists for code in sorted(stock.known & self._drawn[artist])
        ]
        for structure, keys in _CHANGED.items():
            if self.side == "both" and structure not in (*SKINNED, "colour"):
                continue
            drawings = stock.pictures if structure in SKINNED else known
            drawings = [one for one in drawings if self.features.structure[one.code] == structure]
            for key in keys:
                found = [one for one in drawings if self._options(*one).get(key)]
                if found:
                    yield (structure, key), Draw(found, stock.concepts)

    def _share(self, structure: str, key: str) -> float:
        keys = [other for drawn, other in self._draws if drawn == structure]
        return STRUCTURES[structure] * _CHANGED[structure][key] / sum(_CHANGED[structure][other] for other in keys)

    def _find_options(self, artist: str, target: str) -> dict[str, list[str]]:
        """Feature to the codes that lead to the target when it alone changes."""
        structure, options = self.features.structure[target], {}
        for key in _CHANGED[structure]:
            if key == "what" and self.stock.split == "test_concept":
                continue
            codes = self.features.variants(target, key)
            codes = [code for code in codes if self._may_lead(artist, code, target, structure)]
            options[key] = [code for code in codes if self._words.can_say(code, target, key)]
        return options

    def _may_lead(self, artist: str, source: str, target: str, structure: str) -> bool:
        if source == target or source not in self._sources or source not in self._drawn[artist]:
            return False
        if self.stock.twins(artist, source):  # nobody could say what the query shows
            return False
        return structure in (*SKINNED, *STEPPED) or self._is_asked(source, target)

    def _is_asked(self, source: str, target: str) -> bool:
        """Whether this split asks for a pair of which "test_combination" holds out some."""
        held_out = fraction(f"{SPLIT_SEED}/edit/{source}/{target}") < HELD_OUT_COMBINATIONS
        return held_out == (self.stock.split == "test_combination")

    def _draw_edit(self, rng: random.Random) -> Edit:
        ((structure, key),) = rng.choices(list(self._draws), self._shares)
        artist, target = self._draws[structure, key](rng)
        options = {key: codes for key, codes in self._options(artist, target).items() if codes}
        source = pick(options[key], rng)
        if len(options) > 1 and rng.random() < TWO_CHANGES:
            second = pick([other for other in options if other != key], rng)
            value = self.features.of[pick(options[second], rng)].get(second, "")
            both = self.features.replace(source, {second: value})
            if both is not None and self._may_lead(artist, both, target, structure):
                keys = tuple(each for each in _CHANGED[structure] if each in (key, second))
                return Edit(artist, both, target, keys)
        return Edit(artist, source, target, (key,))

    def _rivals(self, edit: Edit, count: int, rng: random.Random, hardness: float) -> list[str]:
        """The corners around the target, some of which the words rule out and some only the picture."""
        chosen, taken = [], {edit.target, *self.stock.twins(edit.artist, edit.target)}
        for changes in itertools.islice(self._corners(edit, rng), TRIES * count):
            if len(chosen) == count:
                break
            code = self.features.replace(edit.target, changes)
            if code is None or code in taken or rng.random() >= hardness or not self._is_fair(edit, code):
                continue
            chosen.append(code)
            taken |= {code, *self.stock.twins(edit.artist, code)}
        if len(chosen) < count:
            target = self.stock.concepts[edit.target]
            strangers = self.stock.negatives(edit.artist, target, count - len(chosen), rng, hardness, taken)
            chosen += [stranger.code for stranger in strangers]
        return chosen

    def _corners(self, edit: Edit, rng: random.Random) -> Iterator[dict[str, str]]:
        """Changes to the target that make rivals of it, best first and without end."""
        before = self.features.of[edit.source]
        other = {key: self._another(edit, key, rng) for key in edit.keys[:1]}
        undone = [{key: before.get(key, "")} for key in edit.keys]
        if len(undone) > 1:  # one of two changes, the other, or both
            undone = _shuffled([*undone, {**undone[0], **undone[1]}], rng)[:2]
        elif rng.random() >= AS_BEFORE:
            undone = [other]
        kept = self._kept(edit, rng)
        if kept:
            # Squares of old and new, kept and not: having much in common with the others gives nothing away.
            corners = [*undone, kept, {**undone[0], **kept}]
            if len(undone) == 1:
                (key,) = kept
                third = {key: self._another(edit, key, rng)}
                corners.append(rng.choice((third, {**undone[0], **third})))
            yield from _shuffled(corners, rng)
        else:
            yield from undone
        while True:
            key = rng.choice(edit.keys)
            changes = {key: self._another(edit, key, rng)}
            yield {**changes, **self._kept(edit, rng)} if rng.random() < 0.5 else changes

    def _kept(self, edit: Edit, rng: random.Random) -> dict[str, str]:
        """Another value of a feature that the edit does not touch."""
        keys = [key for key in _KEPT[self.features.structure[edit.target]] if key not in edit.keys]
        rng.shuffle(keys)
        for key in keys:
            value = self._another(edit, key, rng)
            if value is not None:
                return {key: value}
        return {}

    def _another(self, edit: Edit, key: str, rng: random.Random) -> str | None:
        """A value of a feature that is neither the old nor the new one; on a scale often a near one."""
        before, after = (self.features.of[code].get(key) for code in (edit.source, edit.target))
        if key in SCALES and rng.random() < 0.7:
            scale = SCALES[key]
            old, new = scale.index(before), scale.index(after)
            value = scale[rng.choice((2 * old - new, new - 1, new + 1)) % len(scale)]
            return None if value in (before, after) else value
        values = {self.features.of[code].get(key) for code in self.features.variants(edit.target, key)}
        values = sorted(value for value in values - {before, after} if value)
        return pick(values, rng) if values else None

    def _is_fair(self, edit: Edit, code: str) -> bool:
        return code in self._drawn[edit.artist] and not self.features.may_be_confused(edit.target, code)

    def _entry(self, artist: str, code: str, style: int) -> Entry:
        concept, drawing = self.stock.concepts[code], Drawing(artist, code)
        if self.side == "picture":
            return Entry(None, drawing, code)
        if self.side == "text":
            return Entry(in_style(concept, self.stock.split, style), None, code)
        return Entry(_article(concept.base) if concept.base in _SHAPES else concept.noun, drawing, code)

    def _grade(self, target: str, code: str) -> int:
        if self.features.differing(target, code) == 1:
            return 2
        return int(self.features.structure[target] == self.features.structure[code])


def _kind(structure: str, keys: tuple[str, ...]) -> str:
    """
    >>> _kind("person", ("skin", "what")), _kind("pair", ("left skin", "right skin")), _kind("clock", ("time",))
    ('person/skin+role', 'pair/skin', 'clock')
    """
    if len(_CHANGED[structure]) == 1:
        return structure
    names = {"what": "shape" if structure == "colour" else "role", "left skin": "skin", "right skin": "skin"}
    return f"{structure}/{'+'.join(dict.fromkeys(names.get(key, key) for key in keys))}"


def _shuffled(values: list, rng: random.Random) -> list:
    return rng.sample(values, len(values))


def count_edits(art: Art, concepts: dict[str, Concept]) -> dict[str, tuple[int, int]]:
    """
    How many edits there are, whoever is asked: pairs of codes that one training artist drew and words tell apart.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.

    Returns:
        `dict[str, tuple[int, int]]`: Structure to the number of edits with one change and with two.
    """
    features, counts = Features(concepts), {structure: [0, 0] for structure in STRUCTURES}
    words = Words(features, "train")
    drawn = [set(art.codes[artist]) for artist in split_artists(art, "train")]
    for target, structure in features.structure.items():
        if not structure:
            continue
        keys = [key for key in _CHANGED[structure] if key in features.of[target]]
        single = {
            key: [
                code for code in features.variants(target, key) if code != target and words.can_say(code, target, key)
            ]
            for key in keys
        }
        double = {
            features.replace(one, {second: features.of[other].get(second, "")})
            for first, second in itertools.combinations(keys, 2)
            for one in single[first]
            for other in single[second]
        }
        for place, sources in enumerate(({code for codes in single.values() for code in codes}, double - {None})):
            counts[structure][place] += sum(any({code, target} <= codes for codes in drawn) for code in sources)
    return {structure: tuple(numbers) for structure, numbers in counts.items()}


# --- words -----------------------------------------------------------------------------------------------------------


class Words:
    """
    Says what an edit changes.

    Args:
        features (`Features`): What can be changed.
        split (`str`): One of `SPLITS`.
    """

    def __init__(self, features: Features, split: str) -> None:
        self.features, self.split = features, split

    def can_say(self, source: str, target: str, key: str) -> bool:
        """Whether there are words for the change of this feature."""
        mine, theirs = (self.features.of[code].get(key, "") for code in (source, target))
        if key in ("time", "phase", "key") or (key == "direction" and self.features.structure[target] == "arrow"):
            return _step(key, mine, theirs) in _STEPS[key]
        if key == "members":
            return _family_change(mine, theirs) is not None
        if key == "what" and theirs not in _SHAPES:
            worn = mine in WORN or (theirs in WORN and mine != PERSON)
            return theirs in self.features.roles and not worn
        return bool(theirs)

    def say(self, source: str, target: str, keys: tuple[str, ...], rng: random.Random) -> str:
        """The whole query."""
        structure = self.features.structure[target]
        before, after = self.features.of[source], {key: self.features.of[target][key] for key in keys}
        if structure in STEPPED:
            return self._step(keys[0], before[keys[0]], after[keys[0]], rng)
        if structure == "family":
            kind, *members = _family_change(before["members"], after["members"])
            return MEMBERS[kind].draw(self.split, rng).format(*members)
        features = self.features.of[target]
        if rng.random() < ORDER_SHARE and (orders := self._orders(after, features, rng)):
            return orders
        return EDITS.draw(self.split, rng).format(self._parts(after, features, structure))

    def _step(self, key: str, before: str, after: str, rng: random.Random) -> str:
        step = _step(key, before, after)
        if key == "time":
            return CLOCKS[1 if step > 0 else -1].draw(self.split, rng).format(HALF_HOURS[abs(step)])
        return _STEPS[key][step].draw(self.split, rng)

    def _orders(self, after: dict[str, str], features: dict[str, str], rng: random.Random) -> str | None:
        """Orders, where each change has one: `"make the skin dark and change the hair to red"`."""
        orders = []
        for key, value in after.items():
            if key == "what":
                key, value = "role", self.features.roles.get(value, "")
            if key == "gender":
                value = "" if value in _COUPLES else _person(value, features)
            if key not in ORDERS or value in ("", "bald") or (key == "role" and not value.startswith(("a ", "an "))):
                return None
            orders.append(ORDERS[key].draw(self.split, rng).format(value))
        return " and ".join(orders)

    def _parts(self, after: dict[str, str], features: dict[str, str], structure: str) -> str:
        """Phrases in the order of English: `"as a woman running facing right with dark skin"`."""
        if structure == "colour":
            if "what" not in after:
                return f"in {after['colour']}"
            return f"as {_article(' '.join(after[key] for key in ('colour', 'what') if key in after))}"
        parts = [self._who(after, features)]
        parts += [f"facing {after['facing']}"] if "facing" in after else []
        parts += [f"pointing {after['direction']}"] if "direction" in after else []
        parts += _with(after)
        return " ".join(part for part in parts if part)

    def _who(self, after: dict[str, str], features: dict[str, str]) -> str:
        gender, role = after.get("gender", ""), self.features.roles.get(after.get("what", ""), "")
        if gender in _COUPLES:
            return f"as {_COUPLES[gender]}"
        if features["what"] in _AGES and gender:
            return f"as {_person(gender, features)}"
        if after.get("hair") == "bald":
            return f"as a bald {gender}" if gender else "bald"
        if role.startswith(("a ", "an ")):
            return f"as a {gender} {role.partition(' ')[2]}" if gender else f"as {role}"
        return " ".join(part for part in (gender and f"as a {gender}", role) if part)


def _person(gender: str, features: dict[str, str]) -> str:
    """
    >>> _person("woman", {"what": "1f9d2"}), _person("woman", {"what": "1f9d1"})
    ('a girl', 'a woman')
    """
    return _AGES.get(features["what"], {}).get(gender, f"a {gender}")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_STEPS = {
    "time": {sign * step: CLOCKS[sign] for sign in CLOCKS for step in HALF_HOURS},
    "phase": MOONS,
    "key": KEYS,
    "direction": TURNS,
}


def _step(key: str, before: str, after: str) -> int | None:
    """
    How far it is from one value to another, the shorter way round where a scale is round.

    >>> _step("time", "twelve o’clock", "one-thirty"), _step("phase", "full", "new"), _step("key", "3", "1")
    (3, 4, -2)
    """
    scale = SCALES[key]
    if before not in scale or after not in scale:
        return None
    step = scale.index(after) - scale.index(before)
    if key == "key":
        return step
    half = len(scale) // 2
    return (step + half - 1) % len(scale) - half + 1


def _family_change(before: str, after: str) -> tuple[str, ...] | None:
    """
    What becomes of a family, if it is one thing.

    >>> _family_change("man, boy", "man, girl, boy"), _family_change("man, boy", "woman, boy")
    (('more', 'girl'), ('swap', 'woman', 'man'))
    """
    mine, theirs = Counter(before.split(", ")), Counter(after.split(", "))
    gone, come = list((mine - theirs).elements()), list((theirs - mine).elements())
    if not gone + come or len(gone) > 1 or len(come) > 1 or "adult" in mine | theirs:
        return None
    if not gone:
        return "more", come[0]
    if mine[gone[0]] > 1:  # nobody could say which of them
        return None
    return ("swap", come[0], gone[0]) if come else ("less", gone[0])


def _with(after: dict[str, str]) -> list[str]:
    """
    >>> _with({"skin": "dark", "hair": "red"}), _with({"left skin": "light"}), _with({"hair": "bald"})
    (['with red hair and dark skin'], ['with light skin on the left'], [])
    """
    hair, left, right = (after.get(key, "") for key in ("hair", "left skin", "right skin"))
    things = [f"{hair} hair"] if hair not in ("", "bald") else []
    things += [f"{after['skin']} skin"] if "skin" in after else []
    if left and left == right:
        return [f"both with {left} skin"]
    things += [f"{skin} skin on the {side}" for side, skin in (("left", left), ("right", right)) if skin]
    return [f"with {' and '.join(things)}"] if things else []
