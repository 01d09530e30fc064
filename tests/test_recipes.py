"""Every recipe's settings are ones that the libraries know today, and mean what the recipe says they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from records import make_example, make_records
from tiny_models import make_processor
from trl import ModelConfig

from vretrver_hf.data.conversations import write_records
from vretrver_hf.encoding import Encoder
from vretrver_hf.protocol import get_preset
from vretrver_hf.training._common import parse
from vretrver_hf.training.grpo import EvidenceGRPOConfig, GRPOScriptArguments
from vretrver_hf.training.rsft import RSFTScriptArguments
from vretrver_hf.training.sft import ConversationSFTConfig, SFTScriptArguments


RECIPES = Path(__file__).parents[1] / "recipes"
CLASSES = {
    "sft": (SFTScriptArguments, ConversationSFTConfig, ModelConfig),
    "rsft": (RSFTScriptArguments, ConversationSFTConfig, ModelConfig),
    "grpo": (GRPOScriptArguments, EvidenceGRPOConfig, ModelConfig),
}
FILES = sorted(path for stage in CLASSES for path in RECIPES.glob(f"*/{stage}*.yaml"))


def test_each_recipe_has_all_three_stages():
    assert {path.parent.name for path in FILES} >= {"v-retrver-7b", "v-retrver-qwen3-vl", "v-retrver-3b-lora"}
    for folder in {path.parent for path in FILES}:
        assert {"sft.yaml", "rsft.yaml", "grpo.yaml", "README.md"} <= {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """Trajectories for stage 2, which takes its protocol from them."""
    folder = tmp_path_factory.mktemp("accepted")
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    write_records(folder, make_records(encoder, [make_example(0)]))
    return folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_settings_are_known(path, accepted):
    stage = path.stem.split("-")[0]
    # This machine may have no GPU; everything else is as in the file.
    argv = ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]
    script, training, model = parse(CLASSES[stage], argv + ["--dataset_name", str(accepted)] * (stage == "rsft"))
    raw = yaml.safe_load(path.read_text())
    assert model.model_name_or_path == raw["model_name_or_path"] and training.output_dir == raw["output_dir"]
    assert script.freeze_vision_tower and script.freeze_projector  # as in the paper
    assert not training.push_to_hub and training.report_to == []  # nothing leaves the machine unasked


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_worked_example_plays_one_protocol(stage, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES / "emoji")
    from preset import MAX_TURN_TOKENS, PRESET, STRIDE, WINDOW

    settings = yaml.safe_load((RECIPES / "emoji" / f"{stage}.yaml").read_text())
    assert get_preset(settings["preset"], **settings["preset_overrides"]) == PRESET
    assert (settings["window"], settings["stride"]) == (WINDOW, STRIDE)
    assert settings["max_turn_tokens"] == MAX_TURN_TOKENS


@pytest.mark.parametrize("family", ["v-retrver-7b", "v-retrver-qwen3-vl"])
def test_batches_are_the_papers_on_eight_gpus(family):
    sft, grpo = (yaml.safe_load((RECIPES / family / f"{stage}.yaml").read_text()) for stage in ("sft", "grpo"))
    assert 8 * sft["per_device_train_batch_size"] * sft["gradient_accumulation_steps"] == 64
    rollouts = 8 * grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"]
    assert rollouts == 128 * grpo["num_generations"] == 1024
    assert grpo["gradient_accumulation_steps"] % grpo["steps_per_generation"] == 0  # all rollouts are on policy


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate_configs/*.yaml")), ids=lambda path: path.stem)
def test_launch_settings_are_known(path):
    config = load_config_from_file(str(path))  # an unknown key raises
    assert config.num_processes == {"single_gpu": 1, "multi_node": 16}.get(path.stem, 8)
    options = {action.dest for action in launch_command_parser()._actions}
    assert {f"fsdp_{key.removeprefix('fsdp_')}" for key in config.fsdp_config or {}} <= options
    # accelerate reads these from the file alone.
    own = {"deepspeed_multinode_launcher", "zero3_init_flag", "zero3_save_16bit_model"}
    assert set(config.deepspeed_config or {}) - own <= options
