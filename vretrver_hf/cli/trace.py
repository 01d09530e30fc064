"""What a model does, told in a terminal as it happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .common import one_line


if TYPE_CHECKING:
    from ..agent import Event
    from ..items import Item
    from ..ranking import Ranking
    from ..reranker import Reranker

_WIDTH = 10
_STYLES = {
    "query": "bold",
    "thinks": "cyan",
    "calls": "yellow",
    "answers": "bold cyan",
    "right": "bold green",
    "wrong": "bold red",
    "is told": "red",
    "error": "red",
}
_STATUS = {"repaired": " (repaired)", "fallback": " (no usable answer: the order stays)"}


class Trace:
    """
    Prints queries, what the model makes of them, and rankings; in colour where standard output is a terminal.

    Candidates are numbered from 1, as the model numbers them.
    """

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._num_candidates = 0

    def line(self, label: str, text: str) -> None:
        """Prints one line: what happens, then the words."""
        style = _STYLES.get(label, "dim")
        self._console.print(Text(label.ljust(_WIDTH), style), Text(one_line(text)), sep="")

    def gap(self) -> None:
        """Prints an empty line."""
        self._console.print()

    def model(self, name: str | None, reranker: Reranker) -> None:
        """Prints which model runs and where."""
        self.line("model", f"{name or 'vretrver-tiny, bundled'} ({reranker.engine.place})")

    def ask(self, query: Item, candidates: list[Item]) -> None:
        """Prints a query and its candidates."""
        self._num_candidates = len(candidates)
        self.line("query", _describe(query))
        for index, candidate in enumerate(candidates):
            self.line(f"{index + 1:>5}", _describe(candidate, index))

    def event(self, event: Event) -> None:
        """Prints what just happened; fit for `on_event`."""
        if event.kind == "window" and len(event.order) < self._num_candidates:
            numbers = ", ".join(str(index + 1) for index in event.order)
            self.line("window", f"candidates {numbers}; the model numbers them from 1")
        elif event.kind == "thought":
            self.line("thinks", event.text)
        elif event.kind == "call":
            arguments = json.dumps(event.call["arguments"], ensure_ascii=False)
            self.line("calls", f"{event.call['name']} {arguments}")
        elif event.kind == "observation":
            sizes = ", ".join(f"{image.width}x{image.height}" for image in event.images)
            self.line("sees" if event.valid else "is told", f"{event.text} {sizes}")
        elif event.kind == "answer":
            best_first = ", ".join(str(place + 1) for place in event.order)
            self.line("answers", best_first + _STATUS.get(event.status, ""))

    def ranking(self, ranking: Ranking) -> None:
        """Prints the best candidates, best first."""
        if ranking.error:
            self.line("error", ranking.error)
        self.gap()
        for place, index in enumerate(ranking.order[: ranking.top_k], start=1):
            self.line(f"{place:>5}.", f"({index + 1}) {_describe(ranking.candidates[index], index)}")
        self.gap()
        self.line("", cost(ranking))


def cost(ranking: Ranking) -> str:
    """Status and cost of a ranking, such as `"ok, 1 call, 1,234 tokens, 2.3 s"`."""
    return f"{ranking.status}, {calls(ranking.num_calls)}, {ranking.num_tokens:,} tokens, {ranking.seconds:.1f} s"


def calls(count: int) -> str:
    """Such as `"2 calls"`."""
    return f"{count} call{'' if count == 1 else 's'}"


def _describe(item: Item, index: int | None = None) -> str:
    """A few words for an item: what its picture is called, and its text. An id made of the `index` says nothing."""
    parts = []
    if item.image is not None:
        named = item.id is not None and item.id != str(index)
        parts.append(f"[picture] {item.id if named else item.image}")
    if item.text is not None:
        parts.append(item.text)
    return " ".join(parts)
