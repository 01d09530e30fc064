"""
What the later stages ask: queries for rejection sampling and for GRPO, of which none was asked before.

Both learn most from queries that are right now and then, and after SFT these are the details. GRPO begins with
details whose place is named coarsely ("the clock in the lower left"): a crop of that place shows what is asked for, so
that looking pays before the model can find a clock by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples import Example, Scene
from stages import COLD_START, Source


RSFT_TASKS = {
    "t2i": 0.1,
    "i2i": 0.09,
    "i2t": 0.05,
    "it2i": 0.1,
    "it2it": 0.03,
    "it2t": 0.04,
    "t2it": 0.04,
    "t2t": 0.03,
    "overview": 0.07,
    "detail": 0.45,
}
GRPO_TASKS = {
    "t2i": 0.06,
    "i2i": 0.06,
    "i2t": 0.03,
    "it2i": 0.08,
    "it2it": 0.02,
    "it2t": 0.04,
    "t2it": 0.02,
    "t2t": 0.02,
    "overview": 0.07,
    "detail": 0.6,
}
"""Shares of the tasks in what each of them asks."""
PLACED_FIRST = 0.08
"""Share of GRPO's queries, from the first, whose details all have a place; of the others half have one. Thirteen steps
of the recipe: after fifty, the model had forgotten where things without a place are."""
TRIES = 1000
"""Draws in a row without a new query after which a task counts as exhausted."""


def identity(example: Example) -> tuple[Any, ...]:
    """
    What two examples share that ask the same.

    That is the query; of scenes, which are asked for in the same words again and again, also the scene that is right.
    """
    right = example.candidates[example.positive].image
    return example.query, right if isinstance(right, Scene) else None


def cold_start_queries(data: Path, seed: int) -> set[tuple[Any, ...]]:
    """
    What the cold start asks.

    Args:
        data (`Path`): Folder that `build_data.py` filled.
        seed (`int`): Seed of the cold start.

    Returns:
        `set[tuple]`: The identities of its queries.
    """
    source = Source(data, data / "processor", seed)
    return {identity(source.cold_start_example(number)[0]) for number in range(COLD_START)}


def draw_lesson(
    makers: dict[str, Any],
    name: str,
    shares: dict[str, float],
    count: int,
    seed: int,
    asked: set[tuple[Any, ...]],
    placed_first: float = 0.0,
) -> list[Example]:
    """
    Queries of all tasks, mixed, in the order in which they are to be asked.

    Args:
        makers (`dict[str, ExampleMaker | SceneMaker]`): Who draws the examples of each task.
        name (`str`): Of the lesson; the ids of its queries begin with it.
        shares (`dict[str, float]`): Shares of the tasks.
        count (`int`): How many.
        seed (`int`): Seed of the draw.
        asked (`set[tuple]`): Identities of what was asked before; those of the new queries are added.
        placed_first (`float`, *optional*, defaults to 0.0): Share of the queries, from the first, whose details all
            have a place.

    Returns:
        `list[Example]`: The examples.

    Raises:
        ValueError: A task has too little that was not asked before.
    """
    rng = random.Random(f"{seed}/{name}")
    streams = {task: endless(makers[task], f"{seed}/{name}/{task}") for task in shares}
    drawn = []
    for number, task in enumerate(rng.choices(list(shares), list(shares.values()), k=count)):
        is_placed = task == "detail" and number < placed_first * count
        example = take_new(task, streams[task], asked, is_placed)
        drawn.append(dataclasses.replace(example, qid=f"{name}-{number:05d}"))
    return drawn


def endless(maker: Any, seed: str) -> Iterator[Example]:
    """Examples without end, some of which may ask the same."""
    rng = random.Random(seed)
    while True:
        yield from maker.make(100, rng.getrandbits(48))


def take_new(task: str, stream: Iterator[Example], asked: set[tuple[Any, ...]], is_placed: bool = False) -> Example:
    """
    The next example that asks what was not asked before.

    Args:
        task (`str`): Its task.
        stream (`Iterator[Example]`): Where it comes from.
        asked (`set[tuple]`): Identities of what was asked before; its own is added.
        is_placed (`bool`, *optional*, defaults to `False`): Whether it must name a place.

    Raises:
        ValueError: Nothing new comes.
    """
    for example in itertools.islice(stream, TRIES):
        if identity(example) not in asked and (example.kind.endswith("/place") or not is_placed):
            asked.add(identity(example))
            return example
    raise ValueError(f"{task} has too few queries: {TRIES} draws in a row brought nothing new")
