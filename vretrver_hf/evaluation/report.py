"""Results as tables and plots: one run beside its coarse stage, several runs beside each other and the paper."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tables import latex_table, markdown_table
from .benchmarks import BENCHMARKS, PAPER, PAPER_MEANS, macro_mean
from .results import METRICS, SCORES, STATUSES, TIME, Results, Scores, primary_metric
from .statistics import Difference, compare


REPORT, TABLES = "README.md", "tables.tex"
"""Files of a report."""

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""

PAPER_COLUMN = "paper's V-Retrver-7B"

_ERRORS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """
    An evaluation to be set beside others.

    Args:
        name (`str`):
            What its column is called.
        results (`Results`):
            Its figures.
        scores (`Scores`, *optional*):
            Its values query by query; without them there is no paired test.
    """

    name: str
    results: Results
    scores: Scores | None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Loads a folder of `vretrver evaluate`, or its `metrics.json`, with the scores beside it."""
        results = Results.load(path)
        file = Path(path) / METRICS if Path(path).is_dir() else Path(path)
        beside = file.with_name(SCORES)
        return cls(results.name, results, Scores.load(beside) if beside.is_file() else None)


def write_report(folder: str | os.PathLike[str], results: Results, scores: Scores | None = None) -> None:
    """
    Writes one evaluation's report: `README.md`, `tables.tex`, and plots where matplotlib is installed.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files go.
        results (`Results`):
            The figures.
        scores (`Scores`, *optional*):
            The values query by query.
    """
    from .plots import draw_metrics, draw_ranks

    folder = Path(folder)
    tables = {
        "Reranked and coarse": gain_table(results),
        "All metrics, reranked": metric_table(results),
        "Cost": cost_table(results),
    }
    plots = [path.name for path in (draw_metrics(folder, results), draw_ranks(folder, scores)) if path is not None]
    text = f"# {results.name}\n\n" + _sections(tables) + _errors(results)
    text += "".join(f"\n![{Path(plot).stem}]({plot})\n" for plot in plots)
    block = json.dumps(results.settings, indent=2, ensure_ascii=False)
    text += f"\n## Settings\n\n```json\n{block}\n```\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    (folder / TABLES).write_text(_latex(tables), encoding="utf-8")


def write_comparison(folder: str | os.PathLike[str], runs: Sequence[Run]) -> None:
    """Writes several evaluations side by side, as [`write_report`] writes one."""
    from .plots import draw_comparison

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = comparison_tables(runs)
    text = "# " + " and ".join(run.name for run in runs) + "\n\n" + _sections(tables)
    plot = draw_comparison(folder, runs)
    text += "" if plot is None else f"\n![{plot.stem}]({plot.name})\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    (folder / TABLES).write_text(_latex(tables), encoding="utf-8")


def comparison_text(runs: Sequence[Run]) -> str:
    """Several evaluations side by side, as Markdown."""
    return _sections(comparison_tables(runs))


def comparison_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """The tables of a comparison: scores beside the paper's, paired tests against the first run, cost."""
    tables = {"Scores": score_table(runs)}
    if len(runs) > 1:
        tables[f"Paired tests against {runs[0].name}"] = test_table(runs)
    head, rows = ["run", *_COST_HEAD], [[run.name, *_cost_cells(run.results.total["cost"])] for run in runs]
    tables["Cost"] = (head, rows)
    return tables


def gain_table(results: Results) -> Table:
    """Each data set in its metric: reranked beside coarse, what was gained, and how sure that is."""
    head = ["data set", "metric", "n", "reranked", "coarse", "gain", "p"]
    if any(group in PAPER["V-Retrver-7B"] for group in results.groups):
        head.append(PAPER_COLUMN)
    rows = [_gain_row(group, primary_metric(group), row, len(head)) for group, row in results.groups.items()]
    if len(results.groups) > 1:
        rows.append(_gain_row("all queries", "hit@1", results.total, len(head)))
    if results.macro is not None:
        macro, paper = results.macro, macro_mean(PAPER["V-Retrver-7B"])
        cells = ["macro mean", "", "16 tasks", _number(macro["reranked"]), _number(macro["coarse"]), "", "", ""]
        rows.append([*cells[:7], f"{paper:.1f}"])
    return head, rows


def metric_table(results: Results) -> Table:
    """Every metric of every data set, with intervals."""
    metrics = list(results.total["reranked"])
    rows = [[_title(g), *(_score(row["reranked"][m]) for m in metrics)] for g, row in results.groups.items()]
    if len(results.groups) > 1:
        rows.append(["all queries", *(_score(results.total["reranked"][m]) for m in metrics)])
    return ["data set", *metrics], rows


def cost_table(results: Results) -> Table:
    """What a query cost and how the answers ended."""
    rows = [[_title(group), *_cost_cells(row["cost"])] for group, row in results.groups.items()]
    if len(results.groups) > 1:
        rows.append(["all queries", *_cost_cells(results.total["cost"])])
    return ["data set", *_COST_HEAD], rows


def score_table(runs: Sequence[Run]) -> Table:
    """Each data set in its metric, a column a run, with the paper's where it has one."""
    groups = list(dict.fromkeys(group for run in runs for group in run.results.groups))
    in_paper = any(group in PAPER["V-Retrver-7B"] for group in groups)
    head = ["data set", "metric", *(run.name for run in runs), *([PAPER_COLUMN] if in_paper else [])]
    rows = []
    for group in groups:
        metric = primary_metric(group)
        cells = [_cell(run.results.groups.get(group), metric) for run in runs]
        rows.append([_title(group), metric, *cells, *([_paper(group)] if in_paper else [])])
    if in_paper:
        means = [run.results.macro["reranked"] if run.results.macro else None for run in runs]
        mean = macro_mean(PAPER["V-Retrver-7B"])
        rows.append(["macro mean of 16", "", *map(_number, means), f"{mean:.1f}"])
        blank = ["–"] * len(runs)
        rows += [[f"macro mean of {name}", "", *blank, f"{value:.1f}"] for name, value in PAPER_MEANS.items()]
    return head, rows


def test_table(runs: Sequence[Run]) -> Table:
    """Each further run against the first on the queries that both have, data set by data set."""
    head = ["data set", "metric", "run", "queries", "difference", "95 % interval", "p", "better", "worse", "equal"]
    rows = []
    for run in runs[1:]:
        for group, metric, count, difference in paired_tests(runs[0], run):
            counts = [difference.wins, difference.losses, difference.ties]
            cells = [_signed(difference.mean), _interval(difference.interval, signed=True), _p(difference.p_value)]
            rows.append([_title(group), metric, run.name, str(count), *cells, *map(str, counts)])
    return head, rows


def paired_tests(first: Run, other: Run) -> list[tuple[str, str, int, Difference]]:
    """
    Compares two runs query by query, in each data set's own metric.

    Returns:
        `list[tuple]`: data set, metric, number of queries that both have, and how `other` differs from `first`.
    """
    if first.scores is None or other.scores is None:
        return []
    places = {key: place for place, key in enumerate(first.scores.keys)}
    shared: dict[str, list[tuple[int, int]]] = {}
    for place, (key, group) in enumerate(zip(other.scores.keys, other.scores.groups, strict=True)):
        if key in places and first.scores.groups[places[key]] == group:
            shared.setdefault(group, []).append((places[key], place))
    tests = []
    for group, pairs in shared.items():
        metric = primary_metric(group)
        if metric in first.scores.reranked and metric in other.scores.reranked:
            ours, theirs = (list(side) for side in zip(*pairs, strict=True))
            values = other.scores.reranked[metric][theirs], first.scores.reranked[metric][ours]
            tests.append((group, metric, len(pairs), compare(*values)))
    return tests


_COST_HEAD = [*("windows", "calls", "valid calls", "malformed turns"), *STATUSES]
_COST_HEAD += ["tokens", "written", "seconds (latency)"]


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    if not cost:
        return ["–"] * len(_COST_HEAD)
    valid = "–" if cost["valid_calls"] is None else f"{cost['valid_calls']:.1%}"
    statuses = [f"{cost['statuses'][status]:.1%}" for status in STATUSES]
    counts = [f"{cost['windows']:.2f}", f"{cost['calls']:.2f}", valid, f"{cost['malformed_turns']:.2f}"]
    return [*counts, *statuses, f"{cost['tokens']:.0f}", f"{cost['sampled_tokens']:.0f}", f"{cost[TIME]:.2f}"]


def _gain_row(group: str, metric: str, row: Mapping[str, Any], width: int) -> list[str]:
    gain = row["gain"].get(metric)
    gained = ["–", "–"]
    if gain is not None:
        gained = [f"{_signed(gain['mean'])} {_interval(gain['interval'], signed=True)}".strip(), _p(gain["p_value"])]
    cells = [_title(group), metric, str(row["n"]), _score(row["reranked"][metric]), _score(row["coarse"][metric])]
    return [*cells, *gained, _paper(group)][:width]


def _cell(row: Mapping[str, Any] | None, metric: str) -> str:
    return "–" if row is None or metric not in row["reranked"] else _score(row["reranked"][metric])


def _title(group: str) -> str:
    benchmark = BENCHMARKS.get(group)
    return f"{benchmark.title} {benchmark.kind}" if benchmark else group


def _paper(group: str) -> str:
    score = PAPER["V-Retrver-7B"].get(group)
    return "–" if score is None else f"{score:.1f}"


def _score(score: Mapping[str, Any]) -> str:
    return f"{_number(score['mean'])} {_interval(score['interval'])}".strip()


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(interval: Sequence[float] | None, signed: bool = False) -> str:
    show = _signed if signed else _number
    return "" if interval is None else f"[{show(interval[0])}, {show(interval[1])}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sections(tables: Mapping[str, Table]) -> str:
    note = (
        "Scores in %, with 95 % intervals over queries: bootstrapped, and Wilson's where all are 0 or all are 1; p "
        "from a paired randomisation test. Seconds are the latency of a query: the sum of its turns' times, which run "
        "while others share the batch, and so not its share of the wall clock.\n\n"
    )
    return note + "\n".join(f"## {title}\n\n{markdown_table(*table)}\n" for title, table in tables.items())


def _latex(tables: Mapping[str, Table]) -> str:
    return "\n\n".join(latex_table(*table, caption=title) for title, table in tables.items()) + "\n"


def _errors(results: Results) -> str:
    if not results.errors:
        return ""
    shown = [[key, " ".join(error.split())] for key, error in list(results.errors.items())[:_ERRORS_SHOWN]]
    more = len(results.errors) - len(shown)
    table = markdown_table(["failed query, counted as 0", "because"], shown)
    # Nothing is known of their candidates, so nothing of them can stand in a file that another tool averages over.
    note = f"They are in none of the run and judgement files: a mean over those is over {len(results.errors)} fewer."
    return f"\n## Failed queries\n\n{note}\n\n{table}\n" + (f"\nand {more} more\n" if more else "")
