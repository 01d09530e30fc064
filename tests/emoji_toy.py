"""A toy set of drawings, a toy tokenizer and a toy model, for tests of the worked example's training and evaluation.

PYTEST_DONT_REWRITE: it asserts nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration


RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

from art import ARTISTS, SIZE, write_archive
from concepts import parse_concepts
from model import make_model, tiny_config
from stages import Source
from tokenizer import make_processor
from train_tiny import load_table


# A small vocabulary by hand: all bytes, then merges in the order of their ranks.
MERGED = (" a", "ca", "an", "in", " ca", " can", "on", "\nC", "di", "da", "date", "th", " cand", " image", '{"', "er")
TOY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
WHOLE = (0, 0, SIZE, SIZE)
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
JOBS = {"scientist": "1F52C", "cook": "1F373", "farmer": "1F33E", "judge": "2696"}
ANIMALS = (
    *("dog", "cat", "fox", "lion", "tiger", "horse", "zebra", "cow", "pig", "goat", "camel", "mouse", "rabbit"),
    *("bear", "koala", "panda", "frog", "monkey", "owl", "eagle", "duck", "swan", "turtle", "snake", "whale", "seal"),
)
TIMES = tuple(
    f"{hour}{half}" for hour in ("one", "two", "three", "four", "five", "six") for half in (" o’clock", "-thirty")
)
GROUPS = {
    "groups": {"1": "people-body", "3": "animals-nature", "5": "travel-places"},
    "subgroups": {"25": "person-role", "34": "animal-mammal", "50": "time"},
}


def ranks(limit: int | None = None) -> dict[bytes, int]:
    """Ranks of which each joins two lower ones: a word of `MERGED` is reached by merging from the left."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in MERGED:
        data = word.encode()
        for end in range(2, len(data) + 1):
            ranks.setdefault(data[:end], len(ranks))
    return {token: rank for token, rank in ranks.items() if limit is None or rank < limit}


def emojibase() -> list[dict]:
    entries = []
    for head, gender in (("1F9D1", ""), ("1F468", "man "), ("1F469", "woman ")):
        for job, code in JOBS.items():
            label = gender + job
            skins = [
                {"label": f"{label}: tone {n}", "hexcode": f"{head}-{tone}-200D-{code}", "tone": n}
                for n, tone in enumerate(TONES, start=1)
            ]
            entries.append(
                {"label": label, "hexcode": f"{head}-200D-{code}", "group": 1, "subgroup": 25, "skins": skins}
            )
    for number, animal in enumerate(ANIMALS):
        entries.append({"label": animal, "hexcode": f"{0x1F400 + number:X}", "group": 3, "subgroup": 34})
    for number, time in enumerate(TIMES):
        entries.append({"label": time, "hexcode": f"{0x1F550 + number:X}", "group": 5, "subgroup": 50})
    return entries


def pictures(codes: list[str], seed: int) -> np.ndarray:
    """Coloured blocks; clocks are one dark face, each with a mark of its own."""
    blocks = np.random.default_rng(seed).integers(0, 256, (len(codes), 6, 6, 3), dtype=np.uint8)
    drawn = blocks.repeat(SIZE // 6, 1).repeat(SIZE // 6, 2)
    for row, code in enumerate(codes):
        number = int(code.split("-")[0], 16) - 0x1F550
        if 0 <= number < len(TIMES):
            left, top = 20 + 40 * (number % 4), 20 + 50 * (number // 4)
            drawn[row] = (20, 20, 90)
            drawn[row, top : top + 24, left : left + 24] = (80, 80, 150)
    return drawn


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with every artist's drawings of coloured blocks."""
    folder = tmp_path_factory.mktemp("data")
    entries = emojibase()
    codes = sorted(parse_concepts(entries, GROUPS))
    members = {"manifest.json": {"packages": {}}, "emojibase/data.json": entries, "emojibase/groups.json": GROUPS}
    members |= {"facts/countries.json": {}, "glosses/wordnet.json": {}}
    write_archive(folder / "art.zip", members | {f"svg/{artist}.json": dict.fromkeys(codes, "") for artist in ARTISTS})
    (folder / "images").mkdir()
    for seed, artist in enumerate(ARTISTS):
        np.save(folder / "images" / f"{artist}.npy", pictures(codes, seed))
        (folder / "images" / f"{artist}.json").write_text(json.dumps(codes))
        (folder / "images" / f"{artist}.twins.json").write_text("[]")
    make_processor(ranks()).save_pretrained(folder / "processor")
    return folder


@pytest.fixture(scope="module")
def source(data) -> Source:
    source = Source(data, data / "processor")
    source.prepare()
    return source


@pytest.fixture(scope="module")
def table(source) -> torch.Tensor:
    return load_table(source, torch.device("cpu"))


@pytest.fixture(scope="module")
def processor(data):
    return AutoProcessor.from_pretrained(data / "processor")


@pytest.fixture(scope="module")
def model(processor) -> Qwen2_5_VLForConditionalGeneration:
    model = make_model(tiny_config(processor.tokenizer, **TOY)).eval()
    with torch.no_grad():  # fresh weights are so small that mistakes would hide
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 3
    return model
