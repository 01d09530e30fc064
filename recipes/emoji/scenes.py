"""
Scenes of many drawings: those that a look is enough for, and those whose question hangs on a detail.

An overview scene is a grid of nine large drawings, asked for by what stands in it. A detail scene scatters small
drawings, and asks for what a clock, a face or a keycap shows; the candidates of a query share everything but that. The
reduced picture of the prompt tells where a clock is, but not what time it shows: members of a family that differ at a
glance never compete, and those that compete are drawn as large as they can be without giving themselves away. What an
eye can tell at which size is measured in `observer.py`.

Half of the questions name the place: then other members of the family stand elsewhere, or the wanted drawing itself
does in other candidates, so that the place matters. In the other half the target is the only one of its kind.

Splits are those of `splits.py`. "test_combination" holds out layouts besides wordings, and asks for codes that
training shows: its rows hold other numbers of things and all sides are others than in training, so that whoever
learned fixed places or sizes by heart instead of looking will miss there. Detail scenes have no held-out concepts: a
time is no concept of its own.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from art import Art
from concepts import Concept
from examples import SPLITS, Drawing, Entry, Example, Placed, Scene
from PIL import Image
from splits import known_codes, pictures, split_artists
from stock import Draw, NothingToAsk, Question, Stock, draw_fair, grade, pick
from wordings import Wording


KINDS = ("detail", "overview")
FAMILIES = ("clock", "face", "keycap")
"""What a detail is asked of."""
SIDE = 1008
"""Width and height of a scene in pixels."""
STEP = 6
"""Corners lie on multiples of it: half a pixel of the reduced picture. Few different places are quicker to render."""

PLACES = (
    ("upper left", "in the upper left"),
    ("top", "at the top"),
    ("upper right", "in the upper right"),
    ("left", "on the left"),
    ("middle", "in the middle"),
    ("right", "on the right"),
    ("lower left", "in the lower left"),
    ("bottom", "at the bottom"),
    ("lower right", "in the lower right"),
)
"""Names of the nine thirds of thirds, row by row, and how to say that something is there."""
CLEAR = 36
"""How far, in pixels, the middle of what is asked for stays from the borders between places."""

SIDES = (30, 36, 42, 48)
"""Sides of the drawings in a detail scene."""
ROWS, HELD_OUT_ROWS = ((4, 4, 4, 4), (5, 5, 5), (3, 5, 3, 5)), ((4, 3, 5, 4), (5, 4, 3, 4), (3, 4, 5, 4))
"""How many drawings stand in the rows of a detail scene."""
MARGIN = 12
"""How far, in pixels, a drawing stays from the edge of its cell."""
SHRINK = 3
"""How much smaller, in pixels, drawings are in a held-out layout: their sides lie between those of training."""
GRID_SIDES, GRID_MARGIN = (252, 276, 300), 6
"""Sides of the drawings in an overview scene, and how far they stay from the edges of their cells."""

GROUP = 8
"""Members of a family that are most alike at a glance, among whom a question chooses."""
GLANCE = 9
"""Pixels of a scene in one of a picture that is looked at again as a whole."""
ALIKE, DISTINCT = 44.0, 300.0
"""Most that members of a group differ at a glance, on average, and least that any two differ seen closely: root of the
sum of squared differences in levels of 255."""
APART = 200.0
"""Least that anything else in a detail scene differs from the average member of the family, in the reduced picture."""
NAMED = 0.5
"""Share of the questions that name the place."""
SWAPPED = 0.5
"""Share of the negatives of an overview question with a place that show the wanted drawing elsewhere."""

_REDUCED = (36, 12)
"""Side at which that difference is measured, and pixels of a scene in one of the reduced picture."""
_DISTRACTOR_GROUPS = frozenset(("animals-nature", "food-drink", "travel-places", "activities", "objects"))
_NO_DISTRACTORS = frozenset(("time",))
_UNNAMED_GROUPS = frozenset(("people-body", "symbols", "component"))
_NAMED_SUBGROUPS = frozenset(("keycap", "geometric"))
_UNNAMED_SUBGROUPS = frozenset(("emotion",))
# Names that are no noun, so that no sentence can hold them.
_UNNAMED = frozenset(
    "camping|cooking|foggy|locked|locked with key|locked with pen|performing arts|rolling on the floor laughing"
    "|speaker high volume|speaker low volume|speaker medium volume|star-struck|unlocked".split("|")
)
_BARE = frozenset(
    "american football|bacon|badminton|baguette bread|bowling|bread|broccoli|building construction|butter|canned food"
    "|construction|cooked rice|coral|curry rice|custard|dango|dna|falafel|field hockey|fire|fog|garlic|high voltage"
    "|ice|ice cream|ice hockey|lacrosse|luggage|mate|meat on bone|money with wings|mount fuji|oden|ping pong|popcorn"
    "|pouring liquid|sake|salt|shaved ice|skis|soap|soft ice cream|spaghetti|sushi|tennis|wood|yarn".split("|")
)
_SIZES = frozenset(("small", "medium", "large"))
_PROPER = frozenset(("milky way", "Statue of Liberty"))
_HEAD_ENDS = re.compile(r" (?:with|without|over|in|on|of|from|behind|showing|holding|under|for) ")
_VOWEL = re.compile(r"(?!eu|ew|one|uni)[aeiou]|hour|x-", re.IGNORECASE)

THINGS = Wording(
    ("a scene with {0}", "find {0}", "{0} among other things", "I am looking for {0} in a scene"),
    ("find a scene with {0}", "find {0} among other things", "I am looking for a scene with {0}"),
)
"""What is in a scene."""
THINGS_AT = Wording(
    ("{0} {1}", "a scene with {0} {1}", "find {0} {1}", "I am looking for {0} {1}"),
    ("find a scene with {0} {1}", "{1}: {0}", "I am looking for a scene with {0} {1}"),
)
"""What is in a scene, and where."""
_SHOWN = {"clock": "a clock showing {}", "keycap": "a keycap showing {}", "face": "{}"}


def family(concept: Concept) -> str | None:
    """Which of `FAMILIES` a concept belongs to, if any."""
    if concept.base in ("clock", "keycap"):
        return concept.base
    return "face" if concept.subgroup.startswith("face-") and concept.subgroup != "face-costume" else None


def value_phrase(concept: Concept) -> str:
    """What a detail shows, such as `"three-thirty"`, `"7"` or `"a winking face"`; for anything else, what it is."""
    values = concept.attributes
    return values.get("time") or values.get("key") or with_article(concept.noun)


def thing_phrase(concept: Concept) -> str:
    """What stands in a scene, such as `"a clock showing three-thirty"` or `"a fox"`."""
    return _SHOWN.get(family(concept), "{}").format(value_phrase(concept))


def place_name(scene: Scene, index: int) -> str:
    """
    Where an object stands, coarsely.

    >>> place_name(Scene((Placed(Drawing("noto", "1f98a"), 900, 40, 48),), 0, 1008), 0)
    'upper right'
    """
    return PLACES[_place(scene.objects[index], scene.side)][0]


def place_phrase(scene: Scene, index: int) -> str:
    """The same as it is said, such as `"in the upper right"`."""
    return PLACES[_place(scene.objects[index], scene.side)][1]


def with_article(noun: str) -> str:
    """
    A noun with its article, where it takes one.

    >>> [with_article(noun) for noun in ("owl", "unicorn", "hot springs", "compass", "bread", "roll of paper")]
    ['an owl', 'a unicorn', 'hot springs', 'a compass', 'bread', 'a roll of paper']
    """
    head = _HEAD_ENDS.split(noun)[0]
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "rhinoceros"))
    if noun.startswith(("a ", "an ", "the ")) or noun in _BARE or is_plural:
        return noun
    if noun in _PROPER:
        return f"the {noun}"
    return f"{'an' if _VOWEL.match(noun) else 'a'} {noun}"


def draw_scene(art: Art, scene: Scene, side: int | None = None) -> np.ndarray:
    """
    The pixels of a scene.

    Args:
        art (`Art`): The pictures.
        scene (`Scene`): What stands where.
        side (`int`, *optional*): Width and height to reduce it to; its own by default.

    Returns:
        `np.ndarray`: uint8 array of shape (side, side, 3).
    """
    canvas = Image.new("RGB", (scene.side, scene.side), "white")
    for drawing, left, top, extent in scene.objects:
        picture = Image.fromarray(art.image(*drawing))
        canvas.paste(picture.resize((extent, extent), Image.Resampling.BICUBIC), (left, top))
    if side is not None:
        canvas = canvas.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(canvas)


class SceneMaker:
    """
    Draws examples whose candidates are scenes; keep it to draw again and again.

    All drawings of a query are by one artist.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        kind (`str`, *optional*, defaults to `"detail"`): One of `KINDS`.
        split (`str`, *optional*, defaults to `"train"`): One of `SPLITS`; "detail" has no "test_concept".
        num_candidates (`int`, *optional*, defaults to 5): Candidates a query, the positive included; at most `GROUP`.
        hardness (`float`, *optional*, defaults to 1.0):
            Share of detail questions among members that are alike at a glance, and factor of the shares of neighbours
            and of swapped drawings in overview scenes; 0 draws all at random.

    Raises:
        ValueError: Unknown kind or split, or nothing can be asked for.
    """

    def __init__(
        self,
        art: Art,
        concepts: dict[str, Concept],
        kind: str = "detail",
        split: str = "train",
        num_candidates: int = 5,
        hardness: float = 1.0,
    ) -> None:
        if kind not in KINDS or split not in SPLITS:
            raise ValueError(f"kind {kind!r} must be one of {KINDS} and split {split!r} one of {SPLITS}")
        if (kind, split) == ("detail", "test_concept"):
            raise ValueError("detail scenes have no held-out concepts: training shows every time, key and face")
        self.kind, self.split = kind, split
        self.num_candidates, self.hardness = num_candidates, hardness
        self.questions = {"detail": _Details, "overview": _Overviews}[kind](art, concepts, split)

    def make(self, n: int, seed: int) -> list[Example]:
        """
        Draw examples.

        Args:
            n (`int`): How many.
            seed (`int`): Seed of the draw.

        Returns:
            `list[Example]`: The examples, of task "t2i".

        Raises:
            ValueError: More candidates are wanted than there are.
        """
        if not 1 <= self.num_candidates <= GROUP:
            raise ValueError(f"num_candidates must be 1 to {GROUP}, got {self.num_candidates}")
        rng = random.Random(f"{seed}/{self.kind}/{self.split}")
        return [self._make_one(rng, f"{self.kind}-{self.split}-{seed}-{number:06d}") for number in range(n)]

    def _make_one(self, rng: random.Random, qid: str) -> Example:
        question = self.questions.draw(rng, self.num_candidates - 1, self.hardness)
        return question.to_example(qid, "t2i", self.split, rng)


# --- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """
    Members of a family that are alike at a glance and differ seen closely.

    Args:
        family (`str`): One of `FAMILIES`.
        artist (`str`): Who draws them.
        codes (`tuple[str, ...]`): The members, at least `GROUP`.
        side (`int`): How large they may be drawn, in pixels of a scene.
    """

    family: str
    artist: str
    codes: tuple[str, ...]
    side: int


class _Details:
    """What a clock, a face or a keycap shows, somewhere in a scene."""

    def __init__(self, art: Art, concepts: dict[str, Concept], split: str) -> None:
        self.concepts, self.split = concepts, split
        self.held_out = split == "test_combination"
        self.groups: dict[str, dict[str, list[Group]]] = {}
        """Who may compete, by family and artist."""
        self.whole: dict[tuple[str, str], Group] = {}
        """All of these together."""
        self.others: dict[tuple[str, str], list[str]] = {}
        """What may stand beside a family."""
        known = known_codes(concepts, split)
        for artist in split_artists(art, split):
            drawn = [concepts[code] for code in sorted(known.intersection(art.codes[artist]))]
            beside = [concept.code for concept in drawn if may_stand_beside(concept)]
            seen = [glimpse(art.image(artist, code), *_REDUCED) for code in beside]
            for name in FAMILIES:
                members = [one.code for one in drawn if family(one) == name and has_plain_name(one)]
                groups = find_groups(art, artist, name, members)
                if not groups:
                    continue
                whole = _whole_family(groups)
                average = np.mean([glimpse(art.image(artist, code), *_REDUCED) for code in whole.codes], axis=0)
                apart = [np.linalg.norm(one - average) >= APART for one in seen]
                others = [code for code, far in zip(beside, apart, strict=True) if far]
                if len(others) >= max(map(sum, ROWS + HELD_OUT_ROWS)):
                    self.groups.setdefault(name, {})[artist] = groups
                    self.whole[artist, name], self.others[artist, name] = whole, others
        if not self.groups:
            raise NothingToAsk("no artist drew enough clocks, faces or keycaps that are alike at a glance")

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        name = pick(tuple(self.groups), rng)
        by_artist = self.groups[name]
        artist = pick(tuple(by_artist), rng)
        whole = self.whole[artist, name]
        group = pick(by_artist[artist], rng) if rng.random() < hardness else whole
        code, *wrong = rng.sample(group.codes, count + 1)
        side = group.side - SHRINK * self.held_out
        named = rng.random() < NAMED
        spots, target, decoys = _scatter(rng, side, named, self.held_out)
        others = rng.sample(self.others[artist, name], len(spots))
        for spot in decoys:
            others[spot] = pick(whole.codes, rng)
        objects = [Placed(Drawing(artist, other), *spot) for other, spot in zip(others, spots, strict=True)]
        entries = [_entry(objects, target, Drawing(artist, one)) for one in (code, *wrong)]
        concept = self.concepts[code]
        text = _ask(concept, entries[0].image, named, self.split, rng)
        kind = f"detail/{name}/{'place' if named else 'blob'}"
        grades = [grade(concept, self.concepts[one]) for one in wrong]
        return Question(kind, Entry(text, None, code), entries[0], entries[1:], grades)


def may_stand_beside(concept: Concept) -> bool:
    """Whether something may stand in a detail scene without being taken for what is asked for."""
    is_face = "face" in concept.name or family(concept) is not None
    return concept.group in _DISTRACTOR_GROUPS and concept.subgroup not in _NO_DISTRACTORS and not is_face


def find_groups(art: Art, artist: str, name: str, codes: Sequence[str]) -> list[Group]:
    """
    Members of a family that may compete: those that are most alike at a glance, around each of them.

    Args:
        art (`Art`): The pictures.
        artist (`str`): Who draws them.
        name (`str`): One of `FAMILIES`.
        codes (`Sequence[str]`): All members.

    Returns:
        `list[Group]`: Of `GROUP` members each, as large as the average difference at a glance allows; none where the
        smallest of `SIDES` gives them away or too few are distinct.
    """
    codes = [code for place, code in enumerate(codes) if art.twins(artist, code).isdisjoint(codes[:place])]
    if len(codes) < GROUP:
        return []
    drawings = [art.image(artist, code) for code in codes]
    close = _distances([shrink(pixels, 24) for pixels in drawings])
    at_a_glance = {side: _distances([glimpse(pixels, side) for pixels in drawings]) for side in SIDES}
    found = {}
    for place in range(len(codes)):
        members: list[int] = []
        for other in np.argsort(at_a_glance[SIDES[-1]][place], kind="stable"):
            if len(members) < GROUP and all(close[other, member] >= DISTINCT for member in members):
                members.append(int(other))
        sides = [side for side in SIDES if len(members) == GROUP and _mean(at_a_glance[side], members) <= ALIKE]
        if sides:
            members = sorted(members)
            found[tuple(members)] = Group(name, artist, tuple(codes[member] for member in members), sides[-1])
    return [found[members] for members in sorted(found)]


def glimpse(pixels: np.ndarray, side: int, scale: int = GLANCE) -> np.ndarray:
    """
    A drawing as a scene that is seen as a whole shows it.

    Args:
        pixels (`np.ndarray`): The drawing.
        side (`int`): Its side in the scene.
        scale (`int`, *optional*): Pixels of the scene in one of what is seen.

    Returns:
        `np.ndarray`: float array of 8 x 8 pixels, the drawing in the middle.
    """
    canvas = Image.new("RGB", (8 * scale, 8 * scale), "white")
    corner = (8 * scale - side) // 2
    canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (corner, corner))
    return np.asarray(canvas.resize((8, 8), Image.Resampling.BICUBIC), float)


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """A drawing as an average of its pixels over `side` x `side` squares."""
    step = len(pixels) // side
    return pixels.reshape(side, step, side, step, 3).mean(axis=(1, 3))


def _whole_family(groups: list[Group]) -> Group:
    """All that any group has, as one, as small as the smallest."""
    codes = sorted(set().union(*(group.codes for group in groups)))
    return Group(groups[0].family, groups[0].artist, tuple(codes), min(group.side for group in groups))


def _distances(pictures: list[np.ndarray]) -> np.ndarray:
    rows = np.array(pictures).reshape(len(pictures), -1)
    return np.array([np.linalg.norm(rows - row, axis=1) for row in rows])


def _mean(distances: np.ndarray, members: list[int]) -> float:
    part = distances[np.ix_(members, members)]
    return float(part.sum() / (len(members) * (len(members) - 1)))


# --- layouts ---------------------------------------------------------------------------------------------------------


def _scatter(
    rng: random.Random, side: int, named: bool, held_out: bool
) -> tuple[list[tuple[int, int, int]], int, list[int]]:
    """
    Where the drawings of a detail scene stand.

    Returns:
        `tuple`: left, top and side of each, row by row; the target's index; the indices of others of its family. With
        `named`, these stand clearly elsewhere, and there is at least one.
    """
    cells = _cells(pick(HELD_OUT_ROWS if held_out else ROWS, rng))
    spots: list[tuple[int, int, int] | None] = [None] * len(cells)
    if named:
        place = int(rng.random() * 9)
        target = _put(rng, cells, spots, side, place)
        far = rng.sample(far_places(place), len(far_places(place)))[: 1 + (rng.random() < 0.5)]
        decoys = [_put(rng, cells, spots, side, other) for other in far]
    else:
        target, decoys = int(rng.random() * len(cells)), []
        spots[target] = _spot(rng, cells[target], side)
    for index, spot in enumerate(spots):
        if spot is None:
            spots[index] = _spot(rng, cells[index], pick(SIDES, rng) - SHRINK * held_out)
    return spots, target, decoys


def far_places(place: int) -> list[int]:
    """Places that have no border in common with a place: of the left those are not the upper left or the middle."""
    row, column = divmod(place, 3)
    return [other for other in range(9) if abs(other // 3 - row) + abs(other % 3 - column) > 1]


def _cells(rows: tuple[int, ...]) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of each cell."""
    height = SIDE / len(rows)
    return [
        (SIDE / count * column, height * row, SIDE / count * (column + 1), height * (row + 1))
        for row, count in enumerate(rows)
        for column in range(count)
    ]


def _put(rng: random.Random, cells: list, spots: list, side: int, place: int) -> int:
    """Puts something into a free cell so that its middle is clearly within a place; the cell's index."""
    zone, fitting = (place % 3, place // 3), []
    for index, cell in enumerate(cells):
        spans = [_clear(cell[axis], cell[axis + 2], side, zone[axis]) for axis in (0, 1)]
        if spots[index] is None and all(first <= last for first, last in spans):
            fitting.append((index, spans))
    index, spans = pick(fitting, rng)
    spots[index] = (*(STEP * rng.randint(*span) for span in spans), side)
    return index


def _spot(rng: random.Random, cell: tuple[float, ...], side: int, margin: int = MARGIN) -> tuple[int, int, int]:
    """Somewhere in a cell."""
    left, top = (rng.randint(*_span(cell[axis] + margin, cell[axis + 2] - margin - side)) for axis in (0, 1))
    return STEP * left, STEP * top, side


def _clear(start: float, stop: float, side: int, third: int) -> tuple[int, int]:
    """Steps from which a side in a cell has its middle in a third of the scene, clear of the other thirds."""
    low = SIDE * third / 3 + (CLEAR if third else 0) - side / 2
    high = SIDE * (third + 1) / 3 - (CLEAR if third < 2 else 0) - side / 2
    return _span(max(start + MARGIN, low), min(stop - MARGIN - side, high))


def _span(low: float, high: float) -> tuple[int, int]:
    """First and last step within two pixels."""
    return math.ceil(low / STEP), math.floor(high / STEP)


def _place(thing: Placed, side: int) -> int:
    column, row = (min(2, int(3 * (corner + thing.side / 2) / side)) for corner in (thing.left, thing.top))
    return 3 * row + column


# --- overviews -------------------------------------------------------------------------------------------------------


class _Overviews:
    """What stands somewhere in a grid of nine."""

    def __init__(self, art: Art, concepts: dict[str, Concept], split: str) -> None:
        self.split, self.held_out = split, split == "test_combination"
        things = {code: concept for code, concept in concepts.items() if has_plain_name(concept)}
        # Whole bases are left out, so these are split as they are among all concepts.
        self.stock = Stock(art, things, split)
        wanted = "train" if self.held_out else split
        self._draw = Draw(pictures(art, things, wanted), things)

    def draw(self, rng: random.Random, count: int, hardness: float) -> Question:
        stock = self.stock
        artist, code = self._draw(rng)
        concept = stock.concepts[code]
        wrong = stock.negatives(artist, concept, count, rng, hardness)
        others = self._others(artist, concept, wrong, rng)
        place, named = int(rng.random() * 9), rng.random() < NAMED
        cells = _cells((3, 3, 3))
        sides = [pick(GRID_SIDES, rng) - 4 * SHRINK * self.held_out for _ in cells]
        spots = [_spot(rng, cell, side, GRID_MARGIN) for cell, side in zip(cells, sides, strict=True)]
        shown = [*others[:place], concept, *others[place:]]
        objects = [Placed(Drawing(artist, one.code), *spot) for one, spot in zip(shown, spots, strict=True)]
        far = rng.sample(far_places(place), len(far_places(place))) if named else []
        entries = [_entry(objects, place, Drawing(artist, code))]
        for number, other in enumerate(wrong):
            if far and rng.random() < SWAPPED * hardness:
                wrong[number] = shown[far[-1]]
                entries.append(_swapped(objects, place, far.pop()))
            else:
                entries.append(_entry(objects, place, Drawing(artist, other.code)))
        text = _ask(concept, entries[0].image, named, self.split, rng)
        grades = [grade(concept, other) for other in wrong]
        kind = f"overview/{'place' if named else 'any'}"
        return Question(kind, Entry(text, None, code), entries[0], entries[1:], grades)

    def _others(self, artist: str, concept: Concept, wrong: list[Concept], rng: random.Random) -> list[Concept]:
        """Eight that are neither what is wanted nor what stands in its place."""
        pool = self.stock.all[artist]
        banned = {code for one in (concept, *wrong) for code in (one.code, *self.stock.twins(artist, one.code))}
        others: list[Concept] = []
        while len(others) < 8:
            other = draw_fair(pool, concept, banned, rng, tries=200)
            if other is None:
                raise ValueError(f"{artist} drew too little for a scene around {concept.name!r}")
            others.append(other)
            banned.update((other.code, *self.stock.twins(artist, other.code)))
        return others


def has_plain_name(concept: Concept) -> bool:
    """Whether something can be asked for as what stands in a scene: things that a noun names, whatever their size."""
    if concept.name in _UNNAMED or concept.subgroup in _UNNAMED_SUBGROUPS or concept.words & _SIZES:
        return False
    return concept.group not in _UNNAMED_GROUPS or concept.subgroup in _NAMED_SUBGROUPS


def _entry(objects: list[Placed], target: int, drawing: Drawing) -> Entry:
    """The scene with this drawing at the target's place."""
    things = (*objects[:target], objects[target]._replace(drawing=drawing), *objects[target + 1 :])
    return Entry(None, Scene(things, target, SIDE), drawing.code)


def _swapped(objects: list[Placed], target: int, other: int) -> Entry:
    """The scene with the target's drawing and another having changed places."""
    things = list(objects)
    things[other] = objects[other]._replace(drawing=objects[target].drawing)
    return _entry(things, target, objects[other].drawing)


def _ask(concept: Concept, scene: Scene, named: bool, split: str, rng: random.Random) -> str:
    thing = thing_phrase(concept)
    if not named:
        return THINGS.draw(split, rng).format(thing)
    return THINGS_AT.draw(split, rng).format(thing, place_phrase(scene, scene.target))
