"""Tables and a plot out of what `evaluate.py` measured.

python recipes/emoji/tables.py recipes/emoji/results/vretrver-tiny.json --plot recipes/emoji/results/foveation.svg
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from evaluate import CANDIDATES
from rows import FACTOR


Row = dict[str, Any]
PLOTTED = ("t2i", "overview", "detail")
"""Tasks of the plot, on the split of held-out combinations."""


def main(
    files: Annotated[list[Path], typer.Argument(help="What evaluate.py wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Also plot accuracy against tokens, by overview budget.")] = None,
) -> None:
    """Print rows with tools beside those without, and each kind of question; plot the price of a larger overview."""
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    ((usual, _),) = collections.Counter(row["overview_pixels"] for row in rows).most_common(1)
    typer.echo(table([row for row in rows if row["overview_pixels"] == usual]))
    typer.echo("\n" + kinds_table([row for row in rows if row["overview_pixels"] == usual]))
    if plot is not None:
        draw_plot(rows, plot)
        typer.echo(f"\n{plot}")


def table(rows: list[Row]) -> str:
    """Each task and split with and without tools, as Markdown."""
    without = {(row["task"], row["split"]): row for row in rows if not row["tools"]}
    names = ("task", "split", "n", "R@1 with tools", "without", "random", "calls", "valid calls", "tokens", "ok")
    lines = _header(*names)
    for row in (row for row in rows if row["tools"]):
        valid = "–" if row["valid_calls"] is None else f"{row['valid_calls']:.1%}"
        plain = without.get((row["task"], row["split"]))
        cells = (
            row["task"],
            row["split"].removeprefix("test_"),
            row["n"],
            _rate(row),
            "–" if plain is None else _rate(plain),
            f"{1 / CANDIDATES:.0%}",
            f"{row['calls']:.2f}",
            valid,
            f"{row['tokens']:.0f}",
            f"{row['statuses']['ok']:.1%}",
        )
        lines.append(_line(*cells))
    return "\n".join(lines)


def kinds_table(rows: list[Row]) -> str:
    """Each kind of question, with and without tools, as Markdown."""
    without = {(row["task"], row["split"]): row for row in rows if not row["tools"]}
    lines = _header("task", "split", "kind", "n", "R@1 with tools", "without")
    for row in (row for row in rows if row["tools"] and len(row["kinds"]) > 1):
        plain = without.get((row["task"], row["split"]), {"kinds": {}})["kinds"]
        for kind, share in row["kinds"].items():
            other = _rate(plain[kind]) if kind in plain else "–"
            lines.append(_line(row["task"], row["split"].removeprefix("test_"), kind, share["n"], _rate(share), other))
    return "\n".join(lines)


def draw_plot(rows: list[Row], path: Path) -> None:
    """
    R@1 against tokens a query, one line a task, with tools and without, and one point an overview budget: beside it
    stands the side of a square that fits.

    Args:
        rows (`list[dict]`): What `evaluate.py` measured.
        path (`Path`): File to write; its suffix says the format.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, task in zip(("tab:blue", "tab:green", "tab:red"), PLOTTED, strict=True):
        for tools, style in ((True, "-"), (False, "--")):
            points = sorted(
                (row["overview_pixels"], row["tokens"], row["r1"], *row["interval"])
                for row in rows
                if (row["task"], row["split"], row["tools"]) == (task, "test_combination", tools)
            )
            if not points:
                continue
            budgets, tokens, rates, low, high = zip(*points, strict=True)
            spread = np.abs(np.array([low, high]) - np.array(rates))
            label = f"{task}, {'tools' if tools else 'no tools'}"
            face = colour if tools else "white"
            axes.errorbar(tokens, rates, spread, color=colour, ls=style, marker="o", mfc=face, capsize=3, label=label)
            # Single pictures and overviews stand side by side.
            above, slant = {"t2i": (5, 45), "overview": (-11, 0), "detail": (5, 0)}[task]
            for x, y, budget in zip(tokens, rates, budgets, strict=True):
                side = int(budget**0.5) // FACTOR * FACTOR
                axes.annotate(
                    f"{side} px", (x, y), textcoords="offset points", xytext=(4, above), rotation=slant, fontsize=7
                )
    axes.axhline(1 / CANDIDATES, color="grey", linewidth=0.8, linestyle=":")
    axes.margins(x=0.08)
    axes.set(xlabel="tokens a query (prompt, pictures, turns)", ylabel="R@1 of 5", ylim=(0, 1.15))
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _rate(share: Row) -> str:
    low, high = share["interval"]
    return f"{share['r1']:.1%} [{low:.1%}, {high:.1%}]"


def _header(*names: str) -> list[str]:
    return [_line(*names), _line(*("---" for _ in names))]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    typer.run(main)
