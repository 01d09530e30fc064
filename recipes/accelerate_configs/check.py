"""
Finds out in a minute whether a launch configuration works on a machine: a few real training steps of the bundled tiny
model, on as many processes as asked for, and a look at what came of them.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 2 \\
        recipes/accelerate_configs/check.py grpo [--steps 3] [--train_tower] [--out FOLDER]

Half the queries have no pictures, so that a process may well meet a batch without any. It ends with an error unless

- every loss and gradient norm is finite,
- all processes hold the same weights at the end, gathered where they are sharded,
- weights that are trained differ from those at the start, unless rounding hides a step, and frozen ones do not,
- the model that was saved holds those weights.

With `sft --adapter lora` or `sft --adapter qlora` the adapter is looked at in place of the weights.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig

from vretrver_hf import Item
from vretrver_hf.agent import play
from vretrver_hf.data.conversations import TrajectoryRecord, write_records
from vretrver_hf.data.examples import RerankExample, write_examples
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines.scripted import ScriptedEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn
from vretrver_hf.reranker import bundled_model
from vretrver_hf.rewards import EvidenceReward
from vretrver_hf.samples import load_samples
from vretrver_hf.training import grpo, sft
from vretrver_hf.training._common import freeze, load_model, save_trained


PRESET = {"overview_pixels": 56 * 56, "inspect_pixels": 84 * 84, "max_calls": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft", "grpo"])
    parser.add_argument("--model", default=str(bundled_model()))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--group", type=int, default=4, help="rollouts of a query, and conversations of a process")
    parser.add_argument("--turn_tokens", type=int, default=48, help="most tokens of a turn, for grpo")
    parser.add_argument("--train_tower", action="store_true", help="train the vision tower and its projector too")
    parser.add_argument(
        "--adapter", choices=["lora", "qlora"], help="for sft: train an adapter; qlora on 4-bit weights"
    )
    parser.add_argument("--out", help="folder for the trained model; a temporary one by default")
    args = parser.parse_args()
    if args.adapter and args.stage == "grpo":
        parser.error("--adapter is for sft")
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        trainer, folder = train(args, temporary)
        seconds = time.perf_counter() - started
        report = examine(trainer, args, folder)
        if trainer.accelerator.is_main_process:
            plugin = trainer.accelerator.state.deepspeed_plugin
            name = f"{trainer.accelerator.distributed_type.value}{f', stage {plugin.zero_stage}' if plugin else ''}"
            print(
                f"{args.stage} under {name}, {trainer.args.world_size} × {trainer.accelerator.device.type}, "
                f"{seconds:.0f} s: {report}"
            )
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


def train(args: argparse.Namespace, temporary: str) -> tuple[Any, Path]:
    """Trains and saves. Returns the trainer and the folder of the model."""
    settings = {
        "per_device_train_batch_size": args.group,
        "max_steps": args.steps,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": True,
        # Told to use the CPU, accelerate would leave DeepSpeed out.
        "use_cpu": not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        "bf16": torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    build = sft.ConversationSFTConfig if args.stage == "sft" else grpo.EvidenceGRPOConfig
    if args.stage == "grpo":
        settings |= {"num_generations": args.group, "max_completion_length": 512, "temperature": 1.2}
    config = build(args.out or str(Path(temporary, "model")), **settings)
    # The processes are to save to one folder and to read one file.
    folder, data = broadcast_object_list([config.output_dir, str(Path(temporary, "data"))])
    config.output_dir = folder
    model_args = ModelConfig(
        model_name_or_path=args.model,
        dtype="float32",
        attn_implementation="sdpa",
        use_peft=args.adapter is not None,
        load_in_4bit=args.adapter == "qlora",
    )
    tower = {"freeze_vision_tower": not args.train_tower, "freeze_projector": not args.train_tower}
    shared = {"dataset_name": data, "preset": "foveated", "preset_overrides": PRESET, **tower}
    if args.stage == "sft":
        script_args = sft.SFTScriptArguments(**shared)
        with config.main_process_first(local=False):
            if config.process_index == 0:
                write_records(data, _records(args.model, script_args.make_preset()))
        return sft.train(script_args, config, model_args), Path(folder)
    script_args = grpo.GRPOScriptArguments(**shared)
    with config.main_process_first(local=False):
        if config.process_index == 0:
            Path(data).mkdir()
            write_examples(Path(data, "train.parquet"), _examples())
    model, encoder = load_model(model_args, config)
    freeze(model, script_args)
    trainer = grpo.EvidenceGRPOTrainer(
        model,
        [EvidenceReward("paper"), varied],
        config,
        grpo.load_examples(str(Path(data, "train.parquet")), "train"),
        processing_class=encoder.processor,
        preset=script_args.make_preset(),
        max_turn_tokens=args.turn_tokens,
    )
    trainer.train()
    save_trained(trainer, encoder, model_args, script_args)
    return trainer, Path(folder)


def varied(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs between the rollouts of a group, so that there is something to learn in every step."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def examine(trainer: Any, args: argparse.Namespace, folder: Path) -> str:
    """
    Looks at what a training left behind.

    Returns:
        `str`: what was found, in words; on the first process.

    Raises:
        `AssertionError`: on all processes, if something is wrong.
    """
    log = [{k: entry[k] for k in ("loss", "grad_norm") if k in entry} for entry in trainer.state.log_history]
    log = [entry for entry in log if entry]
    assert len(log) == args.steps, f"{len(log)} steps were logged instead of {args.steps}"
    assert all(math.isfinite(value) for entry in log for value in entry.values()), f"not finite: {log}"
    weights = dict(_whole_weights(trainer))
    held = {name: weight.float() for name, weight in weights.items()}
    sums = [
        [(name, weight.double().sum().item(), weight.double().abs().sum().item()) for name, weight in held.items()]
    ]
    everybody = gather_object(sums)
    for other in everybody[1:]:
        apart = [mine[0] for mine, theirs in zip(everybody[0], other, strict=True) if mine != theirs]
        assert not apart, f"processes hold different weights: {apart[:5]}"
    norms = ", ".join(f"{entry.get('loss', math.nan):.3g}/{entry.get('grad_norm', math.nan):.3g}" for entry in log)
    unset_hf_deepspeed_config()  # or else the models below would be spread over the processes too
    start, saved = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (args.model, folder)
    )
    if args.adapter:
        found = _examine_adapter(held, start, saved)
        return f"loss/gradient norm {norms}; {found}; equal on {len(everybody)} processes"
    moved = [name for name in held if not torch.equal(held[name], start[name])]
    trains = {name: not _is_tower(name) or args.train_tower for name in held}
    rate = trainer.args.learning_rate
    movable = [name for name in held if trains[name] and _can_move(start[name], weights[name].dtype, rate)]
    still = [name for name in movable if name not in moved and not name.endswith("qkv.bias")]
    assert moved and len(still) < len(held) // 10, f"these did not move: {still[:5]}"
    assert all(trains[name] for name in moved), "frozen weights moved"
    # Weights are saved in half precision where they are trained so.
    wrong = [name for name in held if not torch.allclose(saved[name], held[name], rtol=2**-7, atol=1e-6)]
    assert not wrong, f"saved weights differ from those in memory: {wrong[:5]}"
    change = max((held[name] - start[name]).abs().max().item() for name in moved)
    return (
        f"loss/gradient norm {norms}; {len(moved)} of {len(held)} weights moved, by {change:.1e} at most; "
        f"equal on {len(everybody)} processes and in the saved model"
    )


def _examine_adapter(held: dict[str, Any], start: dict[str, Any], saved: dict[str, Any]) -> str:
    """Whether the adapter has learned, and was merged into the model that was saved, beside which it lies."""
    # The second factor of every pair is 0 before the training.
    moved = [name for name, weight in held.items() if "lora_B" in name and weight.any()]
    names = [name for name in held if "lora_B" in name]
    assert names and len(moved) == len(names), f"{len(moved)} of {len(names)} pairs of the adapter learned"
    merged = [name for name in start if not torch.equal(start[name], saved[name])]
    assert len(merged) == len(names), f"{len(merged)} weights of the saved model differ, for {len(names)} pairs"
    assert not any(map(_is_tower, merged)), "the adapter touched the vision tower"
    return f"{len(moved)} pairs of the adapter learned and were merged"


def _can_move(weight: torch.Tensor, dtype: torch.dtype, rate: float) -> bool:
    """
    Whether a first step of Adam, which is as long as the learning rate, takes any element to another number of this
    data type. In bfloat16 none leaves 1, where norms start: the numbers beside it lie farther off.
    """
    held = weight.to(dtype)
    gap = (held - torch.nextafter(held, torch.zeros_like(held))).abs()  # on the side where numbers lie closer
    return bool((gap / 2 < rate).any())


def _whole_weights(trainer: Any) -> Any:
    """Every weight by its name, on every process, in the precision in which it is held."""
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                yield name, weight.detach().cpu().clone()
        elif hasattr(weight, "full_tensor"):
            yield name, weight.full_tensor().detach().cpu()
        else:
            yield name, weight.detach().cpu()


def _is_tower(name: str) -> bool:
    return "visual." in name


def _examples() -> list[RerankExample]:
    with_pictures = [RerankExample(s.id, s.query, s.candidates, [s.positive]) for s in load_samples()]
    texts = [
        RerankExample(f"text-{i}", Item(text=f"number {i}"), [Item(text=f"{i} {word}") for word in "abcde"], [i % 5])
        for i in range(len(with_pictures))
    ]
    return [example for pair in zip(with_pictures, texts, strict=True) for example in pair]


def _records(model: str, preset: Any) -> list[TrajectoryRecord]:
    """Conversations with a look and an answer, or an answer alone where there is nothing to see."""
    encoder = Encoder(AutoProcessor.from_pretrained(model), "qwen2_5_vl")
    examples = {example.query_id: example for example in _examples()}

    def script(query_id: str, turn: int) -> str:
        example = examples[query_id]
        shown = [number for number, item in enumerate(example.candidates, 1) if item.image is not None]
        if turn == 0 and shown:
            return format_turn("Look closer.", format_call("select_images", {"target_images": shown[:2]}))
        best = example.positives[0]
        return format_turn("Seen.", format_answer([best, *(i for i in range(5) if i != best)]))

    played = play(ScriptedEngine(encoder, script), [example.task(preset) for example in examples.values()])
    return [TrajectoryRecord(examples[trajectory.query_id], trajectory) for trajectory in played]


if __name__ == "__main__":
    main()
