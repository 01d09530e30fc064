"""Which of PyTorch's attention kernels a model may use on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.backends import cuda


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOCK = threading.Lock()
_under_way = 0
_was_on = False


@contextlib.contextmanager
def without_cudnn_attention(model: PreTrainedModel) -> Iterator[None]:
    """
    While the context lasts, `scaled_dot_product_attention` does without cuDNN; for models that use it, on a GPU.

    cuDNN plans anew for each shape, and in a batch whose rows grow nearly every step has a new one; short of memory, a
    plan fails instead of being replaced by another kernel. PyTorch knows one switch for the whole process, so
    that of several contexts in as many threads the last one to end sets it back.

    Args:
        model (`PreTrainedModel`):
            What runs.
    """
    if model.device.type != "cuda" or model.config.get_text_config()._attn_implementation != "sdpa":
        yield
        return
    global _under_way, _was_on
    with _LOCK:
        if not _under_way:
            _was_on = cuda.cudnn_sdp_enabled()
            cuda.enable_cudnn_sdp(False)
        _under_way += 1
    try:
        yield
    finally:
        with _LOCK:
            _under_way -= 1
            if not _under_way:
                cuda.enable_cudnn_sdp(_was_on)


__all__ = ["without_cudnn_attention"]
