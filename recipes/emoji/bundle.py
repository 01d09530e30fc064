"""
Makes what the package ships out of a trained model: bf16 weights in small shards, and what belongs to them.

    python recipes/emoji/bundle.py outputs/emoji/proof/full-need-0 --out outputs/bundle

The card is written by hand, from the figures in results/.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from train_tiny import save_model
from transformers import Qwen2_5_VLForConditionalGeneration

from vretrver_hf.cards import RECORD_NAME


def main(
    trained: Annotated[Path, typer.Argument(help="Folder of a model that a stage of training wrote.")],
    out: Annotated[Path, typer.Option(help="Another folder to write; but for older weights, what is in it stays.")],
) -> None:
    """Write weights, tokenizer, processor, preset and the record of the training, ready to be loaded and shipped."""
    if not (trained / "config.json").is_file():
        raise typer.BadParameter(f"{trained} holds no model")
    if out.resolve() == trained.resolve():
        raise typer.BadParameter(f"--out {out} is the trained model, which would be overwritten; name another folder")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    for old in out.glob("model*.safetensors*"):
        old.unlink()  # a file without shards would be loaded in place of the new ones
    save_model(model, trained, out)
    if (trained / RECORD_NAME).is_file():
        shutil.copy(trained / RECORD_NAME, out / RECORD_NAME)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"{out}  {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    typer.run(main)
