"""How an annotator looks for the right scene: one candidate after another, not always enough of them, and not always
at the right place."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from cases import Case
from examples import Placed, Scene
from likeness import Likeness
from record import Record
from scenes import family, place_phrase, thing_phrase, value_phrase


CROPS = {0: 0.05, 1: 0.15, 2: 0.3, 3: 0.3, 4: 0.2}
"""How many candidates are cropped, and how often. The number is drawn beforehand, whether the right one is found or
not: when to stop is left to be learned from reward."""
MISSED_FIRST, MISSED_LATER = 0.3, 0.05
"""Shares of first crops, and of those of other candidates, that are aimed at something that may be taken for the
target. These are shown and not learned; what is learned is to look elsewhere then. When boxes anywhere stood here, a
model that had seen nothing where it looked looked there again: its second look met the target in one of fourteen
cases."""
NEEDLESS_SELECT, NEEDLESS_CALL = 0.08, 0.3
"""Shares of searches that begin with a look at whole scenes, which shows too little, and of scenes that need no closer
look and get one."""
BOX_SIDES = (0.12, 0.26)
"""Least and most side of a crop's box, as a share of the scene; a large target gets a little more than itself."""
GRID = 20
"""Boxes are written on a grid of so many steps a scene: 0.05 is about what a place is known to from an overview, and
few numbers are quicker to learn."""
AIM_ERROR = 0.012
"""Standard deviation of the middle of a box, as a share of the scene."""
SEEN = 0.85
"""Share of the target's side, across and down, that must be in view to read it."""


def search(record: Record, rng: random.Random, use_tools: bool, likeness: Likeness) -> None:
    """
    Plays a case of scenes to its end.

    Args:
        record (`Record`): The conversation so far.
        rng (`random.Random`): Source of chance.
        use_tools (`bool`): Whether tools may be called.
        likeness (`Likeness`): Says what is taken for what.
    """
    if record.case.kind.startswith("detail"):
        _Search(record, rng, likeness).play(use_tools)
    else:
        _glance(record, rng, use_tools)


class _Search:
    """A detail in each of several scenes that are alike but for it."""

    def __init__(self, record: Record, rng: random.Random, likeness: Likeness):
        self.record, self.case, self.rng, self.likeness = record, record.case, rng, likeness
        self.scene = self.case.candidates[0].scene
        """In the other candidates the same things stand in the same places, but for the target."""
        self.thing = family(self.case.candidates[0].concept)
        self.place_is_told = self.case.kind.endswith("/place")

    def play(self, use_tools: bool) -> None:
        best, count = self.case.order[0] + 1, len(self.case.candidates)
        crops = _draw(CROPS, self.rng) if use_tools else 0
        mistaken = self._mistaken(MISSED_FIRST) if crops else None
        thought = f"the {self.thing} {self._place(mistaken)} is too small to read"
        if not crops:
            return self.record.answer(f"{thought}; a guess.", self.case.order)
        if self.rng.random() < NEEDLESS_SELECT and self.record.calls_left > 1:
            numbers = list(range(1, min(count, self.record.preset.max_selected or count) + 1))
            arguments = {"target_images": numbers}
            self.record.call(f"{thought}; look at all.", "select_images", arguments, loss=mistaken is None)
            thought = "still too small"
        read: list[int] = []
        for number in range(1, min(crops, count) + 1):
            if not self._read(number, f"{thought}; look at {number}.", mistaken):
                break
            read.append(number)
            mistaken = self._mistaken(MISSED_LATER)
            thought = finding(self.case, number)
        order = conclude(best, read, count)
        first = order[0] + 1
        if first in read:
            ending = "." if first == read[-1] else f"; {first} is right."
        else:
            ending = f"; {first} is left." if len(read) == count - 1 else f"; maybe {first}."
        self.record.answer(thought + ending if read else f"{thought}; a guess.", order)

    def _mistaken(self, share: float) -> int | None:
        """What is taken for the target, if anything is."""
        if self.rng.random() >= share:
            return None
        return self.likeness.mistaken(self.scene, self.rng, nearby=self.place_is_told)

    def _place(self, mistaken: int | None) -> str:
        """Where the target seems to be."""
        return place_phrase(self.scene, self.scene.target if mistaken is None or self.place_is_told else mistaken)

    def _read(self, number: int, thought: str, mistaken: int | None) -> bool:
        """Crops until the target is in view; whether it came into view before the calls ran out."""
        scene = self.case.candidates[number - 1].scene
        while self.record.calls_left:
            aim = scene if mistaken is None else dataclasses.replace(scene, target=mistaken)
            arguments = {"bbox_2d": aim_box(aim, self.rng), "target_image": number}
            seen = self.record.call(thought, "crop_image", arguments, loss=mistaken is None).refs[0].box
            if in_view(scene, seen):
                return True
            mistaken = None
            thought = f"no {self.thing} there; maybe {self._place(None)}; look at {number} again."
        return False


def _glance(record: Record, rng: random.Random, use_tools: bool) -> None:
    """What is asked for can be seen at once; some look closer all the same."""
    case = record.case
    best = case.order[0] + 1
    side = case.sides[best]
    thing = thing_phrase(side.concept)
    glance = record.brief(f"{best} has {thing} {place_phrase(side.scene, side.scene.target)}", f"{best} has {thing}")
    if use_tools and rng.random() < NEEDLESS_CALL:
        box = aim_box(side.scene, rng)
        arguments = {"bbox_2d": box, "target_image": best}
        record.call(record.brief(f"{glance}; check it.", "check."), "crop_image", arguments)
        glance = f"{best} has {thing}"
    record.answer(f"{glance}.", case.order)


def finding(case: Case, number: int) -> str:
    """What a candidate's detail shows and whether it is what is asked for, such as `"2 shows three-thirty: no"`."""
    verdict = "yes" if number - 1 == case.order[0] else "no"
    return f"{number} shows {value_phrase(case.candidates[number - 1].concept)}: {verdict}"


def aim_box(scene: Scene, rng: random.Random) -> list[float]:
    """A box around the target, a little off, as shares of the scene, on the grid."""
    target = scene.objects[scene.target]
    x, y = (middle + rng.gauss(0, AIM_ERROR) for middle in _middle(target, scene))
    return _box(x, y, max(rng.uniform(*BOX_SIDES), _room(target, scene)))


def box_around(thing: Placed, scene: Scene) -> list[float]:
    """The box that shows a thing best."""
    return _box(*_middle(thing, scene), max(sum(BOX_SIDES) / 2, _room(thing, scene)))


def in_view(scene: Scene, seen: tuple[int, int, int, int]) -> bool:
    """Whether a region shows enough of the target to read it."""
    return shows(seen, scene.objects[scene.target].box)


def shows(seen: Sequence[float], box: Sequence[int]) -> bool:
    """
    Whether a region shows enough of what stands in a box to read it.

    >>> shows((0, 0, 100, 100), (60, 60, 102, 102)), shows((0, 0, 100, 100), (60, 60, 120, 120))
    (True, False)
    """
    spans = ((max(box[axis], seen[axis]), min(box[axis + 2], seen[axis + 2])) for axis in (0, 1))
    return all(stop - start >= SEEN * (box[2] - box[0]) for start, stop in spans)


def _middle(thing: Placed, scene: Scene) -> tuple[float, float]:
    left, top, right, bottom = thing.box
    return (left + right) / 2 / scene.side, (top + bottom) / 2 / scene.side


def _room(thing: Placed, scene: Scene) -> float:
    return 1.2 * thing.side / scene.side


def _box(x: float, y: float, side: float) -> list[float]:
    extent = round(GRID * side)
    left, top = (min(max(round(GRID * middle - extent / 2), 0), GRID - extent) for middle in (x, y))
    return [round(step / GRID, 2) for step in (left, top, left + extent, top + extent)]


def conclude(best: int, read: list[int], count: int) -> list[int]:
    """What was found, what was not looked at, and what was seen to be wrong, 0-based."""
    rest = [number for number in range(1, count + 1) if number not in read]
    found = [best] if best in read else []
    return [number - 1 for number in found + rest + [number for number in read if number != best]]


def _draw(shares: dict[int, float], rng: random.Random) -> int:
    return rng.choices(list(shares), list(shares.values()))[0]
