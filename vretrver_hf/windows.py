"""Sliding windows: how a model that compares `size` candidates at a time ranks any number of them.

The walk goes from the back to the front. Each window overlaps the one before it by `size - stride` places, so the best
of the back ride forward: with a ranker that is right about each window, the best `size - stride` of all candidates end
at the top.
"""

from __future__ import annotations

from collections.abc import Sequence


def sliding_windows(n: int, size: int = 20, stride: int = 10) -> list[tuple[int, int]]:
    """
    The windows over `n` positions, from the back to the front. Every position lies in at least one window.

    Args:
        n (`int`):
            Number of positions.
        size (`int`, *optional*, defaults to 20):
            Positions in a window. Every window is full, except the only one where `n` is smaller than `size`.
        stride (`int`, *optional*, defaults to 10):
            Positions from a window to the next, towards the front. The last step is shorter where a full one would
            pass the front.

    Returns:
        `list[tuple[int, int]]`: half-open ranges `(start, stop)` in the order in which they are ranked.

    Raises:
        `ValueError`: if `n` is negative, `size` or `stride` is below 1, or `stride` exceeds `size`, which would leave
            positions out.

    Example:

    ```python
    >>> from vretrver_hf.windows import sliding_windows

    >>> sliding_windows(50)
    [(30, 50), (20, 40), (10, 30), (0, 20)]
    >>> sliding_windows(25)
    [(5, 25), (0, 20)]
    >>> sliding_windows(7)
    [(0, 7)]

    ```
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if size < 1 or stride < 1:
        raise ValueError(f"size and stride must be at least 1, got size {size} and stride {stride}")
    if stride > size:
        raise ValueError(f"stride {stride} exceeds size {size}: positions between two windows would be left out")
    if n == 0:
        return []
    starts = [*range(n - size, 0, -stride), 0]
    return [(start, min(start + size, n)) for start in starts]


class WindowWalk:
    """
    One query's walk through its windows. Each window shows the candidates as the windows before it have left them.

    Args:
        n (`int`):
            Number of candidates.
        size (`int`, *optional*, defaults to 20):
            Candidates in a window.
        stride (`int`, *optional*, defaults to 10):
            Step from a window to the next.
        passes (`int`, *optional*, defaults to 1):
            How often the walk is taken, each time from the back: each pass brings further good ones to the front.

    Raises:
        `ValueError`: as [`sliding_windows`], or if `passes` is below 1.

    Example:

    ```python
    >>> from vretrver_hf.windows import WindowWalk

    >>> walk = WindowWalk(4, size=3, stride=2)
    >>> walk.next()
    [1, 2, 3]
    >>> walk.merge([2, 0, 1])  # the last of the window is its best
    >>> walk.next()
    [0, 3, 1]
    >>> walk.merge([1, 0, 2])
    >>> walk.order
    [3, 0, 1, 2]
    >>> walk.next() is None
    True

    ```
    """

    def __init__(self, n: int, size: int = 20, stride: int = 10, passes: int = 1) -> None:
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self._order = list(range(n))
        self._windows = iter(sliding_windows(n, size, stride) * passes)
        self._current: tuple[int, int] | None = None

    @property
    def order(self) -> list[int]:
        """All candidates as ranked so far, best first: a permutation of `range(n)` at any time."""
        return list(self._order)

    def next(self) -> list[int] | None:
        """
        The candidates of the next window in their present order, or `None` when the walk is over.

        Raises:
            `RuntimeError`: if the window before it has not been merged.
        """
        if self._current is not None:
            raise RuntimeError("merge() the current window before asking for the next: its candidates depend on it")
        self._current = next(self._windows, None)
        return None if self._current is None else self._order[slice(*self._current)]

    def merge(self, order: Sequence[int]) -> None:
        """
        Puts the candidates of the current window into a new order.

        Args:
            order (sequence of `int`):
                Positions within the window, 0-based, best first.

        Raises:
            `ValueError`: if `order` is not a permutation of the window's positions. Nothing is changed then.
            `RuntimeError`: if no window is under way.
        """
        if self._current is None:
            raise RuntimeError("there is no window to merge: call next() first")
        shown = self._order[slice(*self._current)]
        if sorted(order) != list(range(len(shown))):
            raise ValueError(f"the order must name each of the window's 0..{len(shown) - 1} once, got {order}")
        self._order[slice(*self._current)] = [shown[position] for position in order]
        self._current = None
