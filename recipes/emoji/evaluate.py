"""Plays held-out queries with the package's own reranker and prints R@1 with intervals.

python recipes/emoji/evaluate.py --count 1000
"""

from __future__ import annotations

import collections
import json
import math
import time
from pathlib import Path
from typing import Annotated

import typer
from art import Art
from concepts import load_concepts
from examples import Entry, Example
from PIL import Image
from tasks import ExampleMaker

from vretrver_hf import Item, Ranking, Reranker


SETS = (
    ("t2i", "test_combination"),
    ("i2i", "test_concept"),
    ("i2t", "test_combination"),
    ("t2i", "test_artist"),
    ("i2i", "test_artist"),
    ("i2t", "test_artist"),
)
"""Task and split of each row: held-out attribute combinations, held-out base concepts, an artist never seen."""
SEED = 1
CANDIDATES = 5


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the bundled model by default.")] = None,
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    count: Annotated[int, typer.Option(help="Queries of each row.")] = 1000,
    tools: Annotated[bool, typer.Option(help="Whether the model may look closer.")] = True,
    out: Annotated[Path | None, typer.Option(help="Also write the rows as JSON here.")] = None,
    sessions: Annotated[int, typer.Option(help="Conversations at the same time.")] = 32,
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "auto",
) -> None:
    """R@1 of a model on held-out queries with five candidates each, with calls, tokens and answer statuses."""
    reranker = Reranker.from_pretrained(model, tools=tools, max_sessions=sessions, device=device, dtype=dtype)
    art, concepts = Art.load(data), load_concepts(data)
    rows = []
    for task, split in SETS:
        examples = ExampleMaker(art, concepts, task, split, num_candidates=CANDIDATES).make(count, SEED)
        started = time.perf_counter()
        rankings = reranker.rank_batch([pair(art, example) for example in examples], show_progress_bar=True)
        seconds = time.perf_counter() - started
        rows.append({"task": task, "split": split, **figures(examples, rankings), "seconds": seconds / count})
        print(line(rows[-1]), flush=True)
    print("\n" + table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def pair(art: Art, example: Example) -> tuple[Item, list[Item]]:
    """An example as the reranker takes it."""

    def item(entry: Entry) -> Item:
        image = None if entry.image is None else Image.fromarray(art.image(*entry.image))
        return Item(text=entry.text, image=image)

    return item(example.query), [item(candidate) for candidate in example.candidates]


def figures(examples: list[Example], rankings: list[Ranking]) -> dict:
    """What a row of the table says."""
    count = len(examples)
    right = sum(r.order[0] == example.positive for example, r in zip(examples, rankings, strict=True))
    calls = sum(ranking.num_calls for ranking in rankings)
    valid = sum(trajectory.num_valid_calls for ranking in rankings for trajectory in ranking.trajectories)
    statuses = collections.Counter(ranking.status for ranking in rankings)
    return {
        "n": count,
        "r1": right / count,
        "interval": wilson(right, count),
        "calls": calls / count,
        "valid_calls": valid / calls if calls else None,
        "tokens": sum(ranking.num_tokens for ranking in rankings) / count,
        "statuses": {status: statuses[status] / count for status in ("ok", "repaired", "fallback")},
    }


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return middle - half, middle + half


def line(row: dict) -> str:
    """A row in short."""
    low, high = row["interval"]
    return f"{row['task']} {row['split']}: R@1 {row['r1']:.1%} [{low:.1%}, {high:.1%}], n {row['n']}"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| task | split | n | R@1 | 95 % interval | random | calls | valid calls | tokens "
        "| ok | repaired | fallback |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        valid = "–" if row["valid_calls"] is None else f"{row['valid_calls']:.1%}"
        statuses = " | ".join(f"{share:.1%}" for share in row["statuses"].values())
        lines.append(
            f"| {row['task']} | {row['split']} | {row['n']} | {row['r1']:.1%} | {low:.1%} – {high:.1%} "
            f"| {1 / CANDIDATES:.0%} | {row['calls']:.2f} | {valid} | {row['tokens']:.0f} | {statuses} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
