"""Ranking metrics, computed by ranx: hit rate, average precision, reciprocal rank, nDCG.

A run says which ids each query got, best first; qrels say which are relevant. The queries are those of the qrels: one
that the run lacks counts 0. Ranks decide and scores do not exist, so there are no ties.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np

Run = Mapping[str, Sequence[str]]
"""Query id to ids, best first."""

Qrels = Mapping[str, Collection[str] | Mapping[str, int]]
"""Query id to the relevant ids, or to a grade for each id, where 0 is not relevant."""

DEFAULT_METRICS = ("hit@1", "hit@5", "hit@10", "map@5", "mrr", "ndcg@10")

_NAME = re.compile(r"(hit|map|ndcg)@([1-9]\d*)|mrr")
_RANX = {"hit": "hit_rate", "map": "map", "ndcg": "ndcg"}


def hit_at_k(run: Run, qrels: Qrels, k: int) -> float:
    """
    Share of the queries with a relevant id among the first `k`: what UniIR and M-BEIR call Recall@k.

    Args:
        run (mapping):
            Query id to ids, best first.
        qrels (mapping):
            Query id to the relevant ids.
        k (`int`):
            How many ids are looked at.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.metrics import hit_at_k

    >>> hit_at_k({"q1": ["a", "b"], "q2": ["c"]}, {"q1": {"b"}, "q2": {"x"}}, k=2)
    0.5

    ```
    """
    return _mean(run, qrels, f"hit@{k}")


def average_precision_at_k(run: Run, qrels: Qrels, k: int) -> float:
    """
    Mean average precision over the first `k`, divided by min(k, number of relevant) as CIRCO defines it.

    Args:
        run (mapping), qrels (mapping), k (`int`):
            As [`hit_at_k`].
    """
    return _mean(run, qrels, f"map@{k}")


def ndcg_at_k(run: Run, qrels: Qrels, k: int) -> float:
    """
    Normalised discounted cumulative gain over the first `k`, with the grades as gains, as trec_eval has it.

    Args:
        run (mapping), qrels (mapping), k (`int`):
            As [`hit_at_k`].
    """
    return _mean(run, qrels, f"ndcg@{k}")


def reciprocal_rank(run: Run, qrels: Qrels) -> float:
    """
    Mean of 1 / rank of the first relevant id; 0 where there is none.

    Args:
        run (mapping), qrels (mapping):
            As [`hit_at_k`].
    """
    return _mean(run, qrels, "mrr")


def per_query(run: Run, qrels: Qrels, metrics: Iterable[str] = DEFAULT_METRICS) -> dict[str, np.ndarray]:
    """
    Each metric for each query, in the order of `qrels`.

    Args:
        run (mapping), qrels (mapping):
            As [`hit_at_k`].
        metrics (iterable of `str`, *optional*):
            Such as `"hit@5"`, `"map@5"`, `"ndcg@10"` and `"mrr"`.

    Raises:
        `ValueError`: for an unknown metric, or a query whose run names an id twice.
    """
    import numpy as np

    names = list(metrics)
    ranx_names = [_ranx_name(name) for name in names]
    if not qrels or not names:
        return {name: np.zeros(0) for name in names}
    numbered = [_numbered(query_id, run.get(query_id, ()), judged) for query_id, judged in qrels.items()]
    scores = _ranx_scores(numbered, ranx_names)
    sizes = np.array([len(judged) for _, judged in numbered])
    for name in names:
        if name.startswith("map@"):  # ranx divides by the number of relevant ids, whatever k is
            scores[name] = scores[name] * sizes / np.clip(sizes, 1, int(name[4:]))
    return {name: scores[name] for name in names}


def check_metrics(names: Iterable[str]) -> None:
    """
    Refuses names that are no metrics.

    Raises:
        `ValueError`: naming the first of them.
    """
    for name in names:
        _ranx_name(name)


def _ranx_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"unknown metric {name!r}: choose 'mrr', or 'hit', 'map' or 'ndcg' with a number, as in 'hit@5'"
        )
    return name if match[1] is None else f"{_RANX[match[1]]}@{match[2]}"


def _mean(run: Run, qrels: Qrels, name: str) -> float:
    (values,) = per_query(run, qrels, [name]).values()
    if not len(values):
        raise ValueError("there are no queries to take the mean of")
    return float(values.mean())


def _numbered(query_id: str, ranked: Sequence[str], judged: Any) -> tuple[dict[int, float], dict[int, float]]:
    """A query's run and qrels with numbers for ids: ranx hashes what it gets, and numbers stay themselves."""
    places = {item: place for place, item in enumerate(ranked)}
    if len(places) < len(ranked):
        twice = next(item for place, item in enumerate(ranked) if places[item] != place)
        raise ValueError(f"query {query_id}: the run names {twice!r} more than once")
    grades = judged if isinstance(judged, Mapping) else dict.fromkeys(judged, 1)
    missing = iter(range(len(ranked), len(ranked) + len(grades)))
    found = {places[item] if item in places else next(missing): float(g) for item, g in grades.items() if g > 0}
    return {place: float(len(ranked) - place) for place in range(len(ranked))}, found


def _ranx_scores(
    numbered: Sequence[tuple[dict[int, float], dict[int, float]]], ranx_names: Sequence[str]
) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ranx

        # ranx takes neither empty runs nor empty qrels: two ids that nothing else has stand for them, and never meet.
        run = {str(i): ranked or {2**40: 1.0} for i, (ranked, _) in enumerate(numbered)}
        qrels = {str(i): judged or {2**41: 1.0} for i, (_, judged) in enumerate(numbered)}
        # For a single metric ranx looks its result up under another name than it stored it.
        asked = list(dict.fromkeys([*ranx_names, "mrr", "hit_rate@1"]))
        scores = ranx.evaluate(qrels, run, asked, return_mean=False)
    return {name.replace("hit_rate", "hit"): values for name, values in scores.items()}
