"""What the package ships, made out of a trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import Qwen2_5_VLForConditionalGeneration


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from bundle import main
from emoji_toy import data, model, processor, source, table
from preset import PRESET
from transformers import AutoProcessor

from vretrver_hf import Reranker


@pytest.fixture
def trained(model, data, tmp_path) -> Path:
    """A folder as a stage of training writes it: fp32, with its record."""
    folder = tmp_path / "trained"
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(data / "processor").save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"stage": "grpo"}))
    return folder


def test_what_is_bundled_is_the_trained_model_in_half_precision(trained, model, tmp_path):
    main(trained, tmp_path / "bundle")
    bundled = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "bundle", dtype="auto")
    for name, weight in model.state_dict().items():
        assert torch.equal(bundled.state_dict()[name], weight.to(torch.bfloat16)), name
    assert Reranker.from_pretrained(str(tmp_path / "bundle")).preset == PRESET
    assert json.loads((tmp_path / "bundle/training.json").read_text()) == {"stage": "grpo"}


def test_other_files_of_the_folder_stay_and_older_weights_do_not(trained, model, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/README.md").write_text("a card")
    (tmp_path / "bundle/model.safetensors").write_bytes(b"older weights")
    main(trained, tmp_path / "bundle")
    assert (tmp_path / "bundle/README.md").read_text() == "a card"
    bundled = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "bundle", dtype="auto")
    assert torch.equal(bundled.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


def test_a_trained_model_is_not_overwritten(trained):
    with pytest.raises(typer.BadParameter, match="would be overwritten"):
        main(trained, trained / ".." / trained.name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="holds no model"):
        main(tmp_path, tmp_path / "bundle")
