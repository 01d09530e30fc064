"""
Pictures through the vision tower: equal sizes as one batch against one by one, and recalled against computed again.

    python tests/benchmarks/vision.py [--model NAME] [--device cuda] [--pictures 40] [--side 84] [--repeats 5]
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from PIL import Image
from timing import alternate, tell

from vretrver_hf import Reranker
from vretrver_hf.vision import PictureFeatures, batched_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub id or folder; the bundled model by default")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--side", type=int, default=84, help="pixels; a multiple of the model's factor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    engine = Reranker.from_pretrained(args.model, device=args.device, dtype=args.dtype).engine
    tower, image_processor = engine.model.model.visual, engine.encoder.processor.image_processor
    noise = np.random.default_rng(0).integers(0, 255, (args.pictures, args.side, args.side, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    inputs = image_processor(pictures, do_resize=False, return_tensors="pt").to(engine.model.device)
    run = torch.no_grad()(partial(tower, inputs["pixel_values"].to(engine.model.dtype), inputs["image_grid_thw"]))
    features = PictureFeatures(tower, image_processor)

    def batched() -> None:
        with batched_attention(tower):
            run()

    print(f"{args.pictures} pictures of {args.side} x {args.side} pixels, the tower alone")
    tell(alternate({"one by one": run, "as one batch": batched}, args.repeats))
    print("with what goes before it")
    recompute = torch.no_grad()(partial(PictureFeatures(tower, image_processor, 0)._features, pictures))
    recall = torch.no_grad()(partial(features._features, pictures))
    tell(alternate({"computed": recompute, "recalled": recall}, args.repeats))


if __name__ == "__main__":
    main()
