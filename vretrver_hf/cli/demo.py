"""`vretrver demo`: the bundled model on the samples that come with the package."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..samples import Sample, load_samples
from .common import DeviceOption, DtypeOption, ModelOption, NoToolsOption, check_output, load_reranker
from .trace import Trace, calls, cost


if TYPE_CHECKING:
    from ..ranking import Ranking

_FOLDER = Path("outputs", "demo")


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a query and nothing else.")] = False,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for the page; {_FOLDER} by default, and with --json none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples.")] = None,
    no_tools: NoToolsOption = False,
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """
    Rank a few real pictures that the bundled model has never seen, and watch it think and look.

    Each query has five candidates, one of them right. Prints what the model thinks, which pictures it looks at again,
    and its answer; then right or wrong. The last line is the path of a web page that shows the same with pictures.

    With --json, one object a line and query: id, task, correct, calls (number of tool calls), order (0-based, best
    first), positive (the right candidate, 0-based), status, seconds.

    Example: `vretrver demo --limit 3 --out my-demo`
    """
    page = None if as_json and out is None else Path(out or _FOLDER, "index.html").absolute()
    if page is not None:
        check_output(page, "--out")
    samples = load_samples()[:limit]
    reranker = load_reranker(model, device, dtype, tools=False if no_tools else None)
    trace = None if as_json else Trace()
    if trace is not None:
        trace.model(model, reranker)
    rankings = []
    for number, sample in enumerate(samples, start=1):
        if trace is not None:
            trace.gap()
            trace.line(f"{number} of {len(samples)}", sample.task)
            trace.ask(sample.query, sample.candidates)
        ranking = reranker.rank(
            sample.query, sample.candidates, query_id=sample.id, on_event=None if trace is None else trace.event
        )
        rankings.append(ranking)
        if trace is None:
            print(json.dumps(_record(sample, ranking)), flush=True)
        else:
            trace.line(*_verdict(sample, ranking))
    if page is not None:
        page.write_text(_page(samples, rankings), encoding="utf-8")
    if trace is not None:
        trace.gap()
        trace.line("score", _score(samples, rankings))
        print(page)


def _correct(sample: Sample, ranking: Ranking) -> bool:
    return ranking.order[0] == sample.positive


def _record(sample: Sample, ranking: Ranking) -> dict:
    return {
        "id": sample.id,
        "task": sample.task,
        "correct": _correct(sample, ranking),
        "calls": ranking.num_calls,
        "order": ranking.order,
        "positive": sample.positive,
        "status": ranking.status,
        "seconds": round(ranking.seconds, 3),
    }


def _verdict(sample: Sample, ranking: Ranking) -> tuple[str, str]:
    right = f"candidate {sample.positive + 1} fits"
    if _correct(sample, ranking):
        return "right", f"{right} ({cost(ranking)})"
    return "wrong", f"{right} but came at place {ranking.order.index(sample.positive) + 1} ({cost(ranking)})"


def _score(samples: list[Sample], rankings: list[Ranking]) -> str:
    right, asked = collections.Counter(), collections.Counter(sample.task for sample in samples)
    for sample, ranking in zip(samples, rankings, strict=True):
        right[sample.task] += _correct(sample, ranking)
    tasks = ", ".join(f"{task} {right[task]} of {count}" for task, count in asked.items())
    looks, seconds = sum(r.num_calls for r in rankings), sum(r.seconds for r in rankings)
    return f"{right.total()} of {len(samples)} right ({tasks}); {calls(looks)}, {seconds:.1f} s"


def _page(samples: list[Sample], rankings: list[Ranking]) -> str:
    from ..html import rankings_html

    return rankings_html(
        rankings,
        title="Held-out samples",
        headings=[f"{number}. {sample.task}" for number, sample in enumerate(samples, start=1)],
        positives=[sample.positive for sample in samples],
    )
