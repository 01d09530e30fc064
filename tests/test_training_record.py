"""What a stage leaves beside the model that it trained, and that it reaches the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fake_hub import TOKEN, FakeHub
from records import OVERRIDES, make_example, make_records
from tiny_models import make_model, make_processor

from vretrver_hf.chat_templates import apply_to
from vretrver_hf.data.conversations import write_records
from vretrver_hf.encoding import Encoder
from vretrver_hf.training._common import StageArguments


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    processor = make_processor("qwen2_5_vl")
    apply_to(processor, "qwen2_5_vl")
    make_model("qwen2_5_vl", processor).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    encoder = Encoder(processor, "qwen2_5_vl")
    write_records(folder / "data", make_records(encoder, [make_example(number) for number in range(4)]))
    settings = {
        "model_name_or_path": folder / "base",
        "dataset_name": folder / "data",
        "preset": "foveated",
        "preset_overrides": json.dumps(OVERRIDES),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vretrver_hf.training.sft", *flags]


def test_a_finished_model_is_pushed_with_what_ran(command, tmp_path):
    with FakeHub().serve() as hub:
        push = ["--output_dir", str(tmp_path / "out"), "--push_to", "someone/trained", "--license", "mit"]
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *push], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        repo = hub.repos["model", "someone/trained"]
        files = repo.files()
        assert repo.private and hub.unknown == []
        again = subprocess.run([*command, *push], env=environment, capture_output=True, text=True)
        assert again.returncode != 0 and "holds something else" in again.stderr.splitlines()[-1]
    record = json.loads(files["training.json"])
    assert (record["stage"], record["steps"], record["processes"]) == ("sft", 1, 1)
    assert record["settings"]["per_device_train_batch_size"] == 2 and record["loss"] > 0
    assert record["memory_gb"] is None  # no GPU
    assert not {"output_dir", "hub_token", "dataset_name"} & set(record["settings"])
    assert "| sft | base (a local folder) | data (a local folder) | 1 |" in files["README.md"].decode()
    assert "training_args.bin" not in files and str(tmp_path) not in files["README.md"].decode()


def test_a_push_needs_a_licence():
    with pytest.raises(ValueError, match="push_to needs a license"):
        StageArguments(push_to="someone/trained")
