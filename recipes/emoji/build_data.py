"""
Build the data of the worked example: fetch the art by package name, slim, render, draw the evaluation examples.

    python recipes/emoji/build_data.py --out recipes/emoji/data --seed 0

Run it again and it does only what is missing. On a machine without a network, bring the archive:

    python recipes/emoji/build_data.py --out recipes/emoji/data --from-archive art.zip

Parquet files for other trainers, one a task and split and one for training, take some minutes more:

    python recipes/emoji/build_data.py --out recipes/emoji/data --steps export

What `vretrver sample` and GRPO ask, as parquet files too:

    python recipes/emoji/build_data.py --out recipes/emoji/data --steps lessons

What trained models are compared on, `test.parquet` and `test_artist.parquet`:

    python recipes/emoji/build_data.py --out recipes/emoji/data --steps held-out
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from art import (
    ARCHIVE_LAYOUT,
    ARTISTS,
    SIZE,
    SOURCES,
    TRAIN_ARTISTS,
    TWIN_TOLERANCE,
    Art,
    fetch,
    packages,
    read_member,
    render_artist,
    slim,
)
from concepts import Concept, load_concepts
from edits import count_edits
from examples import SPLITS, Example
from sheets import draw_sheet
from tasks import KINDS, TASKS, make_maker, pictures, splits_of


STEPS = ("fetch", "slim", "render", "examples")
MORE_STEPS = ("export", "lessons", "held-out")
SHEET_ROWS = {"overview": 3, "detail": 4}
"""Rows of a sheet of scenes; those of drawings have `DRAWING_ROWS`."""
DRAWING_ROWS = 8
SCENES_IN = 4
"""Of this many exported examples of a task, one is of each kind of scene: those are large."""


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("recipes/emoji/data"),
    seed: Annotated[int, typer.Option(help="Seed of the evaluation examples; lessons: that of the cold start.")] = 0,
    num_examples: Annotated[int, typer.Option(help="Evaluation examples a task and split.")] = 1000,
    from_archive: Annotated[Path | None, typer.Option(help="Start from this art.zip; nothing is fetched.")] = None,
    num_train: Annotated[int, typer.Option(help="Exported training examples.")] = 20_000,
    num_rsft: Annotated[int, typer.Option(help="Queries for rejection sampling.")] = 4000,
    num_grpo: Annotated[int, typer.Option(help="Queries for GRPO.")] = 8000,
    steps: Annotated[str, typer.Option(help="Which steps to run, separated by commas.")] = ",".join(STEPS),
    sheet: Annotated[Path | None, typer.Option(help="Also draw one contact sheet a task into this folder.")] = None,
) -> None:
    """Fetch, slim, render and draw examples. What is there already and still fits is kept."""
    wanted = [step.strip() for step in steps.split(",")]
    if unknown := set(wanted) - {*STEPS, *MORE_STEPS}:
        raise typer.BadParameter(f"unknown steps {sorted(unknown)}; choose among {', '.join(STEPS + MORE_STEPS)}")
    out.mkdir(parents=True, exist_ok=True)
    if from_archive is not None:
        take_archive(from_archive, out)
    else:
        if "fetch" in wanted and not archive_is_current(out):
            fetch(out / "cache", log=typer.echo)
        if "slim" in wanted:
            make_archive(out)
    if "render" in wanted:
        render_missing(out)
    if "examples" in wanted:
        write_examples(out, seed, num_examples)
    if "export" in wanted:
        export(out, seed, num_examples, num_train)
    if "lessons" in wanted:
        write_lessons(out, seed, num_rsft, num_grpo)
    if "held-out" in wanted:
        write_held_out(out, seed)
    if sheet is not None:
        write_sheets(out, seed, sheet)


def archive_is_current(out: Path) -> bool:
    """Whether `out` holds an archive made from exactly the pinned packages, in today's way."""
    archive = out / "art.zip"
    if not archive.exists():
        return False
    pinned = {f"{package.name}@{package.version}": package.sha256 for package in packages()}
    manifest = read_member(archive, "manifest.json")
    return manifest["packages"] == pinned and manifest.get("layout") == ARCHIVE_LAYOUT


def take_archive(source: Path, out: Path) -> None:
    """Copy an archive made elsewhere into `out`, unless it is there already."""
    if not source.is_file():
        raise typer.BadParameter(f"{source} is not a file")
    target = out / "art.zip"
    if not target.exists() or target.read_bytes() != source.read_bytes():
        shutil.copyfile(source, target)
    typer.echo(f"archive  {source}")


def make_archive(out: Path) -> None:
    """Slim the fetched packages to `art.zip`, unless it is there and current."""
    if archive_is_current(out):
        typer.echo("archive  up to date")
        return
    counts = slim(out / "cache", out / "art.zip")
    typer.echo(f"archive  {sum(counts.values())} drawings, {(out / 'art.zip').stat().st_size / 1e6:.1f} MB")


def render_missing(out: Path) -> None:
    """Render each artist, one a process, unless the same drawings were rendered before in the same way."""
    manifest_path = out / "images" / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    keys = {artist: _render_key(out / "art.zip", artist) for artist in ARTISTS}
    missing = [artist for artist in ARTISTS if manifest.get(artist) != keys[artist]]
    for artist in ARTISTS:
        if artist not in missing:
            typer.echo(f"render   {artist}: up to date")
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        rendering = {pool.submit(render_artist, out / "art.zip", artist, out / "images"): artist for artist in missing}
        for future in as_completed(rendering):
            artist, count = rendering[future], future.result()
            manifest[artist] = keys[artist]
            manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True))
            typer.echo(f"render   {artist}: {count} pictures after {time.perf_counter() - start:.0f} s")


def _render_key(archive: Path, artist: str) -> str:
    """Names what a rendering of an artist depends on."""
    drawings = json.dumps(read_member(archive, f"svg/{artist}.json"))
    return hashlib.sha256(f"{SIZE} {TWIN_TOLERANCE} {drawings}".encode()).hexdigest()


def write_examples(out: Path, seed: int, num_examples: int) -> None:
    """Write `examples/<task>.<split>.jsonl` for every test split, and `summary.md`; drawing anew takes a minute."""
    art, concepts = Art.load(out), load_concepts(out)
    folder = out / "examples"
    folder.mkdir(exist_ok=True)
    rows = []
    for task, split in test_sets():
        examples = make_maker(art, concepts, task, split).make(num_examples, seed)
        lines = (json.dumps(example.to_dict(), ensure_ascii=False) for example in examples)
        (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n")
        rows.append(_example_row(task, split, examples))
    tables = (_picture_table(art, concepts), _edit_table(art, concepts), _table(_EXAMPLE_HEADER, rows))
    summary = "\n\n".join(tables) + "\n"
    (out / "summary.md").write_text(summary)
    typer.echo(f"\n{summary}")


def test_sets() -> list[tuple[str, str]]:
    """Every task and kind of scene with each of its test splits."""
    return [(task, split) for task in (*TASKS, *KINDS) for split in splits_of(task)[1:]]


def export(out: Path, seed: int, num_examples: int, num_train: int) -> None:
    """Write `export/<task>.<split>.parquet` for every test split, and `export/train.parquet`."""
    from export import Exporter, training_examples

    art, concepts = Art.load(out), load_concepts(out)
    exporter = Exporter(art)
    for task, split in test_sets():
        count = num_examples // SCENES_IN if task in KINDS else num_examples
        _write_parquet(out, exporter, f"{task}.{split}", make_maker(art, concepts, task, split).make(count, seed))
    _write_parquet(out, exporter, "train", training_examples(art, concepts, num_train, seed))


def write_lessons(out: Path, seed: int, num_rsft: int, num_grpo: int) -> None:
    """Write `export/rsft.parquet` and `export/grpo.parquet`, of which neither asks what the cold start asks."""
    from export import Exporter
    from lessons import GRPO_TASKS, PLACED_FIRST, RSFT_TASKS, cold_start_queries, draw_lesson

    art, concepts = Art.load(out), load_concepts(out)
    exporter, asked = Exporter(art), cold_start_queries(out, seed)
    makers = {task: make_maker(art, concepts, task, "train") for task in GRPO_TASKS}
    _write_parquet(out, exporter, "rsft", draw_lesson(makers, "rsft", RSFT_TASKS, num_rsft, seed, asked))
    lesson = draw_lesson(makers, "grpo", GRPO_TASKS, num_grpo, seed, asked, PLACED_FIRST)
    _write_parquet(out, exporter, "grpo", lesson)


def write_held_out(out: Path, seed: int) -> None:
    """Write `export/test.parquet` and `export/test_artist.parquet`."""
    from export import Exporter
    from heldout import HELD_OUT, draw_held_out

    art, concepts = Art.load(out), load_concepts(out)
    exporter = Exporter(art)
    for name, (split, counts) in HELD_OUT.items():
        makers = {task: make_maker(art, concepts, task, split) for task in counts}
        _write_parquet(out, exporter, name, draw_held_out(makers, name, counts, seed))


def _write_parquet(out: Path, exporter: Any, name: str, examples: list[Example]) -> None:
    from export import write_parquet

    path = out / "export" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    write_parquet(path, exporter.rows(examples))
    size, seconds = path.stat().st_size, time.perf_counter() - start
    typer.echo(f"export   {name}: {len(examples)} rows, {size / 1e6:.1f} MB after {seconds:.0f} s")


def write_sheets(out: Path, seed: int, folder: Path) -> None:
    """Draw one contact sheet a task and kind of scene: training examples, one kind of question after another."""
    art, concepts = Art.load(out, TRAIN_ARTISTS), load_concepts(out)
    for task in (*TASKS, *KINDS):
        examples = make_maker(art, concepts, task, "train").make(600, seed)
        draw_sheet(art, _various(examples, SHEET_ROWS.get(task, DRAWING_ROWS)), folder / f"{task}.webp")
        typer.echo(f"sheet    {folder / f'{task}.webp'}")


def _various(examples: list[Example], count: int) -> list[Example]:
    """The first example of each kind, most frequent kinds first, then the second of each, and so on."""
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    kinds = sorted(by_kind.values(), key=len, reverse=True)
    return [example for turn in zip_longest(*kinds) for example in turn if example is not None][:count]


_EXAMPLE_HEADER = (
    "task",
    "split",
    "examples",
    "kinds",
    "near negatives",
    "related negatives",
    "other negatives",
    "chance",
)


def _example_row(task: str, split: str, examples: list[Example]) -> tuple:
    grades = [grade for example in examples for grade in example.relevance if grade < 3]
    shares = (f"{100 * grades.count(grade) / len(grades):.0f} %" for grade in (2, 1, 0))
    kinds = len({example.kind for example in examples})
    return (task, split, len(examples), kinds, *shares, f"{100 / len(examples[0].candidates):.0f} %")


def _edit_table(art: Art, concepts: dict[str, Concept]) -> str:
    counts = count_edits(art, concepts)
    rows = [(structure, *numbers) for structure, numbers in counts.items()]
    rows.append(("all", *(sum(numbers[place] for numbers in counts.values()) for place in (0, 1))))
    return _table(("edits of", "one change", "two changes"), rows)


def _picture_table(art: Art, concepts: dict[str, Concept]) -> str:
    by_split = {split: [artist for artist, _ in pictures(art, concepts, split)] for split in SPLITS}
    rows = [
        (artist, SOURCES[artist].license, len(art.codes[artist]), *(by_split[split].count(artist) for split in SPLITS))
        for artist in art.codes
    ]
    return _table(("artist", "licence", "pictures", *SPLITS), rows)


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
