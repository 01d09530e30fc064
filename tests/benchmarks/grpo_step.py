"""
A step of our GRPO trainer against one of TRL's stock trainer, on the same model, pictures, turns and tokens.

Both really run the model and are made to say the same script: two tool calls and an answer. On a CPU the time of the
CPU is what counts, since others may use the machine too; on a GPU that of the clock, and its peak of memory is told.

    python tests/benchmarks/grpo_step.py [--rollouts 8] [--candidates 5] [--thought 40] [--steps 3] [--freeze]

A step as in `recipes/emoji/grpo.yaml`, 512 rollouts of about 1,000 tokens, on one GPU; TRL's trainer is given fewer of
them, since it takes long, and ours the same number once more:

    python tests/benchmarks/grpo_step.py --queries 64 --stock_queries 16 --accumulate 4 --max_sessions 512 \\
        --prefill_tokens 65536 --pixels 7225 --inspect_pixels 15625 --thought 60 --freeze --budget 5
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
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


class Clock:
    """Seconds of the parts of each step: those of the CPU where the model runs on one."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    @contextlib.contextmanager
    def part(self, name: str):
        started = self.now()
        yield
        if self.steps:
            self.steps[-1][name] += self.now() - started

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def medians(self) -> dict[str, float]:
        """Of the steps behind the first, which warms up."""
        measured = self.steps[1:] or self.steps
        return {name: statistics.median(step[name] for step in measured) for name in measured[0]}


class Steps(TrainerCallback):
    """Tells a clock where a step begins and ends, its optimiser's part included."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.clock.now()
        self.clock.steps.append(collections.defaultdict(float))

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.steps[-1]["step"] = self.clock.now() - self.started


class Timed:
    """Mixed into a trainer: measures the parts of a step."""

    clock: Clock

    def training_step(self, *args, **kwargs):
        with self.clock.part("training"):
            return super().training_step(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        with self.clock.part("batch"):
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts):
        with self.clock.part("rollouts"):
            result = super()._generate(prompts)
        self.tokens = sum(map(len, result[0])), sum(map(len, result[1]))
        return result

    def compute_loss(self, *args, **kwargs):
        with self.clock.part("forward"):
            return super().compute_loss(*args, **kwargs)


class Stock(Timed, GRPOTrainer):
    pass


class Ours(Timed, grpo.EvidenceGRPOTrainer):
    pass


class TimedEngine(ForcedEngine):
    clock: Clock

    def _forward_prefill(self, batch):
        with self.clock.part("prefill"):
            return super()._forward_prefill(batch)

    def _decode(self):
        with self.clock.part("decode"):
            return super()._decode()


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
    parser.add_argument("--rollouts", type=int, default=8, help="of each query of a step")
    parser.add_argument("--queries", type=int, default=1, help="of a step")
    parser.add_argument("--stock_queries", type=int, help="of a step of TRL's trainer; as many by default, 0 for none")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes of a step")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--thought", type=int, default=40, help="words of each thought")
    parser.add_argument("--pixels", type=int, default=112 * 112, help="budget of an overview")
    parser.add_argument("--inspect_pixels", type=int, default=224 * 224, help="budget of what a tool shows")
    parser.add_argument("--max_sessions", type=int, default=16)
    parser.add_argument("--prefill_tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--stock_steps", type=int, help="the same for TRL's trainer")
    parser.add_argument("--freeze", action="store_true", help="freeze the vision tower")
    parser.add_argument("--budget", type=float, help="fail where a step of ours takes longer, in seconds")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()

    stock_queries = args.queries if args.stock_queries is None else args.stock_queries
    runs = [("ours", args.queries, args.steps)]
    if stock_queries not in (0, args.queries):
        runs.append(("ours", stock_queries, args.steps))
    if stock_queries:
        runs.append(("stock", stock_queries, args.stock_steps or args.steps))
    results = {}
    for name, queries, steps in runs:
        results[name, queries] = result = measure(name, args, queries, steps)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in result["seconds"].items() if part != "step")
        read, written = result["tokens"]
        memory = f"; peak memory {result['memory'] / 2**30:.1f} GiB" if result["memory"] else ""
        print(
            f"{name:6}{queries * args.rollouts:5} rollouts, {(read + written) / queries / args.rollouts:,.0f} tokens "
            f"each: step {result['seconds']['step']:7.2f} s ({parts}){memory}",
            flush=True,
        )
    if args.json:
        figures = {f"{name} {queries * args.rollouts}": result for (name, queries), result in results.items()}
        Path(args.json).write_text(json.dumps({"settings": vars(args), **figures}, indent=1))
    if stock_queries:
        ours, stock = results["ours", stock_queries]["seconds"], results["stock", stock_queries]["seconds"]
        print(
            f"ratio at {stock_queries * args.rollouts} rollouts: step {ours['step'] / stock['step']:.3f}, "
            f"rollouts {ours['rollouts'] / stock['rollouts']:.3f}"
        )
    if stock_queries not in (0, args.queries):
        expected = stock["step"] * args.queries / stock_queries
        count = args.queries * args.rollouts
        print(f"TRL's step would take {expected:.1f} s at {count} rollouts if it grew in proportion")
    seconds = results["ours", args.queries]["seconds"]["step"]
    if args.budget is not None and seconds > args.budget:
        sys.exit(f"a step took {seconds:.2f} s, more than {args.budget} s")


def make_examples(count: int, candidates: int) -> list[RerankExample]:
    source = np.random.default_rng(0)
    return [
        RerankExample(
            f"q{i}",
            Item(text="query"),
            [
                Item(image=Image.fromarray(source.integers(0, 255, (480, 360, 3), dtype=np.uint8)))
                for _ in range(candidates)
            ],
            positives=[0],
        )
        for i in range(count)
    ]


def make_turns(args) -> list[str]:
    thought = "word " * args.thought
    return [
        format_turn(thought, format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.6], "target_image": 1})),
        format_turn(thought, format_call("select_images", {"target_images": [1, 2, 3]})),
        format_turn(thought, format_answer(range(args.candidates))),
    ]


def measure(name: str, args, queries: int, steps: int) -> dict:
    """Median seconds of a step and its parts, tokens of its prompts and of all behind them, and the peak of memory."""
    preset = get_preset("foveated", overview_pixels=args.pixels, inspect_pixels=args.inspect_pixels, max_calls=2)
    examples, turns, clock = make_examples(queries, args.candidates), make_turns(args), Clock()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    model.model.visual.requires_grad_(not args.freeze)
    on_gpu = torch.cuda.is_available()
    settings = {
        "per_device_train_batch_size": queries * args.rollouts // args.accumulate,
        "gradient_accumulation_steps": args.accumulate,
        "gradient_checkpointing": False,
        "num_generations": args.rollouts,
        "max_completion_length": 4000,
        "max_steps": steps + 1,
        "report_to": [],
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    encoder = prepare_processor(processor, model.config.model_type, preset)
    script = [turn_ids(encoder, turn) for turn in turns]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        original = grpo.TransformersEngine
        if name == "ours":
            TimedEngine.clock = clock
            grpo.TransformersEngine = functools.partial(forced_engine, turns=turns)
            limits = {"max_sessions": args.max_sessions, "prefill_tokens": args.prefill_tokens}
            config = grpo.EvidenceGRPOConfig(folder, trajectories_steps=0, **limits, **settings)
            trainer = Ours(
                model, None, config, examples, processing_class=processor, preset=preset, max_turn_tokens=1000
            )
        else:
            config = GRPOConfig(folder, **settings, **stock_arguments(encoder, preset, max_turn_tokens=1000))
            trainer = Stock(
                model,
                EvidenceReward("paper"),
                config,
                training_dataset(examples, preset),
                processing_class=processor,
                environment_factory=functools.partial(RerankEnvironment, encoder, preset),
            )
            force_generate(model, Forced(script, encoder))
        trainer.clock = clock
        trainer.add_callback(Steps(clock))
        try:
            trainer.train()
        finally:
            grpo.TransformersEngine = original
    seconds = clock.medians()
    # What is asked for one inside another becomes what lies beside each other.
    seconds["scoring"] = seconds.pop("batch") - seconds["rollouts"]
    seconds["backward"] = seconds.pop("training") - seconds["rollouts"] - seconds["scoring"] - seconds["forward"]
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"seconds": dict(seconds), "tokens": trainer.tokens, "memory": memory, "all": clock.steps}


def forced_engine(model, processor, max_sessions, prefill_tokens, turns):
    return TimedEngine(
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
