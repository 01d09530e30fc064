"""Passes over one token a row, recorded once for each size and played again on a GPU."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ._slot_cache import SlotCache


logger = logging.getLogger(__name__)

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Takes each row's token, cache column and position, and the columns that attention looks at; gives hidden states."""

_COLUMNS = 256
"""Numbers of columns are multiples of this, so that few sizes are recorded."""
_ROWS = 4
"""Each number of rows is so many times the next smaller one."""
_PLAIN_USES = 3
"""A size is recorded when it has come up more often: that takes about as long as so many passes."""


class DecodeGraphs:
    """
    Runs passes over one token a row as CUDA graphs.

    A host takes longer to start the hundreds of kernels of such a pass than a GPU takes to run them. Rows and columns
    are filled up to one of few sizes; what is filled in writes into rows of the cache that nobody uses.

    Args:
        run (`Pass`):
            The pass itself.
        cache (`SlotCache`):
            What it writes to. Where its memory moves, everything is recorded anew.
        max_rows (`int`):
            Most rows.
        record (callable, *optional*):
            Takes a function of no arguments and returns one that does the same again: a CUDA graph by default.
    """

    def __init__(
        self,
        run: Pass,
        cache: SlotCache,
        max_rows: int,
        record: Callable[[Callable[[], torch.Tensor]], _Recorded] | None = None,
    ):
        self._run, self._cache, self._max_rows = run, cache, max_rows
        self._record = record or _record
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._uses: Counter[tuple[int, int]] = Counter()
        self._version = -1
        self._works = True

    def __call__(
        self, tokens: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Hidden states (rows × width), which the next pass overwrites."""
        size = self.size(len(tokens), length)
        self._uses[size] += 1
        if not self._works or self._uses[size] <= _PLAIN_USES:
            return self._run(tokens, columns, positions, length)
        self._cache.reserve(*size)
        if self._version != self._cache.version:
            self._graphs.clear()
            self._version = self._cache.version
        if size not in self._graphs:
            try:
                self._graphs[size] = self._recorded(size, (tokens, columns, positions))
            except RuntimeError as error:
                self._works = False
                logger.warning("passes cannot be recorded as CUDA graphs and stay slow: %s", error)
                return self._run(tokens, columns, positions, length)
        return self._graphs[size](tokens, columns, positions)

    def size(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and columns of the cache that a pass over so many uses, filled up."""
        size = self._max_rows
        while -(-size // _ROWS) >= rows and size > 1:
            size = -(-size // _ROWS)
        return size, -(-length // _COLUMNS) * _COLUMNS

    def _recorded(self, size: tuple[int, int], values: Sequence[torch.Tensor]) -> _Graph:
        rows, length = size
        inputs = [torch.nn.functional.pad(value, (0, rows - len(value))) for value in values]
        return _Graph(inputs, self._record(lambda: self._run(*inputs, length)))


@dataclasses.dataclass
class _Recorded:
    """A function that was recorded: how to play it, and where its result then stands."""

    play: Callable[[], None]
    result: torch.Tensor


@dataclasses.dataclass
class _Graph:
    inputs: list[torch.Tensor]
    recorded: _Recorded

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        rows = len(values[0])
        for buffer, value in zip(self.inputs, values, strict=True):
            buffer[:rows].copy_(value)
        self.recorded.play()
        return self.recorded.result[:rows]


def _record(function: Callable[[], torch.Tensor]) -> _Recorded:
    # Once before, on a stream of its own: what is made at the first call (handles, casts of weights that autocast
    # keeps) must not be part of the recording.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return _Recorded(graph.replay, result)


__all__ = ["DecodeGraphs"]
