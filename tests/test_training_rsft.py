from __future__ import annotations

import json

import pytest
import torch
from records import ANSWER, CROP, PRESET, SELECT, make_example, make_records
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import ModelConfig

from vretrver_hf import Reranker
from vretrver_hf.data.conversations import write_records
from vretrver_hf.protocol import get_preset
from vretrver_hf.training._common import parse
from vretrver_hf.training.rsft import RSFTScriptArguments, main
from vretrver_hf.training.sft import ConversationSFTConfig, train


@pytest.fixture(scope="module")
def accepted(encoder, tmp_path_factory):
    """A folder of records as `vretrver sample` writes it: four queries, with and without tools."""
    folder = tmp_path_factory.mktemp("accepted")
    examples = [make_example(number) for number in range(4)]
    write_records(folder, make_records(encoder, examples, [[CROP, ANSWER], [ANSWER], [SELECT, ANSWER]]))
    return folder


@pytest.fixture(scope="module")
def base(model, processor, tmp_path_factory):
    """A folder with an untrained model."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(base, accepted, output_dir, *more) -> list[str]:
    args = ["--model_name_or_path", base, "--dataset_name", accepted, "--output_dir", output_dir]
    args += ["--learning_rate", 1e-3, "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    return [str(arg) for arg in [*args, "--logging_steps", 1, *more]]


def test_a_model_learns_from_its_accepted_trajectories(accepted, base, tmp_path, capsys):
    main(arguments(base, accepted, tmp_path, "--max_steps", 2, "--per_device_train_batch_size", 4))
    assert "4 of 4 conversations kept" in (told := capsys.readouterr().out), told
    assert "4 in the tokens that were sampled, 0 rendered" in told
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert any("layers" in name for name in changed) and not any("visual" in name for name in changed)
    reranker = Reranker.from_pretrained(tmp_path)
    assert reranker.preset == PRESET  # it is played as it was sampled
    # Nor does an engine that reads its limits from the folder resize what the protocol has sized.
    size = AutoProcessor.from_pretrained(tmp_path).image_processor.size
    least, most = size["shortest_edge"], size["longest_edge"]
    assert least <= reranker.engine.encoder.factor**2 and most >= PRESET.inspect_pixels


def test_a_killed_run_ends_where_an_uninterrupted_one_does(accepted, base, tmp_path):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    short = ["--max_steps", 4, "--save_steps", 2, "--per_device_train_batch_size", 2]
    main(arguments(base, accepted, tmp_path / "whole", *short))
    killed = arguments(base, accepted, tmp_path / "killed", *short)
    with pytest.raises(KeyboardInterrupt):
        train(*parse((RSFTScriptArguments, ConversationSFTConfig, ModelConfig), killed), callbacks=[Kill()])
    main(killed)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class TestPreset:
    def arguments(self, **kwargs) -> RSFTScriptArguments:
        return RSFTScriptArguments(**kwargs)

    def test_is_that_of_the_trajectories(self, accepted):
        assert self.arguments(dataset_name=str(accepted)).make_preset() == PRESET

    def test_single_settings_can_be_replaced(self, accepted):
        arguments = self.arguments(dataset_name=str(accepted), preset_overrides='{"max_calls": 1}')
        assert arguments.make_preset() == get_preset(PRESET, max_calls=1)

    def test_can_be_named(self, accepted):
        assert self.arguments(dataset_name=str(accepted), preset="release").make_preset() == get_preset("release")

    def test_nothing_to_learn_from(self, tmp_path):
        with pytest.raises(ValueError, match="set dataset_name: a folder of accepted trajectories"):
            self.arguments()
        with pytest.raises(FileNotFoundError, match=r"has no trajectories\.jsonl"):
            self.arguments(dataset_name=str(tmp_path))
        write_records(tmp_path, [])
        with pytest.raises(ValueError, match="holds no trajectory: nothing was accepted"):
            self.arguments(dataset_name=str(tmp_path))
