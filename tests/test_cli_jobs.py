"""What tells the weights of one model from those of another that stands in the same place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from vretrver_hf.cli.common import Mistake
from vretrver_hf.cli.jobs import tell_memory, weights_digest


def _model(folder: Path, trained: int) -> Path:
    """A model of a trained layer between two that are frozen."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    frozen = np.arange(30_000, dtype=np.float32)
    save_file({"a": frozen, "b": frozen + trained, "c": frozen}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file({"lora": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_weights_of_which_one_layer_was_trained_have_another_digest(tmp_path):
    first = weights_digest(str(_model(tmp_path / "m", 0)))
    assert first == weights_digest(str(_model(tmp_path / "m", 0))) != weights_digest(str(_model(tmp_path / "m", 1)))
    assert weights_digest(None) not in (first, "")


def test_another_name_of_a_tensor_is_another_model(tmp_path):
    digests = set()
    for name in ("a", "b"):
        folder = _model(tmp_path / "m", 0)
        save_file({name: np.ones(3, np.float32)}, folder / "model.safetensors")
        digests.add(weights_digest(str(folder)))
    assert len(digests) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4, b"\xff" * 100, b"\x08" + b"\0" * 7 + b"no json!", b"\x02" + b"\0" * 7 + b"[]"],
    ids=["empty", "shorter than its length", "a length beyond all", "no JSON", "no table"],
)
def test_a_broken_file_of_weights_is_named(tmp_path, content):
    folder = _model(tmp_path / "m", 0)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Mistake, match=r"m/model\.safetensors is no whole safetensors file: \S"):
        weights_digest(str(folder))


def test_a_file_of_weights_that_was_cut_off_is_named(tmp_path):
    path = _model(tmp_path / "m", 0) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Mistake, match=r"m/model\.safetensors is no whole safetensors file"):
        weights_digest(str(path.parent))


def test_scalars_empty_tensors_and_bfloat16_have_digests_too(tmp_path):
    folder, digests = _model(tmp_path / "m", 0), set()
    for value in (1.0, 2.0):
        tensors = {"scalar": torch.tensor(value), "none": torch.empty(0, 3), "half": torch.ones(2, 2).bfloat16()}
        save_torch(tensors, folder / "model.safetensors")
        digests.add(weights_digest(str(folder)))
    assert len(digests) == 2


def test_an_adapter_is_told_by_its_base_too(tmp_path):
    adapter = _adapter(tmp_path / "a", _model(tmp_path / "m", 0))
    first = weights_digest(str(adapter))
    _model(tmp_path / "m", 1)
    assert weights_digest(str(adapter)) != first


def test_an_endpoint_keeps_its_weights_to_itself():
    assert weights_digest("V-Retrver/V-Retrver-7B", "openai") == "behind an endpoint"


@pytest.mark.parametrize(
    ("initialized", "held", "told"),
    [(False, [], ""), (True, [0, 0], ""), (True, [0, 3_260_000_000], "\nGPU memory: 3.3 GB at most\n")],
    ids=["no GPU", "none in this process", "the second"],
)
def test_memory_is_told_where_a_gpu_was_used(monkeypatch, capsys, initialized, held, told):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(held))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", held.__getitem__)
    tell_memory()
    assert capsys.readouterr().out == told
