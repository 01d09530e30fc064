"""
What evaluations of several models say side by side, as numbers: means over seeds, intervals, differences, curves.

Each model is trained with one seed or more, and all answer the same queries. A model's value for a query is its mean
over the seeds; intervals are bootstrapped over the queries, all seeds of a query together (Wilson's where all are
right or none), and differences are taken query by query. So intervals say how other queries might have come out. How
other seeds might have is not in them: with two or three seeds nothing better can be said of that than what each seed
gave, which stands in `by_seed`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scenes import KINDS
from searching import shows

from vretrver_hf.evaluation.job import QueryResult
from vretrver_hf.evaluation.results import METRICS, SCORES, Results, Scores
from vretrver_hf.evaluation.statistics import RESAMPLES, bootstrap_interval, compare, score_interval
from vretrver_hf.journal import finished_entries


MODELS = {
    "sft": "SFT",
    "rsft": "SFT, RSFT",
    "grpo-no-tools": "SFT, GRPO without tools",
    "grpo": "SFT, GRPO",
    "full": "SFT, RSFT, GRPO",
    "full-need": "SFT, RSFT, GRPO, reward `need`",
    "full-tools-off": "SFT, RSFT, GRPO, played without tools",
}
"""Names of the folders of evaluations, less their seed, and what they are called; others go by their names."""
PAIRS = (
    ("sft", "rsft"),
    ("sft", "grpo"),
    ("grpo-no-tools", "grpo"),
    ("rsft", "full"),
    ("sft", "full"),
    ("grpo", "full"),
    ("full", "full-need"),
    ("full-tools-off", "full"),
)
"""What is compared: each second model with the first."""
ALL = "all"
MEANS = ("hit@1", "mrr", "calls", "tokens", "ok")
"""Means over queries."""
BOUNDED = ("hit@1", "mrr", "ok")
"""Those of them that lie between 0 and 1."""
SHARES = {
    "valid_calls": "calls",
    "on_target": "crops",
    "first_on_target": "looked",
    "found_after_miss": "after_miss",
    "right_in_view": "in_view",
}
"""Shares of something that queries have more or less of: valid ones of the calls; of the crops that a tool made of a
scene, those on target, which show what is asked for; the same of the first crops of queries, and of crops whose last
one before, of any candidate, was beside; of the queries with a crop on target of the right candidate, those right."""
COMPARED = ("hit@1", "mrr", "calls", "tokens")
CURVES = {
    "reward": "reward",
    "accuracy": "evidence/top1",
    "length": "completions/mean_length",
    "calls": "evidence/calls",
    "failed_calls": "tools/failure_frequency",
    "malformed": "evidence/malformed",
}
"""What is kept of each step of GRPO, and what the trainer calls it."""
SEED = 0
"""Of the bootstrap."""

_RUN = re.compile(r"(.+)-(\d+)")
_PLAYED = ("model", "weights", "tools")
"""Settings in which evaluations that are compared may differ."""


class NotComparable(ValueError):
    """Evaluations that cannot stand side by side. The message says which, why, and what to do."""


@dataclasses.dataclass
class Evaluation:
    """
    What one trained model made of one set of queries.

    Args:
        run (`str`): Name of its folder.
        settings (`dict`): What it was run with.
        keys (`list[str]`): Ids of the queries.
        right (`list[str]`): Of each, the id of the candidate that is right.
        values (`dict[str, np.ndarray]`): Of each, what [`MEANS`] and [`SHARES`] are made of.
    """

    run: str
    settings: dict[str, Any]
    keys: list[str]
    right: list[str]
    values: dict[str, np.ndarray]


def summarize(root: Path) -> dict[str, Any]:
    """
    All numbers of the comparison, small enough to be kept.

    Args:
        root (`Path`): Folder of `<model>-<seed>/<set>`, each of which `vretrver evaluate` wrote.

    Returns:
        `dict`: `sets` (name to its `n` and `mix`), `models` (each with `name`, `seeds`, `minutes` and `sets`: figures
            by set and group of queries), `differences` and `curves`, ready for JSON.

    Raises:
        NotComparable: Evaluations are missing, unfinished, or of different queries or settings.
    """
    runs = find_runs(root)
    sets = sorted({name for folders in runs.values() for name in folders})
    groups = {name: query_groups(_data_of(runs, name)) for name in sets}
    loaded: dict[str, dict[str, list[Evaluation]]] = {}
    for name in sets:
        targets = target_boxes(_data_of(runs, name))
        for run, folders in runs.items():
            if name in folders:
                model = model_and_seed(run)[0]
                loaded.setdefault(model, {}).setdefault(name, []).append(load(folders[name], run, targets))
        check_pairing([one for by_set in loaded.values() for one in by_set.get(name, [])], name)
    asked = {name: next(by_set[name][0] for by_set in loaded.values() if name in by_set).keys for name in sets}
    models = [_model_row(name, loaded[name], groups, runs) for name in sorted(loaded, key=_rank)]
    return {
        "sets": {name: {"n": len(keys), "mix": _mix(groups[name]["task"], keys)} for name, keys in asked.items()},
        "models": models,
        "differences": list(_differences(loaded, groups)),
        "curves": training_curves(runs),
    }


def find_runs(root: Path) -> dict[str, dict[str, Path]]:
    """
    The evaluations in a folder.

    Args:
        root (`Path`): Folder of `<model>-<seed>/<set>`.

    Returns:
        `dict[str, dict[str, Path]]`: Run to set to folder, models in the order of [`MODELS`].

    Raises:
        NotComparable: There are none, or one is not finished.
    """
    found: dict[str, dict[str, Path]] = {}
    for journal in sorted(root.glob("*/*/journal")):
        folder = journal.parent
        if not (folder / METRICS).is_file():
            raise NotComparable(f"{folder} is not finished; run its evaluation again, and it goes on")
        model_and_seed(folder.parent.name)
        found.setdefault(folder.parent.name, {})[folder.name] = folder
    if not found:
        raise NotComparable(f"{root} holds no evaluations; they belong into {root}/<model>-<seed>/<set>")
    return {run: found[run] for run in sorted(found, key=lambda run: (_rank(model_and_seed(run)[0]), run))}


def model_and_seed(run: str) -> tuple[str, int]:
    """
    What the name of a run says.

    >>> model_and_seed("full-need-1")
    ('full-need', 1)
    """
    match = _RUN.fullmatch(run)
    if match is None:
        raise NotComparable(f"{run!r} is no name of a run: it ends with a dash and the seed, as in 'full-0'")
    return match[1], int(match[2])


def load(folder: Path, run: str, targets: Mapping[str, Sequence[Sequence[int]]]) -> Evaluation:
    """
    Read an evaluation, query by query.

    Args:
        folder (`Path`): What `vretrver evaluate` wrote.
        run (`str`): Name of the run.
        targets (mapping): For each query, where in each candidate what is asked for stands; empty for no scene.

    Raises:
        NotComparable: A query failed or is not finished.
    """
    results, scores = Results.load(folder), Scores.load(folder / SCORES)
    if foreign := [key for key in scores.keys if key not in targets]:
        raise NotComparable(f"{folder} asked {foreign[0]}, which other models were not; evaluate all on the same file")
    facts, right = {}, {}
    for key, value in finished_entries(folder / "journal"):
        result = QueryResult.from_dict(value)
        facts[key], (right[key], *_) = query_facts(result, targets[key]), [*result.relevant]
    if missing := [key for key in scores.keys if key not in facts]:
        raise NotComparable(f"{folder}: {len(missing)} queries failed, such as {missing[0]}; evaluate it again")
    values = {metric: scores.reranked[metric] for metric in ("hit@1", "mrr")}
    for name in ("calls", "tokens", "ok", *SHARES, *SHARES.values()):
        values[name] = np.array([facts[key][name] for key in scores.keys], float)
    return Evaluation(run, results.settings, scores.keys, [right[key] for key in scores.keys], values)


def query_facts(result: QueryResult, targets: Sequence[Sequence[int]]) -> dict[str, float]:
    """What a query cost, how many of the crops of scenes showed what was asked for, and what came of it."""
    windows = result.windows
    right = {str(key) for key in result.relevant}
    by_window = [
        [
            (result.coarse[ref["index"] - 1] in right, shows(ref["box"], targets[ref["index"] - 1]))
            for turn in trajectory["turns"]
            if turn["role"] == "observation"
            for ref in turn["images"]
            if ref["box"] and ref["index"] and targets[ref["index"] - 1]
        ]
        for trajectory in result.trajectories or ()
    ]
    crops = [crop for window in by_window for crop in window]
    in_view = any(is_right and on_target for is_right, on_target in crops)
    pairs = (pair for window in by_window for pair in itertools.pairwise(window))
    after_miss = [after for (_, before), (_, after) in pairs if not before]
    return {
        "calls": sum(window.calls for window in windows),
        "valid_calls": sum(window.valid_calls for window in windows),
        "tokens": sum(window.tokens for window in windows),
        "ok": result.status == "ok",
        "crops": len(crops),
        "on_target": sum(on_target for _, on_target in crops),
        "looked": bool(crops),
        "first_on_target": bool(crops) and crops[0][1],
        "after_miss": len(after_miss),
        "found_after_miss": sum(after_miss),
        "in_view": in_view,
        "right_in_view": in_view and result.reranked[0] in right,
    }


def query_groups(data: Path) -> dict[str, dict[str, str]]:
    """Groups of the queries of a set, in columns: task by query id, and of scenes the kind of question."""
    rows = _columns(data, "data_source", "extra_info")
    tasks = {row["extra_info"]["qid"]: row["data_source"].removeprefix("emoji/") for row in rows}
    kinds = query_kinds(data)
    return {"task": tasks, "kind": {key: kinds[key] for key, task in tasks.items() if task in KINDS}}


def query_kinds(data: Path) -> dict[str, str]:
    """The kind of question of each query of a set."""
    return {row["extra_info"]["qid"]: row["ability"] for row in _columns(data, "ability", "extra_info")}


def target_boxes(data: Path) -> dict[str, list[list[int]]]:
    """For each query of a set, where in each candidate what is asked for stands."""
    infos = (row["extra_info"] for row in _columns(data, "extra_info"))
    return {info["qid"]: info["target_boxes"] for info in infos}


def check_pairing(evaluations: Sequence[Evaluation], name: str) -> None:
    """
    Make sure that all models were asked the same in the same way.

    Args:
        evaluations (`Sequence[Evaluation]`): Of one set.
        name (`str`): Of the set.

    Raises:
        NotComparable: They were not.
    """
    first = evaluations[0]
    right = dict(zip(first.keys, first.right, strict=True))
    for other in evaluations[1:]:
        theirs = dict(zip(other.keys, other.right, strict=True))
        if theirs.keys() != right.keys():
            (key, *more) = sorted(theirs.keys() ^ right.keys())
            where = first.run if key in right else other.run
            raise NotComparable(
                f"{first.run} and {other.run} were evaluated on different queries of {name}: {len(more) + 1} are in "
                f"one only, such as {key} in {where}; evaluate both on the same file"
            )
        if changed := [key for key in right if theirs[key] != right[key]]:
            raise NotComparable(
                f"{first.run} and {other.run} were evaluated on different queries of {name}: {changed[0]} has another "
                "right answer, so the file was built anew in between; evaluate both on the same file"
            )
        differing = [key for key in first.settings if first.settings[key] != other.settings.get(key)]
        if differing := sorted(set(differing) - set(_PLAYED)):
            raise NotComparable(
                f"{first.run} and {other.run} were evaluated on {name} with different {', '.join(differing)}; use the "
                "same options for both"
            )


def figures(evaluations: Sequence[Evaluation], keys: Sequence[str]) -> dict[str, Any]:
    """
    Means over queries and seeds with intervals.

    Args:
        evaluations (`Sequence[Evaluation]`): Of the same model and set, one a seed.
        keys (`Sequence[str]`): The queries.

    Returns:
        `dict`: `n`; each of [`MEANS`] and [`SHARES`] as mean, lower and upper end, or `None`; `by_seed`, the means of
            each seed.
    """
    values = {name: table(evaluations, name, keys) for name in (*MEANS, *SHARES, *SHARES.values())}
    told: dict[str, Any] = {"n": len(keys)}
    for name in MEANS:
        spread = score_interval if name in BOUNDED else bootstrap_interval
        told[name] = _rounded(values[name].mean(), spread(values[name].mean(axis=0), seed=SEED))
    for part, whole in SHARES.items():
        told[part] = share(values[part].sum(axis=0), values[whole].sum(axis=0))
    by_seed = {name: [round(float(row.mean()), 4) for row in values[name]] for name in MEANS}
    return {**told, "by_seed": by_seed}


def table(evaluations: Sequence[Evaluation], name: str, keys: Sequence[str]) -> np.ndarray:
    """A value of each of these queries, one row an evaluation, whatever order each has them in."""
    rows = []
    for one in evaluations:
        places = {key: place for place, key in enumerate(one.keys)}
        rows.append(one.values[name][[places[key] for key in keys]])
    return np.array(rows)


def share(parts: np.ndarray, wholes: np.ndarray) -> list[float] | None:
    """
    A share of all that the queries have, with an interval over queries.

    Args:
        parts (`np.ndarray`), wholes (`np.ndarray`): What counts, and all there is, of each query.

    Returns:
        `list[float]`, *optional*: The share, lower and upper end; `None` where there is nothing to share.
    """
    asked = wholes > 0  # the others have no part in it, and resamples of them alone would divide by nothing
    if not asked.any():
        return None
    parts, wholes = parts[asked], wholes[asked]
    rng, ends = np.random.default_rng(SEED), None
    if len(parts) > 1:
        weights = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=RESAMPLES)
        ends = np.percentile((weights @ parts) / (weights @ wholes), (2.5, 97.5))
    return _rounded(parts.sum() / wholes.sum(), ends)


def training_curves(runs: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, list[float | None]]]:
    """
    What GRPO logged in each step, of each trained model whose folder is still there.

    Returns:
        `dict`: Run to `step` and to each of [`CURVES`], `None` where a step did not log it.
    """
    curves, seen = {}, set()
    for run, folders in runs.items():
        model = Path(_model_of(folders))
        if model not in seen and (steps := logged_steps(model)):
            columns = {name: [_short(entry.get(key)) for entry in steps] for name, key in CURVES.items()}
            curves[run] = {"step": [entry["step"] for entry in steps], **columns}
        seen.add(model)  # it is not trained again to be played otherwise
    return curves


def logged_steps(model: Path) -> list[dict[str, Any]]:
    """What GRPO logged up to a model's last checkpoint; nothing for models that other stages trained."""
    states = sorted(model.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
    return [entry for entry in history if "reward" in entry]


def training_minutes(model: Path) -> dict[str, Any]:
    """
    What a model took from stage 0 on, the minutes of several GPUs added up.

    Args:
        model (`Path`): Folder of a model that one of the package's stages trained.

    Returns:
        `dict`: `stages`; `training`, minutes of training; `sampling`, minutes of `vretrver sample` where the launch
            line noted them beside what was accepted; `memory`, most GB that PyTorch held on the first GPU in the last
            stage, since its last start and as far as known; `device`.
    """
    path = model / "training.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    stages, training, sampling, device = [], 0.0, None, record and record["device"]
    memory = record and record.get("memory_gb")
    if record is not None:
        record["seconds"] = max(record["seconds"] or 0.0, _stepping(model))
    while record is not None:
        stages.insert(0, record["stage"])
        training += (record["seconds"] or 0.0) * record["processes"]
        note = Path(record["datasets"][0]) / "seconds.txt"
        if note.is_file():
            sampling = (sampling or 0.0) + float(note.read_text())
        record = record["before"]
    minutes = {"training": training, "sampling": sampling}
    rounded = {name: None if seconds is None else round(seconds / 60, 2) for name, seconds in minutes.items()}
    return {"stages": stages, **rounded, "memory": memory, "device": device}


def _stepping(model: Path) -> float:
    """Seconds of GRPO's steps, which the logs know also where it was interrupted."""
    before, seconds = 0, 0.0
    for entry in logged_steps(model):
        seconds += (entry["step"] - before) * entry.get("step_time", 0.0)
        before = entry["step"]
    return seconds


def _model_row(
    name: str,
    by_set: Mapping[str, list[Evaluation]],
    groups: Mapping[str, dict[str, dict[str, str]]],
    runs: Mapping[str, Mapping[str, Path]],
) -> dict[str, Any]:
    names = [run for run in runs if model_and_seed(run)[0] == name]
    minutes = [training_minutes(Path(_model_of(runs[run]))) for run in names]
    told = {
        set_name: {group: figures(evaluations, keys) for group, keys in _grouped(groups[set_name], evaluations[0])}
        for set_name, evaluations in by_set.items()
    }
    return {"name": name, "seeds": [model_and_seed(run)[1] for run in names], "minutes": minutes, "sets": told}


def _grouped(groups: Mapping[str, dict[str, str]], first: Evaluation) -> Iterator[tuple[str, list[str]]]:
    """Every group that this evaluation has queries of, most general first."""
    yield ALL, first.keys
    for column in ("task", "kind"):
        by_name: dict[str, list[str]] = {}
        for key in first.keys:
            if key in groups[column]:
                by_name.setdefault(groups[column][key], []).append(key)
        yield from sorted(by_name.items())


def _differences(
    loaded: Mapping[str, Mapping[str, list[Evaluation]]], groups: Mapping[str, dict[str, dict[str, str]]]
) -> Iterator[dict[str, Any]]:
    for first, second in PAIRS:
        for name in loaded.get(first, {}):
            if name not in loaded.get(second, {}):
                continue
            sides = loaded[second][name], loaded[first][name]
            tasks = {"task": groups[name]["task"], "kind": {}}  # by kind of question too the file would be too large
            for group, keys in _grouped(tasks, sides[0][0]):
                for metric in COMPARED:
                    ours, theirs = (table(side, metric, keys).mean(axis=0) for side in sides)
                    found = compare(ours, theirs, seed=SEED)
                    row = {"first": first, "second": second, "set": name, "group": group, "metric": metric}
                    yield {
                        **row,
                        "difference": _rounded(found.mean, found.interval),
                        "p": round(found.p_value, 4),
                        "better": found.wins,
                        "worse": found.losses,
                    }


def _rank(model: str) -> tuple[int, str]:
    return [*MODELS, model].index(model), model


def _model_of(folders: Mapping[str, Path]) -> str:
    return Results.load(next(iter(folders.values()))).settings["model"]


def _data_of(runs: Mapping[str, Mapping[str, Path]], name: str) -> Path:
    folder = next(folders[name] for folders in runs.values() if name in folders)
    return Path(Results.load(folder).settings["data"])


def _mix(tasks: Mapping[str, str], keys: Sequence[str]) -> dict[str, int]:
    return dict(collections.Counter(tasks[key] for key in keys).most_common())


def _columns(data: Path, *names: str) -> list[dict[str, Any]]:
    """Columns of a file of queries, read without the pictures."""
    from pyarrow import parquet

    return parquet.read_table(data, columns=list(names)).to_pylist()


def _rounded(mean: float, interval: Sequence[float] | None) -> list[float]:
    return [round(float(value), 4) for value in (mean, *(interval if interval is not None else (mean, mean)))]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
