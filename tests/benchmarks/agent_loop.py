"""
Agent loop against a bare `generate` over the same tokens, in one run.

Both read the same prompts with the same pictures and the same observations, and write the same number of tokens in
the same number of rows. `generate` does it in one go with everything that is read up front; the loop does it in
turns, decodes and parses each, answers it, and prefills what is new; once more with pictures that the vision tower has
seen before, as in a query's next window. Told besides: how much of the loop's time passes in the model, in the tools,
and in neither, where the same model is made to write real calls of as many tokens.

    python tests/benchmarks/agent_loop.py [--rows 8] [--turns 3] [--tokens 64] [--repeats 5]

With random weights in the shape of Qwen2.5-VL-7B and 20 candidates, on one GPU:

    python tests/benchmarks/agent_loop.py --random --candidates 20 --rows 16 --repeats 3
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import resource
import statistics
import sys
import threading
from pathlib import Path
from unittest import mock

import subject
import torch
from timing import timed

from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import Sampling
from vretrver_hf.protocol import format_answer, format_call, format_turn
from vretrver_hf.tools import VisualTools
from vretrver_hf.vision import PictureFeatures


sys.path.insert(0, str(Path(__file__).parents[1]))

from scripted import ForcedEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.add_argument("--turns", type=int, default=3, help="model turns of each conversation")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each model turn")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in alternation")
    args = parser.parse_args()

    reranker = subject.load(args)
    engine = reranker.engine
    # No turn may end by itself: every turn is cut at its limit, told so, and followed by the next.
    engine.encoder.stop_ids = []
    engine.encoder.end_of_call = -1
    preset = dataclasses.replace(reranker.preset, max_calls=args.turns - 2)
    tasks = subject.make_tasks(args, preset, args.rows)
    sampling = Sampling(max_turn_tokens=args.tokens)

    trajectories = play(engine, tasks, sampling)
    sampled = sum(trajectory.num_sampled_tokens for trajectory in trajectories)
    if sampled != args.rows * args.turns * args.tokens:
        raise SystemExit(f"expected {args.rows} x {args.turns} x {args.tokens} sampled tokens, got {sampled}")
    inputs = bare_inputs(engine, tasks, trajectories)

    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(args.repeats):
        forget_pictures(engine)
        times["agent loop"].append(timed(lambda: play(engine, tasks, sampling)))
        times["the same, pictures known"].append(timed(lambda: play(engine, tasks, sampling)))
        times["bare generate"].append(timed(lambda: bare(engine, inputs, args.turns * args.tokens)))
    plain = statistics.median(times["bare generate"])
    read = sum(trajectory.num_tokens for trajectory in trajectories) - sampled
    print(f"rows {args.rows}, turns {args.turns}, tokens read {read}, written {sampled}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"(min {min(seconds):.3f}, max {max(seconds):.3f})"
        print(f"{name:26s}{median:7.3f} s  {spread}  ratio {median / plain:.3f}")
    forced, tasks = make_calls(engine, tasks, args.turns, args.tokens)
    parts = shares(forced, lambda: play(forced, tasks, Sampling(max_turn_tokens=2 * args.tokens + 64)))
    whole = sum(parts.values())
    print("time of the loop in " + ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in parts.items()))
    print(f"peak memory    {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:7.2f} GiB")


def forget_pictures(engine) -> None:
    """What the tower made of pictures is computed anew, as `generate` does each time."""
    engine.features = PictureFeatures(engine.model.model.visual, engine.encoder.processor.image_processor)


def bare_inputs(engine, tasks, trajectories) -> dict[str, torch.Tensor]:
    """Everything that the conversations read, as one left-padded batch."""
    rows = [
        [token for turn in trajectory.turns for token in turn.token_ids[turn.num_sampled :]]
        for trajectory in trajectories
    ]
    width = max(map(len, rows))
    pad = engine.encoder.end_of_turn
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pictures = []
    for task, trajectory in zip(tasks, trajectories, strict=True):
        items = [task.query, *task.candidates]
        pictures += [ref.render(items[ref.index].load_image()) for ref in trajectory.images]
    vision = engine.encoder.processor.image_processor(pictures, do_resize=False, return_tensors="pt")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **vision}
    inputs["mm_token_type_ids"] = (input_ids == engine.encoder.image_pad).int()
    return {name: value.to(engine.model.device) for name, value in inputs.items()}


def bare(engine, inputs, tokens: int) -> None:
    output = engine.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        suppress_tokens=engine.encoder.suppressed_ids,
    )
    assert output.shape[1] == inputs["input_ids"].shape[1] + tokens


def make_calls(engine, tasks, turns: int, tokens: int) -> tuple[ForcedEngine, list[AgentTask]]:
    """The model and its tasks, so that it calls tools in all turns but the last, which is an answer."""
    tools = [
        format_call("crop_image", {"bbox_2d": [0.1, 0.1, 0.6, 0.6], "target_image": 1}),
        format_call("select_images", {"target_images": [1, 2]}),
    ]
    processor = engine.encoder.processor
    thought = "so " * max(tokens - len(processor.tokenizer.encode(tools[0])) - 4, 1)

    def script(query_id: str, turn: int) -> str:
        last = turn == turns - 1
        return format_turn(thought, format_answer(range(len(tasks[0].candidates))) if last else tools[turn % 2])

    preset = dataclasses.replace(tasks[0].preset, max_calls=turns)
    forced = ForcedEngine(engine.model, processor, script, max_sessions=engine.max_sessions)
    return forced, [dataclasses.replace(task, preset=preset) for task in tasks]


def shares(engine, action) -> dict[str, float]:
    """Seconds of one run in the model, in the tools and in neither; each part waits for the accelerator."""
    spent: dict[str, float] = collections.defaultdict(float)
    this = threading.local()

    def clocked(part, function):
        def run(*args, **kwargs):
            if getattr(this, "is_timed", False):  # by a caller; a CUDA graph that it records may wait for nothing
                return function(*args, **kwargs)
            results, this.is_timed = [], True
            spent[part] += timed(lambda: results.append(function(*args, **kwargs)))
            this.is_timed = False
            return results[0]

        return run

    with contextlib.ExitStack() as stack:
        for part, owner, name in (
            ("model", engine, "_pass"),
            ("model", engine.model.model, "forward"),
            ("model", engine.model.model.visual, "forward"),
            ("model", engine.model.lm_head, "forward"),
            ("tools", VisualTools, "call"),
        ):
            stack.enter_context(mock.patch.object(owner, name, clocked(part, getattr(owner, name))))
        whole = timed(action)
    return {"model": spent["model"], "tools": spent["tools"], "neither": whole - spent["model"] - spent["tools"]}


if __name__ == "__main__":
    main()
