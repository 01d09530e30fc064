"""Which things in a scene may be taken for one another from afar, where only colour and shape are seen."""

from __future__ import annotations

import random

import numpy as np
from art import Art
from concepts import Concept
from examples import Drawing, Placed, Scene
from scenes import family


CELLS = 3
"""A drawing is looked at as so many cells across and down: about what an overview has of a small one."""
MISTAKEN = (0.6, 0.25, 0.15)
"""How often the thing most like another is taken for it, and how often the next ones are."""


class Likeness:
    """
    Looks of drawings, kept once they are known.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): What they show.
    """

    def __init__(self, art: Art, concepts: dict[str, Concept]):
        self.art, self.concepts = art, concepts
        self._looks: dict[Drawing, np.ndarray] = {}

    def mistaken(self, scene: Scene, rng: random.Random, nearby: bool = False) -> int | None:
        """
        A thing that somebody takes for the target; none that is of its kind, such as another clock.

        Args:
            scene (`Scene`): What stands where.
            rng (`random.Random`): Source of chance.
            nearby (`bool`, *optional*, defaults to `False`): Whether it is a neighbour, whatever it looks like, as
                where the place is known.

        Returns:
            `int`, *optional*: Its index; `None` where there is nothing else.
        """
        target = scene.objects[scene.target]
        kind = self._kind(target)
        others = [index for index, thing in enumerate(scene.objects) if self._kind(thing) != kind]
        apart = _distance if nearby else self._difference
        nearest = sorted(others, key=lambda index: apart(scene.objects[index], target))[: len(MISTAKEN)]
        return rng.choices(nearest, MISTAKEN[: len(nearest)])[0] if nearest else None

    def _kind(self, thing: Placed) -> str:
        concept = self.concepts[thing.drawing.code]
        return family(concept) or concept.base

    def _difference(self, one: Placed, other: Placed) -> float:
        sides = 2 * abs(one.side - other.side) / (one.side + other.side)
        return float(np.abs(self._look(one.drawing) - self._look(other.drawing)).mean()) + sides

    def _look(self, drawing: Drawing) -> np.ndarray:
        """Mean colours of its cells, from 0 to 1."""
        if drawing not in self._looks:
            pixels = self.art.image(*drawing)
            side = len(pixels) // CELLS * CELLS
            cells = pixels[:side, :side].reshape(CELLS, side // CELLS, CELLS, side // CELLS, 3)
            self._looks[drawing] = cells.mean((1, 3)) / 255
        return self._looks[drawing]


def _distance(one: Placed, other: Placed) -> float:
    """Between their middles, in pixels."""
    left, top = (2 * place + one.side for place in (one.left, one.top))
    return float(np.hypot(left - 2 * other.left - other.side, top - 2 * other.top - other.side)) / 2
