"""`vretrver report`: evaluations side by side, with paired tests and the paper's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Mistake
from .jobs import check_folder, mistakes


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of vretrver evaluate, or their metrics.json.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write README.md, tables.tex and a plot there.")
    ] = None,
    names: Annotated[str | None, typer.Option(help="Names of the runs, separated by commas.")] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX instead of Markdown.")] = False,
) -> None:
    """
    Set evaluations side by side: scores with intervals, paired tests against the first, cost, and the paper's rows.

    Tests compare query by query, by scores.json beside each metrics.json. The macro mean is computed where all sixteen
    tasks of M-BEIR are there.

    Example: `vretrver report outputs/tools outputs/no-tools --out outputs/report`
    """
    import dataclasses

    from ..evaluation.report import Run, comparison_tables, comparison_text, write_comparison
    from ..tables import latex_table

    with mistakes():
        loaded = [Run.load(path) for path in runs]
    if names is not None:
        given = [name.strip() for name in names.split(",")]
        if len(given) != len(loaded):
            raise Mistake(f"--names gives {len(given)} names for {len(loaded)} runs")
        loaded = [dataclasses.replace(run, name=name) for run, name in zip(loaded, given, strict=True)]
    if len({run.name for run in loaded}) < len(loaded):
        loaded = [
            dataclasses.replace(run, name=f"{run.name} ({path})") for run, path in zip(loaded, runs, strict=True)
        ]
    if latex:
        tables = comparison_tables(loaded)
        print("\n\n".join(latex_table(*table, caption=title) for title, table in tables.items()))
    else:
        print(comparison_text(loaded), end="")
    if out is not None:
        check_folder(out, "--out")
        write_comparison(out, loaded)
        print(f"\n{out.absolute()}")
