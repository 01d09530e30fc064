"""How sure a mean is, and whether one run is better than another on the same queries; by scipy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


RESAMPLES = 2_000
"""Bootstrap resamples of an interval."""
SIGN_FLIPS = 9_999
"""Random sign flips of a paired test; with few differing queries all flips are taken and the test is exact."""

_CELLS = 2**22


@dataclasses.dataclass(frozen=True)
class Difference:
    """
    One run against another on the same queries.

    Args:
        mean (`float`):
            Mean of the first minus the mean of the second.
        interval (`tuple[float, float]`, *optional*):
            95 % bootstrap interval of that difference.
        p_value (`float`):
            Of a two-sided randomisation test: how often flipping signs at random gives as large a difference.
        wins (`int`), losses (`int`), ties (`int`):
            Queries on which the first is better, worse, equal.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float
    wins: int
    losses: int
    ties: int


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """
    Percentile bootstrap interval of the mean over queries.

    Args:
        values (sequence of `float`):
            One value a query.
        level (`float`, *optional*, defaults to 0.95):
            Share of resamples inside.
        resamples (`int`, *optional*, defaults to 2,000):
            How many resamples are drawn.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end; `None` for fewer than two values, which have no spread.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.statistics import bootstrap_interval

    >>> low, high = bootstrap_interval([0.0] * 50 + [1.0] * 50)
    >>> 0.39 < low < 0.42 and 0.58 < high < 0.61
    True

    ```
    """
    import numpy as np
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _CELLS // len(values)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def score_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """
    95 % interval of the mean of scores between 0 and 1, such as hit@1 or nDCG.

    It is bootstrapped, except where all scores are 0 or all are 1: resamples of those are all alike and would make a
    certainty of ten queries. Wilson's interval stands in for them.

    Args:
        values (sequence of `float`):
            One score a query.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end; `None` for fewer than two values.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.statistics import score_interval

    >>> [round(end, 2) for end in score_interval([1.0] * 20)]
    [0.84, 1.0]

    ```
    """
    from scipy import stats

    count, total = len(values), float(sum(values))
    if count < 2 or (any(values) and not all(value == 1 for value in values)):
        return bootstrap_interval(values, seed=seed)
    found = stats.binomtest(round(total), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """
    Compares two runs query by query.

    Args:
        first (sequence of `float`), second (sequence of `float`):
            Values of the same queries in the same order.
        seed (`int`, *optional*, defaults to 0):
            Seed of bootstrap and test.

    Raises:
        `ValueError`: if the two are not of one length, or empty.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.statistics import compare

    >>> compare([1, 1, 1, 0], [0, 0, 1, 0]).p_value  # two queries differ: 2 of 4 flips are as extreme
    0.5

    ```
    """
    import numpy as np
    from scipy import stats

    differences = np.asarray(first, float) - np.asarray(second, float)
    if len(first) != len(second) or not len(differences):
        raise ValueError(f"a paired test needs the same queries twice, got {len(first)} and {len(second)}")
    decisive = differences[differences != 0]  # flipping the sign of nothing changes nothing
    p_value = 1.0
    if len(decisive) > 1:  # of a single one, either sign is as extreme
        p_value = stats.permutation_test(
            (decisive,),
            np.sum,
            permutation_type="samples",
            n_resamples=SIGN_FLIPS,
            batch=max(1, _CELLS // len(decisive)),
            rng=np.random.default_rng(seed),
        ).pvalue
    return Difference(
        mean=float(differences.mean()),
        interval=bootstrap_interval(differences, seed=seed),
        p_value=float(p_value),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )
