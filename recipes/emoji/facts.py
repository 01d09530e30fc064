"""Questions that need knowledge: facts about countries, which their flags stand for, and definitions of words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from concepts import LOOK_ALIKE_FLAGS, Concept, may_be_confused
from examples import Drawing, Entry
from stock import ANYBODY, NothingToAsk, Question, Stock, grid, pick
from wordings import (
    FACT_TEXTS,
    FLAG_AND,
    OF_COUNTRY,
    QUESTIONS,
    THIS_AND_GLOSS,
    THIS_FLAG_AND,
    TO_GLOSS,
    TO_NAME,
    WHICH_COUNTRY,
    WORD_AND_GLOSS,
)


FACTS = {"capital": 0.45, "continent": 0.15, "language": 0.25, "currency": 0.15}
"""Kinds of facts, and their shares."""
NEAR = 0.6
"""Share of the wrong answers that are of the same continent, or of the same sort of things."""
WHOSE_SHARE, ASIDE_SHARE = 0.25, 0.5
"""Shares of the questions about a flag that ask whose it is, and of those with a candidate that is true of the country
but answers another question."""
MIN_FLAGS = 20
"""An artist who drew fewer flags is not asked about any."""
SHORT_GLOSS = 12
"""Most words of a definition that stands beside a picture or among candidates."""
TRIES = 60


# --- countries -------------------------------------------------------------------------------------------------------


class CountryFacts:
    """A fact in words, and either countries or values to choose from."""

    def __init__(self, stock: Stock) -> None:
        self.stock, self._flags = stock, _Flags(stock, (ANYBODY,))

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        kind, artist, flag = self._flags.draw(rng)
        value, split = flag.country.facts[kind], self.stock.split
        if rng.random() < 0.5:
            others = self._flags.others(kind, artist, flag, count, rng, hardness)
            entries = [Entry(country_name(one), None, one.code) for one in (flag, *others)]
            query = Entry(WHICH_COUNTRY[kind].draw(split, rng).format(value))
            return Question(f"fact/{kind}/of", query, entries[0], entries[1:], [_grade(flag, one) for one in others])
        text = OF_COUNTRY[kind].draw(split, rng).format(flag.country.name)
        texts = self._flags.wrong_values(kind, artist, flag, count, rng, hardness)
        query = Entry(text[0].upper() + text[1:] if text.startswith("the ") else text, None, flag.code)
        return Question(f"fact/{kind}", query, Entry(value), [Entry(text) for text in texts], [1] * count)


class FlagQuestions:
    """A flag and a question about its country."""

    def __init__(self, stock: Stock) -> None:
        self.stock, self._flags = stock, _Flags(stock, stock.artists)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        kind, artist, flag = self._flags.draw(rng)
        facts = flag.country.facts
        if rng.random() < WHOSE_SHARE:
            others = self._flags.others("", artist, flag, count, rng, hardness)
            kind, right, wrong = "country", country_name(flag), [country_name(other) for other in others]
        else:
            right = facts[kind]
            wrong = self._flags.wrong_values(kind, artist, flag, count, rng, hardness)
        grades = [1] * count
        asides = [text for other, text in facts.items() if other != kind] + [country_name(flag)] * (kind != "country")
        asides = [text for text in asides if text not in (right, *wrong)]
        if asides and count > 1 and rng.random() < hardness * ASIDE_SHARE:
            wrong[-1], grades[-1] = pick(asides, rng), 0
        query = Entry(QUESTIONS[kind].draw(self.stock.split, rng), Drawing(artist, flag.code), flag.code)
        return Question(f"ask/{kind}", query, Entry(right), [Entry(text) for text in wrong], grades)


class FlagWithFact:
    """
    Flags with a fact beside each, of which the flag, the fact or both may be wrong.

    Args:
        stock (`Stock`): What there is.
        by_picture (`bool`): Whether the query shows the flag, by another artist, or names the country.
    """

    def __init__(self, stock: Stock, by_picture: bool) -> None:
        self.stock, self.by_picture = stock, by_picture
        self._flags = _Flags(stock, stock.artists, by_picture)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        kind, artist, flag = self._flags.draw(rng)
        value, split, code = flag.country.facts[kind], self.stock.split, flag.code
        if self.by_picture:
            drawing = Drawing(pick(self.stock.query_artists(artist, code), rng), code)
            query, banned = Entry(THIS_FLAG_AND[kind].draw(split, rng), drawing, code), self.stock.twins(*drawing)
        else:
            query, banned = Entry(FLAG_AND[kind].draw(split, rng).format(flag.country.name), None, code), ()
        others = self._flags.others(kind, artist, flag, max(count - 2, 1), rng, hardness, banned)
        cells = grid(flag, value, [(other, other.country.facts[kind]) for other in others], count, rng)
        positive, *negatives = (
            Entry(FACT_TEXTS[kind].format(said), Drawing(artist, one.code), one.code)
            for one, said in ((flag, value), *cells)
        )
        grades = [2 if one is flag or said == value else 0 for one, said in cells]
        return Question(f"fact/{kind}", query, positive, negatives, grades)


class _Flags:
    """Flags by whoever draws them, of whose countries something can be asked."""

    def __init__(self, stock: Stock, artists: Sequence[str], by_picture: bool = False) -> None:
        self.stock = stock
        concepts = stock.concepts
        self.shown: dict[str, list[Concept]] = {}
        self.near: dict[tuple[str, str], list[Concept]] = {}
        self.asked: dict[str, list[tuple[str, Concept]]] = {kind: [] for kind in FACTS}
        for artist in artists:
            flags = [one for one in stock.all.get(artist, ()) if one.country]
            if len(flags) < MIN_FLAGS:
                continue
            self.shown[artist] = flags
            for flag in flags:
                self.near.setdefault((artist, flag.country.facts.get("continent", "")), []).append(flag)
                has_query = not by_picture or stock.query_artists(artist, flag.code)
                unlike = not stock.twins(artist, flag.code) and not any(
                    flag.code in group for group in LOOK_ALIKE_FLAGS
                )
                if flag.code in stock.known and has_query and unlike:
                    for kind in flag.country.facts:
                        self.asked[kind].append((artist, flag))
        self._shares = {kind: share for kind, share in FACTS.items() if self.asked[kind]}
        if not self._shares:
            raise NothingToAsk(f"there is no country among the {len(concepts)} concepts")

    def draw(self, rng: random.Random) -> tuple[str, str, Concept]:
        """A kind of fact, an artist, and a flag of whose country it is known."""
        (kind,) = rng.choices(list(self._shares), list(self._shares.values()))
        return kind, *pick(self.asked[kind], rng)

    def others(
        self,
        kind: str,
        artist: str,
        flag: Concept,
        count: int,
        rng: random.Random,
        hardness: float,
        banned: Sequence[str] | frozenset[str] = (),
    ) -> list[Concept]:
        """Countries of which the flag's value is not true, nor theirs of the flag's; any for no kind of fact."""
        chosen, taken, value = (
            [],
            {flag.code, *self.stock.twins(artist, flag.code), *banned},
            flag.country.facts.get(kind),
        )
        for other in self._candidates(kind, artist, flag, count, rng, hardness):
            its_value = other.country.facts.get(kind)
            wrong = its_value and not other.country.has(kind, value) and not flag.country.has(kind, its_value)
            if (wrong or not kind) and other.code not in taken:
                chosen.append(other)
                taken |= {other.code, *self.stock.twins(artist, other.code)}
            if len(chosen) == count:
                return chosen
        raise ValueError(f"there are too few countries to put {count} beside {flag.name!r}")

    def wrong_values(
        self, kind: str, artist: str, flag: Concept, count: int, rng: random.Random, hardness: float
    ) -> list[str]:
        """Values of other countries that are not true of the flag's; of another kind where there are too few."""
        values: list[str] = []
        for other in self._candidates(kind, artist, flag, count, rng, hardness):
            value = other.country.facts.get(kind)
            if value and value not in values and not flag.country.has(kind, value):
                values.append(value)
            if len(values) == count:
                return values
        others = (pick(self.shown[artist], rng).country.facts.get("capital") for _ in range(TRIES * count))
        values += list(
            dict.fromkeys(text for text in others if text and text not in (*values, *flag.country.facts.values()))
        )
        return values[:count]

    def _candidates(self, kind: str, artist: str, flag: Concept, count: int, rng: random.Random, hardness: float):
        near = self.near[artist, flag.country.facts.get("continent", "")] if kind != "continent" else ()
        for _ in range(TRIES * count):
            yield pick(near if near and rng.random() < hardness * NEAR else self.shown[artist], rng)


def country_name(flag: Concept) -> str:
    """A country's name on its own, such as `"Netherlands"`."""
    return flag.role.partition(": ")[2]


def _grade(flag: Concept, other: Concept) -> int:
    same = "continent" in flag.country.facts and flag.country.facts["continent"] == other.country.facts.get(
        "continent"
    )
    return 2 if same else 1


# --- definitions -----------------------------------------------------------------------------------------------------


class Definitions:
    """A definition and names to choose from, or the other way round."""

    def __init__(self, stock: Stock) -> None:
        self.stock, self._words = stock, _Words(stock, (ANYBODY,))

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        split = self.stock.split
        if rng.random() < 0.5:
            artist, word = self._words.draw(rng)
            others = self._words.others(artist, word, count, rng, hardness)
            query = Entry(TO_NAME.draw(split, rng).format(word.gloss), None, word.code)
            kind, entries = "definition/name", [Entry(one.role, None, one.code) for one in (word, *others)]
        else:
            artist, word = self._words.draw(rng, short=True)
            others = self._words.others(artist, word, count, rng, hardness, short=True)
            query = Entry(TO_GLOSS.draw(split, rng).format(word.role), None, word.code)
            kind, entries = "definition", [Entry(one.gloss, None, one.code) for one in (word, *others)]
        return Question(kind, query, entries[0], entries[1:], [_near(word, one) for one in others])


class PictureDefinitions:
    """A picture, and definitions to choose from."""

    def __init__(self, stock: Stock) -> None:
        self.stock, self._words = stock, _Words(stock, stock.artists)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, word = self._words.draw(rng, short=True)
        others = self._words.others(artist, word, count, rng, hardness, short=True)
        entries = [Entry(one.gloss, None, one.code) for one in (word, *others)]
        query = Entry(QUESTIONS["definition"].draw(self.stock.split, rng), Drawing(artist, word.code), word.code)
        return Question("ask/definition", query, entries[0], entries[1:], [_near(word, one) for one in others])


class PictureWithDefinition:
    """
    Pictures with a definition beside each, of which the picture, the definition or both may be wrong.

    Args:
        stock (`Stock`): What there is.
        by_picture (`bool`): Whether the query shows the thing, by another artist, or names it.
    """

    def __init__(self, stock: Stock, by_picture: bool) -> None:
        self.stock, self.by_picture = stock, by_picture
        self._words = _Words(stock, stock.artists, by_picture)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, word = self._words.draw(rng, short=True)
        split, code = self.stock.split, word.code
        if self.by_picture:
            drawing = Drawing(pick(self.stock.query_artists(artist, code), rng), code)
            query, banned = Entry(THIS_AND_GLOSS.draw(split, rng), drawing, code), self.stock.twins(*drawing)
        else:
            query, banned = Entry(WORD_AND_GLOSS.draw(split, rng).format(word.role), None, code), ()
        others = self._words.others(artist, word, max(count - 2, 1), rng, hardness, True, banned)
        cells = grid(word, word.gloss, [(other, other.gloss) for other in others], count, rng)
        positive, *negatives = (
            Entry(gloss, Drawing(artist, one.code), one.code) for one, gloss in ((word, word.gloss), *cells)
        )
        grades = [2 if one is word or gloss == word.gloss else 0 for one, gloss in cells]
        return Question("definition", query, positive, negatives, grades)


class _Words:
    """What a dictionary defines, by whoever draws it."""

    def __init__(self, stock: Stock, artists: Sequence[str], by_picture: bool = False) -> None:
        self.stock = stock
        self.shown: dict[tuple[str, bool], list[Concept]] = {}
        self.near: dict[tuple[str, str, bool], list[Concept]] = {}
        self.asked: dict[bool, list[tuple[str, Concept]]] = {False: [], True: []}
        for artist in artists:
            for word in (one for one in stock.all.get(artist, ()) if one.gloss):
                has_query = not by_picture or stock.query_artists(artist, word.code)
                asked = word.code in stock.known and has_query and not stock.twins(artist, word.code)
                for short in (False, True) if _is_short(word) else (False,):
                    self.shown.setdefault((artist, short), []).append(word)
                    self.near.setdefault((artist, word.subgroup, short), []).append(word)
                    self.asked[short] += [(artist, word)] * bool(asked)
        if not self.asked[True]:
            raise NothingToAsk("there is no definition")

    def draw(self, rng: random.Random, short: bool = False) -> tuple[str, Concept]:
        """An artist and a word."""
        return pick(self.asked[short], rng)

    def others(
        self,
        artist: str,
        word: Concept,
        count: int,
        rng: random.Random,
        hardness: float,
        short: bool = False,
        banned: Sequence[str] | frozenset[str] = (),
    ) -> list[Concept]:
        """Words of which neither is a kind of the other and whose pictures nobody takes for its."""
        chosen, taken = [], {word.code, *self.stock.twins(artist, word.code), *banned}
        everything, near = self.shown[artist, short], self.near.get((artist, word.subgroup, short), ())
        for _ in range(TRIES * count):
            other = pick(near if len(near) > 1 and rng.random() < hardness * NEAR else everything, rng)
            is_new = other.code not in taken and all(other.gloss != one.gloss for one in chosen)
            if is_new and _is_other(word, other):
                chosen.append(other)
                taken |= {other.code, *self.stock.twins(artist, other.code)}
            if len(chosen) == count:
                return chosen
        raise ValueError(f"there are too few definitions to put {count} beside {word.name!r}")


def _is_short(word: Concept) -> bool:
    return len(word.gloss.split()) <= SHORT_GLOSS


def _is_other(word: Concept, other: Concept) -> bool:
    related = other.code in word.kinds or word.code in other.kinds or other.gloss == word.gloss
    return not related and other.base != word.base and not may_be_confused(word, other)


def _near(word: Concept, other: Concept) -> int:
    return int(other.subgroup == word.subgroup)
