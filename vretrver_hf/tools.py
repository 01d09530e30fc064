"""The visual tools: a model looks again at whole images or at a region of one.

Whatever a model writes, it gets an observation back. Misuse is an observation too: it says what is wrong and what is
allowed, and never repeats strings that the model wrote, so that no call can smuggle control tokens into the
conversation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from .images import MAX_ASPECT, MAX_IMAGE_TOKENS, MIN_IMAGE_TOKENS, ImageRef, fit_size, to_rgb
from .protocol import Preset, crop_observation, get_preset, select_observation


@dataclasses.dataclass(frozen=True)
class Observation:
    """
    What a tool returns to the model.

    Args:
        text (`str`):
            The text that comes first.
        images (`list[PIL.Image.Image]`):
            The pictures that follow it, at the size the model sees.
        valid (`bool`):
            Whether the call was a proper one.
        refs (`tuple[ImageRef, ...]`, *optional*):
            The pictures by reference, in the same order.
    """

    text: str
    images: list[Image.Image]
    valid: bool
    refs: tuple[ImageRef, ...] = ()


class VisualTools:
    """
    `select_images` and `crop_image` over one query's images.

    Images are numbered as in the prompt: 0 is the query's, `i` candidate i's. Boxes refer to the original pixels,
    whatever size the prompt showed. No call raises: misuse gives an observation with `valid=False`.

    Args:
        query_image (`PIL.Image.Image`, *optional*):
            The query's image, `None` for a text-only query.
        candidate_images (sequence of `PIL.Image.Image` or `None`):
            The candidates' images in order; `None` stands for a text-only candidate, so that numbers never shift.
        preset (`str` or `Preset`, *optional*, defaults to `"release"`):
            Coordinate frame of boxes, padding of crops, most images a call may select, and observation texts.
        factor (`int`, *optional*, defaults to 28):
            The sides of what is returned are multiples of this many pixels: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        inspect_pixels (`int`, *optional*):
            Most pixels of an image that is returned; without it the preset's, or else 5120 image tokens.

    Raises:
        `ValueError`: if `inspect_pixels` is below the least size of an image, four image tokens.

    Example:

    ```python
    >>> from PIL import Image
    >>> from vretrver_hf.tools import VisualTools

    >>> tools = VisualTools(None, [Image.new("RGB", (1000, 800)), None])
    >>> observation = tools.crop_image([100, 100, 300, 300], 1)
    >>> print(observation.text.strip(), observation.refs[0].box)
    Here is the cropped image. (Image Size: 392x364) (0, 20, 400, 380)
    >>> tools.select_images([2]).text
    'Candidate 2 has no image. Images: 1.'

    ```
    """

    def __init__(
        self,
        query_image: Image.Image | None,
        candidate_images: Sequence[Image.Image | None],
        preset: str | Preset = "release",
        factor: int = 28,
        inspect_pixels: int | None = None,
    ) -> None:
        self.preset = get_preset(preset)
        self.factor = factor
        self.min_pixels = MIN_IMAGE_TOKENS * factor**2
        budgets = (inspect_pixels, self.preset.inspect_pixels, MAX_IMAGE_TOKENS * factor**2)
        self.max_pixels = next(budget for budget in budgets if budget is not None)
        if factor < 1 or self.max_pixels < self.min_pixels:
            raise ValueError(
                f"inspect_pixels must be at least {self.min_pixels} (four image tokens of {factor}x{factor} pixels), "
                f"got {self.max_pixels}"
            )
        self._images = [None if image is None else to_rgb(image) for image in (query_image, *candidate_images)]
        self._numbers = [number for number, image in enumerate(self._images) if image is not None]

    def select_images(self, target_images: list[int]) -> Observation:
        """
        Shows whole images again, with the tools' pixel budget.

        Args:
            target_images (`list[int]`):
                Numbers of the images, each once.
        """
        return _observe(self._select, target_images)

    def crop_image(self, bbox_2d: list[float], target_image: int) -> Observation:
        """
        Shows a region of one image, padded and enlarged.

        Args:
            bbox_2d (`list[float]`):
                `[x1, y1, x2, y2]` in the preset's coordinates.
            target_image (`int`):
                Number of the image.
        """
        return _observe(self._crop, bbox_2d, target_image)

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        """
        Runs a parsed tool call.

        Args:
            name (`str`):
                `"select_images"` or `"crop_image"`.
            arguments (`dict`):
                The tool's arguments by name.
        """
        return _observe(self._call, name, arguments)

    def _call(self, name: Any, arguments: Any) -> Observation:
        if name == "select_images":
            return self._select(*_arguments(arguments, "select_images", "target_images"))
        if name == "crop_image":
            return self._crop(*_arguments(arguments, "crop_image", "bbox_2d", "target_image"))
        raise _Misuse("There is no such tool. Tools: select_images, crop_image.")

    def _select(self, numbers: Any) -> Observation:
        if not isinstance(numbers, (list, tuple)) or not numbers:
            raise _Misuse(f"target_images must be a list of image numbers, at least one. {self._allowed()}")
        limit = self.preset.max_selected
        if limit is not None and len(numbers) > limit:
            raise _Misuse(f"target_images names {len(numbers)} images; {limit} at most are allowed.")
        images = [self._image(number) for number in numbers]
        if len(set(numbers)) < len(numbers):
            raise _Misuse("target_images names an image twice; name each once.")
        refs = [
            ImageRef(number, *self._fit(image.size, f"Image {number}"))
            for number, image in zip(numbers, images, strict=True)
        ]
        text = select_observation(self.preset, numbers, (refs[0].width, refs[0].height))
        return Observation(text, [ref.render(self._images[ref.index]) for ref in refs], True, tuple(refs))

    def _crop(self, values: Any, number: Any) -> Observation:
        image = self._image(number)
        left, top, right, bottom = box = self._region(_box(values), image.size, number)
        size = self._fit((right - left, bottom - top), "The region")
        ref = ImageRef(number, *size, box=box)
        width, height = image.size
        shown = (left / width, top / height, right / width, bottom / height)
        return Observation(crop_observation(self.preset, number, shown, size), [ref.render(image)], True, (ref,))

    def _image(self, number: Any) -> Image.Image:
        if isinstance(number, bool) or not isinstance(number, int):
            raise _Misuse(f"An image number must be an integer. {self._allowed()}")
        if not 0 <= number < len(self._images):
            raise _Misuse(f"An image number is out of range. {self._allowed()}")
        image = self._images[number]
        if image is None:
            owner = f"Candidate {number}" if number else "The query"
            raise _Misuse(f"{owner} has no image. {self._allowed()}")
        return image

    def _region(self, box: list[float], size: tuple[int, int], number: int) -> tuple[int, int, int, int]:
        """The padded box in whole pixels of the original image, never empty."""
        width, height = size
        x1, y1, x2, y2 = self._to_pixels(box, size)
        if x2 <= x1 or y2 <= y1:
            raise _Misuse("bbox_2d is empty or reversed; [x1, y1, x2, y2] needs x1 < x2 and y1 < y2.")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise _Misuse(f"bbox_2d lies outside image {number}, which is {width}x{height} pixels.")
        left, right = self._pad(x1, x2, width)
        top, bottom = self._pad(y1, y2, height)
        return left, top, right, bottom

    def _to_pixels(self, box: list[float], size: tuple[int, int]) -> list[float]:
        frame = self.preset.coordinates
        if frame == "pixels":
            unit = 1 if max(box) <= 1 else None
        else:
            unit = {"relative": 1, "thousand": 1000}[frame]
            if min(box) < 0 or max(box) > unit:
                raise _Misuse(f"bbox_2d must lie in 0..{unit}: shares of the image's width and height.")
        return box if unit is None else [value / unit * side for value, side in zip(box, (*size, *size), strict=True)]

    def _pad(self, start: float, stop: float, side: int) -> tuple[int, int]:
        """One side of a box with its padding, clamped and rounded to whole pixels, at least one of them."""
        padding = min(self.preset.crop_padding * side, self.preset.crop_padding_pixels)
        first = min(round(max(0, start - padding)), side - 1)
        return first, max(round(min(side, stop + padding)), first + 1)

    def _fit(self, size: tuple[int, int], what: str) -> tuple[int, int]:
        width, height = size
        if min(size) < 1 or max(size) > MAX_ASPECT * min(size):
            raise _Misuse(
                f"{what} is {width}x{height} pixels; the sides may differ by {MAX_ASPECT}:1 at most. "
                "Choose another image or a wider region."
            )
        return fit_size(width, height, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def _allowed(self) -> str:
        return f"Images: {_ranges(self._numbers)}."


class _Misuse(Exception):
    """A call that cannot be carried out; the message is what the model reads."""


def _observe(tool: Callable[..., Observation], *arguments: Any) -> Observation:
    try:
        return tool(*arguments)
    except _Misuse as misuse:
        return Observation(str(misuse), [], False)


def _arguments(arguments: Any, tool: str, *names: str) -> list[Any]:
    if not isinstance(arguments, dict) or set(arguments) != set(names):
        raise _Misuse(f"{tool} takes exactly these arguments: {', '.join(names)}.")
    return [arguments[name] for name in names]


def _box(values: Any) -> list[float]:
    if not isinstance(values, (list, tuple)) or len(values) != 4 or not all(map(_is_number, values)):
        raise _Misuse("bbox_2d must be a list of four finite numbers, [x1, y1, x2, y2].")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs joined: `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs) or "none"
