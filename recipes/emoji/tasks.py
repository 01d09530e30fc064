"""
Reranking examples out of the art: one query, a few candidates, one positive, and rules that keep them fair.

Of all candidates exactly one is right. All pictures among them are by one artist, so that style gives nothing away;
none looks the same as another under another name; texts differ. What each split holds out is defined in `splits.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from art import Art
from concepts import Concept
from edits import Edits
from examples import SPLITS, Example
from examples import TASKS as NUMBERS
from facts import (
    CountryFacts,
    Definitions,
    FlagQuestions,
    FlagWithFact,
    PictureDefinitions,
    PictureWithDefinition,
)
from matching import Describe, Match, Message, Name, Paraphrase
from questions import AttributeQuestions
from scenes import KINDS, SceneMaker
from splits import pictures, split_codes, splits_of
from stock import Family, NothingToAsk, Stock


__all__ = ["TASKS", "ExampleMaker", "make_examples", "make_maker", "pictures", "split_codes", "splits_of"]

TASKS = tuple(NUMBERS)
"""What the query is, 2, what the candidates are; t text, i picture, it both."""

FAMILIES: dict[str, tuple[tuple[float, Callable[[Stock], Family]], ...]] = {
    "t2i": ((1.0, Describe),),
    "t2t": ((0.4, CountryFacts), (0.35, Definitions), (0.25, Paraphrase)),
    "t2it": (
        (0.4, partial(Describe, captioned=True)),
        (0.3, Message),
        (0.15, partial(FlagWithFact, by_picture=False)),
        (0.15, partial(PictureWithDefinition, by_picture=False)),
    ),
    "i2t": ((1.0, Name),),
    "i2i": ((1.0, Match),),
    "it2t": (
        (0.4, AttributeQuestions),
        (0.2, FlagQuestions),
        (0.2, partial(Edits, side="text")),
        (0.1, PictureDefinitions),
        (0.1, partial(Name, asked=True)),
    ),
    "it2i": ((1.0, Edits),),
    "it2it": (
        (0.5, partial(Edits, side="both")),
        (0.25, partial(FlagWithFact, by_picture=True)),
        (0.25, partial(PictureWithDefinition, by_picture=True)),
    ),
}
"""Task to its sorts of questions and their shares."""


def make_examples(
    art: Art,
    concepts: dict[str, Concept],
    task: str,
    split: str,
    n: int,
    seed: int,
    num_candidates: int = 5,
) -> list[Example]:
    """
    Draw examples; the same arguments give the same examples on every machine.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        task (`str`): One of `TASKS`.
        split (`str`): One of `splits_of(task)`.
        n (`int`): Number of examples.
        seed (`int`): Seed of the draw; what is held out does not depend on it.
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included.

    Returns:
        `list[Example]`: The examples.
    """
    return ExampleMaker(art, concepts, task, split, num_candidates).make(n, seed)


class ExampleMaker:
    """
    Draws examples of one task and split; keep it to draw again and again.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        task (`str`): One of `TASKS`.
        split (`str`): One of `splits_of(task)`.
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included.
        hardness (`float`, *optional*, defaults to 1.0): Factor of the shares of hard negatives; 0 draws all at random.

    Raises:
        ValueError: Unknown task or split, or there is nothing to ask for.
    """

    def __init__(
        self,
        art: Art,
        concepts: dict[str, Concept],
        task: str,
        split: str,
        num_candidates: int = 5,
        hardness: float = 1.0,
    ) -> None:
        if task not in TASKS or split not in splits_of(task):
            raise ValueError(f"task {task!r} must be one of {TASKS} and split {split!r} one of its own among {SPLITS}")
        self.task, self.split = task, split
        self.num_candidates = num_candidates
        self.hardness = hardness
        stock = Stock(art, concepts, split)
        self._families, self._shares = [], []
        for share, make in FAMILIES[task]:
            try:
                self._families.append(make(stock))
            except NothingToAsk:
                continue
            self._shares.append(share)
        if not self._families:
            raise ValueError(f"nothing can be asked for in {task}, {split}: {len(stock.pictures)} pictures fit it")

    def make(self, n: int, seed: int) -> list[Example]:
        """
        Draw examples.

        Args:
            n (`int`): How many.
            seed (`int`): Seed of the draw.

        Returns:
            `list[Example]`: The examples.

        Raises:
            ValueError: An artist drew too little for that many fair candidates.
        """
        rng = random.Random(f"{seed}/{self.task}/{self.split}")
        return [self._example(rng, f"{self.task}-{self.split}-{seed}-{number:06d}") for number in range(n)]

    def _example(self, rng: random.Random, qid: str) -> Example:
        (family,) = rng.choices(self._families, self._shares)
        question = family.draw(rng, self.num_candidates - 1, self.hardness)
        return question.to_example(qid, self.task, self.split, rng)


def make_maker(
    art: Art,
    concepts: dict[str, Concept],
    task: str,
    split: str,
    num_candidates: int = 5,
    hardness: float = 1.0,
) -> ExampleMaker | SceneMaker:
    """
    Whoever draws the examples of a task, or of a kind of scene, which is text to image.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        task (`str`): One of `TASKS` or of `KINDS` of scenes: `"overview"`, `"detail"`.
        split (`str`): One of `splits_of(task)`.
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included.
        hardness (`float`, *optional*, defaults to 1.0): Factor of the shares of hard negatives; 0 draws all at random.
    """
    maker = SceneMaker if task in KINDS else ExampleMaker
    return maker(art, concepts, task, split, num_candidates, hardness)
