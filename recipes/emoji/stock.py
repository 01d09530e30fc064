"""What the examples of a split are made of: the pictures that may be asked for, and fair negatives for each."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from art import TRAIN_ARTISTS, Art
from concepts import PEOPLE, Concept, may_be_confused
from examples import Drawing, Entry, Example
from splits import known_codes, pictures, shown_codes, split_artists, split_codes


SAME_BASE, SAME_SUBGROUP = 0.5, 0.3
"""Shares of the negatives that are another variant of the positive, and its neighbours; the rest is random.
Where no variant can compete, a neighbour does, and where none can, anything."""
ANYBODY = ""
"""Stands for the artist where nothing is drawn: any concept of the split will do."""


@dataclass(frozen=True, slots=True)
class Question:
    """
    An example before its candidates are put in order.

    Args:
        kind (`str`): What sort of question it is within the task.
        query (`Entry`): What is asked for.
        positive (`Entry`): The right candidate.
        negatives (`list[Entry]`): The wrong ones.
        grades (`list[int]`): How relevant each of these is nonetheless: 0 to 2.
    """

    kind: str
    query: Entry
    positive: Entry
    negatives: list[Entry]
    grades: list[int]

    def to_example(self, qid: str, task: str, split: str, rng: random.Random) -> Example:
        """
        The example, its right candidate anywhere among the others.

        Args:
            qid (`str`): Its unique name.
            task (`str`): Its task.
            split (`str`): Its split.
            rng (`random.Random`): Source of chance.
        """
        place = int(rng.random() * (len(self.negatives) + 1))
        candidates, relevance = list(self.negatives), list(self.grades)
        candidates.insert(place, self.positive)
        relevance.insert(place, 3)
        return Example(qid, task, split, self.query, candidates, place, relevance, self.kind)


class Family(Protocol):
    """Draws questions of one sort. Whoever makes one gets a `NothingToAsk` where the data hold no such question."""

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        """
        One question.

        Args:
            rng (`random.Random`): Source of chance.
            count (`int`): Number of negatives.
            hardness (`float`): Factor of the shares of hard negatives; 0 draws all at random.
        """


class NothingToAsk(ValueError):
    """The data of a split hold no question of some sort."""


class Stock:
    """
    The pictures and concepts of one split.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        split (`str`): One of `SPLITS`.
    """

    def __init__(self, art: Art, concepts: dict[str, Concept], split: str) -> None:
        self.art, self.concepts, self.split = art, concepts, split
        self.artists = split_artists(art, split)
        """Who draws the candidates."""
        self.wanted = split_codes(concepts, split)
        """Codes that may be positives."""
        self.known = known_codes(concepts, split)
        """Codes that may be positives where there is no combination to hold out."""
        self.shown = shown_codes(concepts, split)
        """Codes that may stand beside them."""
        self.pictures = pictures(art, concepts, split)
        """Pictures of `wanted`."""
        self.all: dict[str, list[Concept]] = {}
        self.base: dict[tuple[str, str], list[Concept]] = {}
        self.subgroup: dict[tuple[str, str], list[Concept]] = {}
        for artist, drawn in {**art.codes, ANYBODY: concepts}.items():
            for concept in (concepts[code] for code in sorted(self.shown.intersection(drawn))):
                self.all.setdefault(artist, []).append(concept)
                self.base.setdefault((artist, concept.base), []).append(concept)
                self.subgroup.setdefault((artist, concept.subgroup), []).append(concept)

    def twins(self, artist: str, code: str) -> frozenset[str]:
        """The other codes whose pictures by this artist look the same."""
        return frozenset() if artist == ANYBODY else self.art.twins(artist, code)

    def query_artists(self, artist: str, code: str) -> tuple[str, ...]:
        """The training artists besides this one who drew the same thing."""
        others = (other for other in TRAIN_ARTISTS if other != artist and other in self.art.codes)
        return tuple(other for other in others if self.art.has(other, code))

    def negatives(
        self,
        artist: str,
        concept: Concept,
        count: int,
        rng: random.Random,
        hardness: float = 1.0,
        banned: Iterable[str] = (),
        ignore: tuple[str, ...] = (),
        tags: Sequence[str] = (),
    ) -> list[Concept]:
        """
        Concepts that cannot be taken for the positive, nor for each other, as one artist draws them.

        Args:
            artist (`str`): Who draws them, or `ANYBODY`.
            concept (`Concept`): The positive.
            count (`int`): How many.
            rng (`random.Random`): Source of chance.
            hardness (`float`, *optional*, defaults to 1.0): Factor of the shares of variants and neighbours.
            banned (`Iterable[str]`, *optional*): Codes that may not be drawn; the positive and its twins never are.
            ignore (`tuple[str, ...]`, *optional*): Attributes that the description leaves unsaid.
            tags (`Sequence[str]`, *optional*): Keywords that none of them may have.

        Raises:
            ValueError: The artist drew too little for that many.
        """
        chosen: list[Concept] = []
        banned = {concept.code, *self.twins(artist, concept.code), *banned}
        for _ in range(count):
            share, other = rng.random(), None
            if share < hardness * SAME_BASE:
                other = draw_fair(self.base.get((artist, concept.base), ()), concept, banned, rng, ignore, tags)
            if other is None and share < hardness * (SAME_BASE + SAME_SUBGROUP):
                other = draw_fair(
                    self.subgroup.get((artist, concept.subgroup), ()), concept, banned, rng, ignore, tags
                )
            if other is None:
                other = draw_fair(self.all[artist], concept, banned, rng, ignore, tags, tries=200)
            if other is None:
                raise ValueError(f"{artist} drew too little to put {count} beside {concept.name!r}")
            chosen.append(other)
            banned.add(other.code)
            banned.update(self.twins(artist, other.code))
        return chosen


def draw_fair(
    pool: Sequence[Concept],
    concept: Concept,
    banned: set[str],
    rng: random.Random,
    ignore: tuple[str, ...] = (),
    tags: Sequence[str] = (),
    tries: int = 8,
) -> Concept | None:
    """One of a pool that cannot be taken for the positive; `None` where a few tries find none."""
    size, draw = len(pool), rng.random
    for _ in range(tries if size > 1 else 0):  # the positive alone is no pool
        other = pool[int(draw() * size)]
        if other.code in banned or may_be_confused(concept, other, ignore):
            continue
        if any(tag in other.keywords or tag in other.name for tag in tags):
            continue
        return other
    return None


class Draw:
    """
    Draws pictures, half of them uniform, half of them base by base: most pictures are skin variants.

    Args:
        drawings (`Sequence[Drawing]`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.

    Raises:
        NothingToAsk: There are none.
    """

    def __init__(self, drawings: Sequence[Drawing], concepts: dict[str, Concept]) -> None:
        if not drawings:
            raise NothingToAsk("there is no such picture")
        self.drawings = list(drawings)
        by_base: dict[str, list[Drawing]] = {}
        for drawing in self.drawings:
            by_base.setdefault(concepts[drawing.code].base, []).append(drawing)
        self._by_base = list(by_base.values())

    def __call__(self, rng: random.Random) -> Drawing:
        drawings = self.drawings if rng.random() >= 0.5 else pick(self._by_base, rng)
        return pick(drawings, rng)


def grid(
    right: Any, said: str, wrong: Sequence[tuple[Any, str]], count: int, rng: random.Random
) -> list[tuple[Any, str]]:
    """
    Pairs of a thing and a text, of which one part or both are wrong.

    The first are the other corners of a square (right and wrong thing, right and wrong text), so that neither part
    alone tells the right pair, nor does having much in common with the others.

    Args:
        right (`Any`): The right thing.
        said (`str`): The right text.
        wrong (`Sequence[tuple]`): Wrong things, each with the wrong text that goes with it: one, or `count - 2`.
        count (`int`): How many pairs.
        rng (`random.Random`): Source of chance.

    Returns:
        `list[tuple]`: The pairs.
    """
    (other, text), *more = wrong
    pairs = [(right, text), (other, said), (other, text)]
    rng.shuffle(pairs)
    pairs += [(thing, said if rng.random() < 0.5 else its_text) for thing, its_text in more]
    return pairs[:count]


def grade(concept: Concept, other: Concept) -> int:
    """How near another concept comes: 2 another variant of it, 1 its subgroup, 0 anything else."""
    return 2 if other.base == concept.base else int(other.subgroup == concept.subgroup)


def sort_of(concept: Concept) -> str:
    """What sort of thing it is, in one word, for reports."""
    if concept.subgroup in PEOPLE:
        return "person"
    if "skin" in concept.attributes:
        return "hand"
    return "flag" if concept.group == "flags" else "symbol" if concept.group == "symbols" else "thing"


def pick(choices: Sequence, rng: random.Random):
    """One of them, quickly."""
    return choices[int(rng.random() * len(choices))]
