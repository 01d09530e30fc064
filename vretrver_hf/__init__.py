"""Evidence-driven multimodal reranking: a vision-language model thinks, looks closer, and ranks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Where each public name lives. Names load on first use, so that importing the package costs no torch import.
_HOMES = {
    "EvidenceReward": "rewards",
    "Item": "items",
    "ItemError": "images",
    "Preset": "protocol",
    "Ranking": "ranking",
    "Reranker": "reranker",
    "Trajectory": "trajectory",
    "VisualTools": "tools",
}
__all__ = ["EvidenceReward", "Item", "ItemError", "Preset", "Ranking", "Reranker", "Trajectory", "VisualTools"]

if TYPE_CHECKING:
    from .images import ItemError
    from .items import Item
    from .protocol import Preset
    from .ranking import Ranking
    from .reranker import Reranker
    from .rewards import EvidenceReward
    from .tools import VisualTools
    from .trajectory import Trajectory


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
