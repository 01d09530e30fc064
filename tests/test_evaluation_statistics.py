from __future__ import annotations

import numpy as np
import pytest

from vretrver_hf.evaluation.statistics import bootstrap_interval, compare, score_interval


class TestBootstrap:
    def test_near_the_normal_interval_of_a_mean(self):
        values = np.random.default_rng(0).random(400)
        low, high = bootstrap_interval(values)
        half = 1.96 * values.std() / 20
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)

    def test_the_same_seed_gives_the_same_interval(self):
        values = np.random.default_rng(0).random(50)
        assert bootstrap_interval(values) == bootstrap_interval(list(values))
        assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)

    @pytest.mark.filterwarnings("error")
    def test_without_spread(self):
        assert bootstrap_interval([1.0] * 10) == (1, 1)

    @pytest.mark.parametrize("values", [[], [0.5]])
    def test_too_few(self, values):
        assert bootstrap_interval(values) is None

    def test_covers_the_truth_about_as_often_as_it_says(self):
        source = np.random.default_rng(1)
        intervals = [bootstrap_interval(source.random(100) < 0.6, resamples=300, seed=i) for i in range(200)]
        assert 0.9 <= np.mean([low <= 0.6 <= high for low, high in intervals]) <= 0.99


class TestScores:
    def test_bootstrapped_where_scores_differ(self):
        values = [0.0, 1.0, 1.0, 0.5] * 10
        assert score_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert score_interval([0.5] * 10) == (0.5, 0.5)

    @pytest.mark.parametrize(("score", "expected"), [(1.0, (0.83887, 1.0)), (0.0, (0.0, 0.16113))])
    def test_wilson_where_all_are_right_or_none(self, score, expected):
        # z = 1.96: all of n right gives n / (n + z²) and 1
        assert score_interval([score] * 20) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("values", [[], [1.0]])
    def test_too_few(self, values):
        assert score_interval(values) is None


class TestCompare:
    def test_counts_and_means(self):
        result = compare([1, 1, 0, 1], [1, 0, 1, 0])
        assert (result.wins, result.losses, result.ties) == (2, 1, 1)
        assert result.mean == pytest.approx(0.25)

    def test_exact_where_few_queries_differ(self):
        # Five wins and no loss: only all signs as they are, or all flipped, are as extreme: 2 of 2 ** 5.
        assert compare([1] * 5 + [0] * 90, [0] * 95).p_value == pytest.approx(2 / 32)

    @pytest.mark.parametrize("count", [1, 9])
    def test_one_differing_query_proves_nothing(self, count):
        assert compare([1] * count, [0] + [1] * (count - 1)).p_value == 1

    def test_equal_runs(self):
        result = compare([0.3, 0.7], [0.3, 0.7])
        assert result.p_value == 1 and result.mean == 0 and result.interval == (0, 0)

    def test_agrees_with_the_sign_test_on_many_queries(self):
        from scipy import stats

        first, second = [1] * 70 + [0] * 30, [0] * 70 + [1] * 30
        expected = stats.binomtest(70, 100).pvalue  # with differences of one size the two tests are one
        assert compare(first, second).p_value == pytest.approx(expected, abs=4e-4)

    @pytest.mark.parametrize("pair", [([1], [1, 2]), ([], [])])
    def test_queries_must_match(self, pair):
        with pytest.raises(ValueError, match="same queries"):
            compare(*pair)
