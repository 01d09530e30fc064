"""Questions whose answer is what they show or say: descriptions, keywords, pictures by another artist, names."""

from __future__ import annotations

import itertools
import random

from concepts import Concept
from examples import Drawing, Entry
from stock import ANYBODY, Draw, Question, Stock, grade, grid, pick, sort_of
from wordings import DAYS, MESSAGE_TEXTS, MESSAGES, PARAPHRASES, PLACES, QUERIES, QUESTIONS, SENDERS, TAG_QUERIES


TAG_SHARE, SHORT_SHARE = 0.15, 0.3
"""Shares of text queries by keywords, and of default-skinned positives whose skin is left unsaid."""
RARE_TAG, SINGLE_TAG = 8, 2
"""A keyword may be in a query if no more than this many base concepts carry it, and be all of it if no more than that;
otherwise two are asked for."""
STYLES = 3
"""Ways in which text candidates are worded: one for all of a query, as in a catalogue."""
EXTRAS = {"sender": SENDERS, "day": DAYS, "place": PLACES}
"""What a text beside a picture tells that the picture does not."""


class Describe:
    """
    A description or keywords, and pictures by one artist.

    Args:
        stock (`Stock`): What there is.
        captioned (`bool`, *optional*, defaults to `False`):
            Whether each picture comes with a text, which names what it shows but not its skin.
    """

    def __init__(self, stock: Stock, captioned: bool = False) -> None:
        self.stock, self.captioned = stock, captioned
        attributes = {code: concept.attributes for code, concept in stock.concepts.items()}
        drawings = [one for one in stock.pictures if not captioned or "skin" in attributes[one.code]]
        self._draw = Draw(drawings, stock.concepts)
        self._tags = {} if captioned else _rare_tags(stock.concepts)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, code = self._draw(rng)
        concept = self.stock.concepts[code]
        kind, text, ignore, tags = self._word(concept, rng)
        # A keyword may well be true of a variant that does not carry it.
        banned = [variant.code for variant in self.stock.base[artist, concept.base]] if tags else ()
        others = self.stock.negatives(artist, concept, count, rng, hardness, banned, ignore, tags)
        shown = (concept, *others)
        entries = [Entry(one.noun if self.captioned else None, Drawing(artist, one.code), one.code) for one in shown]
        return _question(f"{kind}/{sort_of(concept)}", Entry(text, None, code), entries, concept, others)

    def _word(self, concept: Concept, rng: random.Random) -> tuple[str, str, tuple[str, ...], list[str]]:
        """Kind and text of a query, the attributes that it leaves unsaid, and the keywords that it uses."""
        split = self.stock.split
        choices = self._tags.get(concept.code)
        if choices and rng.random() < TAG_SHARE:
            tags = pick(choices, rng)
            return "keywords", TAG_QUERIES.draw(split, rng).format(" and ".join(tags)), (), tags
        template = QUERIES.draw(split, rng)
        if not self.captioned and concept.short_captions and rng.random() < SHORT_SHARE:
            return "short", template.format(pick(concept.short_captions, rng)), ("skin",), []
        kind = "caption" if self.captioned else "describe"
        return kind, template.format(describe(concept, split, rng)), (), []


class Match:
    """A picture, and pictures by another artist."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self._artists = {drawing: stock.query_artists(*drawing) for drawing in stock.pictures}
        self._draw = Draw([drawing for drawing, artists in self._artists.items() if artists], stock.concepts)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, code = drawing = self._draw(rng)
        concept, query_artist = self.stock.concepts[code], pick(self._artists[drawing], rng)
        banned = self.stock.twins(query_artist, code)
        others = self.stock.negatives(artist, concept, count, rng, hardness, banned)
        entries = [Entry(None, Drawing(artist, one.code), one.code) for one in (concept, *others)]
        query = Entry(None, Drawing(query_artist, code), code)
        return _question(f"match/{sort_of(concept)}", query, entries, concept, others)


class Name:
    """
    A picture, and descriptions in one wording.

    Args:
        stock (`Stock`): What there is.
        asked (`bool`, *optional*, defaults to `False`): Whether a question comes with the picture.
    """

    def __init__(self, stock: Stock, asked: bool = False) -> None:
        self.stock, self.asked = stock, asked
        self._draw = Draw(stock.pictures, stock.concepts)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, code = drawing = self._draw(rng)
        concept, style = self.stock.concepts[code], int(rng.random() * STYLES)
        others = self.stock.negatives(artist, concept, count, rng, hardness)
        entries = [Entry(in_style(one, self.stock.split, style), None, one.code) for one in (concept, *others)]
        text = QUESTIONS["name"].draw(self.stock.split, rng) if self.asked else None
        kind = f"{'ask/name' if self.asked else 'name'}/{sort_of(concept)}"
        return _question(kind, Entry(text, drawing, code), entries, concept, others)


class Paraphrase:
    """A description, and descriptions in another wording."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        codes = [code for code in sorted(stock.wanted) if len(stock.concepts[code].captions) > 1]
        self._draw = Draw([Drawing(ANYBODY, code) for code in codes], stock.concepts)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        code, split = self._draw(rng).code, self.stock.split
        concept, style = self.stock.concepts[code], int(rng.random() * STYLES)
        others = self.stock.negatives(ANYBODY, concept, count, rng, hardness)
        entries = [Entry(in_style(one, split, style), None, one.code) for one in (concept, *others)]
        text = pick([text for text in concept.captions if text != entries[0].text], rng)
        query = Entry(PARAPHRASES.draw(split, rng).format(text), None, code)
        return _question(f"paraphrase/{sort_of(concept)}", query, entries, concept, others)


class Message:
    """A description and who sent it, when or where, and pictures with a text that tells the latter."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        self._draw = Draw(stock.pictures, stock.concepts)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        artist, code = self._draw(rng)
        concept, kind = self.stock.concepts[code], pick(tuple(EXTRAS), rng)
        template = pick(MESSAGE_TEXTS[kind], rng)
        right, wrong = rng.sample(EXTRAS[kind], 2)
        split = self.stock.split
        text = MESSAGES[kind].draw(split, rng).format(describe(concept, split, rng), right)
        others = self.stock.negatives(artist, concept, max(count - 2, 1), rng, hardness)
        cells = grid(concept, right, [(other, wrong) for other in others], count, rng)
        positive, *negatives = (
            Entry(template.format(said), Drawing(artist, one.code), one.code)
            for one, said in ((concept, right), *cells)
        )
        grades = [2 if one is concept or said == right else 0 for one, said in cells]
        return Question(f"message/{kind}", Entry(text, None, code), positive, negatives, grades)


def describe(concept: Concept, split: str, rng: random.Random) -> str:
    """A complete description; "test_combination" also draws wordings that training never reads."""
    held_out = concept.held_out_captions if split == "test_combination" else ()
    return pick(concept.captions + held_out, rng)


def in_style(concept: Concept, split: str, style: int) -> str:
    """
    A complete description in a style that all concepts know.

    Args:
        concept (`Concept`): What to describe.
        split (`str`): One of `SPLITS`; "test_combination" has styles of its own.
        style (`int`): Number of the style, below `STYLES`.
    """
    if split == "test_combination":
        return concept.held_out_captions[style % len(concept.held_out_captions)]
    captions = concept.captions  # the last one is the plain name, the first a phrase; some have another between them
    if style == STYLES - 1:
        return captions[-1]
    return captions[style] if len(captions) == STYLES else captions[0]


def _question(kind: str, query: Entry, entries: list[Entry], concept: Concept, others: list[Concept]) -> Question:
    return Question(kind, query, entries[0], entries[1:], [grade(concept, other) for other in others])


def _rare_tags(concepts: dict[str, Concept]) -> dict[str, list[list[str]]]:
    """Code to the keywords, one or two, that tell what it is; none for plain people, nor for a stated skin tone."""
    bases: dict[str, set[str]] = {}
    for concept in concepts.values():
        for tag in concept.tags:
            bases.setdefault(tag, set()).add(concept.base)
    found = {}
    for code, concept in concepts.items():
        if concept.attributes.get("skin", "yellow") == "yellow" and concept.subgroup != "person":
            tags = [tag for tag in concept.tags if tag.islower() and len(bases[tag]) <= RARE_TAG]
            single = [[tag] for tag in tags if len(bases[tag]) <= SINGLE_TAG]
            found[code] = single + [list(pair) for pair in itertools.permutations(tags, 2)]
    return found
