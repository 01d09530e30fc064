"""
Writes the cold start as files: trajectories of an imperfect oracle, played through the package's own agent loop.

    python recipes/emoji/cold_start.py --out recipes/emoji/data/cold_start

These are the trajectories from which `train_tiny.py` teaches the protocol; `python -m vretrver_hf.training.sft` reads
them too. The oracle is imperfect on purpose, as a teacher is: see `trajectories.py` and `searching.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from export import Exporter
from preset import MAX_TURN_TOKENS, PRESET
from record import Record
from stages import COLD_START, Source
from tqdm.auto import tqdm
from transformers import AutoProcessor

from vretrver_hf.agent import play
from vretrver_hf.data.conversations import TrajectoryRecord, write_records
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines.base import Sampling
from vretrver_hf.engines.scripted import ScriptedEngine


def main(
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    out: Annotated[Path | None, typer.Option(help="Folder to write; DATA/cold_start by default.")] = None,
    count: Annotated[int, typer.Option(help="Trajectories.", min=1, max=COLD_START)] = COLD_START,
    seed: Annotated[int, typer.Option(help="Seed of the draw, as in training.")] = 0,
) -> None:
    """Play the oracle's trajectories with the real prompt, tools, parser and pictures, and write them down."""
    source = Source(data, data / "processor", seed)
    encoder = Encoder(AutoProcessor.from_pretrained(source.processor), "qwen2_5_vl")
    told: collections.Counter[str] = collections.Counter()
    records = tqdm(trajectories(source, encoder, count, told), total=count, unit="trajectory")
    out = out or data / "cold_start"
    write_records(out, records)
    typer.echo(f"{out}  " + ", ".join(f"{number} {what}" for what, number in sorted(told.items())))


def trajectories(
    source: Source,
    encoder: Encoder,
    count: int,
    told: collections.Counter[str] | None = None,
    max_turn_tokens: int = MAX_TURN_TOKENS,
) -> Iterator[TrajectoryRecord]:
    """
    The first trajectories of the cold start, played on all cores.

    Args:
        source (`Source`): Draws the examples.
        encoder (`Encoder`): Of the model that is to learn them.
        count (`int`): How many.
        told (`Counter`, *optional*): Counts trajectories, calls, and right answers.
        max_turn_tokens (`int`, *optional*, defaults to 128): Most tokens of a turn.

    Raises:
        ValueError: The agent loop saw something else than the oracle did.
    """
    told = collections.Counter() if told is None else told
    source.prepare()  # once, before the workers are forked
    context, workers = multiprocessing.get_context("fork"), len(os.sched_getaffinity(0))
    tools = (source, encoder, Exporter(source.art), max_turn_tokens)
    with ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(tools,)) as pool:
        try:
            for played, is_right in pool.map(_play, range(count), chunksize=8):
                told["trajectories"] += 1
                told["calls"] += played.trajectory.num_calls
                told["right first"] += is_right
                yield played
        finally:
            pool.shutdown(cancel_futures=True)


_TOOLS: tuple[Source, Encoder, Exporter, int] | None = None


def _adopt(tools: tuple[Source, Encoder, Exporter, int]) -> None:
    global _TOOLS
    _TOOLS = tools


def _play(number: int) -> tuple[TrajectoryRecord, bool]:
    """A trajectory of the cold start, and whether it ranks the right candidate first."""
    source, encoder, exporter, max_turn_tokens = _TOOLS
    example, rng = source.cold_start_example(number)
    record = source.oracle.play(source.cases.plain(example), rng)
    reranked = dataclasses.replace(exporter.rerank_example(example), query_id=f"cold-start-{number:05d}")
    played = play_again(record, reranked, encoder, max_turn_tokens)
    return played, played.trajectory.order[0] == example.positive


def play_again(record: Record, example: RerankExample, encoder: Encoder, max_turn_tokens: int) -> TrajectoryRecord:
    """
    What the oracle wrote, said again to the real loop with the real pictures.

    Args:
        record (`Record`): The oracle's conversation.
        example (`RerankExample`): What it is about, with its pictures.
        encoder (`Encoder`): Of the model that is to learn it.
        max_turn_tokens (`int`): Most tokens of a turn.

    Raises:
        ValueError: The loop saw something else than the oracle did, or did not take its answer.
    """
    written = [message for message in record.messages if message["role"] == "assistant"]
    seen = [message["content"] for message in record.messages[2:] if message["role"] == "user"]
    engine = ScriptedEngine(encoder, lambda _, turn: written[turn]["content"])
    task = example.task(PRESET, tools=record.use_tools)
    (trajectory,) = play(engine, [task], Sampling(max_turn_tokens=max_turn_tokens))
    shown = [turn.text for turn in trajectory.turns if turn.role == "observation"]
    if trajectory.status != "ok" or shown != [content[0]["text"] for content in seen]:
        raise ValueError(f"{example.query_id}: the loop did not play what the oracle wrote: {trajectory.problems}")
    for turn, message in zip(trajectory.assistant_turns, written, strict=True):
        if not message["loss"]:
            turn.num_sampled = 0  # shown, not to be learned
    return TrajectoryRecord(example, trajectory)


if __name__ == "__main__":
    typer.run(main)
