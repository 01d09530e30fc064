"""Where things are in a scene and what is where, asked and answered; and scenes as a crop shows them."""

from __future__ import annotations

import dataclasses
import json
import random

from cases import Case, Side
from concepts import Concept
from examples import Placed, Scene
from likeness import Likeness
from preset import PRESET
from scenes import family, place_name, thing_phrase, value_phrase
from searching import aim_box, box_around, shows


PICTURES_A_ROW = 4
"""Scenes of a row, each with a question of its own."""
NUM_THINGS = {1: 0.2, 2: 0.2, 4: 0.2, None: 0.4}
"""How many things are left in a scene that is asked about, and how often; none for all of them. Where a thing is was
not learned from full scenes in a million questions: to find it and to say where it is are of no use alone. With one
thing, only the second is to be learned; with two, the first pays in every other question."""
ABOUT_TARGET = 0.5
"""Share of the questions that are about the target, such as the clock; the others are about any thing."""
WHERE = 0.65
"""Share of the questions that ask where a thing is, and not what is at a place."""
AGAIN = 0.4
"""Share of the queries for which the wrong box of something that may be taken for the thing is named beforehand: where
the first look was at the wrong thing, that is all a model has to go by."""
PLACE_WEIGHT = 2.5
"""Weight of a place in words. It comes before the box: nine places are learned sooner than hundreds of boxes."""

Exchange = tuple[str, str, float]
"""A question, its answer, and the weight of the answer's loss."""


def thinned(scene: Scene, count: int | None, rng: random.Random) -> Scene:
    """The scene with another target, maybe, and so many things in all; without `count`, with all of them."""
    things = range(len(scene.objects))
    target = scene.target if rng.random() < ABOUT_TARGET else rng.choice(things)
    others = [number for number in things if number != target]
    kept = sorted([target, *(others if count is None else rng.sample(others, count - 1))])
    return Scene(tuple(scene.objects[number] for number in kept), kept.index(target), scene.side)


def ask(scene: Scene, concepts: dict[str, Concept], rng: random.Random, reduced: bool) -> list[Exchange]:
    """
    What the target of a scene is, or where it is: first in words, then in which box.

    The first question is to be asked *before* the scene is shown, as a query is: then each part of the picture can be
    compared with it when it is read. Asked afterwards, what was read without it is all there is.

    Args:
        scene (`Scene`):
            What stands where.
        concepts (`dict[str, Concept]`):
            What it is.
        rng (`random.Random`):
            Source of chance.
        reduced (`bool`):
            Whether small things are too small to read.
    """
    name = _name(scene.objects[scene.target], concepts, reduced)
    unique = sum(_name(other, concepts, reduced) == name for other in scene.objects) == 1
    if unique and rng.random() < WHERE:
        return [
            (f"Where is {name}?", place_name(scene, scene.target), PLACE_WEIGHT),
            ("In which box?", _box(scene), 1.0),
        ]
    return [(f"What is at {_box(scene)}?", name, 1.0)]


def point_out(case: Case, rng: random.Random, likeness: Likeness) -> list[Exchange]:
    """
    Where what a query asks for is in one of its candidates, which are scenes.

    Args:
        case (`Case`):
            The query and its candidates.
        rng (`random.Random`):
            Source of chance.
        likeness (`Likeness`):
            Says what may be taken for what is asked for.
    """
    number = case.order[0] + 1
    if case.kind.startswith("detail"):  # all look alike from afar
        number = rng.randint(1, len(case.candidates))
    scene, told = case.sides[number].scene, case.kind.endswith("/place")
    hint = _hint(scene, likeness.mistaken(scene, rng, nearby=told)) if rng.random() < AGAIN else ""
    if told:  # the query says it; a place could be copied
        return [(f"{hint}In which box is it in {number}?", _box(scene), 1.0)]
    place = place_name(scene, scene.target)
    return [(f"{hint}Where is it in {number}?", place, PLACE_WEIGHT), ("In which box?", _box(scene), 1.0)]


def ask_middle(scene: Scene, concepts: dict[str, Concept]) -> Exchange:
    """What a crop of the target shows."""
    return "What is in the middle?", value_phrase(concepts[scene.objects[scene.target].drawing.code]), 1.0


def close_up(case: Case, rng: random.Random) -> Case:
    """The case with each scene as a crop of its target shows it."""
    tools = case.tools(PRESET)

    def crop(number: int, side: Side) -> Side:
        ref = tools.crop_image(aim_box(side.scene, rng), number).refs[0]
        return dataclasses.replace(side, view=side.view.region(ref.box))

    candidates = [crop(number, side) for number, side in enumerate(case.candidates, start=1)]
    return dataclasses.replace(case, candidates=candidates)


def _hint(scene: Scene, wrong: int | None) -> str:
    """Where the target is not; nothing where the box of what is taken for it shows it too."""
    if wrong is None:
        return ""
    box = box_around(scene.objects[wrong], scene)
    if shows([scene.side * edge for edge in box], scene.objects[scene.target].box):
        return ""
    return f"It is not in {json.dumps(box)}. "


def _name(thing: Placed, concepts: dict[str, Concept], reduced: bool) -> str:
    concept = concepts[thing.drawing.code]
    kind = family(concept) if reduced else None
    return f"a {kind}" if kind else thing_phrase(concept)


def _box(scene: Scene) -> str:
    """The target's box as a call would write it."""
    return json.dumps(box_around(scene.objects[scene.target], scene))
