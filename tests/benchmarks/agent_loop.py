"""
Agent loop against a bare `generate` over the same tokens, in one run.

Both read the same prompts with the same pictures and the same observations, and write the same number of tokens in
the same number of rows. `generate` does it in one go with everything that is read up front; the loop does it in
turns, decodes and parses each, answers it, and prefills what is new.

    python tests/benchmarks/agent_loop.py [--rows 8] [--turns 3] [--tokens 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import Sampling
from vretrver_hf.samples import load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub id or folder; the bundled model by default")
    parser.add_argument("--rows", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--turns", type=int, default=3, help="model turns of each conversation")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each model turn")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in alternation")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    reranker = Reranker.from_pretrained(args.model, device=args.device, dtype=args.dtype, max_sessions=args.rows)
    engine = reranker.engine
    # No turn may end by itself: every turn is cut at its limit, told so, and followed by the next.
    engine.encoder.stop_ids = []
    engine.encoder.end_of_call = -1
    preset = reranker.preset
    tasks = make_tasks(preset, args.rows, calls=args.turns - 2)
    sampling = Sampling(max_turn_tokens=args.tokens)

    trajectories = play(engine, tasks, sampling)
    sampled = sum(trajectory.num_sampled_tokens for trajectory in trajectories)
    if sampled != args.rows * args.turns * args.tokens:
        raise SystemExit(f"expected {args.rows} x {args.turns} x {args.tokens} sampled tokens, got {sampled}")
    inputs = bare_inputs(engine, tasks, trajectories)

    loop_times, bare_times = [], []
    for _ in range(args.repeats):
        loop_times.append(timed(lambda: play(engine, tasks, sampling)))
        bare_times.append(timed(lambda: bare(engine, inputs, args.turns * args.tokens)))
    loop, plain = statistics.median(loop_times), statistics.median(bare_times)
    read = sum(trajectory.num_tokens for trajectory in trajectories) - sampled
    print(f"rows {args.rows}, turns {args.turns}, tokens read {read}, written {sampled}")
    print(f"agent loop     {loop:7.3f} s  (min {min(loop_times):.3f}, max {max(loop_times):.3f})")
    print(f"bare generate  {plain:7.3f} s  (min {min(bare_times):.3f}, max {max(bare_times):.3f})")
    print(f"ratio          {loop / plain:7.3f}")
    print(f"peak memory    {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:7.2f} GiB")


def make_tasks(preset, rows: int, calls: int) -> list[AgentTask]:
    """Bundled samples with pictures; the budget is such that each conversation has exactly `calls + 2` turns."""
    import dataclasses

    preset = dataclasses.replace(preset, max_calls=calls)
    samples = [sample for sample in load_samples() if sample.candidates[0].image is not None]
    picked = [samples[i % len(samples)] for i in range(rows)]
    return [
        AgentTask(Item(text="the one that fits"), sample.candidates, preset, query_id=str(i))
        for i, sample in enumerate(picked)
    ]


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


def timed(action) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
