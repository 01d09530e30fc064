"""
Rejection-sampling fine-tuning: a model learns from those of its own trajectories that were right.

vretrver sample --model outputs/sft --data train.parquet --out outputs/accepted
accelerate launch --config_file recipes/accelerate_configs/zero3.yaml \\
    -m vretrver_hf.training.rsft --config recipes/v-retrver-7b/rsft.yaml
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from trl import ModelConfig

from ..data.conversations import read_records
from ..protocol import Preset, get_preset
from ._common import parse
from .sft import ConversationSFTConfig, SFTScriptArguments, train


@dataclasses.dataclass
class RSFTScriptArguments(SFTScriptArguments):
    """
    What to learn from: [`SFTScriptArguments`] with two differences.

    Args:
        dataset_name (`str`):
            A folder that `vretrver sample` wrote.
        preset (`str`, *optional*):
            The protocol to train; by default the one under which the trajectories were sampled, with all its settings.
    """

    stage: ClassVar[str] = "rsft"

    dataset_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder of accepted trajectories, as vretrver sample writes it."}
    )
    preset: str | None = dataclasses.field(
        default=None, metadata={"help": "Protocol to train; that of the trajectories by default."}
    )

    def make_preset(self) -> Preset:
        """The protocol that these settings describe."""
        if self.preset is not None:
            return super().make_preset()
        return get_preset(_sampled_preset(self.dataset_name), **(self.preset_overrides or {}))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the settings and trains."""
    trainer = train(*parse((RSFTScriptArguments, ConversationSFTConfig, ModelConfig), argv))
    trainer.accelerator.end_training()  # a process group that is not ended may abort at exit


def _sampled_preset(folder: str | None) -> Preset:
    if folder is None:
        raise ValueError("set dataset_name: a folder of accepted trajectories, as vretrver sample writes it")
    records = read_records(folder)
    if not len(records):
        raise ValueError(f"{folder} holds no trajectory: nothing was accepted")
    return Preset.from_dict(records[0].trajectory.preset)


if __name__ == "__main__":
    main()
