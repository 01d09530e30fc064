"""Questions about one picture, with short answers to choose from."""

from __future__ import annotations

import random

from concepts import Concept
from edits import SCALES, WORN, Features
from examples import Drawing, Entry
from stock import Draw, NothingToAsk, Question, Stock, pick
from wordings import QUESTIONS


ASKED = {
    "skin": 0.2,
    "left skin": 0.06,
    "right skin": 0.06,
    "hair": 0.08,
    "role": 0.2,
    "time": 0.12,
    "colour": 0.06,
    "key": 0.05,
    "members": 0.05,
    "direction": 0.06,
    "phase": 0.06,
}
"""What is asked for, and its share."""
ASIDE_SHARE = 0.5
"""Share of the questions with a candidate that is true of the picture but answers another question."""
NEAR = 0.5
"""Share of the wrong answers that are next to the right one, where answers have an order."""
TRIES = 40
COMBINED = ("skin", "left skin", "right skin", "hair", "role")
"""Asked about held-out combinations, where such are asked for."""

_VAGUE = WORN | {"1f6b6"}
"""What people wear is not what they are, and others walk as well."""


class AttributeQuestions:
    """A picture, a question about one thing to be seen in it, and short answers."""

    def __init__(self, stock: Stock) -> None:
        self.stock = stock
        roles = Features(stock.concepts).roles
        self._answers = {code: _answers(concept, roles) for code, concept in stock.concepts.items()}
        known = [Drawing(artist, code) for artist in stock.artists for code in stock.art.codes[artist]]
        known = [drawing for drawing in known if drawing.code in stock.known]
        self._draws, self._values = {}, {}
        for kind in ASKED:
            drawings = stock.pictures if kind in COMBINED else known
            drawings = [one for one in drawings if kind in self._answers.get(one.code, ()) and not stock.twins(*one)]
            values = {self._answers[code].get(kind, "") for code in stock.shown} - {""}
            if drawings and len(values) > 1:
                self._draws[kind], self._values[kind] = Draw(drawings, stock.concepts), _in_order(kind, values)
        if not self._draws:
            raise NothingToAsk("there is nothing to ask about")
        self._shares = {kind: ASKED[kind] for kind in self._draws}

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        (kind,) = rng.choices(list(self._shares), list(self._shares.values()))
        drawing = self._draws[kind](rng)
        answers = self._answers[drawing.code]
        wrong = self._wrong(kind, answers, count, rng, hardness)
        query = Entry(QUESTIONS[kind].draw(self.stock.split, rng), drawing, drawing.code)
        grades = [int(answer in self._values[kind]) for answer in wrong]
        return Question(f"ask/{kind}", query, Entry(answers[kind]), [Entry(answer) for answer in wrong], grades)

    def _wrong(self, kind: str, answers: dict[str, str], count: int, rng: random.Random, hardness: float) -> list[str]:
        right, values, wrong = answers[kind], self._values[kind], []
        asides = [answer for answer in answers.values() if answer != right]
        if asides and rng.random() < hardness * ASIDE_SHARE:
            wrong.append(pick(asides, rng))
        place = values.index(right)
        for _ in range(TRIES * count):
            near = kind in SCALES and rng.random() < hardness * NEAR
            answer = values[(place + rng.choice((-2, -1, 1, 2))) % len(values)] if near else pick(values, rng)
            if len(wrong) < count and answer != right and answer not in wrong:
                wrong.append(answer)
        while len(wrong) < count:  # there are too few values: answers to other questions
            answer = pick(pick(list(self._values.values()), rng), rng)
            if answer not in (right, *wrong):
                wrong.append(answer)
        rng.shuffle(wrong)
        return wrong


def _answers(concept: Concept, roles: dict[str, str]) -> dict[str, str]:
    """What can be asked about a concept, and the right answers."""
    attributes, answers = concept.attributes, {}
    skins = attributes.get("skin", "").split(", ")
    if concept.is_pair and skins[0]:
        answers |= {"left skin": f"{skins[0]} skin", "right skin": f"{skins[-1]} skin"}
    elif skins[0]:
        answers["skin"] = f"{skins[0]} skin"
    if hair := attributes.get("hair"):
        answers["hair"] = hair if hair == "bald" else f"{hair} hair"
    if concept.base in roles and concept.base not in _VAGUE and "skin" in attributes:
        answers["role"] = roles[concept.base]
    if "members" in attributes and "adult" not in attributes["members"]:
        answers["members"] = concept.noun.removeprefix("a family of ")
    if "phase" in attributes:
        answers["phase"] = concept.noun
    return answers | {key: attributes[key] for key in ("time", "colour", "key", "direction") if key in attributes}


def _in_order(kind: str, values: set[str]) -> list[str]:
    """The answers in the order of their scale, where they have one."""
    scale = [f"{value} skin" if kind == "skin" else value for value in SCALES.get(kind, ())]
    return sorted(values, key=lambda value: (scale.index(value) if value in scale else len(scale), value))
