"""A small tokenizer cut from a real one: the first 8,192 ranks of Qwen's byte pairs and Qwen2.5-VL's control tokens.

Byte-pair ranks are nested: a merge only ever joins two tokens of lower rank, so any prefix of the ranks is a
vocabulary in its own right, and text whose merges all lie below the cut has the same ids in both.

    pip download --no-deps dashscope==2.0.2
    python recipes/emoji/tokenizer.py --ranks dashscope-2.0.2-py3-none-any.whl --out recipes/emoji/data/processor
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from preset import INSPECT_PIXELS
from transformers import (
    AddedToken,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vretrver_hf.chat_templates import apply_to


REQUIREMENT = "dashscope==2.0.2"
"""The package that carries the ranks; Apache-2.0."""

NUM_RANKS = 8192

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Control tokens, in this order behind the ranks. They never show in decoded text."""

VISIBLE_TOKENS = ("<tool_call>", "</tool_call>")
"""Single tokens that stay in decoded text, as in Qwen2.5, whose think and answer tags are ordinary text, as here."""

_RANKS_MEMBER = "dashscope/resources/qwen.tiktoken"


def fetch_ranks(folder: str | Path) -> Path:
    """Downloads the package that carries the ranks into `folder` with pip and returns the wheel's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("dashscope-*.whl"))


def read_ranks(source: str | Path, limit: int | None = None) -> dict[bytes, int]:
    """
    Byte-pair ranks from a wheel or from a `.tiktoken` file.

    Args:
        source (`str` or `Path`):
            The wheel of `dashscope`, or the file that lies in it.
        limit (`int`, *optional*):
            Keeps the ranks below it.
    """
    source = Path(source)
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            lines = wheel.read(_RANKS_MEMBER).splitlines()
    else:
        lines = source.read_bytes().splitlines()
    ranks = {}
    for line in lines:
        token, rank = line.split()
        if limit is None or int(rank) < limit:
            ranks[base64.b64decode(token)] = int(rank)
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make each token of more than one byte, in the order in which byte-pair encoding applies them."""
    return [
        _last_merge(token, rank, ranks)
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]


def make_tokenizer(ranks: dict[bytes, int]) -> Qwen2Tokenizer:
    """
    A Hugging Face tokenizer with these ranks and Qwen2.5-VL's control tokens behind them.

    Args:
        ranks (`dict[bytes, int]`):
            Byte strings and their ranks, as [`read_ranks`] returns them.
    """
    letters = _byte_letters()
    vocab = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spell(left, letters), _spell(right, letters)) for left, right in merges_of(ranks)]
    # The constructor would put its own special tokens first, so the control tokens are part of the vocabulary already.
    for token in SPECIAL_TOKENS + VISIBLE_TOKENS:
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([_added(token, special=True) for token in SPECIAL_TOKENS], special_tokens=True)
    tokenizer.add_tokens([_added(token, special=False) for token in VISIBLE_TOKENS])
    return tokenizer


def make_processor(ranks: dict[bytes, int]) -> Qwen2_5_VLProcessor:
    """
    The processor of the tiny model: patches of 14 pixels, merged two by two, so image sides are multiples of 28.

    Args:
        ranks (`dict[bytes, int]`):
            Byte strings and their ranks.
    """
    pixels = {"min_pixels": 56 * 56, "max_pixels": INSPECT_PIXELS}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=make_tokenizer(ranks),
        video_processor=Qwen2VLVideoProcessor(**pixels),
    )
    apply_to(processor, "qwen2_5_vl")
    return processor


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Byte-pair encodes `token` with lower ranks only: what is left are the two parts that its own merge joins."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
        lowest, place = min(pairs)
        if lowest >= rank:
            raise ValueError(f"rank {rank} joins more than two parts: {parts}")
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies write for each byte: itself where printable, else one past 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return letters | {byte: chr(byte) for byte in printable}


def _spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False, lstrip=False, rstrip=False, single_word=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder that receives the processor.")],
    ranks: Annotated[Path | None, typer.Option(help="Wheel or .tiktoken file; left out, pip downloads it.")] = None,
) -> None:
    """Makes the tiny model's tokenizer and processor."""
    with tempfile.TemporaryDirectory() as folder:
        source = ranks or fetch_ranks(folder)
        processor = make_processor(read_ranks(source, NUM_RANKS))
    processor.save_pretrained(out)
    print(out)


if __name__ == "__main__":
    typer.run(main)
