"""Examples into cases: what stands in the prompt, and how each picture is shown."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from art import SIZE, Art
from concepts import Concept, caption
from examples import Drawing, Entry, Example, Scene
from PIL import Image
from preset import OVERVIEW_PIXELS, PRESET
from rows import FACTOR, Layer, Picture

from vretrver_hf.images import ImageRef, fit_size
from vretrver_hf.items import Item
from vretrver_hf.protocol import Preset, build_messages, image_numbers
from vretrver_hf.tools import VisualTools


_WHOLE = (0, 0, SIZE, SIZE)
_NOTHING = (0, (-3 * SIZE, -3 * SIZE, -2 * SIZE, -2 * SIZE))
"""A layer of which nothing is seen: where a region of a scene is empty."""
_MIXED = ("t2i", "i2i")
"""Tasks whose picture candidates may as well be named, or both shown and named."""
_ORIGINAL_SIDES = (168, 168, 168, 252, 336, 512)


@dataclasses.dataclass(frozen=True)
class View:
    """
    An original of any size and shape, made of stored pictures.

    Args:
        layers (`tuple[Layer, ...]`):
            The stored pictures in it, each with the part of it that the whole original shows.
        size (`tuple[int, int]`, *optional*):
            Width and height of the original in pixels.
        look (`int`, *optional*, defaults to 0):
            Of the whole original, as in [`Picture`].
    """

    layers: tuple[Layer, ...]
    size: tuple[int, int] = (SIZE, SIZE)
    look: int = 0

    def shown(self, ref: ImageRef) -> Picture:
        """The original as `ref` shows it."""
        left, top, right, bottom = ref.box or (0, 0, *self.size)
        layers = []
        for row, (x1, y1, x2, y2) in self.layers:
            across, down = (x2 - x1) / self.size[0], (y2 - y1) / self.size[1]
            box = (x1 + left * across, y1 + top * down, x1 + right * across, y1 + bottom * down)
            if box[0] < SIZE and box[1] < SIZE and box[2] > 0 and box[3] > 0:
                layers.append((row, box))
        return Picture(tuple(layers) or (_NOTHING,), (ref.width, ref.height), self.look)

    def region(self, box: tuple[int, int, int, int]) -> View:
        """What lies within a box, in pixels of the original, as an original of its own."""
        left, top, right, bottom = box
        return View(self.shown(ImageRef(0, *self.size, box=box)).layers, (right - left, bottom - top))

    def within(self, max_pixels: int) -> Picture:
        """The whole original, as large as a budget of pixels allows."""
        size = fit_size(*self.size, factor=FACTOR, min_pixels=4 * FACTOR**2, max_pixels=max_pixels)
        return self.shown(ImageRef(0, *size))


@dataclasses.dataclass(frozen=True)
class Side:
    """
    A query or a candidate.

    Args:
        text (`str`, *optional*):
            Its text.
        view (`View`, *optional*):
            Its picture.
        concept (`Concept`, *optional*):
            What it means, where that is known; for a scene, what the question is about.
        scene (`Scene`, *optional*):
            What stands where, if the picture is a scene.
    """

    text: str | None = None
    view: View | None = None
    concept: Concept | None = None
    scene: Scene | None = None

    @functools.cached_property
    def item(self) -> Item:
        """The protocol's item; its picture is blank, since only its size matters until pixels are rendered."""
        return Item(text=self.text, image=None if self.view is None else _blank(self.view.size))


@dataclasses.dataclass(frozen=True)
class Case:
    """
    One query with its candidates.

    Args:
        query (`Side`):
            The query.
        candidates (`list[Side]`):
            The candidates, in prompt order.
        relevance (`list[int]`):
            Of each candidate, higher is better; the best is alone at its grade.
        task (`str`, *optional*), kind (`str`, *optional*):
            As in [`Example`].
        overview_pixels (`int`, *optional*):
            Most pixels of a picture in the prompt.
    """

    query: Side
    candidates: list[Side]
    relevance: list[int]
    task: str = ""
    kind: str = ""
    overview_pixels: int = OVERVIEW_PIXELS

    @property
    def order(self) -> list[int]:
        """Candidates from best to worst, 0-based; those of one grade by number."""
        return sorted(range(len(self.candidates)), key=lambda place: (-self.relevance[place], place))

    @property
    def sides(self) -> list[Side]:
        """The query and the candidates, by the number of their pictures."""
        return [self.query, *self.candidates]

    def messages(self, preset: Preset = PRESET, tools: bool = True) -> list[dict[str, Any]]:
        """The opening of the conversation."""
        return build_messages(self.query.item, [side.item for side in self.candidates], preset, tools)

    def pictures(self, messages: Sequence[dict[str, Any]]) -> list[Picture]:
        """The pictures of those opening messages."""
        return [self.sides[number].view.within(self.overview_pixels) for number in image_numbers(messages)]

    def tools(self, preset: Preset = PRESET) -> VisualTools:
        """The visual tools over pictures of these sizes."""
        images = [None if side.view is None else _blank(side.view.size) for side in self.sides]
        return VisualTools(images[0], images[1:], preset=preset, factor=FACTOR)


class CaseMaker:
    """
    Makes cases out of examples.

    Args:
        art (`Art`):
            The pictures.
        concepts (`dict[str, Concept]`):
            What they show.
    """

    def __init__(self, art: Art, concepts: dict[str, Concept]):
        self.art, self.concepts = art, concepts
        self.first_rows, rows = {}, 0
        for artist, codes in art.codes.items():
            self.first_rows[artist] = rows
            rows += len(codes)

    def row(self, artist: str, code: str) -> int:
        """Place of a picture in the table that holds all artists' pictures one after another."""
        return self.first_rows[artist] + self.art.row(artist, code)

    def plain(self, example: Example) -> Case:
        """The example as it is, each picture whole and square: for evaluation."""
        return self._make(example, lambda drawing: View(((self.row(*drawing), _WHOLE),)))

    def varied(
        self, example: Example, rng: random.Random, shape: tuple[int, int] = (1, 1), mixed: float = 0.1
    ) -> Case:
        """
        The example with pictures of varied size and framing, for training.

        Args:
            example (`Example`):
                What is asked.
            rng (`random.Random`):
                Source of chance.
            shape (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
                Width and height of the pictures in proportion.
            mixed (`float`, *optional*, defaults to 0.1):
                Share of cases in which some pictures give way to, or are joined by, text.
        """
        case = self._make(example, lambda drawing: draw_view(self.row(*drawing), shape, rng))
        if example.task in _MIXED and rng.random() < mixed and case.candidates[0].scene is None:
            case = _mix(case, rng)
        return case

    def _make(self, example: Example, look: Callable[[Drawing], View]) -> Case:
        def side(entry: Entry) -> Side:
            concept = None if entry.code is None else self.concepts[entry.code]
            if isinstance(entry.image, Scene):
                return Side(entry.text, self.view_of(entry.image), concept, entry.image)
            return Side(entry.text, None if entry.image is None else look(entry.image), concept)

        candidates = [side(entry) for entry in example.candidates]
        return Case(side(example.query), candidates, list(example.relevance), example.task, example.kind)

    def view_of(self, scene: Scene) -> View:
        """Each drawing as a layer of which the scene shows all, and much white around it."""
        layers = []
        for drawing, left, top, side in scene.objects:
            scale = SIZE / side
            box = (-left * scale, -top * scale, (scene.side - left) * scale, (scene.side - top) * scale)
            layers.append((self.row(*drawing), box))
        return View(tuple(layers), (scene.side, scene.side))


def draw_view(row: int, shape: tuple[int, int], rng: random.Random) -> View:
    """
    A stored picture in a frame of some shape, a little off centre and off scale.

    Args:
        row (`int`):
            Its place in the table of all stored pictures.
        shape (`tuple[int, int]`):
            Width and height in proportion.
        rng (`random.Random`):
            Source of chance.
    """
    # Whole pixels and few of them, so that many pictures of a batch share one resizing matrix.
    grow = right = down = 0
    if rng.random() < 0.6:
        grow, right, down = rng.randint(-8, 8), rng.randint(-6, 6), rng.randint(-6, 6)
    short = min(shape)
    wide, high = (SIZE * side // short for side in shape)
    x, y = (wide - SIZE) // 2, (high - SIZE) // 2
    box = (right - grow - x, down - grow - y, SIZE + right + grow + x, SIZE + down + grow + y)
    side = rng.choice(_ORIGINAL_SIDES)
    return View(((row, box),), (side * wide // SIZE, side * high // SIZE))


def _mix(case: Case, rng: random.Random) -> Case:
    """Some candidates as text, some as both; in a third of the cases all as text."""
    text_share, both_share = rng.choice(((1.0, 0.0), (0.4, 0.3), (0.0, 1.0)))

    def change(side: Side) -> Side:
        draw = rng.random()
        if draw < text_share:
            return Side(caption(side.concept, rng), None, side.concept)
        if draw < text_share + both_share:
            return Side(caption(side.concept, rng), side.view, side.concept)
        return side

    return dataclasses.replace(case, candidates=[change(side) for side in case.candidates])


def disguise(case: Case, look: int) -> Case:
    """The same case with all its pictures in other colours or turned: what it shows has no name any more."""

    def change(side: Side) -> Side:
        return dataclasses.replace(side, view=dataclasses.replace(side.view, look=look), concept=None)

    return dataclasses.replace(case, query=change(case.query), candidates=[change(side) for side in case.candidates])


@functools.lru_cache(maxsize=256)
def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, "white")
