"""Both model families and adapters in the real vLLM; random weights, so that any difference would show at once."""

from __future__ import annotations

import gc

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this folder where it is")

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model, make_processor
from vllm.distributed import cleanup_dist_env_and_memory

from vretrver_hf import Item
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.engines.vllm import VLLMEngine
from vretrver_hf.protocol import get_preset


HEADS = 2  # vLLM's attention on CPUs knows no smaller heads than those of 32 dimensions
PRESET = get_preset("foveated", overview_pixels=128 * 128, inspect_pixels=160 * 160, max_calls=3)
SAMPLING = Sampling(max_turn_tokens=12)
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "max_num_batched_tokens": 4096}


@pytest.fixture
def load(tmp_path):
    engines = []

    def make(**settings):
        engines.append(VLLMEngine.from_pretrained(tmp_path, max_sessions=4, max_images=8, **SETTINGS, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


def tasks(picture) -> list[AgentTask]:
    return [
        AgentTask(
            Item(text=f"query {i}"),
            [Item(text=f"text {j}", image=picture(90 + 40 * j, 120) if j < 2 else None) for j in range(2 + i)],
            PRESET,
            query_id=str(i),
        )
        for i in range(4)
    ]


def assert_same(mine, theirs) -> None:
    for fast, plain in zip(mine, theirs, strict=True):
        assert fast.token_ids == plain.token_ids and fast.mask == plain.mask
        known = [value for value in fast.logprobs if value is not None]
        assert known == pytest.approx([value for value in plain.logprobs if value is not None], abs=1e-3)


def test_a_family_says_what_it_says_in_transformers(family, processor, picture, load, tmp_path):
    model = make_model(family, processor, heads=HEADS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    played = tasks(picture)
    assert_same(play(load(), played, SAMPLING), play(TransformersEngine(model, processor), played, SAMPLING))


def test_an_adapter_is_as_if_it_were_merged(picture, load, tmp_path):
    processor = make_processor("qwen2_5_vl")
    model = make_model("qwen2_5_vl", processor, heads=HEADS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    played = tasks(picture)
    mine = play(load(lora=tmp_path / "adapter"), played, SAMPLING)
    merged = play(TransformersEngine(adapted.merge_and_unload(), processor), played, SAMPLING)
    bare = play(TransformersEngine(make_model("qwen2_5_vl", processor, heads=HEADS), processor), played, SAMPLING)
    assert_same(mine, merged)
    assert [trajectory.token_ids for trajectory in mine] != [trajectory.token_ids for trajectory in bare]
