"""
Compares trained models on the same held-out queries: tables, paired differences, and curves of their training.

    python recipes/emoji/proof.py measure outputs/emoji/proof/evaluations --out recipes/emoji/results/proof.json
    python recipes/emoji/proof.py show recipes/emoji/results/proof.json --plot recipes/emoji/results/proof.svg

The first reads what `vretrver evaluate` wrote for each model, and the logs of GRPO beside the models. The second needs
nothing but the file that the first wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from evaluate import CANDIDATES
from proof_runs import ALL, CURVES, MODELS, NotComparable, model_and_seed, summarize

from vretrver_hf.tables import markdown_table


Proof = dict[str, Any]
MAIN, ARTIST = "test", "test_artist"
SMOOTHED = 5
"""Steps of a running mean in the plot."""
PANELS = {
    "reward": "reward",
    "accuracy": "right candidate first",
    "malformed": "malformed outputs",
    "length": "tokens written, all turns",
    "calls": "valid calls",
    "valid_calls": "valid calls, share of all",
}
"""What the plot shows of each step, as means over rollouts; calls over those that may call."""

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(
    root: Annotated[Path, typer.Argument(help="Folder of evaluations, <model>-<seed>/<set>.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("recipes/emoji/results/proof.json"),
) -> None:
    """Sum up evaluations and trainings in one small file, and print its tables."""
    try:
        proof = summarize(root)
    except NotComparable as error:
        raise typer.BadParameter(str(error)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(compact(proof) + "\n", encoding="utf-8")
    typer.echo(tables(proof))
    typer.echo(f"{out}  {out.stat().st_size / 1e3:.0f} kB")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="What `measure` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot what GRPO logged, over its steps.")] = None,
) -> None:
    """Print the tables, and draw the plot."""
    proof = json.loads(file.read_text(encoding="utf-8"))
    typer.echo(tables(proof))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(tables(proof), encoding="utf-8")
    if plot is not None:
        draw_curves(proof, plot)
        typer.echo(plot)


def compact(proof: Proof) -> str:
    """As JSON, one line a model, difference and curve: a file that is small and whose changes can be read."""
    parts = [f' "sets": {json.dumps(proof["sets"])}']
    for name in ("models", "differences"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in proof[name])
        parts.append(f' "{name}": [\n{rows}\n ]')
    rows = ",\n".join(f"  {json.dumps(run)}: {json.dumps(curve)}" for run, curve in proof["curves"].items())
    return "{\n" + ",\n".join([*parts, f' "curves": {{\n{rows}\n }}']) + "\n}"


def tables(proof: Proof) -> str:
    """
    Everything there is to say, as Markdown.

    Args:
        proof (`dict`): What [`summarize`] made.
    """
    sections = {
        "Models": main_table(proof),
        "Differences": difference_table(proof),
        "How details are found": detail_table(proof),
        "Right first, by task": group_table(proof, "hit@1", "task"),
        "Calls, by task": group_table(proof, "calls", "task"),
        "Scenes, by kind of question": group_table(proof, "hit@1", "kind"),
    }
    mixes = [
        f"`{name}`, {told['n']:,} queries: " + ", ".join(f"{count} {task}" for task, count in told["mix"].items())
        for name, told in proof["sets"].items()
    ]
    note = f"Sets: {'; '.join(mixes)}. {CANDIDATES} candidates a query, so guessing gives {1 / CANDIDATES:.0%}.\n"
    return note + "".join(f"\n### {title}\n\n{table}\n" for title, table in sections.items())


def main_table(proof: Proof) -> str:
    """Each model in a row: on all held-out combinations, on details and overviews, and on the unseen artist."""
    head = ["model", "n", "R@1", "of each seed", "MRR", "detail R@1", "detail calls", "crops on target"]
    head += ["overview R@1", "overview calls", "unseen artist R@1", "calls", "valid", "tokens", "ok"]
    head += ["GPU minutes", "GPU GB"]
    rows = []
    for model in proof["models"]:
        groups, artist = model["sets"].get(MAIN, {}), model["sets"].get(ARTIST, {})
        whole, detail, overview = (groups.get(name, {}) for name in (ALL, "detail", "overview"))
        cells = [_title(model["name"]), whole.get("n", "–"), _rate(whole, "hit@1"), _seeds(whole)]
        cells += [_number(whole, "mrr", 3), _rate(detail, "hit@1"), _mean(detail, "calls"), _share(whole, "on_target")]
        cells += [_rate(overview, "hit@1"), _mean(overview, "calls"), _rate(artist.get(ALL, {}), "hit@1")]
        cells += [_mean(whole, "calls"), _share(whole, "valid_calls"), _mean(whole, "tokens", 0), _share(whole, "ok")]
        rows.append([*cells, _minutes(model["minutes"]), _memory(model["minutes"])])
    return markdown_table(head, rows)


def difference_table(proof: Proof) -> str:
    """Each pair of models in a row: how far the second is from the first on the same queries."""
    found = {
        (row["first"], row["second"], row["set"], row["group"], row["metric"]): row for row in proof["differences"]
    }
    columns = {
        "R@1": (MAIN, ALL, "hit@1"),
        "detail R@1": (MAIN, "detail", "hit@1"),
        "overview R@1": (MAIN, "overview", "hit@1"),
        "unseen artist R@1": (ARTIST, ALL, "hit@1"),
        "calls": (MAIN, ALL, "calls"),
        "overview calls": (MAIN, "overview", "calls"),
    }
    pairs = dict.fromkeys((row["first"], row["second"]) for row in proof["differences"])
    rows = [
        [_title(second), _title(first), *(_difference(found.get((first, second, *key))) for key in columns.values())]
        for first, second in pairs
    ]
    return markdown_table(["model", "against", *columns], rows)


def detail_table(proof: Proof) -> str:
    """Each model in a row: where it looks in scenes whose overview is not enough, and what comes of it."""
    columns = {
        "crops on target": "on_target",
        "first crops on target": "first_on_target",
        "crops on target after a miss": "found_after_miss",
        "right, once the right candidate was in view": "right_in_view",
    }
    rows = []
    for model in proof["models"]:
        detail = model["sets"].get(MAIN, {}).get("detail", {})
        shares = [_rate(detail, name) for name in columns.values()]
        rows.append([_title(model["name"]), _rate(detail, "hit@1"), _mean(detail, "calls"), *shares])
    return markdown_table(["model", "R@1", "calls", *columns], rows)


def group_table(proof: Proof, metric: str, which: Literal["task", "kind"]) -> str:
    """
    Groups of queries in rows, models in columns.

    Args:
        proof (`dict`): What [`summarize`] made.
        metric (`str`): What is shown.
        which (`str`): `"task"`, or `"kind"` of the questions about scenes.
    """
    models = proof["models"]
    rows = []
    for set_name in proof["sets"]:
        by_model = [model["sets"].get(set_name, {}) for model in models]
        names = dict.fromkeys(name for groups in by_model for name in groups if name != ALL)
        for name in names:
            if ("/" in name) == (which == "kind"):
                counts = [groups[name]["n"] for groups in by_model if name in groups]
                shown = _rate if metric == "hit@1" else _mean
                cells = [shown(groups.get(name, {}), metric) for groups in by_model]
                rows.append([name, set_name.removeprefix("test_").replace("test", "combination"), counts[0], *cells])
    return markdown_table([which, "split", "n", *map(_of, models)], rows)


def draw_curves(proof: Proof, path: Path) -> None:
    """
    What GRPO logged over its steps: each seed as a thin line, a running mean over seeds and steps as a thick one.

    Args:
        proof (`dict`): What [`summarize`] made.
        path (`Path`): The picture to write.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 5.6), sharex=True, layout="constrained")
    by_model: dict[str, list[dict[str, np.ndarray]]] = {}
    for run, curve in proof["curves"].items():
        by_model.setdefault(model_and_seed(run)[0], []).append(_panels(curve))
    for number, (model, curves) in enumerate(by_model.items()):
        for name, panel in zip(PANELS, axes.flat, strict=True):
            _draw_curves(panel, curves, name, f"C{number}", f"{_plain(model)} ({len(curves)})")
    for (name, title), panel in zip(PANELS.items(), axes.flat, strict=True):
        panel.set_title(title, fontsize=10)
        panel.grid(linewidth=0.4)
        if name in ("accuracy", "malformed", "valid_calls"):
            panel.set_ylim(-0.02, 1.02)
    for panel in axes[1]:
        panel.set_xlabel("step")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def running_mean(values: np.ndarray, width: int = SMOOTHED) -> np.ndarray:
    """
    Means over neighbouring steps, of as many as there are at the ends; steps without a value are left out.

    >>> running_mean(np.array([0.0, 3.0, 6.0, np.nan]), 3).tolist()
    [1.5, 3.0, 4.5, 6.0]
    """
    windows = (values[max(0, place - width // 2) : place + width // 2 + 1] for place in range(len(values)))
    known = (window[np.isfinite(window)] for window in windows)
    return np.array([window.mean() if len(window) else np.nan for window in known])


def _panels(curve: dict[str, list[float | None]]) -> dict[str, np.ndarray]:
    known = {name: np.array(curve[name], float) for name in ("step", *CURVES)}
    # Where nobody calls, no share of the calls is valid or not.
    calls = np.where(known["calls"] > 0, 1 - known["failed_calls"], np.nan)
    return {**known, "valid_calls": calls}


def _draw_curves(panel: Any, curves: list[dict[str, np.ndarray]], name: str, colour: str, label: str) -> None:
    for curve in curves:
        panel.plot(curve["step"], curve[name], color=colour, linewidth=0.5, alpha=0.5)
    steps = min((curve["step"] for curve in curves), key=len)
    together = np.array([curve[name][: len(steps)] for curve in curves])
    known = np.isfinite(together).any(axis=0)
    mean = np.full(len(steps), np.nan)
    mean[known] = np.nanmean(together[:, known], axis=0)
    panel.plot(steps, np.where(known, running_mean(mean), np.nan), color=colour, linewidth=2, label=label)


def _title(model: str) -> str:
    return MODELS.get(model, model)


def _of(model: dict[str, Any]) -> str:
    return _title(model["name"])


def _plain(model: str) -> str:
    return _title(model).replace("`", "")


def _rate(group: Proof, metric: str) -> str:
    """A mean or a share in percent, with its interval."""
    if group.get(metric) is None:
        return "–"
    mean, low, high = (100 * value for value in group[metric])
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _seeds(group: Proof) -> str:
    return ", ".join(f"{100 * mean:.1f}" for mean in group["by_seed"]["hit@1"]) if group else "–"


def _number(group: Proof, metric: str, digits: int) -> str:
    if metric not in group:
        return "–"
    mean, low, high = (f"{value:.{digits}f}" for value in group[metric])
    return f"{mean} [{low}, {high}]"


def _mean(group: Proof, metric: str, digits: int = 2) -> str:
    return "–" if metric not in group else f"{group[metric][0]:.{digits}f}"


def _share(group: Proof, metric: str) -> str:
    return "–" if group.get(metric) is None else f"{100 * group[metric][0]:.1f}"


def _difference(row: Proof | None) -> str:
    if row is None:
        return "–"
    scale, digits = (1, 2) if row["metric"] in ("calls", "tokens") else (100, 1)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in row["difference"])
    return f"{mean} [{low}, {high}]"


def _minutes(seeds: list[Proof]) -> str:
    """The mean over seeds; with a plus where sampling is part of what was done and nobody noted how long it took."""
    if not any(seed["stages"] for seed in seeds):
        return "–"
    total = np.mean([seed["training"] + (seed["sampling"] or 0) for seed in seeds])
    unknown = any("rsft" in seed["stages"] and seed["sampling"] is None for seed in seeds)
    return f"{total:.1f}" + (" + sampling" if unknown else "")


def _memory(seeds: list[Proof]) -> str:
    """The most that the last stage of any seed held."""
    known = [seed["memory"] for seed in seeds if seed.get("memory") is not None]
    return f"{max(known):.1f}" if known else "–"


if __name__ == "__main__":
    app()
