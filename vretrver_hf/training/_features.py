"""Features of a vision tower that is not trained, each picture's computed once."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import PIL.Image
import torch

from ..vision import PictureFeatures, picture_grid, picture_ids


_DIGITS = 4
"""A picture's number has so many digits to the base of 256: each is exact in every data type of a tower."""


class FeatureCache:
    """
    Remembers what a frozen vision tower made of each picture.

    The rollouts of a group show the same pictures, and the loss reads all of them again: without it a picture passes
    the tower twice for every rollout, and its pixels, some 19 kilobytes a token, travel to the device as often.
    So while [`FeatureCache.numbered`] lasts, the image processor gives a number in place of a picture's pixels, and
    the tower, whose `forward` is replaced, answers to numbers with what the engine of the rollouts has computed.
    Pixels still pass it as ever.

    Args:
        tower (`torch.nn.Module`):
            The vision tower of a Qwen2.5-VL or Qwen3-VL model, none of whose parameters are trained.
        image_processor (`BaseImageProcessor`):
            That of the model; pictures come at their final size.

    Attributes:
        pictures (`dict[str, PictureFeatures]`):
            What is known of the pictures of the last batch of each mode, `"train"` and `"eval"`. An engine that plays
            rollouts should use it, see [`~engines.transformers.TransformersEngine`].
    """

    def __init__(self, tower: torch.nn.Module, image_processor: Any):
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("the vision tower is trained, so its features change; freeze it first")
        self._tower = tower
        self._image_processor = image_processor
        self._pixels = copy.copy(image_processor)  # gives pixels also while the other one gives numbers
        self._compute = tower.forward
        self._numbered: dict[int, tuple[str, PIL.Image.Image]] = {}  # mode and picture of each number
        self._next_number = 0
        self._mode = "train"
        self.pictures = {mode: self._nothing() for mode in ("train", "eval")}
        tower.forward = self._forward

    def begin(self, mode: Literal["train", "eval"]) -> PictureFeatures:
        """
        Forgets the last batch, but for what training still needs behind an evaluation. Returns what is to be filled
        with the features of the next.
        """
        self._mode = mode
        for ended in {mode, "eval"}:
            self._numbered = {number: known for number, known in self._numbered.items() if known[0] != ended}
            self.pictures[ended] = self._nothing()
        return self.pictures[mode]

    @contextlib.contextmanager
    def numbered(self) -> Iterator[None]:
        """While the context lasts, the image processor gives numbers in place of pixels."""
        original = self._image_processor.preprocess

        def preprocess(images: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(images, list) or not all(isinstance(image, PIL.Image.Image) for image in images):
                return original(images, *args, **kwargs)
            result = original(images[:1], *args, **kwargs)  # for its type and what else is in it
            grid = picture_grid(images, self._image_processor)
            digits = torch.tensor([_digits(number) for number in self._numbers(images)], dtype=torch.float32)
            result["pixel_values"] = digits.repeat_interleave(grid.prod(-1), dim=0)
            result["image_grid_thw"] = grid
            return result

        self._image_processor.preprocess = preprocess
        try:
            yield
        finally:
            del self._image_processor.preprocess

    def _nothing(self) -> PictureFeatures:
        # Nothing may be forgotten while a batch is trained on: processes that share out the weights compute together.
        return PictureFeatures(self._tower, self._pixels, max_bytes=math.inf)

    def _numbers(self, images: list[PIL.Image.Image]) -> list[int]:
        numbers: dict[str, int] = {}
        ids = picture_ids(images)
        for key, image in zip(ids, images, strict=True):
            if key not in numbers:
                numbers[key] = self._next_number
                self._numbered[self._next_number] = self._mode, image
                self._next_number += 1
        return [numbers[key] for key in ids]

    def _forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        if hidden_states.shape[-1] != _DIGITS:
            return self._compute(hidden_states, grid_thw=grid_thw, **kwargs)
        ends = grid_thw.prod(-1).cumsum(0).to(hidden_states.device)
        numbers = [_number(digits) for digits in hidden_states[ends - 1].long().tolist()]
        modes, images = zip(*(self._numbered[number] for number in numbers), strict=True)
        with torch.no_grad():
            return self.pictures[modes[0]].tower_output(images)


def _digits(number: int) -> tuple[int, ...]:
    return tuple(number.to_bytes(_DIGITS, "big"))


def _number(digits: list[int]) -> int:
    return int.from_bytes(bytes(digits), "big")


__all__ = ["FeatureCache"]
