"""What visitors of the Space read when something failed; tests/browser has the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from vretrver_hf import ItemError
from vretrver_hf.engines import EngineError
from vretrver_hf.reranker import saved_settings


sys.path.insert(0, str(Path(__file__).parents[1] / "spaces" / "rerank"))

from failures import ModelError, naming, told  # noqa: E402
from runs import Stopped  # noqa: E402


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ItemError("candidate 2: it is no picture"), "candidate 2: it is no picture"),
        (Stopped("Cancelled."), "Cancelled."),
        (ModelError("model a/b: it is gated"), "model a/b: it is gated"),
        (ValueError("the window is empty"), "These settings do not work: the window is empty"),
        (EngineError("engine 'vllm' failed: no room\nat line 3"), "The model failed: engine 'vllm' failed: no room"),
        (EngineError(), "The model failed: EngineError"),
    ],
)
def test_what_was_foreseen_is_told_and_not_logged(caplog, error, text):
    assert told(error) == text
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("/home/me/.secret"), "Something failed here."),
        (OSError(28, "No space left on device", "/home/me/.secret"), "Something failed here."),
        (torch.OutOfMemoryError("CUDA out of memory. /home/me/.secret"), "The model ran out of memory."),
    ],
)
def test_what_was_not_goes_to_the_log_alone(caplog, error, text):
    try:
        raise error
    except Exception as caught:
        said = told(caught)
    assert said.startswith(text) and "secret" not in said
    (record,) = caplog.records
    assert "Traceback" in caplog.text and ".secret" in caplog.text and record.levelname == "ERROR"


@pytest.mark.parametrize("error", [OSError, ValueError, ImportError, SafetensorError])
def test_a_failure_to_load_names_the_model(error):
    with pytest.raises(ModelError, match="^model a/b: no such file$") as caught:
        with naming("a/b"):
            raise error("no such file\nat line 3")
    assert isinstance(caught.value.__cause__, error)


def test_so_does_the_hub(tmp_path):
    absent = str(tmp_path / "none")
    with pytest.raises(ModelError, match="no such folder, and .* is no name on the hub"):
        with naming(absent):
            saved_settings(absent)
