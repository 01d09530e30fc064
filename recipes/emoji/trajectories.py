"""What an attentive annotator would write: short thoughts, a look where rivals are close, and an answer.

The oracle knows what each picture shows. Its calls run through the real tools, so that each observation reads and is
cut as in use. A share of its turns are mistakes, which are shown but not learned, so that the model learns to go on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from cases import Case, Side
from concepts import Concept
from likeness import Likeness
from preset import PRESET
from record import Record
from searching import search

from vretrver_hf.protocol import Preset


CALL_IF_CLOSE, CALL_IF_CLEAR = 0.7, 0.25
"""Shares of trajectories with a call, where the best has close rivals and where it has none."""
SECOND_CALL, THIRD_CALL = 0.3, 0.1
"""Shares of those that go on to another call."""
MISTAKES, OUT_OF_CALLS, NO_TOOLS = 0.04, 0.01, 0.04
"""Shares of trajectories that begin with a mistake, that run out of calls, and whose prompt offers no tools."""

_DIFFERENCES = {
    "gender": "is a {}",
    "hair": "has {} hair",
    "members": "is {}",
    "colour": "is {}",
    "time": "shows {}",
    "key": "shows {}",
    "facing": "faces {}",
    "phase": "shows the phase {}",
    "direction": "points {}",
    "skin": "has {} skin",
}
_FAMILIES = {"clock": "a clock", "keycap": "a keycap", "1f46a": "a family"}
_SKIN = re.compile(r",? (?:both )?(?:with|and) [\w-]+ skin\b.*$")
_FACE = [0.2, 0.1, 0.8, 0.6]
_MIDDLE = [0.25, 0.25, 0.75, 0.75]


class Oracle:
    """
    Plays a case and writes the conversation down.

    Args:
        concepts (`dict[str, Concept]`):
            All concepts, for the names of families.
        count_tokens (`Callable[[str], int]`):
            Length of a text for the model: thoughts are kept short.
        likeness (`Likeness`):
            Says what is taken for what in a scene.
        preset (`Preset`, *optional*):
            The protocol.
    """

    def __init__(
        self,
        concepts: dict[str, Concept],
        count_tokens: Callable[[str], int],
        likeness: Likeness,
        preset: Preset = PRESET,
    ):
        self.concepts, self.count_tokens, self.likeness, self.preset = concepts, count_tokens, likeness, preset

    def play(self, case: Case, rng: random.Random) -> Record:
        """
        A whole conversation.

        Args:
            case (`Case`):
                The query and its candidates.
            rng (`random.Random`):
                Source of chance.

        Returns:
            `Record`: the conversation, to its answer.
        """
        use_tools = rng.random() >= NO_TOOLS
        record = Record(case, self.preset, use_tools, self.count_tokens)
        if use_tools:
            self._stumble(record, rng)
        if case.candidates[0].scene is not None:
            search(record, rng, use_tools and record.calls_left > 0, self.likeness)
        else:
            self._compare(record, rng, use_tools)
        return record

    def _compare(self, record: Record, rng: random.Random, use_tools: bool) -> None:
        """A case of single pictures and texts."""
        case = record.case
        thinker = _Thinker(case, self.concepts)
        calls = _plan(case, thinker, rng)[: record.calls_left] if use_tools else []
        look, finding = thinker.first_look(), thinker.finding()
        if not calls:
            thoughts = [f"{look}; {finding}."] if thinker.rivals else []
            return record.answer(record.brief(*thoughts, f"{look}.", f"{finding}."), case.order)
        question = f"check {thinker.question}."
        record.call(record.brief(f"{look}; {question}", f"{look}.", question), *calls[0])
        for call in calls[1:]:
            record.call(record.brief(f"{finding}; look closer.", "look closer."), *call)
        record.answer(record.brief(f"{finding}.", f"{thinker.best} fits best."), case.order)

    def _stumble(self, record: Record, rng: random.Random) -> None:
        """A call that the tools refuse, or one after another until none is left."""
        draw = rng.random()
        if draw < OUT_OF_CALLS:
            call = ("select_images", {"target_images": [rng.randint(0, len(record.case.candidates))]})
            while not record.warned:
                record.call("look.", *call, loss=False)
        elif draw < OUT_OF_CALLS + MISTAKES:
            record.call("look.", *_bad_call(record.case, rng), loss=False)


class _Thinker:
    """What can be said about a case, in a few words."""

    def __init__(self, case: Case, concepts: dict[str, Concept]):
        self.case, self.concepts = case, concepts
        self.best = case.order[0] + 1
        close = [number for number in (place + 1 for place in case.order[1:]) if self._is_rival(number)]
        self.rivals = sorted(close[:3])
        """Numbers of up to three other candidates of the best one's kind."""
        self._keys = self._differing_keys()

    @property
    def question(self) -> str:
        """What a closer look is to settle."""
        return f"the {self._keys[0]}" if self._keys else "the details"

    def first_look(self) -> str:
        """Which candidates come close, and what they have in common."""
        numbers = _listed(sorted([self.best, *self.rivals]))
        shown = self._common() if self.rivals else self._caption()
        several = bool(self.rivals)
        query, best = self.case.query, self._side(self.best)
        if query.view is not None and query.text is not None:
            return self._resolved()
        if best.view is None and (query.view is None or best.concept is None):
            return f"{self.best} fits best"
        if query.view is None:
            return f"{numbers} {'show' if several else 'shows'} {shown}"
        if best.view is None:
            return f"{numbers} {'fit' if several else 'fits'} 0, {shown}"
        return f"{numbers} {'show' if several else 'shows'} {shown} like 0"

    def _resolved(self) -> str:
        """What a picture and a text about it ask for together."""
        query, best = self.case.query, self._side(self.best)
        if best.view is None:
            return f"0 shows {_SKIN.sub('', query.concept.captions[0])}; {self.best} fits"
        return f"wanted: {best.concept.captions[0]}; {self.best} fits"

    def finding(self) -> str:
        """What tells the best from its rivals."""
        concept = self._side(self.best).concept
        facts = [_fact(key, concept.attributes[key]) for key in self._keys[:2]]
        return f"{self.best} {' and '.join(facts) if facts else 'fits best'}"

    def _side(self, number: int) -> Side:
        return self.case.sides[number]

    def _is_rival(self, number: int) -> bool:
        one, other = self._side(self.best).concept, self._side(number).concept
        return one is not None and other is not None and one.base == other.base

    def _differing_keys(self) -> list[str]:
        if not self.rivals:
            return []
        mine = self._side(self.best).concept.attributes
        others = [self._side(number).concept.attributes for number in self.rivals]
        return [key for key in _DIFFERENCES if key in mine and any(other.get(key) != mine[key] for other in others)]

    def _caption(self) -> str:
        concept = self._side(self.best).concept
        return concept.captions[0] if concept is not None else self._side(self.best).text

    def _common(self) -> str:
        concepts = [self._side(number).concept for number in (self.best, *self.rivals)]
        first = concepts[0]
        if all(concept.role == first.role for concept in concepts):
            return _SKIN.sub("", first.captions[0])
        if first.base in _FAMILIES:
            return _FAMILIES[first.base]
        if "colour" in first.attributes:
            return f"a {first.base}"
        if first.base in self.concepts:
            return _SKIN.sub("", self.concepts[first.base].captions[0])
        return first.role


def _fact(key: str, value: str) -> str:
    if value == "bald":
        return "is bald"
    if key == "gender" and " and " in value:
        return "shows a {} and a {}".format(*value.split(" and "))
    return _DIFFERENCES[key].format(value)


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _plan(case: Case, thinker: _Thinker, rng: random.Random) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a trajectory; none without a picture to look at."""
    focus = [number for number in sorted([thinker.best, *thinker.rivals]) if case.sides[number].view is not None]
    asked = [0] if case.query.view is not None else []
    if not (focus or asked) or rng.random() >= (CALL_IF_CLOSE if thinker.rivals else CALL_IF_CLEAR):
        return []
    best = thinker.best if case.sides[thinker.best].view is not None else (focus or asked)[0]
    detail = ("crop_image", {"bbox_2d": _region(case.sides[best].concept), "target_image": best})
    if not thinker.rivals or rng.random() < 0.25:
        return [detail]
    several = asked + focus if len(focus) < 3 and rng.random() < 0.5 else focus or asked
    calls = [("select_images", {"target_images": several[:4]})]
    if rng.random() < SECOND_CALL:
        calls.append(detail)
        if rng.random() < THIRD_CALL:
            other = next((number for number in focus if number != best), best)
            calls.append(("crop_image", {"bbox_2d": _MIDDLE, "target_image": other}))
    return calls


def _region(concept: Concept | None) -> list[float]:
    """Where to look: faces are in the upper half."""
    is_person = concept is not None and concept.group == "people-body" and "skin" in concept.attributes
    return _FACE if is_person else _MIDDLE


def _bad_call(case: Case, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A call that the tools refuse."""
    count = len(case.candidates)
    number = rng.randint(1, count)
    bad = [
        ("select_images", {"target_images": [count + rng.randint(1, 3)]}),
        ("select_images", {"target_images": [number, number]}),
        ("select_images", {"target_images": []}),
        ("crop_image", {"bbox_2d": [0.8, 0.2, 0.2, 0.8], "target_image": number}),
        ("crop_image", {"bbox_2d": [20, 20, 60, 60], "target_image": number}),
        ("crop_image", {"target_image": number}),
    ]
    without = [number for number, side in enumerate(case.sides) if side.view is None]
    if without:
        bad += [("select_images", {"target_images": [rng.choice(without)]})] * 3
    return rng.choice(bad)
