"""What a visitor reads when something failed: the reason where it was foreseen, and never the insides."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from runs import Stopped
from safetensors import SafetensorError

from vretrver_hf import ItemError
from vretrver_hf.engines import EngineError


logger = logging.getLogger(__name__)


class ModelError(Exception):
    """A model that cannot be had; the message names it and says why."""


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
    """
    Says which model it is whose files are missing or broken.

    Raises:
        `ModelError`: in place of what the hub or a library raised.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"model {model}: {_first_line(error)}") from error


def told(error: Exception) -> str:
    """What a visitor reads. Of what nobody foresaw that is no reason: the operator finds it in the log."""
    if isinstance(error, (ItemError, Stopped, ModelError)):
        return str(error)
    if isinstance(error, EngineError):
        return f"The model failed: {_first_line(error)}"
    if isinstance(error, ValueError):
        return f"These settings do not work: {error}"
    logger.error("a run failed", exc_info=error)
    torch = sys.modules.get("torch")  # where it is not loaded no model has run
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "The model ran out of memory. Try fewer or smaller candidates."
    return "Something failed here. Try again, or with other candidates."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
