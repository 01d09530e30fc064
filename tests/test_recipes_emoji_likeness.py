"""Which things in a scene are taken for one another."""

from __future__ import annotations

import collections
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from examples import Drawing, Placed, Scene
from likeness import MISTAKEN, Likeness


COLOURS = {"clock": (255, 0, 0), "apple": (250, 10, 0), "brick": (200, 0, 0), "sea": (0, 0, 255), "other": (255, 0, 0)}
BASES = {"other": "clock"}  # as another time on the same clock


class OneColour:
    """Drawings of one colour each."""

    def image(self, artist: str, code: str) -> np.ndarray:
        return np.full((9, 9, 3), COLOURS[code], np.uint8)


@pytest.fixture
def likeness() -> Likeness:
    concepts = {
        code: SimpleNamespace(base=BASES.get(code, code), subgroup="", attributes={}, noun=code) for code in COLOURS
    }
    return Likeness(OneColour(), concepts)


def scene(*codes: str, lefts=None, sides=None) -> Scene:
    """Things side by side, the first of which is the target."""
    lefts, sides = lefts or range(0, 100 * len(codes), 100), sides or [50] * len(codes)
    things = [
        Placed(Drawing("noto", code), left, 0, side) for code, left, side in zip(codes, lefts, sides, strict=True)
    ]
    return Scene(tuple(things), 0, 1008)


def drawn(likeness: Likeness, scene: Scene, **options) -> list[int | None]:
    """What is taken for the target, most often first."""
    rng = random.Random(0)
    counts = collections.Counter(likeness.mistaken(scene, rng, **options) for _ in range(400))
    return [index for index, _ in counts.most_common()]


def test_what_looks_most_alike_is_taken_for_it_most_often(likeness):
    assert drawn(likeness, scene("clock", "sea", "brick", "apple")) == [3, 2, 1]


def test_size_tells_things_apart_too(likeness):
    # 24 of 50 pixels are 0.7 of their mean: more than between red and brick, 55 of 255 in one of three colours.
    assert drawn(likeness, scene("clock", "apple", "brick", sides=[50, 24, 50])) == [2, 1]


def test_neighbours_where_the_place_is_known(likeness):
    assert drawn(likeness, scene("clock", "apple", "sea", "brick", lefts=[0, 600, 100, 300]), nearby=True) == [2, 3, 1]


def test_only_the_nearest_ones(likeness):
    many = scene("clock", *["sea"] * 5, lefts=range(0, 600, 100))
    assert drawn(likeness, many, nearby=True) == [1, 2, 3] and len(MISTAKEN) == 3


@pytest.mark.parametrize("codes", [("clock",), ("clock", "other")], ids=["alone", "with its like"])
def test_nothing_is_taken_for_it_where_there_is_nothing_else(likeness, codes):
    assert likeness.mistaken(scene(*codes), random.Random(0)) is None
