"""
What trained models are compared on: fixed numbers of held-out queries of each task, mixed.

A third asks for details, which only tools can tell, and a sixth for what a glance at a scene is enough for, so that
calls that are needed and calls that are not both weigh. The rest is every other task in equal parts.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any, NamedTuple

from examples import Example
from lessons import endless, take_new


class HeldOut(NamedTuple):
    """
    A set of held-out queries.

    Args:
        split (`str`): The split that they are drawn from.
        counts (`dict[str, int]`): How many of each task.
    """

    split: str
    counts: dict[str, int]


HELD_OUT = {
    "test": HeldOut(
        "test_combination",
        {
            "detail": 800,
            "overview": 400,
            **dict.fromkeys(("t2i", "t2t", "t2it", "i2t", "i2i", "it2t", "it2i", "it2it"), 150),
        },
    ),
    "test_artist": HeldOut(
        "test_artist", {"detail": 200, "overview": 100, **dict.fromkeys(("t2i", "i2i", "i2t", "it2i"), 75)}
    ),
}
"""Name of each set: 2,400 held-out combinations, wordings and layouts, of which training asks none, and 600 queries
about an artist never seen, which training may have asked about others."""


def draw_held_out(makers: dict[str, Any], name: str, counts: dict[str, int], seed: int) -> list[Example]:
    """
    Queries of all tasks in a random order, so that the first ones are a fair part of all.

    Args:
        makers (`dict[str, ExampleMaker | SceneMaker]`): Who draws the examples of each task, of one held-out split.
        name (`str`): Of the set; the ids of its queries begin with it.
        counts (`dict[str, int]`): How many of each task.
        seed (`int`): Seed of the draw.

    Returns:
        `list[Example]`: The examples, no two of which ask the same.

    Raises:
        ValueError: A task has too few different queries.
    """
    tasks = [task for task, count in counts.items() for _ in range(count)]
    random.Random(f"{seed}/{name}").shuffle(tasks)
    streams = {task: endless(makers[task], f"{seed}/{name}/{task}") for task in counts}
    asked: set[tuple[Any, ...]] = set()
    drawn = (take_new(task, streams[task], asked) for task in tasks)
    return [dataclasses.replace(example, qid=f"{name}-{number:05d}") for number, example in enumerate(drawn)]
