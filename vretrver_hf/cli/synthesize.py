"""`vretrver synthesize`: worked examples by a strong model, checked by rules, to begin training with."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import Mistake
from .jobs import (
    DataOption,
    ImageRootOption,
    KeepOption,
    LimitOption,
    OutOption,
    Progress,
    SeedOption,
    SplitOption,
    check_folder,
    check_keep,
    load_data,
    mistakes,
    tell,
)


if TYPE_CHECKING:
    from ..data.rejection import Query
    from ..protocol import Preset


def synthesize(
    data: DataOption,
    out: OutOption,
    teacher: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
    ],
    teacher_model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model there.")],
    keep: KeepOption = "first",
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Tell the teacher which candidates are right. Thoughts become excuses.")
    ] = False,
    preset: Annotated[
        Literal["release", "foveated"], typer.Option(help="Protocol that the student is to learn.")
    ] = "release",
    preset_overrides: Annotated[
        str, typer.Option(metavar="JSON", help='Settings of it to replace, such as {"overview_pixels": 50176}.')
    ] = "{}",
    factor: Annotated[
        int, typer.Option(min=1, help="Pictures have sides of a multiple: 28 for Qwen2.5-VL, 32 for Qwen3-VL.")
    ] = 28,
    temperature: Annotated[float, typer.Option(min=0, help="Of the teacher's sampling.")] = 0.7,
    max_turn_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one turn of the teacher.")] = 2048,
    seed: SeedOption = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Queries that the teacher is asked at a time.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a reply may take.")] = 600,
    retries: Annotated[int, typer.Option(min=0, help="Tries after a failed request, with growing pauses.")] = 5,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the key, where one is needed.")
    ] = "OPENAI_API_KEY",
    split: SplitOption = "train",
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
) -> None:
    """
    Have a strong model write worked examples: the data that training begins with.

    The teacher reads the student's own prompt behind instructions of how to work (name the features that decide,
    compare each candidate, look closer at a few, rank). Its tool calls are carried out for real. What is kept keeps to
    the protocol, calls only for pictures that there are, answers as its last thought concludes, and passes --keep.
    The result is written as if the student had said it: the instructions are left out.

    By default the teacher does not know the right answer, and the labels only filter. With --reveal more is kept, but
    a thought that leads to a given answer is an excuse; those that speak of it are filtered.

    Run the same command again after an interruption and it goes on: finished queries are in FOLDER/journal, and
    another --keep needs no teacher. Queries that failed are told and tried again by the next run.

    FOLDER holds conversations.json (with images/) in the released form and README.md, a data card with the acceptance
    rates. Train on it with `python -m vretrver_hf.training.sft --dataset_name FOLDER/conversations.json`.

    The key of the endpoint comes from the environment and is written nowhere.

    Example: `vretrver synthesize --teacher http://localhost:8000/v1 --teacher-model Qwen/Qwen2.5-VL-72B-Instruct
    --data train.parquet --out outputs/cold-start`
    """
    if importlib.util.find_spec("openai") is None:
        raise Mistake("the teacher is asked through the openai package, which is not installed: pip install openai")
    max_rank = check_keep(keep)
    protocol = _preset(preset, preset_overrides, factor)
    check_folder(out, "--out")
    examples, keys = load_data(data, split, image_root, limit)

    from ..data import synthesis
    from ..journal import Journal

    instructions = synthesis.annotation_prompt(protocol, [0] if reveal else None)
    settings = {
        "teacher": teacher_model,
        "instructions": hashlib.sha256(instructions.encode()).hexdigest()[:16],
        "reveal": reveal,
        "data": data,
        "split": split,
        "preset": protocol.to_dict(),
        "factor": factor,
        "temperature": temperature,
        "max_turn_tokens": max_turn_tokens,
        "seed": seed,
    }
    asked = synthesis.Teacher(
        base_url=teacher,
        model=teacher_model,
        api_key=os.environ.get(api_key_env) or "none",
        temperature=temperature,
        max_turn_tokens=max_turn_tokens,
        timeout=timeout,
        retries=retries,
    )
    with mistakes():
        journal = Journal(out / "journal", settings)
    with journal:
        with Progress(keys, journal, "synthesizing") as progress:

            def count(key: str, query: Query | None) -> None:
                progress.add(None if query is None else [synthesis.judge(query, max_rank, reveal)])

            try:
                synthesis.synthesize_queries(
                    examples,
                    keys,
                    journal,
                    asked,
                    protocol,
                    seed=seed,
                    factor=factor,
                    reveal=reveal,
                    concurrency=concurrency,
                    on_query=count,
                )
            except synthesis.TeacherDown as error:
                raise Mistake(f"--teacher {teacher}: {error}; what is finished stays, run again to go on") from error
        with mistakes():
            summary = synthesis.write_conversations(out, examples, keys, journal, max_rank, reveal)
    synthesis.write_card(out, summary, settings, keep)
    tell(summary, out, synthesis.TEACHER_REASONS)


def _preset(name: str, overrides: str, factor: int) -> Preset:
    from ..protocol import get_preset
    from ..tools import VisualTools

    try:
        preset = get_preset(name, **json.loads(overrides))
        VisualTools(None, [], preset=preset, factor=factor)  # budgets that cannot work are refused here
    except (ValueError, TypeError) as error:
        raise Mistake(f"--preset-overrides {overrides}: {error}") from error
    return preset
