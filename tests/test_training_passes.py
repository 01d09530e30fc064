from __future__ import annotations

import copy

import pytest
import torch
from records import PRESET, SCRIPTS, make_example, make_records
from transformers import Trainer, TrainingArguments

from vretrver_hf.data.conversations import TrajectoryConversations
from vretrver_hf.training._passes import QuickPasses, base_model
from vretrver_hf.training.sft import ConversationCollator


class Quick(QuickPasses, Trainer):
    pass


@pytest.fixture
def batch(encoder):
    """Rows of different lengths whose pictures have several sizes."""
    scripts = [SCRIPTS[2], SCRIPTS[0], SCRIPTS[2]]
    records = make_records(encoder, [make_example(number) for number in range(3)], scripts)
    conversations = TrajectoryConversations(records, encoder, PRESET)
    return ConversationCollator({}, encoder).collate([conversations[number] for number in range(3)])


def make_trainer(kind, model, tmp_path, adapter):
    model = copy.deepcopy(model)
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        names = ["qkv", "q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False))
    trainer = kind(model, TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1))
    trainer.current_gradient_accumulation_steps = 1  # as within `train`
    return trainer


def step(trainer, batch):
    """Loss and gradients of one step."""
    loss = trainer.training_step(trainer.model, {name: value.clone() for name, value in batch.items()})
    return loss, {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_the_plain_trainer(model, batch, tmp_path, adapter):
    expected_loss, expected = step(make_trainer(Trainer, model, tmp_path, adapter), batch)
    trainer = make_trainer(Quick, model, tmp_path, adapter)
    loss, found = step(trainer, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert found.keys() == expected.keys() and any("visual" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert not any("forward" in vars(block.attn) for block in base_model(trainer.model).model.visual.blocks)


@pytest.mark.parametrize("kind", [Trainer, Quick])
def test_pictures_of_equal_size_attend_together_and_rows_are_not_gone_through(
    model, batch, tmp_path, monkeypatch, kind
):
    inner, slow = type(model.model), []
    get_rope_index = inner.get_rope_index
    monkeypatch.setattr(inner, "get_rope_index", lambda *args, **kw: slow.append(1) or get_rope_index(*args, **kw))
    trainer = make_trainer(kind, model, tmp_path, adapter=False)
    original, batches = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: batches.append(len(query)) or original(query, *args, **kwargs),
    )
    for run in (step, lambda trainer, batch: trainer.prediction_step(trainer.model, batch, True)):
        batches.clear(), slow.clear()
        run(trainer, batch)
        config, pictures = trainer.model.config, len(batch["image_grid_thw"])
        layers = config.text_config.num_hidden_layers
        of_tower = len(batches) - layers
        if kind is Trainer:
            assert of_tower >= pictures * config.vision_config.depth and slow == [1]
        else:
            assert of_tower < pictures * config.vision_config.depth and slow == []
