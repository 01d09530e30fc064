"""Cards for the hub, made from what actually ran: what lies beside the weights or in the data says what they say."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from .protocol import Preset


if TYPE_CHECKING:
    from huggingface_hub import CardData, DatasetCard, ModelCard

    from .data.conversations import TrajectoryRecord
    from .data.examples import RerankExample

RECORD_NAME = "training.json"
"""File beside a trained model that says what ran: its base, data, settings, and the stages before."""

RESULTS_NAME = "evaluation.json"
"""File beside a model with figures that were measured on it; see [`read_figures`]."""

TAG = "vretrver_hf"
_MADE = "<!-- made by vretrver push -->"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
_PROTOCOL = ("name", "coordinates", "max_calls", "overview_pixels", "inspect_pixels", "crop_padding")


@dataclasses.dataclass(frozen=True)
class Figure:
    """
    One measured number.

    Args:
        task (`str`):
            What was asked.
        data (`str`):
            The data set or split.
        metric (`str`):
            Name of the metric.
        value (`float`), low (`float`, *optional*), high (`float`, *optional*):
            The number, and the ends of its 95 % interval.
        count (`int`):
            Number of queries.
        calls (`float`, *optional*):
            Tool calls a query.
    """

    task: str
    data: str
    metric: str
    value: float
    count: int
    low: float | None = None
    high: float | None = None
    calls: float | None = None


def read_figures(path: str | Path) -> list[Figure]:
    """
    Reads measured numbers.

    Args:
        path (`str` or `Path`):
            What `vretrver evaluate` wrote (its folder, or its `metrics.json`), of which each data set's own metric is
            taken; or a JSON list of rows with `task`, `n`, `metric` and `value` (or `r1` for both), and where known
            `interval` (its two ends), `split` or `dataset`, and `calls`.

    Raises:
        `ValueError`: naming the file, and the row that lacks one of these.
    """
    path = Path(path)
    if path.is_dir() or isinstance(rows := json.loads(path.read_text(encoding="utf-8")), dict):
        return _measured(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds neither a list of rows nor the metrics of vretrver evaluate")
    figures = []
    for number, row in enumerate(rows, start=1):
        try:
            figures.append(_figure(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number}: {error!r}; it needs task, n, metric and value") from error
    return figures


def model_card(
    folder: str | Path, repo_id: str, *, license: str | None = None, figures: Sequence[Figure] | None = None
) -> ModelCard:
    """
    The card of a model, from the files beside its weights.

    A `README.md` that somebody wrote for this model (it has the tag `vretrver_hf`) is kept as it is, unless figures
    are given.

    Args:
        folder (`str` or `Path`):
            The model, or an adapter.
        repo_id (`str`):
            Where it is going to be.
        license (`str`, *optional*):
            The licence's short name on the hub; that of the model's own card by default.
        figures (sequence of `Figure`, *optional*):
            What was measured; by default what `evaluation.json` beside the model says.

    Raises:
        `ValueError`: if nothing says under which licence the model is.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    written = _own_card(folder, ModelCard)
    if written is not None and figures is None and _MADE not in written.text:
        written.data.license = license or written.data.license
        return _with_license(written)
    if figures is None:
        figures = read_figures(folder / RESULTS_NAME) if (folder / RESULTS_NAME).is_file() else []
    stages = _stages(_read(folder / RECORD_NAME))
    adapter = _read(folder / "adapter_config.json")
    base = adapter.get("base_model_name_or_path") or (stages[0]["base_model"] if stages else None)
    datasets = [name for stage in stages for name in stage["datasets"] if _on_hub(name)]
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        license=license or (written.data.license if written else None),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base if _on_hub(base) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _on_hub(base) else None,
        datasets=sorted(set(datasets)) or None,
        tags=["reranking", "multimodal", TAG],
        model_name=name if figures else None,
        eval_results=[_eval_result(figure) for figure in figures] or None,
    )
    text = _render(
        "model_card.md.jinja",
        data,
        name=name,
        repo_id=repo_id,
        what=_describe_model(folder, adapter),
        base=_public(base) if base else None,
        is_adapter=bool(adapter),
        protocol=_protocol(_read(folder / "reranker_config.json")),
        stages=[{**stage, "base_model": _public(stage["base_model"])} for stage in stages],
        sources=[", ".join(map(_public, stage["datasets"])) for stage in stages],
        figures=figures,
        attribution=(folder / "ATTRIBUTION.md").is_file(),
    )
    return _with_license(ModelCard(text))


def data_card(
    examples: Iterable[RerankExample], repo_id: str, *, license: str, attribution: bool = False
) -> DatasetCard:
    """
    The card of a data set of queries with candidates and labels, from the rows themselves.

    Args:
        examples (iterable of `RerankExample`):
            The rows, taken one at a time.
        repo_id (`str`):
            Where they are going to be.
        license (`str`):
            The licence's short name on the hub.
        attribution (`bool`, *optional*, defaults to `False`):
            Whether an `ATTRIBUTION.md` goes with them.
    """
    from .data.rejection import modalities

    groups: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    sizes: collections.Counter[int] = collections.Counter()
    for example in examples:
        count = groups[example.data_source or "–", modalities(example)]
        count["queries"] += 1
        count["pictures"] += sum(item.image is not None for item in [example.query, *example.candidates])
        sizes[len(example.candidates)] += 1
    return _dataset_card(
        "data_card.md.jinja",
        repo_id,
        license,
        ["reranking", "multimodal", TAG],
        groups=[(*group, count["queries"], count["pictures"]) for group, count in sorted(groups.items())],
        total=sizes.total(),
        smallest=min(sizes, default=0),
        largest=max(sizes, default=0),
        attribution=attribution,
    )


def trajectories_card(
    records: Iterable[TrajectoryRecord], repo_id: str, *, license: str, story: str = "", attribution: bool = False
) -> DatasetCard:
    """
    The card of a data set of trajectories, from the trajectories themselves.

    Args:
        records (iterable of `TrajectoryRecord`):
            The trajectories, taken one at a time.
        repo_id (`str`):
            Where they are going to be.
        license (`str`):
            The licence's short name on the hub.
        story (`str`, *optional*, defaults to `""`):
            How they came about, as Markdown: the card that `vretrver sample` wrote beside them.
        attribution (`bool`, *optional*, defaults to `False`):
            Whether an `ATTRIBUTION.md` goes with them.
    """
    from .data.rejection import modalities

    groups: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    presets: dict[str, dict[str, Any]] = {}
    for record in records:
        trajectory = record.trajectory
        count = groups[record.example.data_source or "–", modalities(record.example)]
        count["trajectories"] += 1
        count["right"] += trajectory.candidate_indices[trajectory.order[0]] in record.example.positives
        count["calls"] += trajectory.num_calls
        count["invalid"] += trajectory.num_calls - trajectory.num_valid_calls
        count["fallback"] += trajectory.status == "fallback"
        presets[json.dumps(trajectory.preset, sort_keys=True)] = trajectory.preset
    return _dataset_card(
        "trajectories_card.md.jinja",
        repo_id,
        license,
        ["reranking", "multimodal", "agent-traces", TAG],
        groups=[(*group, count) for group, count in sorted(groups.items())],
        total=sum(count["trajectories"] for count in groups.values()),
        presets=[_protocol({"preset": preset}) for preset in presets.values()],
        story=_body(story),
        attribution=attribution,
    )


def _dataset_card(template: str, repo_id: str, license: str, tags: list[str], **values: Any) -> DatasetCard:
    from huggingface_hub import DatasetCard, DatasetCardData

    data = DatasetCardData(
        license=license,
        tags=tags,
        task_categories=["image-text-to-text"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    return DatasetCard(_render(template, data, name=repo_id.split("/")[-1], repo_id=repo_id, **values))


def _measured(path: Path) -> list[Figure]:
    """Of the metrics of `vretrver evaluate`, each data set's own."""
    from .evaluation.results import Results, primary_metric

    results = Results.load(path)
    figures = []
    for name, group in results.groups.items():
        metric = primary_metric(name)
        score, calls = group["reranked"][metric], group["cost"]["calls"]
        data = Path(str(results.settings.get("data", "–"))).name
        figures.append(Figure(name, data, metric, score["mean"], group["n"], *score["interval"], calls))
    return figures


def _figure(row: Mapping[str, Any]) -> Figure:
    low, high = row.get("interval") or (None, None)
    return Figure(
        task=str(row["task"]),
        data=str(row.get("dataset") or row.get("split") or "–"),
        metric=row["metric"] if "metric" in row else "R@1",
        value=float(row["value"] if "value" in row else row["r1"]),
        count=int(row["n"]),
        low=low,
        high=high,
        calls=row.get("calls"),
    )


def _eval_result(figure: Figure) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="image-text-to-text",
        task_name=figure.task,
        dataset_type="custom",
        dataset_name=f"{figure.task} on {figure.data}",
        metric_type="recall" if figure.metric.startswith("R@") else figure.metric,
        metric_name=figure.metric,
        metric_value=round(figure.value, 4),
    )


def _own_card(folder: Path, kind: type) -> Any:
    """The `README.md` of this project's models; those that trainers leave behind say little and are passed over."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    card = kind(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    return card if TAG in (card.data.get("tags") or []) else None


def _with_license(card: Any) -> Any:
    if not card.data.get("license"):
        raise ValueError("nothing says under which licence this is; name one, such as apache-2.0")
    return card


def _stages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a training, first to last."""
    return [*_stages(record.get("before") or {}), record] if record else []


def _describe_model(folder: Path, adapter: dict[str, Any]) -> str:
    family = _FAMILIES.get(_read(folder / "config.json").get("model_type", ""), "")
    count, kinds = _weights(folder)
    kind = f"LoRA adapter of rank {adapter.get('r')}" if adapter else family or "model"
    return f"{kind} with {count:,} weights ({', '.join(sorted(kinds))})"


def _weights(folder: Path) -> tuple[int, set[str]]:
    """How many weights the files hold and in which formats; read from their headers."""
    from safetensors import safe_open

    count, kinds = 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                piece = file.get_slice(name)
                count += math.prod(piece.get_shape())
                kinds.add(piece.get_dtype())
    return count, kinds


def _protocol(config: dict[str, Any]) -> list[tuple[str, Any]]:
    if not config:
        return []
    preset = Preset.from_dict(config["preset"]).to_dict()
    rows = [(name.replace("_", " "), preset[name]) for name in _PROTOCOL]
    rows += [(name, config[name]) for name in ("window", "stride") if name in config]
    return [("preset" if name == "name" else name, "no limit" if value is None else value) for name, value in rows]


def _on_hub(name: str | None) -> bool:
    return name is not None and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _public(name: str | None) -> str:
    """A name as others may read it: of a folder only the last part, since the rest says how a computer is set up."""
    return "–" if not name else name if _on_hub(name) else f"{Path(name).name} (a local folder)"


def _body(card: str) -> str:
    """A card without its metadata and title."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()
    return re.sub(r"\A# .*\n", "", text).strip()


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _render(template: str, data: CardData, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vretrver_hf", "assets"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(
        card_data=data.to_yaml(), license=data.get("license"), made=_MADE, **values
    )
    return text.encode("utf-8", "replace").decode("utf-8")
