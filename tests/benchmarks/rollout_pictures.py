"""
What rollouts spend on pictures, in groups that share those of their prompt and as many rollouts that share nothing.

No model runs: the turns are scripted, a crop, four whole images and an answer. CPU time is what counts on a machine
that others use too.

    python tests/benchmarks/rollout_pictures.py [--side 1008] [--groups 4] [--rollouts 8]
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image, ImageFilter
from tiny_models import make_processor

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.scripted import ScriptedEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.training._rollouts import play_rollouts


PRESET = get_preset("foveated", overview_pixels=112 * 112, inspect_pixels=224 * 224, max_calls=2)
TURNS = [
    format_turn("look", format_call("crop_image", {"bbox_2d": [0.2, 0.2, 0.6, 0.6], "target_image": 1})),
    format_turn("look", format_call("select_images", {"target_images": [1, 2, 3, 4]})),
    format_turn("so", format_answer(range(5))),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1008, help="of each picture, in pixels")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=8, help="of each group")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many runs counts")
    args = parser.parse_args()

    source = np.random.default_rng(0)
    files = [make_file(source, args.side) for _ in range(5)]
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    count = args.groups * args.rollouts
    runs: dict[str, list[float]] = {"alone": [], "shared": []}
    for _ in range(args.repeat):  # in turns, since the machine is not always as quick
        runs["alone"].append(play(encoder, files, count, 1))
        runs["shared"].append(play(encoder, files, args.groups, args.rollouts))
    for name, seconds in runs.items():
        print(f"{name:7} {min(seconds):6.2f} s of CPU time for {count} rollouts")
    print(f"ratio   {min(runs['shared']) / min(runs['alone']):6.3f}")


def make_file(source: np.random.Generator, side: int) -> bytes:
    pixels = source.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).filter(ImageFilter.SMOOTH).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def play(encoder: Encoder, files: list[bytes], groups: int, rollouts: int) -> float:
    examples = [
        RerankExample(f"q{i}", Item(text="which?"), [Item(image=file) for file in files], positives=[0])
        for i in range(groups)
    ]
    tasks = [example.task(PRESET, sample=i) for example in examples for i in range(rollouts)]
    engine = ScriptedEngine(encoder, lambda query_id, turn: TURNS[turn], max_sessions=len(tasks))
    started = time.process_time()
    played = play_rollouts(engine, tasks, Sampling(), 10_000)
    seconds = time.process_time() - started
    assert all(rollout.trajectory.num_valid_calls == 2 for rollout in played)
    return seconds


if __name__ == "__main__":
    main()
