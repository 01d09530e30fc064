"""`vretrver sample`: several trajectories a query, of which the sound and right ones are kept to learn from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

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
)
from .jobs import (
    DataOption,
    ImageRootOption,
    KeepOption,
    LimitOption,
    MaxTurnTokensOption,
    OutOption,
    Progress,
    SeedOption,
    SplitOption,
    check_folder,
    check_keep,
    load_data,
    mistakes,
    tell,
    weights_digest,
)


if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..data.rejection import Query
    from ..journal import Journal, Shard
    from ..reranker import Reranker


def sample(
    data: DataOption,
    out: OutOption,
    model: ModelOption = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Trajectories a query.")] = 8,
    keep: KeepOption = "first",
    max_per_query: Annotated[int, typer.Option(min=1, help="Most accepted trajectories of a query to write.")] = 2,
    tool_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of written trajectories that use a tool; as it comes by default."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Least total probability of the tokens to draw from.")] = 1.0,
    max_turn_tokens: MaxTurnTokensOption = None,
    seed: SeedOption = 0,
    split: SplitOption = "train",
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Trajectories under way at a time; with 1 none depends on others to the last bit."),
    ] = 16,
    no_tools: NoToolsOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    base_url: BaseUrlOption = None,
) -> None:
    """
    Sample trajectories and keep the right ones: the data of rejection-sampling fine-tuning.

    Each query is played --num-samples times. A trajectory is accepted if every turn keeps to the protocol, every call
    can be carried out, the answer names each candidate once, and the ranking passes --keep. Of a query's accepted
    trajectories at most --max-per-query are written, with and without tools in turn.

    Run the same command again after an interruption and it goes on: finished queries are in FOLDER/journal. Everything
    sampled stays there, so another --keep, --max-per-query or --tool-share takes seconds and no model turn. Queries
    that failed (a broken picture) are told, listed in FOLDER/README.md, and tried again by the next run.

    Several GPUs or machines: `accelerate launch --multi_gpu -m vretrver_hf sample …`; each process takes its share of
    the queries, and the result is the same. Or serve the model as many times as there is room for it, behind one
    --base-url, and let one process ask: --batch-size is then how many requests are under way.

    FOLDER holds trajectories.jsonl, examples.parquet and README.md, a data card with the acceptance rates. Train on it
    with `python -m vretrver_hf.training.rsft`.

    Example: `vretrver sample --model outputs/sft --data train.parquet --out outputs/accepted --num-samples 8`
    """
    max_rank = check_keep(keep)
    if num_samples > 1 and temperature == 0:
        raise Mistake("--temperature 0 makes all trajectories of a query the same; raise it, or use --num-samples 1")
    check_folder(out, "--out")
    examples, keys = load_data(data, split, image_root, limit)

    from ..data.rejection import write_card, write_selection
    from ..journal import Journal, current_shard

    with mistakes():
        shard = current_shard()
    tools = False if no_tools else None
    place = (device or shard.device, dtype, engine, base_url)
    reranker = load_reranker(model, *place, tools=tools, max_sessions=batch_size)
    changes = {"temperature": temperature, "top_p": top_p, "max_turn_tokens": max_turn_tokens, "seed": seed}
    with mistakes():
        given = {name: value for name, value in changes.items() if value is not None}
        reranker.sampling = dataclasses.replace(reranker.sampling, **given)
        settings = _settings(model, "openai" if base_url else engine, data, split, num_samples, reranker, dtype)
        journal = Journal(out / "journal", settings, shard.index)
    with journal:
        with engine_mistakes(), reranker.engine:
            _play(reranker, examples, keys, journal, num_samples, max_rank, shard)
        shard.leave()
        if not shard.is_main:
            return
        with mistakes():
            journal.refresh()
            summary = write_selection(out, examples, keys, journal, max_rank, max_per_query, tool_share, seed)
    choice = {"keep": keep, "max_per_query": max_per_query, "tool_share": tool_share}
    write_card(out, summary, settings, choice)
    tell(summary, out)


def _settings(
    model: str | None, engine: str, data: str, split: str, num_samples: int, reranker: Reranker, dtype: str
) -> dict[str, Any]:
    """What the sampled trajectories depend on."""
    return {
        "model": model or "vretrver-tiny, bundled",
        "weights": weights_digest(model, engine),
        "engine": engine,
        "dtype": dtype,
        "data": data,
        "split": split,
        "num_samples": num_samples,
        "sampling": dataclasses.asdict(reranker.sampling),
        "preset": reranker.preset.to_dict(),
        "tools": reranker.tools,
    }


def _play(
    reranker: Reranker,
    examples: Examples,
    keys: list[str],
    journal: Journal,
    num_samples: int,
    max_rank: int | None,
    shard: Shard,
) -> None:
    from ..data.rejection import judge, sample_queries

    mine = [keys[row] for row in shard.rows(len(keys))]
    label = "sampling" if shard.count == 1 else f"sampling, process 1 of {shard.count}"
    with Progress(mine, journal, label, shard.is_main) as progress:

        def count(key: str, query: Query | None) -> None:
            progress.add(None if query is None else judge(query.trajectories, query.positives, max_rank))

        sample_queries(
            examples,
            keys,
            journal,
            reranker.engine,
            reranker.preset,
            reranker.sampling,
            num_samples,
            reranker.tools,
            shard,
            on_query=count,
        )
