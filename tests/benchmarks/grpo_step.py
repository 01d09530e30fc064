"""
A step of our GRPO trainer against one of TRL's stock trainer, on the same model, pictures, turns and tokens.

Both really run the model and are made to say the same script: two tool calls and an answer. CPU time is what counts
on a machine that others use too.

    python tests/benchmarks/grpo_step.py [--rollouts 8] [--candidates 5] [--thought 40] [--steps 3] [--freeze]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer


sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from scripted import ForcedEngine, turn_ids

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.environment import (
    RerankEnvironment,
    prepare_processor,
    stock_arguments,
    training_dataset,
)
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.reranker import bundled_model
from vretrver_hf.rewards import EvidenceReward
from vretrver_hf.training import grpo


PRESET = get_preset("foveated", overview_pixels=112 * 112, inspect_pixels=224 * 224, max_calls=2)


class Timed:
    """Mixed into a trainer: measures its steps and, within them, the rollouts."""

    def training_step(self, *args, **kwargs):
        started = time.process_time()
        result = super().training_step(*args, **kwargs)
        self.steps = [*getattr(self, "steps", []), time.process_time() - started]
        return result

    def _generate(self, prompts):
        started = time.process_time()
        result = super()._generate(prompts)
        self.rollouts = [*getattr(self, "rollouts", []), time.process_time() - started]
        self.tokens = sum(map(len, result[0])), sum(map(len, result[1]))
        return result


class Stock(Timed, GRPOTrainer):
    pass


class Ours(Timed, grpo.EvidenceGRPOTrainer):
    pass


class Forced(LogitsProcessor):
    """Makes `generate` write the script: which turn it is shows by how many have begun."""

    def __init__(self, script, encoder):
        self.script = [[*turn, *([] if turn[-1] == encoder.end_of_turn else [encoder.end_of_turn])] for turn in script]
        self.start = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.width = 0

    def __call__(self, input_ids, scores):
        turn = int((input_ids[0, : self.width] == self.start).sum() - 3) // 2
        ids = self.script[turn]
        place = input_ids.shape[1] - self.width
        scores[:] = -torch.inf
        scores[:, ids[min(place, len(ids) - 1)]] = 0
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled_model()))
    parser.add_argument("--rollouts", type=int, default=8, help="of the one query of a step")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--thought", type=int, default=40, help="words of each thought")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--freeze", action="store_true", help="freeze the vision tower")
    args = parser.parse_args()

    source = np.random.default_rng(0)
    pictures = [source.integers(0, 255, (480, 360, 3), dtype=np.uint8) for _ in range(args.candidates)]
    example = RerankExample("q", Item(text="query"), [Item(image=Image.fromarray(p)) for p in pictures], positives=[0])
    thought = "word " * args.thought
    turns = [
        format_turn(thought, format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.6], "target_image": 1})),
        format_turn(thought, format_call("select_images", {"target_images": [1, 2, 3]})),
        format_turn(thought, format_answer(range(args.candidates))),
    ]
    results = {name: measure(name, args, example, turns) for name in ("stock", "ours")}
    for name, (step, rollout, tokens) in results.items():
        print(f"{name:6} step {step:7.2f} s, rollouts {rollout:7.2f} s; prompt tokens {tokens[0]}, others {tokens[1]}")
    (step, rollout, _), (stock_step, stock_rollout, _) = results["ours"], results["stock"]
    print(f"ratio  step {step / stock_step:7.3f}    rollouts {rollout / stock_rollout:7.3f}")


def measure(name: str, args, example: RerankExample, turns: list[str]) -> tuple[float, float, tuple[int, int]]:
    """Median CPU seconds of a step and of its rollouts, and the tokens of prompts and completions."""
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    model.model.visual.requires_grad_(not args.freeze)
    settings = {
        "per_device_train_batch_size": args.rollouts,
        "num_generations": args.rollouts,
        "max_completion_length": 4000,
        "max_steps": args.steps + 1,
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    encoder = prepare_processor(processor, model.config.model_type, PRESET)
    script = [turn_ids(encoder, turn) for turn in turns]
    with tempfile.TemporaryDirectory() as folder:
        if name == "ours":
            engine = functools.partial(forced_engine, turns=turns)
            grpo.TransformersEngine, original = engine, grpo.TransformersEngine
            config = grpo.EvidenceGRPOConfig(folder, trajectories_steps=0, **settings)
            trainer = Ours(
                model, None, config, [example], processing_class=processor, preset=PRESET, max_turn_tokens=1000
            )
        else:
            original = grpo.TransformersEngine
            config = GRPOConfig(folder, **settings, **stock_arguments(encoder, PRESET, max_turn_tokens=1000))
            trainer = Stock(
                model,
                EvidenceReward("paper"),
                config,
                training_dataset([example], PRESET),
                processing_class=processor,
                environment_factory=functools.partial(RerankEnvironment, encoder, PRESET),
            )
            force_generate(model, Forced(script, encoder))
        try:
            trainer.train()
        finally:
            grpo.TransformersEngine = original
    return statistics.median(trainer.steps[1:]), statistics.median(trainer.rollouts[1:]), trainer.tokens


def forced_engine(model, processor, max_sessions, prefill_tokens, turns):
    return ForcedEngine(
        model, processor, lambda query_id, turn: turns[turn], max_sessions=max_sessions, prefill_tokens=prefill_tokens
    )


def force_generate(model, forced: Forced) -> None:
    generate = model.generate

    def forced_generate(**inputs):
        forced.width = inputs["input_ids"].shape[1]
        return generate(**inputs, logits_processor=LogitsProcessorList([forced]))

    model.generate = forced_generate


if __name__ == "__main__":
    main()
