"""
Flash attention against PyTorch's own, where the package uses it: the engine's prefill, later turns and decoding, and
the loss on whole rollouts of different lengths, padded as TRL pads them.

Half precision makes both inexact, so each is compared with the same weights in single precision: what flash attention
is off by must be of the size of what `sdpa` is off by. Ends with an error where it is not.

    python tests/benchmarks/flash_attention.py [--attention flash_attention_2] [--rollouts 6] [--repeat 5]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from timing import alternate, tell
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image
from scripted import ForcedEngine

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.engines import Sampling
from vretrver_hf.environment import prepare_processor
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.reranker import bundled_model
from vretrver_hf.training._rollouts import Rollout, play_rollouts


PRESET = get_preset("foveated", overview_pixels=112 * 112, inspect_pixels=224 * 224, max_calls=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled_model()))
    parser.add_argument("--attention", default="flash_attention_2" if torch.cuda.is_available() else "eager")
    parser.add_argument("--rollouts", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each that are timed")
    parser.add_argument("--factor", type=float, default=2.0, help="how much further off it may be than sdpa")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(args.model)
    kinds = {"reference": ("sdpa", torch.float32), "sdpa": ("sdpa", torch.bfloat16)}
    kinds[args.attention] = (args.attention, torch.bfloat16)
    models = {
        name: AutoModelForImageTextToText.from_pretrained(args.model, attn_implementation=kind, dtype=dtype).to(device)
        for name, (kind, dtype) in kinds.items()
    }
    for name, model in models.items():
        assert model.config.get_text_config()._attn_implementation == kinds[name][0]
        prepare_processor(processor, model.config.model_type, PRESET)
    found = {name: examine(model, processor, args.rollouts) for name, model in models.items()}
    failed = False
    print(f"{'off by, as a share of the reference':<46}{'sdpa':>12}{args.attention:>20}")
    for part, reference in found["reference"].items():
        plain, flash = (_distance(found[name][part], reference) for name in ("sdpa", args.attention))
        print(f"{part:<46}{plain:>12.2e}{flash:>20.2e}")
        failed |= not flash <= args.factor * plain + 1e-6
    rollouts = play(models["reference"], processor, args.rollouts)
    halves = {name: models[name] for name in ("sdpa", args.attention)}
    if args.repeat:
        engine = {name: lambda m=model: play(m, processor, args.rollouts) for name, model in halves.items()}
        loss = {name: lambda m=model: learn(m, processor, rollouts) for name, model in halves.items()}
        for part, actions in (("rollouts, ", engine), ("loss and gradients, ", loss)):
            tell({part + name: seconds for name, seconds in alternate(actions, args.repeat).items()})
    if failed:
        sys.exit(f"{args.attention} is further off than {args.factor} times what sdpa is")
    print(f"{args.attention} agrees with sdpa")


def examine(model, processor, count: int) -> dict[str, torch.Tensor]:
    """What is compared: log-probabilities of the engine and of the loss's forward pass, and gradients."""
    rollouts = play(model, processor, count)
    sampled = [value for r in rollouts for value, bit in zip(r.logprobs, r.mask, strict=True) if bit]
    logprobs, gradients = learn(model, processor, rollouts)
    parts = {"engine: log-probabilities of what it wrote": torch.tensor(sampled), "loss: log-probabilities": logprobs}
    return parts | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def play(model, processor, count: int) -> list[Rollout]:
    """Rollouts whose words are fixed: of different lengths, with crops and whole images, many at a time."""
    source = np.random.default_rng(0)
    examples = [
        RerankExample(
            f"q{i}",
            Item(text="query " * (i + 1)),
            [Item(image=Image.fromarray(source.integers(0, 255, (200, 150 + 60 * i, 3), dtype=np.uint8)))]
            * (2 + i % 4),
            positives=[0],
        )
        for i in range(count)
    ]
    sizes = {example.query_id: len(example.candidates) for example in examples}

    def script(query_id: str, turn: int) -> str:
        thought = "word " * (5 + 7 * int(query_id[1:]))
        if turn == 0:
            return format_turn(
                thought, format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.6], "target_image": 1})
            )
        if turn == 1 and int(query_id[1:]) % 2:
            return format_turn(thought, format_call("select_images", {"target_images": [1, 2]}))
        return format_turn(thought, format_answer(range(sizes[query_id])))

    engine = ForcedEngine(model, processor, script, max_sessions=count)
    with torch.no_grad():
        return play_rollouts(
            engine, [example.task(PRESET) for example in examples], Sampling(1.0, max_turn_tokens=500), 4000
        )


def learn(model, processor, rollouts: list[Rollout]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of the sampled tokens, prompts padded on the left and the rest on the right, and gradients."""
    device = model.device
    before = max(len(rollout.prompt_ids) for rollout in rollouts)
    behind = max(len(rollout.completion_ids) for rollout in rollouts)
    ids = torch.full((len(rollouts), before + behind), processor.tokenizer.pad_token_id)
    mask, sampled = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, rollout in enumerate(rollouts):
        start, end = before - len(rollout.prompt_ids), before + len(rollout.completion_ids)
        ids[row, start:end] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        mask[row, start:end] = 1
        sampled[row, before:end] = torch.tensor(rollout.mask)
    images = [image for rollout in rollouts for image in rollout.images]
    vision = processor.image_processor(images, do_resize=False, return_tensors="pt")
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    model.train()
    model.zero_grad()
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        mm_token_type_ids=(ids == pad).int().to(device),
        pixel_values=vision["pixel_values"].to(device),
        image_grid_thw=vision["image_grid_thw"].to(device),
        use_cache=False,
    ).logits
    chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None].to(device))[..., 0]
    chosen = chosen[sampled[:, 1:].bool().to(device)]
    chosen.mean().backward()
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    weights = {"the first layer's queries": layers[0].self_attn.q_proj.weight}
    weights |= {"the last layer's values": layers[-1].self_attn.v_proj.weight, "the tower": blocks[0].attn.qkv.weight}
    return chosen.detach().cpu(), {name: weight.grad.float().cpu() for name, weight in weights.items()}


def _distance(values: torch.Tensor, reference: torch.Tensor) -> float:
    return ((values - reference).norm() / reference.norm()).item()


if __name__ == "__main__":
    main()
