"""Plots of results. Without matplotlib there are none, and nothing else is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmarks import BENCHMARKS, PAPER
from .results import Results, Scores, primary_metric


if TYPE_CHECKING:
    from .report import Run

_MOST_GROUPS = 24


def draw_metrics(folder: Path, results: Results) -> Path | None:
    """Reranked beside coarse, one pair of points a data set, with intervals; the paper's where it has one."""
    groups = list(results.groups)[:_MOST_GROUPS]
    if not _can_draw() or not groups:
        return None
    figure, axes = _axes(groups)
    for place, name, colour in ((-0.12, "coarse", "tab:grey"), (0.12, "reranked", "tab:blue")):
        points = [results.groups[group][name][primary_metric(group)] for group in groups]
        _points(axes, [i + place for i in range(len(groups))], points, name, colour)
    _paper_points(axes, groups)
    return _save(figure, axes, folder / "metrics.svg")


def draw_comparison(folder: Path, runs: Sequence[Run]) -> Path | None:
    """The runs' scores, one row a data set, with intervals; the paper's where it has one."""
    groups = list(dict.fromkeys(group for run in runs for group in run.results.groups))[:_MOST_GROUPS]
    if not _can_draw() or not groups:
        return None
    figure, axes = _axes(groups)
    for number, run in enumerate(runs):
        known = [(place, group) for place, group in enumerate(groups) if group in run.results.groups]
        points = [run.results.groups[group]["reranked"][primary_metric(group)] for _, group in known]
        offset = 0.5 * ((number + 0.5) / len(runs) - 0.5)
        _points(axes, [place + offset for place, _ in known], points, run.name, f"C{number}")
    _paper_points(axes, groups)
    return _save(figure, axes, folder / "comparison.svg")


def draw_ranks(folder: Path, scores: Scores | None) -> Path | None:
    """Share of the queries with a relevant candidate among the first k, reranked and coarse, for each k."""
    if not _can_draw() or scores is None or not scores.keys:
        return None
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in (("coarse", "tab:grey"), ("reranked", "tab:blue")):
        ranks = 1 / getattr(scores, name)["mrr"].clip(1e-9)
        cuts = list(range(1, 51))
        axes.step(cuts, [(ranks <= k + 1e-3).mean() for k in cuts], where="post", label=name, color=colour)
    axes.set(xlabel="k", ylabel="hit@k, all queries", ylim=(0, 1.02), xlim=(1, 50))
    return _save(figure, axes, folder / "ranks.svg")


def _can_draw() -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vretrver"  # the same figures give the same file
    return True


def _axes(groups: Sequence[str]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.42 * len(groups)), layout="constrained")
    names = [f"{BENCHMARKS[g].title} {BENCHMARKS[g].kind}" if g in BENCHMARKS else g for g in groups]
    labels = [f"{name}  {primary_metric(group)}" for name, group in zip(names, groups, strict=True)]
    axes.set_yticks(range(len(groups)), labels)
    axes.set(xlim=(0, 100), xlabel="%", ylim=(len(groups) - 0.5, -0.5))
    axes.grid(axis="x", linewidth=0.4)
    return figure, axes


def _points(axes: Any, places: Sequence[float], points: Sequence[Any], label: str, colour: str) -> None:
    known = [(place, p) for place, p in zip(places, points, strict=True) if p["mean"] is not None]
    means = [100 * point["mean"] for _, point in known]
    ends = [point["interval"] or (point["mean"], point["mean"]) for _, point in known]
    below = [max(0.0, mean - 100 * low) for mean, (low, _) in zip(means, ends, strict=True)]
    above = [max(0.0, 100 * high - mean) for mean, (_, high) in zip(means, ends, strict=True)]
    heights = [place for place, _ in known]
    axes.errorbar(means, heights, xerr=[below, above], fmt="o", markersize=4, capsize=2, label=label, color=colour)


def _paper_points(axes: Any, groups: Sequence[str]) -> None:
    rows = PAPER["V-Retrver-7B"]
    known = [(rows[group], place) for place, group in enumerate(groups) if group in rows]
    if known:
        axes.scatter(*zip(*known, strict=True), marker="|", s=90, color="black", label="paper's V-Retrver-7B")


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
