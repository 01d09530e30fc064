from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import grpo_processes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scripted import ForcedEngine, ScriptedEngine
from scripted_trainers import (
    ANSWER,
    CROP,
    PRESET,
    SCRIPTS,
    make_example,
    read_rows,
    scripted_trainer,
    stock_form,
)
from tiny_models import make_model, make_processor
from transformers import TrainerCallback
from trl.distributed import DistributedBackend

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import play
from vretrver_hf.data.examples import write_examples
from vretrver_hf.engines import Sampling
from vretrver_hf.environment import prepare_processor
from vretrver_hf.protocol import format_turn, get_preset, malformed_observation
from vretrver_hf.rewards import EvidenceReward
from vretrver_hf.training import _passes, grpo
from vretrver_hf.training._features import FeatureCache
from vretrver_hf.training._rollouts import cut_trajectory, play_rollouts, to_rollout, with_unseen_picture
from vretrver_hf.training.grpo import EvidenceGRPOConfig, EvidenceGRPOTrainer
from vretrver_hf.trajectory import read_jsonl


TESTS = Path(__file__).parent


class RecordingTrainer(EvidenceGRPOTrainer):
    """Keeps what it trained on."""

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        return self.generated

    def _generate_and_score_completions(self, inputs):
        self.batches = [*getattr(self, "batches", []), super()._generate_and_score_completions(inputs)]
        return self.batches[-1]


def make_trainer(
    family, examples, output_dir, reward=None, freeze=False, preset=PRESET, max_turn_tokens=16, name="", **arguments
):
    processor = make_processor(family)
    model = make_model(family, processor)
    model.config._name_or_path = str(name)  # where TRL finds a reference model
    model.model.visual.requires_grad_(not freeze)
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 2000,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        **arguments,
    }
    return RecordingTrainer(
        model,
        reward,
        EvidenceGRPOConfig(str(output_dir), **settings),
        examples,
        processing_class=processor,
        preset=PRESET,
        max_turn_tokens=max_turn_tokens,
    )


@pytest.fixture
def scripts(monkeypatch):
    """Makes the model of our trainer say, in the rollout of each sample number, what this dictionary lists."""
    said: dict[int, list[str]] = {}

    class SampledEngine(ForcedEngine):
        def __init__(self, model, processor, *limits):
            script = lambda query_id, turn: said[int(query_id.rpartition("/")[2])][turn]  # noqa: E731
            super().__init__(model, processor, script, max_sessions=limits[0], prefill_tokens=limits[1])

        def open(self, query_id="", sample=0):
            session = super().open(query_id, sample)
            session.query_id = f"{query_id}/{sample}"
            return session

    monkeypatch.setattr(grpo, "TransformersEngine", SampledEngine)
    return said


def logps_of_the_loss(trainer, batch) -> torch.Tensor:
    """What the loss makes of the tokens of a batch, with pictures and all."""
    inputs = {name: batch.get(name) for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].shape[1],
            **inputs,
        )
    return logps


def difference(trainer, batch) -> float:
    """Largest difference between the log-probabilities of rollout and loss, over the model's own tokens."""
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert mask.any()
    return (logps_of_the_loss(trainer, batch) - batch["sampling_per_token_logps"])[mask].abs().max().item()


def on_first_inputs(trainer):
    """Has the trainer make its first batch, without training on it."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    return trainer._generate_and_score_completions(rows)


class TestGolden:
    def test_tokens_and_pictures_equal_those_of_loop_and_stock_trainer(self, family, picture, scripts, tmp_path):
        example = make_example(picture)
        scripts |= dict(enumerate(SCRIPTS.values()))
        trainer = make_trainer(family, [example], tmp_path, max_turn_tokens=400, max_steps=1)
        batch = on_first_inputs(trainer)

        encoder = trainer.encoder
        loop = {}
        for name, script in SCRIPTS.items():
            engine = ScriptedEngine(encoder, lambda query_id, turn, script=script: script[turn])
            (loop[name],) = play(engine, [example.task(PRESET)])
        assert read_rows(batch) == [(trajectory.token_ids, trajectory.mask) for trajectory in loop.values()]

        processor = make_processor(family)
        prepared = processor, prepare_processor(processor, family, PRESET)
        stock = scripted_trainer(family, prepared, [example], SCRIPTS.values(), tmp_path)
        stock.train()
        assert read_rows(stock.batches[0]) == [stock_form(trajectory, encoder) for trajectory in loop.values()]
        for name in ("pixel_values", "image_grid_thw"):
            assert batch[name].equal(stock.batches[0][name])
        assert batch["num_images"] == stock.batches[0]["num_images"] == [2, 5, 2, 5]
        assert batch["advantages"].equal(stock.batches[0]["advantages"])

    def test_the_loss_covers_exactly_what_the_model_wrote(self, family, picture, scripts, tmp_path):
        malformed = "I would rather chat."
        turns = [format_turn("look", CROP), malformed, ANSWER]
        scripts |= dict.fromkeys(range(4), turns)
        trainer = make_trainer(family, [make_example(picture)], tmp_path, max_turn_tokens=400)
        batch = on_first_inputs(trainer)
        encoder = trainer.encoder
        for ids, mask in read_rows(batch):
            learned = encoder.tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
            # The end mark behind a call is the loop's, the others are the model's.
            assert learned == turns[0] + malformed + "<|im_end|>" + ANSWER + "<|im_end|>"
            problem = "there is no <tool_call> and no <answer>"
            assert malformed_observation(problem) in encoder.tokenizer.decode(ids)

    @pytest.mark.parametrize("freeze", [False, True])
    def test_rollout_and_loss_read_the_same(self, family, picture, scripts, tmp_path, freeze):
        """The log-probabilities agree only if tokens, positions and every picture do."""
        scripts |= dict(enumerate(SCRIPTS.values()))
        trainer = make_trainer(family, [make_example(picture)], tmp_path, freeze=freeze, max_turn_tokens=400)
        batch = on_first_inputs(trainer)
        assert difference(trainer, batch) < 1e-4
        # And the check can fail: another picture in the observations shows.
        if freeze:
            last, (mode, image) = max(trainer.features._numbered.items())
            trainer.features._numbered[last] = mode, ImageOps.invert(image)
        else:
            batch["pixel_values"][-1] += 1.0
        assert difference(trainer, batch) > 1e-3

    def test_half_precision_agrees(self, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        trainer = make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, max_turn_tokens=400, bf16=True)
        assert 0 < difference(trainer, on_first_inputs(trainer)) < 0.5


class TestTraining:
    @pytest.mark.parametrize("freeze", [False, True])
    def test_two_steps(self, family, picture, scripts, tmp_path, freeze):
        scripts |= dict(enumerate(SCRIPTS.values()))
        trainer = make_trainer(family, [make_example(picture)], tmp_path, freeze=freeze, max_turn_tokens=400)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
        assert any("language_model" in name for name in changed)
        assert any("visual" in name for name in changed) is not freeze
        assert trainer.model.training

    def test_metrics(self, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        scripts[0] = ["I would rather chat.", ANSWER]
        trainer = make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, max_turn_tokens=400, max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        turns = 2 + 3 + 2 + 4
        expected = {
            "tools/call_frequency": (0 + 2 + 1 + 4) / 4,
            # One names a candidate without picture, two come when no calls are left.
            "tools/failure_frequency": 3 / 7,
            "rollouts/turns": turns / 4,
            "rollouts/malformed_turns": 1 / turns,
            "rollouts/pictures": (2 + 5 + 2 + 5) / 4,
            "rollouts/answer": 3 / 4,
            "rollouts/no_answer": 1 / 4,
            "rollouts/error": 0,
            "rollouts/ok": 3 / 4,
            "rollouts/fallback": 1 / 4,
            "completions/clipped_ratio": 0,
            "evidence/calls": (0 + 2 + 0 + 2) / 4,
            # Formula 0.2 format + 0.8 rank + 0.2 bonus - 0.1 for the second call; a malformed turn spoils the form.
            "evidence/top1": 2 / 4,
        }
        assert {name: log[name] for name in expected} == pytest.approx(expected)
        lengths = [sum(mask) for mask in trainer.generated[2]]
        assert log["completions/max_length"] == max(lengths)
        assert log["num_tokens"] == sum(lengths) + sum(map(len, trainer.generated[0]))

    def test_the_last_of_a_group_play_without_tools(self, picture, tmp_path):
        reward = EvidenceReward("need", no_tool_share=0.5)
        trainer = make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, reward)
        on_first_inputs(trainer)
        shown = ["<tools>" in trainer.encoder.tokenizer.decode(ids) for ids in trainer.generated[0]]
        assert shown == [True, True, False, False]
        assert [environment.facts.tools for environment in trainer.environments] == shown

    def test_all_may_play_without_tools(self, picture, scripts, tmp_path):
        scripts |= dict.fromkeys(range(4), [ANSWER])
        processor = make_processor("qwen2_5_vl")
        args = EvidenceGRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, report_to=[], use_cpu=True, bf16=False
        )
        trainer = RecordingTrainer(
            make_model("qwen2_5_vl", processor),
            args=args,
            train_dataset=[make_example(picture)],
            processing_class=processor,
            preset=PRESET,
            tools=False,
        )
        on_first_inputs(trainer)
        assert not any("<tools>" in trainer.encoder.tokenizer.decode(ids) for ids in trainer.generated[0])

    def test_a_picture_that_cannot_be_read_costs_its_query_only(self, family, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        bad = dataclasses.replace(make_example(picture, "bad"), query=Item(image=b"no picture"))
        arguments = {"max_turn_tokens": 400, "per_device_train_batch_size": 8, "max_steps": 1}
        trainer = make_trainer(family, [bad, make_example(picture)], tmp_path, **arguments)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["rollouts/error"] == 0.5 and log["rollouts/answer"] == 3 / 8
        (row,) = [i for i, e in enumerate(trainer.environments[::4]) if e.example.query_id == "bad"]
        failed = trainer.batches[-1]["advantages"][4 * row : 4 * row + 4]
        assert failed.tolist() == [0.0] * 4
        assert all(map(torch.isfinite, map(torch.tensor, (log["loss"], log["grad_norm"]))))

    def test_all_pictures_bad_is_no_crash_either(self, picture, tmp_path):
        bad = dataclasses.replace(make_example(picture), query=Item(image=b"no picture"))
        trainer = make_trainer("qwen2_5_vl", [bad], tmp_path)
        trainer.train()
        assert [entry["rollouts/error"] for entry in trainer.state.log_history[:2]] == [1.0, 1.0]
        assert all(not any(mask) for mask in trainer.generated[2])

    def test_a_prompt_beyond_the_context_is_no_crash(self, picture, tmp_path):
        example = make_example(picture)
        endless = dataclasses.replace(example, query=Item(text="x" * 17_000))  # a token a byte, the model reads 16,384
        trainer = make_trainer("qwen2_5_vl", [endless], tmp_path)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["rollouts/length"] == 1.0 and log["num_tokens"] == 4

    def test_queries_without_pictures(self, family, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        example = make_example(picture)
        texts = dataclasses.replace(example, candidates=[Item(text="a"), Item(text="b"), Item(text="c")])
        trainer = make_trainer(family, [texts], tmp_path, max_turn_tokens=400, max_steps=1)
        trainer.train()
        assert "pixel_values" not in trainer.batches[0]
        assert difference(trainer, on_first_inputs(trainer)) < 1e-4

    @pytest.mark.parametrize("freeze", [False, True])
    def test_batches_without_pictures_among_others(self, picture, scripts, tmp_path, freeze):
        """TRL rolls out for several backward passes together, and one of these may have no picture of its own."""
        scripts |= dict(enumerate(SCRIPTS.values()))
        example = make_example(picture)
        texts = dataclasses.replace(
            example, query_id="texts", candidates=[Item(text="a"), Item(text="b"), Item(text="c")]
        )
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        trainer = make_trainer(
            "qwen2_5_vl", [example, texts], tmp_path, freeze=freeze, max_turn_tokens=400, max_steps=1, **small
        )
        trainer.train()
        assert trainer.batches[0]["image_grid_thw"].tolist().count([1, 2, 2]) == 4  # one black token each
        assert trainer.batches[0]["num_images"].count(1) == 4 and trainer.state.global_step == 1

    def test_a_reference_model_is_shown_the_pictures_too(self, family, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        saved = tmp_path / "model"
        processor = make_processor(family)
        make_model(family, processor).save_pretrained(saved)
        trainer = make_trainer(
            family, [make_example(picture)], tmp_path, freeze=True, name=saved, max_turn_tokens=400, beta=0.1
        )
        trainer.train()
        kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
        assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 0

    def test_attention_does_without_cudnn_in_rollouts_and_both_passes_of_the_loss(
        self, picture, tmp_path, monkeypatch
    ):
        state, seen = {"off": 0}, []

        @contextlib.contextmanager
        def without(model):
            assert model is trainer.model
            state["off"] += 1
            yield
            state["off"] -= 1

        monkeypatch.setattr(_passes, "without_cudnn_attention", without)
        arguments = {"max_steps": 1, "gradient_checkpointing": True, "per_device_eval_batch_size": 4}
        trainer = make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, **arguments)
        block = trainer.model.model.language_model.layers[0]
        block.self_attn.register_forward_hook(
            lambda *args: seen.append((torch.is_grad_enabled(), trainer.model.training, state["off"]))
        )
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        # Rollouts, the loss and the recomputation in its backward pass; the evaluation.
        assert {kind[:2] for kind in seen} >= {(False, False), (True, True)}
        assert all(off == 1 for *_, off in seen)

    def test_evaluates(self, picture, tmp_path):
        processor = make_processor("qwen2_5_vl")
        model = make_model("qwen2_5_vl", processor)
        model.model.visual.requires_grad_(False)
        args = EvidenceGRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            num_generations=2,
            num_generations_eval=4,
            max_completion_length=100,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        )
        data = {"train_dataset": [make_example(picture)], "eval_dataset": [make_example(picture, "e")]}
        trainer = EvidenceGRPOTrainer(
            model,
            EvidenceReward("release"),
            args,
            **data,
            processing_class=processor,
            preset=PRESET,
            max_turn_tokens=8,
        )
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluations) == 2 and "eval_rollouts/answer" in evaluations[0]

    def test_saves_trajectories(self, picture, scripts, tmp_path):
        scripts |= dict.fromkeys(range(4), [ANSWER])
        arguments = {"max_turn_tokens": 400, "max_steps": 3, "trajectories_steps": 2}
        make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, **arguments).train()
        files = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
        assert files == ["step-000000.jsonl", "step-000002.jsonl"]
        trajectories = list(read_jsonl(tmp_path / "trajectories" / files[1]))
        assert [trajectory.order for trajectory in trajectories] == [[1, 0, 2]] * 4

    def test_saves_all_trajectories_of_a_step_that_are_made_in_several_goes(self, picture, scripts, tmp_path):
        scripts |= dict.fromkeys(range(4), [ANSWER])
        arguments = {"max_turn_tokens": 400, "max_steps": 2, "trajectories_steps": 1}
        goes = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
        examples = [make_example(picture), make_example(picture, "e")]
        for _ in range(2):  # a second run writes the files anew
            make_trainer("qwen2_5_vl", examples, tmp_path, **arguments, **goes).train()
        for step in range(2):
            found = read_jsonl(tmp_path / "trajectories" / f"step-{step:06d}.jsonl")
            assert sorted(trajectory.query_id for trajectory in found) == ["e"] * 4 + ["q"] * 4


class TestChance:
    def test_every_step_draws_anew_and_every_run_the_same(self, picture, tmp_path):
        example = make_example(picture)

        def ids(**arguments):
            arguments |= {"learning_rate": 0.0, "max_turn_tokens": 6}
            trainer = make_trainer("qwen2_5_vl", [example], tmp_path, **arguments)
            trainer.train()
            return [read_rows(batch) for batch in trainer.batches]

        first, again, other = ids(), ids(), ids(seed=1)
        assert first == again
        assert first[0] != first[1] and first[0] != other[0]
        assert len({tuple(tokens) for tokens, _ in first[0]}) == 4

    # At the end of the first epoch, and within the second.
    @pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.nightly), 3])
    def test_a_killed_run_goes_on_as_if_nothing_had_happened(self, picture, tmp_path, stop):
        class Kill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    raise KeyboardInterrupt

        examples = [make_example(picture, str(i)) for i in range(4)]

        def build(folder):
            arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": stop, "max_turn_tokens": 8}
            arguments |= {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
            trainer = make_trainer(
                "qwen2_5_vl", examples, tmp_path / folder, grpo_processes.token_reward, freeze=True, **arguments
            )
            return trainer

        whole = build("whole")
        whole.train()
        killed = build("killed")
        killed.add_callback(Kill())
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        resumed = build("killed")
        resumed.train(resume_from_checkpoint=True)
        assert len(whole.batches) == 8  # four steps of two queries
        for mine, theirs in zip(resumed.batches, whole.batches[2 * stop :], strict=True):
            assert read_rows(mine) == read_rows(theirs)
        weights = whole.model.state_dict()
        assert all(weight.equal(weights[name]) for name, weight in resumed.model.state_dict().items())
        start = make_model("qwen2_5_vl", make_processor("qwen2_5_vl")).state_dict()
        assert not all(weight.equal(start[name]) for name, weight in weights.items())

    def test_every_epoch_has_an_order_of_its_own(self, picture, tmp_path):
        examples = [make_example(picture, str(i)) for i in range(4)]
        arguments = {"max_steps": 12, "max_turn_tokens": 1, "learning_rate": 0.0}
        trainer = make_trainer("qwen2_5_vl", examples, tmp_path, **arguments)
        orders = [[]]
        play = trainer._play

        def note(mode):
            orders[-1].append(trainer.environments[0].example.query_id)
            if len(orders[-1]) == 4:
                orders.append([])
            return play(mode)

        trainer._play = note
        trainer.train()
        assert [sorted(order) for order in orders] == [["0", "1", "2", "3"]] * 3 + [[]]
        assert len({tuple(order) for order in orders}) > 2

    def test_warns_of_checkpoints_within_a_batch_of_rollouts(self, picture, tmp_path, caplog):
        arguments = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
        with caplog.at_level(logging.WARNING, "vretrver_hf"):
            make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, steps_per_generation=2, **arguments)
        assert "draws new rollouts and ends elsewhere" in caplog.text

    def test_two_processes_do_what_one_does(self, tmp_path):
        weights, log = grpo_processes.run(tmp_path / "one", num_processes=1)
        output = tmp_path / "two" / "result.pt"
        output.parent.mkdir()
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--mixed_precision", "no", "--main_process_port", "0"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*launch, str(TESTS / "grpo_processes.py"), str(output)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        other_weights, other_log = torch.load(output)
        for mine, theirs in zip(log[:2], other_log[:2], strict=True):
            for name in ("num_tokens", "completions/mean_length", "rewards/token_reward/mean", "reward_std"):
                assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
        assert log[0]["rewards/token_reward/std"] > 0
        for name, weight in weights.items():
            torch.testing.assert_close(weight, other_weights[name], atol=2e-5, rtol=1e-4)


class TestPictures:
    def test_a_group_shares_the_pictures_of_its_prompt(self, family, picture):
        encoder = prepare_processor(make_processor(family), family, PRESET)
        examples = [make_example(picture, name) for name in "ab"]
        tasks = [example.task(PRESET, sample=number) for example in examples for number in range(4)]
        engine = ScriptedEngine(encoder, lambda query_id, turn: [CROP, ANSWER][turn])
        rollouts = play_rollouts(engine, tasks, Sampling(max_turn_tokens=400), 10_000)
        shown = [rollout.images[: len(rollout.trajectory.turns[0].images)] for rollout in rollouts]
        for first, *others in (shown[:4], shown[4:]):
            assert all(a is b for other in others for a, b in zip(first, other, strict=True))
        task = tasks[0]
        images = [item.load_image() for item in task.candidates if item.image is not None]
        right = [ref.render(image) for ref, image in zip(rollouts[0].trajectory.turns[0].images, images, strict=True)]
        assert [image.tobytes() for image in shown[0]] == [image.tobytes() for image in right]

    def test_a_group_shares_its_prompt(self, family, picture, monkeypatch):
        encoder = prepare_processor(make_processor(family), family, PRESET)
        examples = [make_example(picture, name) for name in "ab"]
        tasks = [example.task(PRESET, number, tools=number < 3) for example in examples for number in range(4)]
        expected = [
            encoder.prompt(
                task.messages(), lambda number, task=task: [task.query, *task.candidates][number].load_image(), PRESET
            ).token_ids
            for task in tasks
        ]
        encoded = []
        original = type(encoder).prompt
        monkeypatch.setattr(type(encoder), "prompt", lambda self, *args: encoded.append(args) or original(self, *args))
        engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER)
        rollouts = play_rollouts(engine, tasks, Sampling(max_turn_tokens=400), 10_000)
        assert len(encoded) == 4  # with tools and without, of two examples
        assert [rollout.prompt_ids for rollout in rollouts] == expected


class TestCutting:
    @pytest.fixture(scope="class")
    @staticmethod
    def played(processor, family):
        """Trajectories with pictures in their turns, and the pictures."""
        source = np.random.default_rng(0)
        example = make_example(
            lambda width, height: Image.fromarray(source.integers(0, 255, (height, width, 3), dtype=np.uint8))
        )
        encoder = prepare_processor(make_processor(family), family, PRESET)
        rollouts = []
        for script in SCRIPTS.values():
            engine = ScriptedEngine(encoder, lambda query_id, turn, script=script: script[turn])
            rollouts += play_rollouts(engine, [example.task(PRESET)], Sampling(max_turn_tokens=400), 10_000)
        return encoder, rollouts

    @given(data=st.data())
    @settings(deadline=None, max_examples=60)
    def test_any_limit(self, played, data):
        encoder, rollouts = played
        whole = data.draw(st.sampled_from(rollouts))
        length = len(whole.completion_ids)
        limit = data.draw(st.integers(1, length + 3))
        trajectory = cut_trajectory(whole.trajectory, limit, encoder)
        rollout = to_rollout(trajectory, whole.images, encoder)  # which checks pads against pictures
        assert len(rollout.completion_ids) <= limit
        assert rollout.completion_ids == whole.completion_ids[: len(rollout.completion_ids)]
        assert rollout.mask == whole.mask[: len(rollout.mask)]
        assert rollout.prompt_ids == whole.prompt_ids
        lost = sum(whole.mask) - sum(rollout.mask)
        assert (trajectory.finish == "length") == (lost > 0)
        if limit >= length:
            assert trajectory == whole.trajectory
        elif lost:
            assert trajectory.status == "fallback" and trajectory.finish == "length"
            assert trajectory.turns[-1].role == "assistant"

    def test_an_answer_that_is_cut_off_earns_nothing(self, played):
        encoder, rollouts = played
        whole = rollouts[1].trajectory
        cut = cut_trajectory(whole, sum(len(turn.token_ids) for turn in whole.turns[1:]) - 4, encoder)
        assert cut.turns[-1].text.startswith("<think>so") and cut.turns[-1].kind == "malformed"
        reward = EvidenceReward("paper")
        assert reward.score_trajectory(whole, [1]).rank == 1 and reward.score_trajectory(cut, [1]).rank == 0

    def test_the_end_mark_behind_a_turn_that_was_cut_off_is_left_out(self, played, picture):
        encoder, _ = played
        engine = ScriptedEngine(encoder, lambda query_id, turn: "no end in sight")
        task = dataclasses.replace(make_example(picture).task(PRESET), tools=False)
        (rollout,) = play_rollouts(engine, [task], Sampling(max_turn_tokens=5), 1000)
        # Both of its turns were cut off: the first is closed, since the conversation went on.
        assert rollout.completion_ids[5] == encoder.end_of_turn and rollout.completion_ids[-1] != encoder.end_of_turn
        assert rollout.mask[-5:] == [1] * 5 and sum(rollout.mask) == 10

    def test_pads_that_fit_no_picture_are_an_error(self, played):
        encoder, rollouts = played
        with pytest.raises(RuntimeError, match="image tokens but its 1 pictures take"):
            to_rollout(rollouts[0].trajectory, rollouts[0].images[:1] * 1, encoder)

    def test_an_unseen_picture_changes_nothing(self, family, picture, tmp_path):
        example = make_example(picture)
        texts = dataclasses.replace(example, candidates=[Item(text="a"), Item(text="b"), Item(text="c")])
        trainer = make_trainer(family, [texts], tmp_path)
        plain = on_first_inputs(trainer)
        play = trainer._play
        trainer._play = lambda mode: [with_unseen_picture(one, trainer.encoder) for one in play(mode)]
        padded = on_first_inputs(trainer)
        assert padded["num_images"] == [1] * 4
        length = plain["completion_ids"].shape[1]
        mask = (plain["completion_mask"] * plain["tool_mask"]).bool()
        mine, other = logps_of_the_loss(trainer, plain), logps_of_the_loss(trainer, padded)
        torch.testing.assert_close(mine[mask], other[:, :length][mask], atol=1e-5, rtol=0)


class TestFeatureCache:
    @pytest.fixture
    @staticmethod
    def tower(family):
        return make_model(family, make_processor(family)).model.visual.requires_grad_(False)

    @pytest.fixture
    @staticmethod
    def image_processor(family):
        processor = make_processor(family)
        prepare_processor(processor, family, get_preset("release"))
        return processor.image_processor

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_numbers_give_what_pixels_give(self, tower, image_processor, picture, dtype):
        tower.to(dtype)
        side = 2 * image_processor.patch_size * image_processor.merge_size
        pictures = [picture(side, side), picture(2 * side, side), picture(side, 2 * side)]
        pictures.append(pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        batches = [[0, 1], [1, 2, 0, 2], [3]]

        def features(batch):
            output = tower(batch["pixel_values"].to(dtype), grid_thw=batch["image_grid_thw"], return_dict=True)
            return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]

        def inputs(numbers):
            return image_processor(images=[pictures[number].copy() for number in numbers], return_tensors="pt")

        plain = [features(inputs(numbers)) for numbers in batches]
        cache = FeatureCache(tower, image_processor)
        cache._next_number = 2**24 - 2  # from there on all digits are in use
        with cache.numbered():
            numbered = [inputs(numbers) for numbers in batches]
            assert all(batch["pixel_values"].shape[-1] == 4 for batch in numbered)
        for batch, numbers, theirs in zip(numbered, batches, plain, strict=True):
            expected = inputs(numbers)
            assert batch.keys() == expected.keys()
            assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])
            assert len(batch["pixel_values"]) == len(expected["pixel_values"])
            for found in (features(batch), features(expected)):  # pixels still pass the tower
                for one, other in zip(found, theirs, strict=True):
                    torch.testing.assert_close(one, other, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
        assert (cache.pictures["train"].num_computed, cache.pictures["train"].num_recalled) == (4, 3)

    def test_an_evaluation_leaves_what_training_needs(self, tower, image_processor, picture):
        cache = FeatureCache(tower, image_processor)
        side = 2 * image_processor.patch_size * image_processor.merge_size
        a, b = picture(side, side), picture(2 * side, side)

        def shown(mode, image):
            cache.begin(mode)
            with cache.numbered():
                return image_processor(images=[image], return_tensors="pt")

        def output(batch):
            return tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output

        training = shown("train", a)
        first = output(training)
        assert not torch.equal(output(shown("eval", b))[: len(first)], first)
        assert torch.equal(output(training), first)
        assert cache.pictures["train"].num_computed == cache.pictures["train"].num_recalled == 1
        shown("train", b)
        with pytest.raises(KeyError):
            output(training)

    def test_refuses_a_tower_that_is_trained(self, tower, image_processor):
        with pytest.raises(ValueError, match="freeze it first"):
            FeatureCache(tower.requires_grad_(True), image_processor)

    def test_a_step_computes_each_picture_once(self, family, picture, scripts, tmp_path):
        scripts |= dict(enumerate(SCRIPTS.values()))
        trainer = make_trainer(
            family, [make_example(picture)], tmp_path, freeze=True, max_turn_tokens=400, max_steps=1
        )
        trainer.train()
        # Two pictures of the prompt, the crop and two selected ones; the loss recalls those of all four rollouts.
        pictures = trainer.features.pictures["train"]
        assert pictures.num_computed == 5 and pictures.num_recalled >= 2 + 5 + 2 + 5


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"min_p": 0.1}, "know nothing of min_p"),  # would be ignored
            ({"repetition_penalty": 1.1}, "know nothing of repetition_penalty"),
            ({"generation_kwargs": {"max_new_tokens": 5}}, "know nothing of generation_kwargs"),
            ({"ds3_gather_for_generation": False}, "know nothing of ds3_gather_for_generation"),  # parts of weights
            ({"remove_unused_columns": True}, "would remove the examples"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, picture, tmp_path, arguments, reason):
        with pytest.raises(ValueError, match=reason):
            make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, **arguments)

    @pytest.mark.parametrize(("version", "fits"), [(1, False), (2, True)])
    def test_only_the_second_version_of_fsdp_gives_whole_weights(self, picture, tmp_path, monkeypatch, version, fits):
        monkeypatch.setattr(DistributedBackend, "__init__", lambda self, accelerator: vars(self).update(told))
        told = {"zero_stage": 0, "fsdp_version": version}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="set fsdp_version to 2"):
            make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path)

    def test_no_rollouts_without_tools_in_vllm(self, picture, tmp_path):
        with pytest.raises(ValueError, match="set no_tool_share to 0"):
            make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path, EvidenceReward("need"), use_vllm=True)

    def test_refuses_bad_settings_before_loading_a_model(self):
        arguments = {"dataset_name": "d"}
        with pytest.raises(ValueError, match="set dataset_name"):
            grpo.GRPOScriptArguments()
        with pytest.raises(ValueError, match="unknown reward preset 'best'"):
            grpo.GRPOScriptArguments(reward="best", **arguments)
        with pytest.raises(ValueError, match="unknown reward settings"):
            grpo.GRPOScriptArguments(reward_overrides='{"sigmal": 2}', **arguments)
        with pytest.raises(ValueError, match="not valid JSON"):
            grpo.GRPOScriptArguments(reward_overrides="{", **arguments)
        assert grpo.GRPOScriptArguments(reward_overrides='{"sigma": 2}', **arguments).make_reward().settings.sigma == 2


class TestVLLM:
    """vLLM does not run here: these look at what it would be handed."""

    class Recorder:
        def __init__(self):
            self.llm = self.llm_engine = self
            self.told: list = []

        def reset_encoder_cache(self):
            self.told.append("reset")

        def sync_weights(self):
            self.told.append("sync")

        def generate(self, prompts, **kwargs):
            self.told.append(prompts)
            return None, [[1]] * len(prompts), [[[0.0]]] * len(prompts), None

    @pytest.fixture
    def trainer(self, picture, tmp_path):
        trainer = make_trainer("qwen2_5_vl", [make_example(picture)], tmp_path)
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self.Recorder(), -1
        return trainer

    def turn(self, trainer):
        pad = trainer.encoder.image_pad
        trainer._generate_single_turn([[5, pad, pad, 6, pad, pad, pad, 7], [5]], None, {}, 1)
        return trainer.vllm_generation.told, pad

    def test_one_pad_a_picture_in_colocate_mode(self, trainer):
        trainer.vllm_mode = "colocate"
        told, pad = self.turn(trainer)
        assert told[-1] == [[5, pad, 6, pad, 7], [5]]

    def test_all_pads_for_a_server(self, trainer):
        trainer.vllm_mode = "server"
        told, pad = self.turn(trainer)
        assert told[-1] == [[5, pad, pad, 6, pad, pad, pad, 7], [5]]

    def test_old_features_are_forgotten_before_new_weights_come(self, trainer):
        trainer.vllm_mode = "colocate"
        self.turn(trainer)
        told, _ = self.turn(trainer)  # of the same step: nothing is new
        assert [entry for entry in told if isinstance(entry, str)] == ["reset", "sync"]
        trainer.state.global_step += 1
        told, _ = self.turn(trainer)
        assert [entry for entry in told if isinstance(entry, str)] == ["reset", "sync"] * 2

    def test_features_of_a_frozen_tower_stay(self, trainer):
        trainer.vllm_mode, trainer._tower_is_trained = "colocate", False
        told, _ = self.turn(trainer)
        assert [entry for entry in told if isinstance(entry, str)] == ["sync"]

    def test_pictures_keep_the_size_that_the_protocol_gave_them(self):
        llm = grpo.SizedLLM(self.Recorder(), {"shortest_edge": 784, "longest_edge": 156_800})
        llm.generate([{"prompt_token_ids": [1], "multi_modal_data": {"image": "a"}}, {"prompt_token_ids": [2]}])
        limits = {"min_pixels": 784, "max_pixels": 156_800}
        shown = {"prompt_token_ids": [1], "multi_modal_data": {"image": "a"}, "mm_processor_kwargs": limits}
        assert llm.told == [[shown, {"prompt_token_ids": [2]}]]

    @pytest.mark.parametrize(
        ("least", "most", "fits"), [(4, 5120, True), (1, 9999, True), (64, 5120, False), (4, 1280, False)]
    )
    def test_a_server_that_would_resize_pictures_is_refused(self, family, least, most, fits):
        encoder, preset = prepare_processor(make_processor(family), family, "release"), get_preset("release")
        size = {"shortest_edge": least * encoder.factor**2, "longest_edge": most * encoder.factor**2}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="would resize the protocol's"):
            grpo._check_limits(size, preset, encoder)


class TestEntryPoint:
    @pytest.mark.parametrize("adapter", [False, True])
    def test_trains_and_saves_a_reranker(self, family, picture, tmp_path, adapter):
        processor = make_processor(family)
        make_model(family, processor).save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        write_examples(tmp_path / "train.parquet", [make_example(picture, str(i)) for i in range(4)])
        overrides = {"overview_pixels": 64 * 64, "inspect_pixels": 128 * 128, "max_calls": 1}
        config = {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset_name": str(tmp_path / "train.parquet"),
            "output_dir": str(tmp_path / "out"),
            "preset": "foveated",
            "preset_overrides": overrides,
            "window": 3,
            "stride": 1,
            "max_turn_tokens": 12,
            "reward": "need",
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 200,
            "max_steps": 2,
            "save_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "use_peft": adapter,
            "lora_r": 2,
        }
        (tmp_path / "grpo.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        grpo.main(["--config", str(tmp_path / "grpo.yaml")])
        reranker = Reranker.from_pretrained(tmp_path / "out", device="cpu")
        assert reranker.preset == get_preset("foveated", **overrides)
        assert (reranker.window, reranker.sampling.max_turn_tokens) == (3, 12)
        assert sorted(reranker.rank("a", ["b", "c"]).order) == [0, 1]
        assert json.loads((tmp_path / "out/checkpoint-1/reranker_config.json").read_text())["preset"]["max_calls"] == 1
