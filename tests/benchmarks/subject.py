"""The model and the queries that benchmarks run: a saved model, or random weights in the shape of Qwen2.5-VL-7B."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentTask
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.protocol import Preset, get_preset
from vretrver_hf.reranker import bundled_model
from vretrver_hf.samples import load_samples


sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import vision_token_ids


PICTURE = 640, 480
"""Width and height of the pictures that a large model is shown, in pixels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="hub id or folder; the bundled model by default")
    parser.add_argument("--random", action="store_true", help="random weights in the shape of Qwen2.5-VL-7B instead")
    parser.add_argument("--layers", type=int, default=28, help="of the random language model; of its tower 4 more")
    parser.add_argument("--candidates", type=int, default=None, help="noise as candidates, in place of the samples")
    parser.add_argument("--rows", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="auto")


def load(args: argparse.Namespace) -> Reranker:
    """What the arguments ask for."""
    if not args.random:
        return Reranker.from_pretrained(args.model, device=args.device, dtype=args.dtype, max_sessions=args.rows)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    processor = AutoProcessor.from_pretrained(bundled_model())
    with device:
        model = AutoModelForImageTextToText.from_config(shape_of_7b(processor, args.layers), dtype=dtype)
    preset = get_preset("foveated", overview_pixels=224 * 224, inspect_pixels=448 * 448)
    return Reranker(TransformersEngine(model, processor, max_sessions=args.rows), preset)


def shape_of_7b(processor, layers: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B's configuration, with the special tokens of a tokenizer that is at hand."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    vision = {"depth": layers + 4, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": list(range(7, layers + 4, 8))}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **vision_token_ids(processor.tokenizer),
    )


def make_tasks(args: argparse.Namespace, preset: Preset, count: int) -> list[AgentTask]:
    """Bundled samples with pictures, or as many candidates of noise as are asked for."""
    if args.candidates is None:
        lists = [sample.candidates for sample in load_samples() if sample.candidates[0].image is not None]
    else:
        source = np.random.default_rng(0)
        size = (PICTURE[1], PICTURE[0], 3)
        lists = [
            [
                Item(text="noise", image=Image.fromarray(source.integers(0, 255, size, np.uint8)))
                for _ in range(args.candidates)
            ]
            for _ in range(count)
        ]
    query = Item(text="the one that fits")
    return [AgentTask(query, lists[i % len(lists)], preset, query_id=str(i)) for i in range(count)]
