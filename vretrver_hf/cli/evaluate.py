"""`vretrver evaluate`: a model on a benchmark, as a job that goes on, with everything a table needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    BaseUrlOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    Mistake,
    ModelOption,
    NoToolsOption,
    engine_mistakes,
    load_reranker,
    one_line,
)
from .jobs import (
    Bar,
    ImageRootOption,
    LimitOption,
    MaxTurnTokensOption,
    OutOption,
    SplitOption,
    check_folder,
    mistakes,
    quiet_datasets,
    tell_memory,
    weights_digest,
)


if TYPE_CHECKING:
    from ..evaluation.job import QueryResult
    from ..evaluation.queries import EvaluationSet
    from ..evaluation.results import Results
    from ..journal import Journal, Shard
    from ..reranker import Reranker

TOP20 = 20
"""Candidates of the one window of `--mode top20`."""


def evaluate(
    out: OutOption,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Released rows: parquet or JSONL file, folder of parquet files, or hub id."),
    ] = None,
    mbeir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A copy of M-BEIR, instead of --data.")] = None,
    task: Annotated[str | None, typer.Option(help="With --mbeir: the task, such as cirr_task7.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --mbeir: coarse results, a run in TREC's columns."),
    ] = None,
    pool: Annotated[
        Literal["local", "global"], typer.Option(help="With --mbeir: the pool that the run is over.")
    ] = "local",
    instruction: Annotated[
        str, typer.Option(help="With --mbeir: first, none, or a number, the seed that draws one for each query.")
    ] = "first",
    model: ModelOption = None,
    engine: EngineOption = "transformers",
    base_url: BaseUrlOption = None,
    mode: Annotated[
        Literal["sliding", "top20"],
        typer.Option(help="sliding: windows over the first --depth results; top20: one over the first 20 of them."),
    ] = "sliding",
    depth: Annotated[int, typer.Option(min=1, help="Coarse results to rerank; the others keep their order.")] = 50,
    window: Annotated[
        int | None, typer.Option(min=1, help="Candidates of a window; as saved with the model by default.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Step from a window to the next; as saved by default.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="How often the windows are walked through.")] = 1,
    prompt: Annotated[
        Literal["auto", "dataset", "preset"],
        typer.Option(help="Whose prompt; auto: the data's own, where they bring one and the preset is 'release'."),
    ] = "auto",
    max_turn_tokens: MaxTurnTokensOption = None,
    name: Annotated[str | None, typer.Option(help="Names the run in tables; by default its model.")] = None,
    split: SplitOption = "test",
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows under way at a time; with 1 none depends on others to the last bit.")
    ] = 16,
    trajectories: Annotated[bool, typer.Option("--trajectories", help="Keep the conversations too.")] = False,
    no_tools: NoToolsOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """
    Evaluate a model on a benchmark: rerank the coarse results, and measure before and after.

    Reads the released evaluation files (--data) or M-BEIR with a coarse run (--mbeir, --task, --run). Every query
    walks through its windows on its own, and windows of many queries share the model's batch. Of released rows the
    coarse results are ranked; where a row brings none, the candidates that it shows, which always hold a relevant one
    (settings: "candidates").

    Run the same command again after an interruption and it goes on: finished queries are in FOLDER/journal. Over
    other data, another run or with other settings it is refused. Queries that failed (a broken picture) count 0, are
    listed in FOLDER/README.md, and tried again by the next run.

    Several GPUs or machines: `accelerate launch --multi_gpu -m vretrver_hf.evaluation …`; each process takes its share
    of the queries, and the result is the same.

    FOLDER holds README.md and tables.tex (hit@k, MAP@5, MRR, nDCG@10 with 95 % intervals, calls, statuses, tokens,
    seconds), metrics.json, scores.json (query by query), run.trec and coarse.trec, qrels.txt, and plots. Set several
    side by side with `vretrver report`.

    Example: `vretrver evaluate --model V-Retrver/V-Retrver-7B --data mbeir_cirr_task7_test.parquet --out outputs/cirr`
    """
    _check_source(data, mbeir, task, run)
    check_folder(out, "--out")
    if mode == "top20":
        depth, window, stride = min(depth, TOP20), TOP20, TOP20
    queries = _open(data, mbeir, task, run, pool, instruction, split, image_root, limit)

    from ..evaluation.report import write_report
    from ..evaluation.results import SCORES, Scores, write_results
    from ..journal import Journal, current_shard

    with mistakes():
        shard = current_shard()
    windows = {"window": window, "stride": stride, "passes": passes}
    options = {"tools": False if no_tools else None, "max_sessions": batch_size, **windows}
    reranker = load_reranker(model, device or shard.device, dtype, engine, base_url, **options)
    with mistakes():
        _adjust(reranker, queries, prompt, max_turn_tokens)
        settings = {
            **_settings(model, "openai" if base_url else engine, reranker, dtype),
            "data": data or str(mbeir),
            "split": split,
            "run": str(run) if run else None,
            "mode": mode,
            "depth": depth,
            **queries.facts,
        }
        journal = Journal(out / "journal", settings, shard.index)
    with journal:
        with engine_mistakes(), reranker.engine:
            _play(reranker, queries, journal, depth, shard, trajectories)
        shard.leave()
        if not shard.is_main:
            return
        with mistakes():
            journal.refresh()
            results = write_results(
                out, name or _name(model, reranker), settings, queries.keys, queries.groups, journal
            )
    write_report(out, results, Scores.load(out / SCORES))
    _tell(results, out)


def _check_source(data: str | None, mbeir: Path | None, task: str | None, run: Path | None) -> None:
    if (data is None) == (mbeir is None):
        raise Mistake("say what to evaluate on: --data, or --mbeir with --task and --run")
    if mbeir is not None and (task is None or run is None):
        raise Mistake("--mbeir needs --task, such as cirr_task7, and --run, a file of coarse results")
    if data is not None and (task is not None or run is not None):
        raise Mistake("--task and --run belong to --mbeir; released rows bring their own coarse results")


def _open(
    data: str | None,
    mbeir: Path | None,
    task: str | None,
    run: Path | None,
    pool: str,
    instruction: str,
    split: str,
    image_root: Path | None,
    limit: int | None,
) -> EvaluationSet:
    quiet_datasets()
    import datasets

    from ..evaluation.queries import MBEIRSet, ReleasedSet

    try:
        if data is not None:
            queries: EvaluationSet = ReleasedSet.open(data, split, image_root, limit)
        else:
            assert mbeir is not None and task is not None and run is not None
            queries = MBEIRSet.open(mbeir, task, run, instruction, pool == "global", image_root, limit)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Mistake(f"--data {data}: {reason}" if data else f"--mbeir {mbeir}: {reason}") from error
    if not len(queries):
        raise Mistake(f"{data or mbeir} holds no queries")
    return queries


def _adjust(reranker: Reranker, queries: EvaluationSet, prompt: str, max_turn_tokens: int | None) -> None:
    """Whose prompt is read, and how long a turn may be."""
    if prompt == "dataset" and not queries.has_prompts:
        raise ValueError("--prompt dataset: the data bring no prompts of their own")
    own = prompt == "dataset" or (prompt == "auto" and queries.has_prompts and reranker.preset.name == "release")
    source: Literal["dataset", "preset"] = "dataset" if own else "preset"
    reranker.preset = dataclasses.replace(reranker.preset, prompt_source=source)
    if max_turn_tokens is not None:
        reranker.sampling = dataclasses.replace(reranker.sampling, max_turn_tokens=max_turn_tokens)


def _settings(model: str | None, engine: str, reranker: Reranker, dtype: str) -> dict[str, Any]:
    """What the rankings depend on."""
    return {
        "model": model or "vretrver-tiny, bundled",
        "weights": weights_digest(model, engine),
        "engine": engine,
        "dtype": dtype,
        "window": reranker.window,
        "stride": reranker.stride,
        "passes": reranker.passes,
        "sampling": dataclasses.asdict(reranker.sampling),
        "preset": reranker.preset.to_dict(),
        "tools": reranker.tools,
    }


def _name(model: str | None, reranker: Reranker) -> str:
    return (Path(model).name if model else "vretrver-tiny") + ("" if reranker.tools else ", no tools")


def _play(
    reranker: Reranker, queries: EvaluationSet, journal: Journal, depth: int, shard: Shard, trajectories: bool
) -> None:
    from ..evaluation.job import evaluate_queries

    mine = [queries.keys[row] for row in shard.rows(len(queries))]
    label = "evaluating" if shard.count == 1 else f"evaluating, process 1 of {shard.count}"
    first = seen = failed = 0
    with Bar(mine, journal, label, shard.is_main) as bar:

        def count(key: str, result: QueryResult | None) -> None:
            nonlocal first, seen, failed
            seen += 1
            failed += result is None
            first += result is not None and bool(result.reranked) and result.relevant.get(result.reranked[0], 0) > 0
            bar.step(f"hit@1 {first / seen:.1%}" + (f", {failed} failed" if failed else ""))

        evaluate_queries(queries, journal, reranker, depth, shard, count, trajectories)


def _tell(results: Results, out: Path) -> None:
    import sys

    from ..evaluation.report import cost_table, gain_table
    from ..tables import markdown_table

    print(markdown_table(*gain_table(results)), markdown_table(*cost_table(results)), sep="\n\n")
    if results.errors:
        key, error = next(iter(results.errors.items()))
        queries = "1 query" if len(results.errors) == 1 else f"{len(results.errors)} queries"
        print(f"{queries} failed, first {key}: {one_line(error)}", file=sys.stderr)
    tell_memory()
    print(f"\n{out.absolute()}")
