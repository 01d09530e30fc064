"""A record of what a stage ran, kept beside the model that it made; cards are written from it."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cards import RECORD_NAME


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments
    from trl import ModelConfig

    from ._common import StageArguments

_PACKAGES = ("trl", "transformers", "torch", "accelerate")

_UNTOLD = {
    *("output_dir", "logging_dir", "run_name", "local_rank", "hub_token", "hub_model_id", "push_to", "license"),
    *("model_name_or_path", "dataset_name", "eval_dataset_name", "resume_from_checkpoint", "deepspeed", "project"),
}
"""Settings that stay out of the record: said elsewhere in it, or nobody else's business."""


def write_record(trainer: Trainer, model_args: ModelConfig, arguments: StageArguments, folder: Path) -> None:
    """
    Writes `training.json`: what ran, and what had run before on the model that it began with.

    Args:
        trainer (`Trainer`):
            The trainer, when it is done.
        model_args (`ModelConfig`):
            What was trained.
        arguments (`StageArguments`):
            The stage's settings.
        folder (`Path`):
            The trained model's.
    """
    args, state = trainer.args, trainer.state
    base = Path(str(model_args.model_name_or_path))
    before = base / RECORD_NAME
    logs = {name: value for entry in state.log_history for name, value in entry.items()}
    changed = {**_changed(args), **_changed(model_args), **_changed(arguments)}
    record = {
        "stage": arguments.stage,
        "base_model": model_args.model_name_or_path,
        "revision": model_args.model_revision,
        "datasets": [arguments.dataset_name],
        "steps": state.global_step,
        "epochs": state.epoch,
        "processes": args.world_size,
        "device": _device_name(args),
        "memory_gb": _memory(args),
        "seconds": logs.get("train_runtime"),
        "loss": logs.get("train_loss"),
        "settings": {name: value for name, value in changed.items() if name not in _UNTOLD},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "before": json.loads(before.read_text(encoding="utf-8")) if before.is_file() else None,
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _changed(settings: Any) -> dict[str, Any]:
    """Plain settings that are not at their defaults."""
    told = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default and isinstance(value, (str, int, float, bool, list, dict)):
            told[field.name] = value.value if isinstance(value, enum.Enum) else value
    return told


def _memory(args: TrainingArguments) -> float | None:
    """Most memory that PyTorch held on the first process's GPU since it last started, in GB of 10⁹ bytes."""
    return round(torch.cuda.max_memory_reserved(args.device) / 1e9, 2) if args.device.type == "cuda" else None


def _device_name(args: TrainingArguments) -> str:
    return torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
