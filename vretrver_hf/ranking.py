"""What comes out for one query: the order, the evidence behind it, and what it cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from .items import Item
from .trajectory import Trajectory


@dataclasses.dataclass
class Ranking:
    """
    The outcome for one query.

    Args:
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The candidates in input order.
        order (`list[int]`):
            A permutation of `range(len(candidates))`, best first.
        status (`str`):
            `"ok"`, or the worst of its windows: `"repaired"` (an answer had to be completed) or `"fallback"` (a
            window had no usable answer and keeps its order).
        trajectories (`list[Trajectory]`):
            One a window, in the order in which they were ranked; none where there was nothing to compare.
        top_k (`int`, *optional*):
            How many of the best `items` and `ids` list; all by default.
        query_id (`str`, *optional*, defaults to `"0"`):
            The query's id in a job.
        error (`str`, *optional*):
            Why the query failed, where errors are recorded instead of raised; its order is then the input order.
    """

    query: Item
    candidates: list[Item]
    order: list[int]
    status: Literal["ok", "repaired", "fallback"]
    trajectories: list[Trajectory]
    top_k: int | None = None
    query_id: str = "0"
    error: str | None = None

    @property
    def items(self) -> list[Item]:
        """The `top_k` best candidates, best first."""
        return [self.candidates[index] for index in self.order[: self.top_k]]

    @property
    def ids(self) -> list[str]:
        """Their ids; a candidate without one goes by its 0-based place in the input."""
        return [str(item.id) for item in self.items]

    @property
    def num_calls(self) -> int:
        """Tool calls over all windows."""
        return sum(trajectory.num_calls for trajectory in self.trajectories)

    @property
    def num_tokens(self) -> int:
        """Tokens read and written over all windows."""
        return sum(trajectory.num_tokens for trajectory in self.trajectories)

    @property
    def seconds(self) -> float:
        """Sum of the turns' times over all windows."""
        return sum(trajectory.seconds for trajectory in self.trajectories)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: order, ids, status, cost and the trajectories; pictures stay out."""
        return {
            "query_id": self.query_id,
            "order": list(self.order),
            "ids": self.ids,
            "status": self.status,
            "error": self.error,
            "calls": self.num_calls,
            "tokens": self.num_tokens,
            "seconds": self.seconds,
            "trajectories": [trajectory.to_dict() for trajectory in self.trajectories],
        }

    def save_html(self, path: str | Path) -> Path:
        """Writes a self-contained page with every thought, call and crop, and the final order; returns its path."""
        from .html import ranking_html

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ranking_html(self), encoding="utf-8")
        return path
