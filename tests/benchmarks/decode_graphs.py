"""
Rollouts with passes over one token a row played as CUDA graphs, against the same passes started kernel by kernel.

Both draw the same tokens of the same queries; told are the time of each, how much of it is decoding, and how many
trajectories are equal. Without a GPU there is nothing to compare, and the plain ones run alone.

    python tests/benchmarks/decode_graphs.py --model FOLDER --data recipes/emoji/data/cold_start/examples.parquet
"""

from __future__ import annotations

import argparse

import torch
from timing import timed

from vretrver_hf import Reranker
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.data.examples import load_examples
from vretrver_hf.engines import Sampling
from vretrver_hf.samples import load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub id or folder; the bundled model by default")
    parser.add_argument("--data", default=None, help="queries, as files of rows; the bundled samples by default")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="rollouts of each query")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    plain = run(args, graphs=False)
    if torch.cuda.is_available():
        recorded = run(args, graphs=True)
        equal = sum(mine.token_ids == theirs.token_ids for mine, theirs in zip(recorded, plain, strict=True))
        print(f"{equal} of {len(plain)} trajectories are equal")


def run(args: argparse.Namespace, graphs: bool) -> list:
    limits = {"max_sessions": args.queries * args.samples, "prefill_tokens": 65536}
    reranker = Reranker.from_pretrained(args.model, dtype=args.dtype, **limits)
    engine, decoding = reranker.engine, []
    if not graphs:
        engine._pass = engine._one_token_a_row
    decode = engine._decode

    def clocked() -> list:
        results: list = []
        decoding.append(timed(lambda: results.extend(decode())))
        return results

    engine._decode = clocked
    examples = load_samples() if args.data is None else load_examples(args.data)
    tasks = [
        AgentTask(example.query, example.candidates, reranker.preset, query_id=str(number), sample=sample)
        for number, example in enumerate(examples[place] for place in range(min(args.queries, len(examples))))
        for sample in range(args.samples)
    ]
    sampling = Sampling(temperature=args.temperature, max_turn_tokens=128, seed=1)
    trajectories: list = []
    seconds = timed(lambda: trajectories.extend(play(engine, tasks, sampling)))
    written = sum(trajectory.num_sampled_tokens for trajectory in trajectories)
    print(
        f"{'CUDA graphs' if graphs else 'plain passes':14s}{len(tasks)} rollouts, {written} tokens written: "
        f"{seconds:.2f} s, of which {sum(decoding):.2f} s decoding"
    )
    return trajectories


if __name__ == "__main__":
    main()
