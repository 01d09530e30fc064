"""From a journal to figures: metrics with intervals, what it cost, run files; in memory that does not grow."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.trec import write_qrels, write_run
from ..journal import Journal
from .benchmarks import BENCHMARKS, macro_mean
from .job import QueryResult, Window
from .metrics import DEFAULT_METRICS, per_query
from .statistics import compare, score_interval


if TYPE_CHECKING:
    import numpy as np

METRICS, SCORES = "metrics.json", "scores.json"
RUN, COARSE_RUN, QRELS = "run.trec", "coarse.trec", "qrels.txt"
"""Files of a finished evaluation."""

STATUSES = ("ok", "repaired", "fallback")
TIME = "seconds"
"""Latency of a query: the sum of its turns' times, which run while others share the batch, and so no share of the wall
clock. It differs from run to run though nothing else does."""

_AT_A_TIME = 1_000


@dataclasses.dataclass
class Results:
    """
    What came of an evaluation.

    Args:
        name (`str`):
            Names it in tables.
        settings (`dict`):
            What it was run with.
        groups (`dict[str, dict]`):
            Data set to its figures: `n`, `failed`, `reranked` and `coarse` (metric to `mean` and `interval`), `gain`
            (metric to a [`~statistics.Difference`] of the two), and `cost`, each a mean over the queries; its
            `seconds` are the latency of a query, as [`~job.Window`] has it, and not wall clock.
        total (`dict`):
            The same over all queries.
        macro (`dict[str, float]`, *optional*):
            Macro means over M-BEIR's sixteen tasks, where all are there.
        errors (`dict[str, str]`):
            Queries that failed, and why. They count 0.
    """

    name: str
    settings: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    total: dict[str, Any]
    macro: dict[str, float] | None
    errors: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_text(json.dumps(vars(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """
        Reads a `metrics.json`, or the one of a folder.

        Raises:
            `ValueError`: if it is none.
        """
        path = Path(path)
        path = path / METRICS if path.is_dir() else path
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); name what vretrver evaluate wrote") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} holds no results of vretrver evaluate ({error})") from error


@dataclasses.dataclass
class Scores:
    """
    Every metric of every query, for paired tests.

    Args:
        keys (`list[str]`):
            Query ids.
        groups (`list[str]`):
            Their data sets.
        reranked (`dict[str, array]`), coarse (`dict[str, array]`):
            Metric to a value for each query.
    """

    keys: list[str]
    groups: list[str]
    reranked: dict[str, np.ndarray]
    coarse: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike[str]) -> None:
        values = {
            name: {metric: scores.round(6).tolist() for metric, scores in getattr(self, name).items()}
            for name in ("reranked", "coarse")
        }
        text = json.dumps({"keys": self.keys, "groups": self.groups, **values}, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        import numpy as np

        values = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("reranked", "coarse"):
            values[name] = {metric: np.array(scores) for metric, scores in values[name].items()}
        return cls(**values)


def write_results(
    folder: str | os.PathLike[str],
    name: str,
    settings: Mapping[str, Any],
    keys: Sequence[str],
    groups: Sequence[str],
    journal: Journal,
    metrics: Sequence[str] | None = None,
) -> Results:
    """
    Writes everything that a finished journal gives: metrics, scores, runs and judgements. It depends on the journal's
    queries alone, not on who did them, nor when.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files go.
        name (`str`):
            Names the evaluation in tables.
        settings (mapping):
            What it was run with.
        keys (sequence of `str`), groups (sequence of `str`):
            All query ids, also of those that failed, and their data sets.
        journal (`Journal`):
            The finished queries.
        metrics (sequence of `str`, *optional*):
            What is computed; what the data sets are reported in by default.
    """
    folder = Path(folder)
    metrics = list(metrics or metrics_of(groups))
    scores = _scores(keys, groups, journal, metrics)
    costs = _costs(keys, groups, journal)
    done = [key in journal for key in keys]
    figures = {}
    for group in dict.fromkeys(groups):
        figures[group] = _figures(scores, done, [g == group for g in groups], costs[group])
    total = _figures(scores, done, [True] * len(keys), costs[None])
    errors = journal.errors
    known = {key: errors[key] for key in keys if key in errors}
    results = Results(name, dict(settings), figures, total, _macro(figures), known)
    _write_files(folder, name, keys, groups, journal)
    scores.save(folder / SCORES)
    results.save(folder / METRICS)
    return results


def metrics_of(groups: Sequence[str]) -> list[str]:
    """Every metric that these data sets are reported in."""
    names = [metric for group in dict.fromkeys(groups) if group in BENCHMARKS for metric in BENCHMARKS[group].metrics]
    return list(dict.fromkeys([*DEFAULT_METRICS, *names]))


def primary_metric(group: str) -> str:
    """The metric that a data set is reported in; hit@1 where nobody has settled one."""
    return BENCHMARKS[group].metric if group in BENCHMARKS else "hit@1"


def finished(keys: Sequence[str], journal: Journal) -> Iterator[tuple[str, QueryResult | None]]:
    """Every query with what came of it, in order, one at a time; `None` where it is not finished."""
    for key in keys:
        yield key, QueryResult.from_dict(journal[key]) if key in journal else None


def _scores(keys: Sequence[str], groups: Sequence[str], journal: Journal, metrics: Sequence[str]) -> Scores:
    import numpy as np

    parts: dict[str, list[dict[str, np.ndarray]]] = {"reranked": [], "coarse": []}
    source = finished(keys, journal)
    while chunk := list(itertools.islice(source, _AT_A_TIME)):
        qrels = {key: {} if result is None else result.relevant for key, result in chunk}
        for name in parts:
            run = {key: getattr(result, name) for key, result in chunk if result is not None}
            parts[name].append(per_query(run, qrels, metrics))
    joined = {
        name: {metric: np.concatenate([part[metric] for part in chunks] or [np.zeros(0)]) for metric in metrics}
        for name, chunks in parts.items()
    }
    return Scores(list(keys), list(groups), **joined)


def _costs(keys: Sequence[str], groups: Sequence[str], journal: Journal) -> dict[str | None, dict[str, Any]]:
    """Sums over each data set, and over all under `None`."""
    sums: dict[str | None, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for (_, result), group in zip(finished(keys, journal), groups, strict=True):
        if result is not None:
            counted = _count(result)
            sums[group].update(counted)
            sums[None].update(counted)
    return collections.defaultdict(dict, {group: _rates(counter) for group, counter in sums.items()})


def _count(result: QueryResult) -> collections.Counter[str]:
    counter: collections.Counter[str] = collections.Counter({"queries": 1, f"query {result.status}": 1})
    for window in result.windows:
        counter.update({"windows": 1, f"window {window.status}": 1})
        counter.update({name: getattr(window, name) for name in _SUMMED})
    return counter


_SUMMED = tuple(field.name for field in dataclasses.fields(Window) if field.name not in ("status", "finish"))


def _rates(counter: collections.Counter[str]) -> dict[str, Any]:
    queries, windows = counter["queries"], counter["windows"]
    return {
        "windows": windows / queries,
        "calls": counter["calls"] / queries,
        "valid_calls": counter["valid_calls"] / counter["calls"] if counter["calls"] else None,
        "malformed_turns": counter["malformed"] / queries,
        "statuses": {status: counter[f"query {status}"] / queries for status in STATUSES},
        "window_statuses": {s: counter[f"window {s}"] / windows if windows else 0.0 for s in STATUSES},
        "tokens": counter["tokens"] / queries,
        "sampled_tokens": counter["sampled"] / queries,
        TIME: counter["seconds"] / queries,
    }


def _figures(scores: Scores, done: list[bool], chosen: list[bool], cost: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    mask = np.array(chosen, bool)
    figures: dict[str, Any] = {"n": int(mask.sum()), "failed": int(sum(np.array(chosen) & ~np.array(done, bool)))}
    for name in ("reranked", "coarse"):
        values = {metric: array[mask] for metric, array in getattr(scores, name).items()}
        figures[name] = {
            metric: {"mean": float(array.mean()) if len(array) else None, "interval": score_interval(array)}
            for metric, array in values.items()
        }
    gains = {m: (scores.reranked[m][mask], scores.coarse[m][mask]) for m in scores.reranked} if mask.any() else {}
    figures["gain"] = {metric: dataclasses.asdict(compare(*pair)) for metric, pair in gains.items()}
    return {**figures, "cost": cost}


def _macro(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    means = {}
    for name in ("reranked", "coarse"):
        rows = {group: row[name][primary_metric(group)]["mean"] for group, row in figures.items()}
        mean = macro_mean(rows)
        if mean is None:
            return None
        means[name] = mean
    return means


def _write_files(folder: Path, name: str, keys: Sequence[str], groups: Sequence[str], journal: Journal) -> None:
    ids = {BENCHMARKS[group].task_id if group in BENCHMARKS else None for group in groups}
    task_id = ids.pop() if len(ids) == 1 else None
    tag = re.sub(r"\s+", "_", name) or "run"

    def rankings(side: str) -> Iterator[tuple[str, list[str]]]:
        for key, result in finished(keys, journal):
            if result is not None:
                yield _column(key), [_column(item) for item in getattr(result, side)]

    write_run(folder / RUN, rankings("reranked"), tag, task_id)
    write_run(folder / COARSE_RUN, rankings("coarse"), "coarse", task_id)
    judged: Callable[[QueryResult], list[str]] = lambda result: [_column(i) for i, g in result.relevant.items() if g]  # noqa: E731
    write_qrels(folder / QRELS, ((_column(key), judged(r)) for key, r in finished(keys, journal) if r is not None))


def _column(item: str) -> str:
    """An id that fits a column."""
    return re.sub(r"\s", "_", item) or "_"
