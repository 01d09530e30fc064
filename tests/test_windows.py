from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vretrver_hf.windows import WindowWalk, sliding_windows


SIZES_AND_STRIDES = [(20, 10), (20, 20), (20, 1), (10, 5), (5, 3), (2, 1), (1, 1), (7, 4), (200, 100)]

sizes_and_strides = st.integers(1, 30).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


def rank_perfectly(n: int, size: int, stride: int, relevance: list[int]) -> list[int]:
    """Walks with a ranker that is right about every window: the most relevant first."""
    walk = WindowWalk(n, size, stride)
    while (window := walk.next()) is not None:
        walk.merge(sorted(range(len(window)), key=lambda position: -relevance[window[position]]))
    return walk.order


class TestSlidingWindows:
    @pytest.mark.parametrize(
        ("n", "size", "stride", "expected"),
        [
            (0, 20, 10, []),
            (1, 20, 10, [(0, 1)]),
            (19, 20, 10, [(0, 19)]),
            (20, 20, 10, [(0, 20)]),
            # One more than a window: the second window starts at 0 instead of at -9, and stays full.
            (21, 20, 10, [(1, 21), (0, 20)]),
            (29, 20, 10, [(9, 29), (0, 20)]),
            (30, 20, 10, [(10, 30), (0, 20)]),
            (31, 20, 10, [(11, 31), (1, 21), (0, 20)]),
            (50, 20, 10, [(30, 50), (20, 40), (10, 30), (0, 20)]),
            (100, 20, 20, [(80, 100), (60, 80), (40, 60), (20, 40), (0, 20)]),
            # Steps of a whole window, but 25 is not a multiple of 10: the last two windows share 5..9.
            (25, 10, 10, [(15, 25), (5, 15), (0, 10)]),
            (4, 2, 1, [(2, 4), (1, 3), (0, 2)]),
            (3, 1, 1, [(2, 3), (1, 2), (0, 1)]),
        ],
    )
    def test_by_hand(self, n, size, stride, expected):
        assert sliding_windows(n, size, stride) == expected

    def test_defaults_are_those_of_the_paper(self):
        assert sliding_windows(50) == [(30, 50), (20, 40), (10, 30), (0, 20)]

    @pytest.mark.parametrize(("size", "stride"), SIZES_AND_STRIDES)
    def test_every_length_up_to_200(self, size, stride):
        for n in range(201):
            windows = sliding_windows(n, size, stride)
            assert {position for window in windows for position in range(*window)} == set(range(n))
            assert all(stop - start == min(size, n) for start, stop in windows)
            # ceil((n - size) / stride) steps from the back to the front, and the window they start from.
            assert len(windows) == (0 if n == 0 else 1 + max(0, -(-(n - size) // stride)))
            if windows:
                assert windows[0][1] == n and windows[-1][0] == 0
            for (start, _), (next_start, _) in zip(windows, windows[1:], strict=False):
                assert start - next_start == stride or (next_start == 0 and 0 < start < stride)

    @given(st.integers(0, 300), sizes_and_strides)
    def test_any_length_size_and_stride(self, n, size_and_stride):
        windows = sliding_windows(n, *size_and_stride)
        assert {position for window in windows for position in range(*window)} == set(range(n))
        assert windows == sorted(set(windows), reverse=True)

    @pytest.mark.parametrize(
        ("n", "size", "stride", "message"),
        [
            (-1, 20, 10, "n must not be negative"),
            (5, 0, 1, "at least 1"),  # an empty window ranks nothing
            (5, 2, 0, "at least 1"),  # the walk would never move
            (5, 2, -1, "at least 1"),  # the walk would move to the back
            (50, 10, 11, "left out"),  # one position in eleven would lie between two windows
            (5, 20, 21, "left out"),  # refused even where n is small enough: settings do not depend on a query
            (0, 0, 0, "at least 1"),
        ],
    )
    def test_bad_settings(self, n, size, stride, message):
        with pytest.raises(ValueError, match=message):
            sliding_windows(n, size, stride)
        with pytest.raises(ValueError, match=message):
            WindowWalk(n, size, stride)


class TestWindowWalk:
    def test_by_hand(self):
        """
        Five candidates, windows of 3 with stride 2: positions 2-5, then 0-3.

            start    0 1 [2 3 4]    the ranker says 4 2 3, that is [2, 0, 1]
            then    [0 1  4] 2 3    the ranker says 4 0 1, that is [2, 0, 1]
            end      4 0 1 2 3
        """
        walk = WindowWalk(5, size=3, stride=2)
        assert walk.next() == [2, 3, 4]
        walk.merge([2, 0, 1])
        assert walk.order == [0, 1, 4, 2, 3]
        assert walk.next() == [0, 1, 4]
        walk.merge([2, 0, 1])
        assert walk.order == [4, 0, 1, 2, 3]
        assert walk.next() is None
        assert walk.next() is None

    def test_nothing_to_rank(self):
        walk = WindowWalk(0)
        assert walk.next() is None
        assert walk.order == []

    @pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 20, 21, 30, 49, 50, 100, 199, 200])
    def test_perfect_ranker_brings_the_best_ten_to_the_top(self, n):
        relevance = random.Random(n).sample(range(n), n)
        best_first = sorted(range(n), key=lambda candidate: -relevance[candidate])
        assert rank_perfectly(n, 20, 10, relevance)[:10] == best_first[:10]

    @given(st.permutations(range(60)), sizes_and_strides)
    def test_perfect_ranker_brings_the_overlap_to_the_top(self, relevance, size_and_stride):
        size, stride = size_and_stride
        order = rank_perfectly(60, size, stride, relevance)
        best_first = sorted(range(60), key=lambda candidate: -relevance[candidate])
        assert order[: size - stride] == best_first[: size - stride]

    @given(st.integers(0, 80), sizes_and_strides, st.randoms(use_true_random=False))
    def test_any_ranker_keeps_a_permutation(self, n, size_and_stride, rng):
        walk = WindowWalk(n, *size_and_stride)
        for start, stop in sliding_windows(n, *size_and_stride):
            before = walk.order
            window = walk.next()
            assert window == before[start:stop]
            walk.merge(rng.sample(range(len(window)), len(window)))
            assert sorted(walk.order) == list(range(n))
            assert walk.order[:start] == before[:start] and walk.order[stop:] == before[stop:]
        assert walk.next() is None

    @pytest.mark.parametrize(
        "order",
        [
            [0, 1],  # a candidate is lost
            [0, 1, 1],  # one is doubled and one is lost
            [1, 2, 3],  # 1-based
            [0, 1, 2, 3],  # a foreign one
            [],
        ],
    )
    def test_refuses_what_would_lose_a_candidate(self, order):
        walk = WindowWalk(3)
        walk.next()
        with pytest.raises(ValueError, match="once"):
            walk.merge(order)
        assert walk.order == [0, 1, 2]
        walk.merge([2, 1, 0])  # the window is still open
        assert walk.order == [2, 1, 0]

    def test_next_and_merge_take_turns(self):
        walk = WindowWalk(3)
        with pytest.raises(RuntimeError, match="next"):
            walk.merge([0, 1, 2])
        walk.next()
        with pytest.raises(RuntimeError, match="merge"):
            walk.next()

    def test_order_is_a_copy(self):
        walk = WindowWalk(3)
        walk.order.reverse()
        assert walk.order == [0, 1, 2]

    def test_passes(self):
        """
        Four candidates, windows of 2 with stride 1, ranked perfectly (3 is best, 0 worst): a pass brings the best to
        the front, and the second pass the best but one behind it.
        """
        orders = []
        for passes in (1, 2):
            walk = WindowWalk(4, 2, 1, passes)
            while (window := walk.next()) is not None:
                walk.merge(sorted(range(len(window)), key=lambda place: -window[place]))
            orders.append(walk.order)
        assert orders == [[3, 0, 1, 2], [3, 2, 0, 1]]
        with pytest.raises(ValueError, match="passes must be at least 1"):
            WindowWalk(4, 2, 1, 0)
