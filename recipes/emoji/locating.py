"""Where things are in a scene and what is where, asked and answered; and scenes as a crop shows them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator

from cases import Case, Side
from concepts import Concept
from examples import Placed, Scene
from preset import PRESET
from scenes import family, place_name, thing_phrase, value_phrase
from searching import aim_box


QUESTIONS = 4
"""Questions about one scene."""
PLACE_WEIGHT = 2.5
"""Weight of a place that is asked for. To find a thing and say where it is is learned from places before it is learned
from numbers: asked for boxes only, the model named one box for everything after a million of them."""
ABOUT_TARGET = 0.8
"""Share of the scenes whose target the draw left out that are asked about it all the same."""


def locations(
    scene: Scene, concepts: dict[str, Concept], rng: random.Random, whole: bool, reduced: bool
) -> Iterator[tuple[str, str, float]]:
    """
    Questions about a scene, with their answers and the weights of these.

    Args:
        scene (`Scene`):
            What stands where.
        concepts (`dict[str, Concept]`):
            What it is.
        rng (`random.Random`):
            Source of chance.
        whole (`bool`):
            Whether the whole scene is seen; of a crop only the target is asked for.
        reduced (`bool`):
            Whether small things are too small to read.
    """
    target = scene.objects[scene.target]
    if not whole:
        yield "What is in the middle?", value_phrase(concepts[target.drawing.code]), 1.0
        return
    # Each thing once: who is asked again, or the other way round, need not look but can copy.
    numbers = rng.sample(range(len(scene.objects)), QUESTIONS)
    if scene.target not in numbers and rng.random() < ABOUT_TARGET:
        numbers[rng.randrange(QUESTIONS)] = scene.target
    for number in numbers:
        thing = scene.objects[number]
        name, box = _name(thing, concepts, reduced), _box(thing, scene)
        unique = sum(_name(other, concepts, reduced) == name for other in scene.objects) == 1
        if unique and rng.random() < 0.6:
            yield f"Where is {name}?", place_name(scene, number), PLACE_WEIGHT
            yield "In which box?", box, 1.0
        else:
            yield f"What is at {box}?", name, 1.0


def close_up(case: Case, rng: random.Random) -> Case:
    """The case with each scene as a crop of its target shows it."""
    tools = case.tools(PRESET)

    def crop(number: int, side: Side) -> Side:
        ref = tools.crop_image(aim_box(side.scene, rng), number).refs[0]
        return dataclasses.replace(side, view=side.view.region(ref.box))

    candidates = [crop(number, side) for number, side in enumerate(case.candidates, start=1)]
    return dataclasses.replace(case, candidates=candidates)


def _name(thing: Placed, concepts: dict[str, Concept], reduced: bool) -> str:
    concept = concepts[thing.drawing.code]
    kind = family(concept) if reduced else None
    return f"a {kind}" if kind else thing_phrase(concept)


def _box(thing: Placed, scene: Scene) -> str:
    """As a call would write it."""
    return json.dumps([round(value / scene.side, 2) for value in thing.box])
