from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from records import ANSWER, CROP, OVERRIDES, PRESET, SCRIPTS, make_example, make_records, noise
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
from trl import ModelConfig

from vretrver_hf import Item, Reranker
from vretrver_hf.data.conversations import (
    Conversation,
    TrajectoryConversations,
    load_conversations,
    write_records,
)
from vretrver_hf.training import sft
from vretrver_hf.training._common import describe, freeze, last_checkpoint, load_model, lora_config, parse
from vretrver_hf.training.sft import ConversationCollator, ConversationSFTConfig, SFTScriptArguments


EXAMPLES = [make_example(number) for number in range(8)]


@pytest.fixture(scope="module")
def base(family, model, processor, tmp_path_factory):
    """A folder with an untrained model."""
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(encoder, tmp_path_factory):
    """A folder with trajectories, the last one without a picture."""
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, make_records(encoder, [*EXAMPLES[:7], make_example(8, pictures=False)]))
    return folder


@pytest.fixture
def settings(base, data, tmp_path):
    """Arguments of a short run; keyword arguments replace and add."""

    def make(**changes) -> list[str]:
        values = {
            "model_name_or_path": base,
            "dataset_name": data,
            "output_dir": tmp_path / "out",
            "preset": "foveated",
            "preset_overrides": json.dumps(OVERRIDES),
            "window": 3,
            "stride": 2,
            "max_turn_tokens": 500,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
        arguments = []
        for name, value in values.items():
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return arguments

    return make


def read(arguments):
    return parse((SFTScriptArguments, ConversationSFTConfig, ModelConfig), arguments)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def part_of(name: str) -> str:
    return next(
        (part for mark, part in (("merger", "projector"), ("visual", "tower")) if mark in name), "language model"
    )


def changed(before, after) -> set[str]:
    """Which parts of a model have other weights."""
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


class TestCollator:
    """What reaches the model."""

    def test_the_loss_is_that_of_plain_transformers(self, encoder, model):
        """The same conversation, rendered by the chat template, read by the processor, its labels found in the ids."""
        (record,) = make_records(encoder, EXAMPLES[1:2], [SCRIPTS[2]])
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        messages = record.example.task(PRESET).messages()
        for turn in record.trajectory.turns[1:]:
            blocks = [{"type": "text", "text": turn.text}, *({"type": "image"} for _ in turn.images)]
            messages.append({"role": "assistant" if turn.role == "assistant" else "user", "content": blocks})
        text = encoder.processor.apply_chat_template(messages, tokenize=False)
        originals = [record.item(ref.index).load_image() for ref in record.trajectory.images]
        pictures = [ref.render(image) for ref, image in zip(record.trajectory.images, originals, strict=True)]
        batch = encoder.processor(
            text=[text], images=pictures, return_tensors="pt", images_kwargs={"do_resize": False}
        )
        ids = batch["input_ids"][0].tolist()
        start, end = (encoder.tokenizer.encode(mark) for mark in ("<|im_start|>assistant\n", "<|im_end|>"))
        labels = [-100] * len(ids)
        for place in range(len(ids)):
            if ids[place - len(start) : place] == start:
                stop = ids.index(end[0], place)
                stop += ids[stop - 1] != encoder.end_of_call  # behind a call the loop closes the turn
                labels[place:stop] = ids[place:stop]
        with torch.no_grad():
            expected = model(**batch, labels=torch.tensor([labels])).loss
            inputs = ConversationCollator({}, encoder).collate([conversation])
            assert model(**inputs).loss == pytest.approx(expected.item(), rel=1e-6)
        assert inputs["labels"][0].tolist() == labels[:-1]  # the newline after the last turn
        assert torch.equal(inputs["pixel_values"], batch["pixel_values"])

    @pytest.mark.parametrize("which", range(3))
    def test_every_picture_reaches_the_model(self, encoder, model, which):
        (record,) = make_records(encoder, EXAMPLES[:1], [[CROP, ANSWER]])  # two in the prompt, one from the tool
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        images = list(conversation.images)
        assert len(images) == 3
        images[which] = noise(*images[which].size, seed=99)
        other = Conversation(conversation.token_ids, conversation.mask, images, "stored")
        collator = ConversationCollator({}, encoder)
        with torch.no_grad():
            one, two = (model(**collator.collate([c])).loss.item() for c in (conversation, other))
        assert abs(one - two) > 1e-4

    def test_a_batch_has_the_loss_of_its_rows(self, encoder, model):
        """Rows of several lengths, with three, two and no pictures."""
        examples = [*EXAMPLES[:2], make_example(2, pictures=False)]
        records = make_records(encoder, examples, [[CROP, ANSWER], [ANSWER], [ANSWER]])
        conversations = list(TrajectoryConversations(records, encoder, PRESET))
        collator = ConversationCollator({}, encoder, pad_to_multiple_of=64)
        batch = collator.collate(conversations)
        assert batch["input_ids"].shape[1] % 64 == 0
        assert batch["attention_mask"].sum(1).tolist() == [len(c.token_ids) for c in conversations]
        with torch.no_grad():
            together = model(**batch).loss.item()
            alone = [model(**collator.collate([c])).loss.item() for c in conversations]
        counts = [sum(c.mask) for c in conversations]
        expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
        assert together == pytest.approx(expected, rel=1e-5)

    def test_a_batch_without_pictures_runs_the_vision_tower_and_keeps_its_loss(self, encoder, model):
        """Where weights are sharded, a process that skipped the tower would leave the others waiting."""
        (record,) = make_records(encoder, [make_example(2, pictures=False)], [[ANSWER]])
        conversation = TrajectoryConversations([record], encoder, PRESET)[0]
        assert conversation.images == []
        inputs = ConversationCollator({}, encoder).collate([conversation])
        ids = torch.tensor([conversation.token_ids])
        labels = torch.where(torch.tensor([conversation.mask]).bool(), ids, -100)
        calls = []
        hook = model.model.visual.register_forward_hook(lambda *_: calls.append(True))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.item()
            assert not calls
            assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-6)
        hook.remove()
        assert calls


class TestRun:
    """The whole command, with TRL's own trainer."""

    def test_two_steps_and_the_folder_plays_what_was_trained(self, base, settings, tmp_path, encoder, capsys):
        sft.main(settings())
        out = tmp_path / "out"
        assert changed(weights(base), weights(out)) == {"language model"}
        for folder in (out, out / "checkpoint-2"):
            reranker = Reranker.from_pretrained(folder)
            assert (reranker.preset, reranker.window, reranker.stride, reranker.tools) == (PRESET, 3, 2, True)
            assert reranker.sampling.max_turn_tokens == 500
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.chat_template == encoder.tokenizer.chat_template
            assert tokenizer.response_template == encoder.tokenizer.response_template
        example = EXAMPLES[0]
        assert sorted(reranker.rank(example.query, example.candidates).order) == [0, 1, 2]
        printed = capsys.readouterr().out
        assert "train: 8 of 8 conversations kept" in printed and "8 in the tokens that were sampled" in printed
        assert "vision tower 0 of" in printed and "projector 0 of" in printed

    def test_it_learns(self, settings):
        trainer = sft.train(*read(settings(max_steps=10, learning_rate=1e-2, save_strategy="no")))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.7 * losses[0]

    def test_its_loss_is_that_of_plain_transformers(self, base, data, encoder, settings):
        """The first step's, before any weight has changed: the mean over the learned tokens of both micro-batches."""
        changes = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        trainer = sft.train(*read(settings(**changes, save_strategy="no")))
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        conversations = load_conversations(data, encoder, PRESET)
        total = count = 0
        with torch.no_grad():
            for conversation in conversations:
                inputs = ConversationCollator({}, encoder).collate([conversation])
                total += model(**inputs).loss.item() * sum(conversation.mask)
                count += sum(conversation.mask)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)

    @pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
    def test_a_killed_run_ends_where_an_uninterrupted_one_does(self, settings, tmp_path, adapter):
        changes = {"max_steps": 4, "save_steps": 2, "use_peft": adapter, "lr_scheduler_type": "cosine"}
        sft.main(settings(**changes, output_dir=tmp_path / "whole"))

        class Kill(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    raise KeyboardInterrupt

        arguments = settings(**changes)
        with pytest.raises(KeyboardInterrupt):
            sft.train(*read(arguments), callbacks=[Kill()])
        assert not (tmp_path / "out" / "model.safetensors").exists()
        sft.main(arguments)
        whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        log = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            ({"freeze_projector": False}, {"language model", "projector"}),
            ({"freeze_vision_tower": False}, {"language model", "tower"}),
        ],
    )
    def test_only_what_is_not_frozen_learns(self, base, settings, tmp_path, flags, parts):
        sft.main(settings(**flags, save_strategy="no"))
        assert changed(weights(base), weights(tmp_path / "out")) == parts

    def test_the_best_checkpoint_is_the_one_that_is_kept(self, encoder, settings, tmp_path):
        """The loss falls, and here more of it is better, so that the first checkpoint is the best."""
        write_records(tmp_path / "held-out", make_records(encoder, EXAMPLES[:2], [[ANSWER]]))
        changes = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        sft.main(settings(**changes, eval_dataset_name=tmp_path / "held-out", greater_is_better=True))
        first, last, kept = (weights(tmp_path / "out" / name) for name in ("checkpoint-1", "checkpoint-2", "."))
        assert all(torch.equal(first[name], kept[name]) for name in kept)
        assert not all(torch.equal(last[name], kept[name]) for name in kept)

    def test_two_processes_do_what_one_does(self, family, settings, tmp_path):
        """Each reads half of the conversations; a token weighs the same in whichever process it is learned."""
        if family != "qwen2_5_vl":
            pytest.skip("one family is enough for what no family changes")
        sft.main(settings(save_strategy="no", output_dir=tmp_path / "one"))
        command = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--mixed_precision",
            "no",
        ]
        command += ["--main_process_port", "0", "-m", "vretrver_hf.training.sft"]
        arguments = settings(save_strategy="no", per_device_train_batch_size=1)
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, *command, *arguments], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout.count("train: 8 of 8 conversations kept") == 1
        one, two = weights(tmp_path / "one"), weights(tmp_path / "out")
        for name in one:
            # A tenth of a step: where a gradient is nearly zero, Adam makes much of the last digit.
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)

    def test_an_adapter_is_merged_and_kept(self, base, data, encoder, settings, tmp_path):
        trainer = sft.train(*read(settings(use_peft=True)))
        out = tmp_path / "out"
        assert (out / "adapter" / "adapter_model.safetensors").is_file()
        own, merged = ((folder / "reranker_config.json").read_text() for folder in (out / "adapter", out))
        assert own == merged  # who loads the adapter alone plays what it was trained on
        assert not (out / "adapter_config.json").exists()  # else loading the merged model would add it once more
        conversation = load_conversations(data, encoder, PRESET)[0]
        inputs = trainer.data_collator.collate([conversation])
        merged = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            trained = trainer.model.eval()(**inputs).loss.item()
            assert merged(**inputs).loss.item() == pytest.approx(trained, rel=1e-5)
            untrained = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)(**inputs).loss.item()
        assert abs(trained - untrained) > 1e-4

    def test_what_cannot_be_learned_is_counted_and_dropped(self, encoder, settings, tmp_path, capsys):
        scripts = [[ANSWER], [ANSWER], [ANSWER], [CROP, CROP, CROP, ANSWER]]
        good, broken, silent, long = make_records(encoder, [make_example(number) for number in range(4)], scripts)
        broken.example.candidates[0] = Item(image=b"no picture")
        silent.trajectory.turns[1:] = []
        limit = len(long.trajectory.token_ids) - 1
        write_records(tmp_path / "data", [good, broken, silent, long])
        sft.main(settings(dataset_name=tmp_path / "data", max_length=limit, save_strategy="no"))
        printed = capsys.readouterr().out
        assert f"train: 1 of 4 conversations kept, at most {limit:,} tokens" in printed
        assert "1 dropped, a picture cannot be read; the first: query q1, candidate 1" in printed
        assert "1 dropped, no assistant turn; the first: query q2: the model wrote nothing" in printed
        assert f"1 dropped, too long; the first: number 3 has {limit + 1} tokens" in printed

    def test_nothing_left_is_an_error(self, settings):
        with pytest.raises(ValueError, match="0 of 8 conversations kept, at most 10 tokens\n  8 dropped, too long"):
            sft.main(settings(max_length=10))

    def test_it_evaluates_on_other_conversations(self, encoder, settings, tmp_path):
        write_records(tmp_path / "held-out", make_records(encoder, EXAMPLES[:2], [[ANSWER]]))
        changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_name": tmp_path / "held-out"}
        trainer = sft.train(*read(settings(**changes, save_strategy="no", learning_rate=0)))
        conversations = load_conversations(tmp_path / "held-out", encoder, PRESET)
        inputs = ConversationCollator({}, encoder).collate(list(conversations))
        with torch.no_grad():
            expected = trainer.model(**inputs).loss.item()
        reported = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert reported == pytest.approx([expected, expected], rel=1e-4)

    def test_sharegpt_files_with_workers(self, base, settings, tmp_path, capsys):
        noise(90, 60, 0).save(tmp_path / "a.png")
        turns = [
            {"from": "human", "value": "<image> (1) a (2) b"},
            {"from": "gpt", "value": "<answer>[2, 1]</answer>"},
        ]
        (tmp_path / "sft.json").write_text(json.dumps(4 * [{"conversations": turns, "images": ["a.png"]}]))
        changes = {"dataset_num_proc": 2, "dataloader_num_workers": 1, "save_strategy": "no"}
        sft.main(settings(dataset_name=tmp_path / "sft.json", **changes))
        assert "4 of 4 conversations kept" in capsys.readouterr().out
        assert changed(weights(base), weights(tmp_path / "out")) == {"language model"}


class TestSettings:
    def test_a_yaml_file_and_the_command_line_which_wins(self, tmp_path):
        config = {
            "model_name_or_path": "m",
            "dataset_name": "d",
            "preset": "foveated",
            "preset_overrides": {"overview_pixels": 4096},
            "max_length": 100,
            "learning_rate": 1e-5,
            "bf16": False,
            "freeze_projector": False,
        }
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        script, training, model = read(
            ["--config", str(tmp_path / "sft.yaml"), "--learning_rate", "2e-5", "--use_cpu"]
        )
        assert script.make_preset().overview_pixels == 4096
        assert (script.freeze_vision_tower, script.freeze_projector) == (True, False)
        assert (training.max_length, training.learning_rate, model.model_name_or_path) == (100, 2e-5, "m")

    def test_an_unknown_key_is_refused(self, tmp_path):
        (tmp_path / "sft.yaml").write_text("dataset_name: d\nlearning_rat: 1\n", encoding="utf-8")
        with pytest.raises(ValueError, match="learning_rat"):
            read(["--config", str(tmp_path / "sft.yaml"), "--use_cpu"])

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ([], "set dataset_name"),
            (["--dataset_name", "d", "--preset", "x"], "unknown preset 'x'"),
            (["--dataset_name", "d", "--preset_overrides", "{"], "preset_overrides is not valid JSON"),
            (["--dataset_name", "d", "--preset_overrides", "[1]"], "preset_overrides must be a mapping"),
            (["--dataset_name", "d", "--preset_overrides", '{"pixels": 1}'], "unknown preset settings.*pixels"),
            (["--dataset_name", "d", "--packing", "true"], "packing and padding_free do not work with pictures"),
        ],
    )
    def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(self, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            read([*arguments, "--use_cpu", "--bf16", "false"])

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"model_name_or_path": ""}, "set model_name_or_path"),
            ({"push_to_hub": True}, "push_to_hub uploads checkpoints"),
            ({"load_in_4bit": True}, "weights of a quantised model cannot be trained; set use_peft"),
        ],
    )
    def test_models_that_cannot_be_trained(self, settings, changes, reason):
        _, training, model = read(settings(**changes))
        with pytest.raises(ValueError, match=reason):
            load_model(model, training)

    def test_a_family_without_a_template_is_refused(self, settings, tmp_path):
        AutoConfig.for_model("llama").save_pretrained(tmp_path)
        _, training, model = read(settings(model_name_or_path=tmp_path))
        with pytest.raises(ValueError, match="is a 'llama' model; supported are"):
            load_model(model, training)

    def test_trajectories_of_another_preset_are_refused(self, settings):
        with pytest.raises(ValueError, match="was played under .*but the model is to be trained under"):
            sft.main(settings(preset_overrides='{"max_calls": 1}'))


class TestCheckpoints:
    @pytest.fixture
    def run(self, tmp_path, settings):
        for step, complete in ((2, True), (10, True), (12, False)):
            folder = tmp_path / "out" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").touch()
            if complete:
                (folder / "trainer_state.json").touch()
        return lambda **changes: read(settings(**changes))[1]

    def test_the_last_complete_one_is_found(self, run, tmp_path):
        """12 was cut off, and 10 comes after 2."""
        assert last_checkpoint(run()) == str(tmp_path / "out" / "checkpoint-10")
        assert last_checkpoint(run(resume_from_checkpoint="true")) == str(tmp_path / "out" / "checkpoint-10")

    def test_a_named_one_or_none(self, run, tmp_path):
        assert last_checkpoint(run(resume_from_checkpoint="elsewhere")) == "elsewhere"
        assert last_checkpoint(run(resume_from_checkpoint="false")) is None
        assert last_checkpoint(run(output_dir=tmp_path / "new")) is None


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"language model"}),
        ({"freeze_projector": False}, {"language model", "projector"}),
        ({"freeze_vision_tower": False}, {"language model", "tower"}),
        ({"freeze_vision_tower": False, "freeze_projector": False}, {"language model", "tower", "projector"}),
    ],
)
@pytest.mark.parametrize(
    "targets",
    # The default, then names that layers of towers, projectors and language models share.
    [[], ["q_proj", "gate_proj", "qkv", "linear_fc1", "mlp.0"], ["all-linear"]],
    ids=["default", "named", "all-linear"],
)
def test_lora_does_not_touch_the_vision_model_by_accident(settings, flags, parts, targets):
    from peft import get_peft_model

    named = {"lora_target_modules": targets} if targets else {}
    script, training, model_args = read(settings(use_peft=True, **flags, **named))
    model, _ = load_model(model_args, training)
    adapted = get_peft_model(model, lora_config(model_args, script))
    names = [name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name]
    assert {part_of(name) for name in names} == parts
    if len(targets) < 2:
        layers = {name.rsplit(".", 1)[1] for name in names if "visual" not in name}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_without_peft_there_is_no_adapter(settings):
    script, _, model_args = read(settings())
    assert lora_config(model_args, script) is None


def test_what_is_trained_is_told(base, settings):
    script, training, model_args = read(settings(freeze_projector=False))
    model, _ = load_model(model_args, training)
    freeze(model, script)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    projector = sum(size for name, size in sizes.items() if "merger" in name)
    tower = sum(size for name, size in sizes.items() if "visual" in name) - projector
    rest = sum(sizes.values()) - tower - projector
    assert describe(model) == (
        f"language model {rest:,} of {rest:,}; vision tower 0 of {tower:,}; projector {projector:,} of {projector:,}"
    )
