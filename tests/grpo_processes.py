"""
Two steps of our GRPO trainer on a tiny model, for a test that compares one process with two.

    accelerate launch … tests/grpo_processes.py OUTPUT_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import make_model, make_processor

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.protocol import get_preset
from vretrver_hf.rewards import EvidenceReward
from vretrver_hf.training.grpo import EvidenceGRPOConfig, EvidenceGRPOTrainer


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=128 * 128, max_calls=1)


def token_reward(completion_ids, **kwargs) -> list[float]:
    """Differs between rollouts, which the reward of a random model does not."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def run(output_dir: Path, num_processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Trains; returns weights and log. The batch of a step is the same, however many processes share it."""
    source = np.random.default_rng(0)
    pictures = [Image.fromarray(source.integers(0, 255, (90, 70, 3), dtype=np.uint8)) for _ in range(4)]
    examples = [
        RerankExample(f"q{i}", Item(text=f"query {i}"), [Item(image=picture), Item(text="b")], positives=[1])
        for i, picture in enumerate(pictures)
    ]
    processor = make_processor("qwen2_5_vl")
    args = EvidenceGRPOConfig(
        str(output_dir),
        # A group of four lies in two processes.
        per_device_train_batch_size=8 // num_processes,
        num_generations=4,
        max_completion_length=200,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = EvidenceGRPOTrainer(
        make_model("qwen2_5_vl", processor),
        [EvidenceReward("need"), token_reward],
        args,
        examples,
        processing_class=processor,
        preset=PRESET,
        max_turn_tokens=12,
    )
    trainer.train()
    return dict(_unwrapped(trainer).state_dict()), trainer.state.log_history


def _unwrapped(trainer) -> torch.nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model)


if __name__ == "__main__":
    output = Path(sys.argv[1])
    weights, log = run(output.parent, num_processes=2)
    if log:
        torch.save((weights, log), output)
