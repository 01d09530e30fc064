"""
Rollouts of TRL's loop in the real vLLM, in the trainer's process and on a CPU: what vLLM reads and how likely it finds
what it writes must agree with the trainer, with pictures in prompts and in what tools return.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from functools import partial

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this folder where it is")

import torch
import trl.generation.vllm_generation
import vllm
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.distributed import cleanup_dist_env_and_memory

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample
from vretrver_hf.protocol import get_preset
from vretrver_hf.reranker import bundled_model
from vretrver_hf.samples import load_samples
from vretrver_hf.training import grpo
from vretrver_hf.training.grpo import EvidenceGRPOConfig, EvidenceGRPOTrainer


class WideProducts(TorchDispatchMode):
    """
    Multiplies in full precision and rounds, as a GPU does, what is in half precision: without instructions for it, a
    CPU takes sixty times as long for the gradients.
    """

    aten = torch.ops.aten
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.products or args[0].dtype is not torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*(value.float() for value in args), **(kwargs or {})).bfloat16()


class RecordingLLM(vllm.LLM):
    """vLLM that keeps what it says it read."""

    def __init__(self, **arguments):
        self.read: list[list[int]] = []
        super().__init__(**arguments)

    def generate(self, *args, **kwargs):
        outputs = super().generate(*args, **kwargs)
        self.read += [list(output.prompt_token_ids) for output in outputs]
        return outputs


class RecordingTrainer(EvidenceGRPOTrainer):
    """Keeps what its rollouts were asked to read, expanded as the trainer's processor does, and its batches."""

    def __init__(self, *args, **kwargs):
        self.asked: list[list[int]] = []
        self.batches: list = []
        super().__init__(*args, **kwargs)

    def train(self, *args, **kwargs):
        with WideProducts(), sdpa_kernel(SDPBackend.MATH):
            return super().train(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.asked += [list(ids) for ids in prompt_ids]
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.batches.append(super()._generate_and_score_completions(inputs))
        return self.batches[-1]


def _keep_weights(layer, remove_weight) -> None:
    """vLLM's CPU build packs weights and drops the originals, so none could be loaded into it; on a GPU they stay."""
    layer.cpu_linear = torch.nn.functional.linear


@pytest.fixture(scope="module")
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(precision):
    """Makes the one engine of a precision, as the first trainer wants it; later ones load their weights into it."""
    made = []

    def make(**arguments):
        if not made:
            patch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", _keep_weights)
            made.append(RecordingLLM(**arguments, dtype=precision, enforce_eager=True))
        made[0].read.clear()
        made[0].reset_prefix_cache()
        made[0].llm_engine.reset_encoder_cache()
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        yield make
    made.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def make_trainer(engine, precision, monkeypatch, tmp_path):
    monkeypatch.setattr(trl.generation.vllm_generation, "LLM", engine)
    return partial(_make_trainer, precision, tmp_path)


def _alternating(completions, **columns) -> list[float]:
    """Rewards that always leave something to learn."""
    return [float(row % 2) for row in range(len(completions))]


def _examples() -> list[RerankExample]:
    """Those that the bundled model makes calls for."""
    samples = [sample for sample in load_samples() if sample.task == "text-to-detail"]
    return [RerankExample(s.id, s.query, s.candidates, [s.positive]) for s in samples]


def _make_trainer(precision, folder, tower=False, examples=None, **arguments) -> RecordingTrainer:
    """A trainer of the vision tower alone or of all but it."""
    settings = json.loads((bundled_model() / "reranker_config.json").read_text())["preset"]
    model = AutoModelForImageTextToText.from_pretrained(bundled_model(), dtype=precision)
    for name, weight in model.named_parameters():
        weight.requires_grad_(("visual" in name) == tower)
    return RecordingTrainer(
        model,
        _alternating,
        EvidenceGRPOConfig(
            str(folder),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=2048,
            num_generations=4,
            max_completion_length=1024,
            report_to=[],
            use_cpu=True,
            bf16=precision == "bfloat16",
            save_strategy="no",
            shuffle_dataset=False,
            gradient_checkpointing=False,
            **{"per_device_train_batch_size": 8, **arguments},
        ),
        examples or _examples(),
        processing_class=AutoProcessor.from_pretrained(bundled_model()),
        preset=get_preset(settings.pop("name"), **{**settings, "max_calls": 1}),
        max_turn_tokens=96,
    )


def differences(batch) -> tuple[torch.Tensor, torch.Tensor]:
    """How much likelier the trainer finds each token than vLLM, and which tokens the model wrote."""
    mask = batch["completion_mask"] * batch["tool_mask"]
    return (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask, mask


def ratio(batches) -> float:
    """Mean over the rollouts of how much likelier the trainer finds what vLLM wrote."""
    return torch.cat([differences(batch)[0].sum(1).exp() for batch in batches]).mean().item()


def gap(batches) -> float:
    """Mean over the tokens of how far trainer and vLLM are apart in their log-probabilities."""
    apart, written = zip(*map(differences, batches), strict=True)
    return (sum(each.abs().sum() for each in apart) / sum(mask.sum() for mask in written)).item()


def assert_reads_the_same(trainer) -> None:
    """vLLM read what the trainer learns from, pads and all, and both pictures of prompts and of tools were in it."""
    assert trainer.vllm_generation.llm.read == trainer.asked
    pad, pictures = trainer.encoder.image_pad, trainer.processing_class.image_processor.merge_size**2
    for batch in trainer.batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        assert (ids == pad).sum() == batch["image_grid_thw"].prod(1).sum() // pictures
        assert (batch["prompt_ids"] == pad).any(1).all()
        assert (batch["completion_ids"] == pad).any()


on = partial(pytest.mark.parametrize, "precision", indirect=True)


@on(["float32"])
def test_exact_in_full_precision(make_trainer):
    # Without this, vLLM shares out the probability of what must not be written, up to 7e-4, among the other tokens.
    trainer = make_trainer(generation_kwargs={"bad_words": []})
    trainer._last_loaded_step = 0  # vLLM has read the same file: no sync
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert_reads_the_same(trainer)
    (batch,) = trainer.batches
    assert differences(batch)[0].abs().max() <= 1e-4


@on(["float32"])
def test_a_call_ends_the_turn_and_its_end_mark_is_not_learnt(make_trainer):
    trainer = make_trainer()
    trainer._last_loaded_step = 0
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    encoder, (batch,) = trainer.encoder, trainer.batches
    mask = batch["completion_mask"] * batch["tool_mask"]
    calls = 0
    for ids, bits in zip(batch["completion_ids"].tolist(), mask.tolist(), strict=True):
        for place, token in enumerate(ids[:-1]):
            if token == encoder.end_of_call and bits[place] and ids[place + 1] == encoder.end_of_turn:
                assert not bits[place + 1]
                calls += 1
            elif token == encoder.end_of_call and bits[place]:
                assert not any(bits[place + 1 :])  # the last turn of a rollout
    assert calls


@on(["bfloat16"])
def test_half_precision_over_weight_syncs(make_trainer):
    trainer = make_trainer(max_steps=3, learning_rate=1e-4)
    trainer.train()
    assert_reads_the_same(trainer)
    assert len(trainer.batches) == 3
    assert ratio(trainer.batches[1:]) == pytest.approx(1, abs=0.05)


@pytest.fixture
def trained(make_trainer, monkeypatch, resets) -> RecordingTrainer:
    """
    Trains on one query, whose pictures vLLM meets again in every step. The language model is left as it is, else the
    first steps of so tiny a model, at a rate that the tower needs to change, would unlearn the calls.
    """
    trainer = make_trainer(
        tower=True,
        examples=_examples()[:1],
        max_steps=4,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
    )
    if not resets:
        monkeypatch.setattr(trainer.vllm_generation.llm.llm_engine, "reset_encoder_cache", lambda: None)
    trainer.train()
    assert_reads_the_same(trainer)
    assert len(trainer.batches) == 4
    return trainer


@pytest.mark.nightly
@on(["bfloat16"])
@pytest.mark.parametrize("resets", [True])
def test_a_tower_that_is_trained(trained):
    assert gap(trained.batches[1:]) <= 0.005


@pytest.mark.nightly
@on(["bfloat16"])
@pytest.mark.parametrize("resets", [False])
def test_a_tower_that_is_trained_while_vllm_keeps_old_features(trained):
    """What the reset of the encoder cache is for. Where this fails, TRL does it itself and ours can go."""
    assert gap(trained.batches[:1]) <= 0.005
    assert gap(trained.batches[1:]) > 0.02


@on(["float32"])
def test_a_picture_beyond_the_limits_of_the_model_folder(make_trainer):
    """One that is so long that the protocol cannot fit it into its budget."""
    first = _examples()[0]
    long = Item(image=Image.linear_gradient("L").resize((4000, 25)))
    example = dataclasses.replace(first, candidates=[*first.candidates[:4], long], positives=[0])
    trainer = make_trainer(examples=[example], per_device_train_batch_size=4, generation_kwargs={"bad_words": []})
    trainer._last_loaded_step = 0
    trainer.model.train()
    trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    assert trainer.vllm_generation.llm.read == trainer.asked
    grids = trainer.batches[0]["image_grid_thw"].prod(1)
    limit = AutoProcessor.from_pretrained(bundled_model()).image_processor.size["longest_edge"]
    assert grids.max() * 14**2 > limit
    assert differences(trainer.batches[0])[0].abs().max() <= 1e-4


@on(["bfloat16"])
def test_pads_as_trl_sends_them_are_expanded_twice(make_trainer, monkeypatch):
    """What `collapse_pads` is for. Where this fails, TRL does it itself and ours can go."""
    monkeypatch.setattr(grpo, "collapse_pads", lambda ids, pad: list(ids))
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert trainer.vllm_generation.llm.read != trainer.asked
    assert ratio(trainer.batches) < 0.5
