"""A key-value cache whose rows live independently of each other."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


_GROWTH = 256
"""Columns are added in steps of at least this many tokens, so that growing stays rare."""


class SlotCache(Cache):
    """
    Keys and values of many conversations, one row each, every row filled from its first column.

    transformers' own caches pad rows on the left and grow together; here a row can be prefilled, extended, moved and
    reused while the others stay as they are. Before each forward pass [`SlotCache.plan`] says where its tokens go.

    Args:
        num_layers (`int`):
            Number of decoder layers.
        device (`torch.device`):
            Where the model runs.
    """

    def __init__(self, num_layers: int, device: torch.device):
        self._plan = _Plan(device)
        super().__init__(layers=[_SlotLayer(self._plan) for _ in range(num_layers)])

    def plan(self, rows: torch.Tensor | None, columns: torch.Tensor, length: int, fresh: bool = False) -> None:
        """
        Says where the next forward pass writes.

        Args:
            rows (`torch.Tensor` of shape `(batch,)`, *optional*):
                Cache row of each row of the batch; `None` for the first `batch` rows in order.
            columns (`torch.Tensor` of shape `(batch, tokens)`):
                Cache column of each token.
            length (`int`):
                Columns that attention looks at.
            fresh (`bool`, *optional*, defaults to `False`):
                Whether the rows hold nothing yet, so that the new tokens attend only to each other.
        """
        self._plan.rows = rows
        self._plan.columns = columns
        self._plan.length = length
        self._plan.fresh = fresh
        self._plan.num_rows = columns.shape[0] if rows is None else int(rows.max()) + 1

    @property
    def version(self) -> int:
        """Another number whenever the memory for keys and values has moved."""
        return self._plan.version

    def reserve(self, rows: int, columns: int) -> None:
        """
        Makes room for so many rows and columns: at once, or with the first that come where none are in use. Growing
        step by step would cost the sum of all sizes, since what is outgrown is too small for what comes next and a
        GPU's allocator keeps it.
        """
        self._plan.room = rows, columns
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(rows, columns)

    def move(self, source: int, target: int) -> None:
        """Copies a row onto another."""
        for layer in self.layers:
            if layer.is_initialized and source < layer.keys.shape[0]:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]

    def clear(self, row: int) -> None:
        """
        Forgets the row behind the last one in use, and all memory once none is in use. A masked column still meets a
        weight of 0, and 0 × NaN would carry what went wrong in one conversation into the next.
        """
        for layer in self.layers:
            if layer.is_initialized and row == 0:
                layer.is_initialized = False
                layer.keys = layer.values = None
                self._plan.version += 1
            elif layer.is_initialized and row < layer.keys.shape[0]:
                layer.keys[row] = 0
                layer.values[row] = 0


class _Plan:
    def __init__(self, device: torch.device):
        self.rows: torch.Tensor | None = None
        self.columns = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.length = 0
        self.fresh = True
        self.num_rows = 0
        self.room = 0, 0
        self.version = 0


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        heads, width = key_states.shape[1], key_states.shape[3]
        # Under autocast rotated keys are in single precision and values in half, as attention will read both.
        self.keys = key_states.new_zeros(0, heads, 0, width, dtype=value_states.dtype)
        self.values = value_states.new_zeros(0, heads, 0, value_states.shape[3])
        self.is_initialized = True
        self.grow(*self._plan.room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._plan
        self.grow(plan.num_rows, plan.length)
        rows = torch.arange(key_states.shape[0], device=key_states.device) if plan.rows is None else plan.rows
        # Advanced indices around a slice: the result is (batch, tokens, heads, width).
        self.keys[rows[:, None], :, plan.columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows[:, None], :, plan.columns] = value_states.transpose(1, 2)
        if plan.fresh:
            return key_states, value_states
        if plan.rows is None:
            return self.keys[: plan.num_rows, :, : plan.length], self.values[: plan.num_rows, :, : plan.length]
        return self.keys[rows, :, : plan.length], self.values[rows, :, : plan.length]

    def get_seq_length(self) -> int:
        return 0 if self._plan.fresh else self._plan.length - self._plan.columns.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self._plan.fresh else self._plan.length), 0

    def get_max_length(self) -> int:
        return -1

    def grow(self, rows: int, columns: int) -> None:
        have_rows, heads, have_columns, _ = self.keys.shape
        if rows <= have_rows and columns <= have_columns:
            return
        new_rows = max(rows, have_rows)
        new_columns = have_columns if columns <= have_columns else max(columns + _GROWTH, have_columns * 5 // 4)
        # Both or none: where memory is full, rows that there are keys but no values of could not be moved any more.
        keys, values = (_enlarged(old, new_rows, new_columns) for old in (self.keys, self.values))
        self.keys, self.values = keys, values
        self._plan.version += 1


def _enlarged(old: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    # Zeros and not uninitialised memory: a masked column still meets a weight of 0, and 0 × NaN would spread.
    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
