"""What tells the weights of one model from those of another that stands in the same place."""

from __future__ import annotations

import json
from pathlib import Path

from vretrver_hf.cli.jobs import weights_digest


def _model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def _adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "adapter_model.safetensors").write_bytes(b"lora")
    return folder


def test_other_weights_have_another_digest(tmp_path):
    first = weights_digest(str(_model(tmp_path / "m", b"one")))
    assert first == weights_digest(str(tmp_path / "m")) != weights_digest(str(_model(tmp_path / "m", b"two")))
    assert weights_digest(None) not in (first, "")


def test_an_adapter_is_told_by_its_base_too(tmp_path):
    adapter = _adapter(tmp_path / "a", _model(tmp_path / "m", b"one"))
    first = weights_digest(str(adapter))
    _model(tmp_path / "m", b"two")
    assert weights_digest(str(adapter)) != first


def test_an_endpoint_keeps_its_weights_to_itself():
    assert weights_digest("V-Retrver/V-Retrver-7B", "openai") == "behind an endpoint"
