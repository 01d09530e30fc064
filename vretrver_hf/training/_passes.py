"""Passes of training that a host starts quickly: on a GPU, a small model waits for its host, not for its kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from ..engines._attention import without_cudnn_attention
from ..vision import batched_attention, quick_positions


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuickPasses:
    """
    Mixed into a `Trainer` of a Qwen2.5-VL or Qwen3-VL model: what it computes stays the same, with fewer kernels.

    Rotary positions of a batch are found at once ([`quick_positions`]), pictures of equal size attend as one batch
    ([`batched_attention`]), and attention does without cuDNN ([`without_cudnn_attention`]), also where gradient
    checkpointing runs it once more in the backward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        quick_positions(base_model(self.model))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """transformers calls this for forward and backward pass."""
        with self._quick_attention():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """transformers calls this for each batch of an evaluation."""
        with self._quick_attention():
            return super().prediction_step(*args, **kwargs)

    @contextlib.contextmanager
    def _quick_attention(self) -> Iterator[None]:
        model = base_model(self.model)
        with without_cudnn_attention(model), batched_attention(model.model.visual):
            yield


def base_model(model: Any) -> PreTrainedModel:
    """The model itself, also where an adapter is trained."""
    return model.get_base_model() if is_peft_model(model) else model


__all__ = ["QuickPasses", "base_model"]
