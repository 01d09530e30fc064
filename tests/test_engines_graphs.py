from __future__ import annotations

import random

import pytest
import torch
from scripted import ForcedEngine

from vretrver_hf import Item
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import Sampling, _graphs, _slot_cache
from vretrver_hf.engines._graphs import DecodeGraphs, _Recorded
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset


PRESET = get_preset("foveated", overview_pixels=128 * 128, inspect_pixels=160 * 160, max_calls=3)
CALL = format_turn("hm", format_call("select_images", {"target_images": [1]}))


def replaying(function):
    """What a CUDA graph does, on a CPU: the same function again, with its result in the same place."""
    result = function().clone()
    return _Recorded(lambda: result.copy_(function()), result)


@pytest.fixture
def tasks(picture):
    query, items = Item(text="q"), [Item(image=picture(90 + 40 * i, 120)) for i in range(3)]
    return [AgentTask(query, items[: 1 + i % 3], PRESET, query_id=str(i)) for i in range(12)]


@pytest.fixture
def script(tasks):
    rng = random.Random(1)
    turns = {task.query_id: [CALL] * rng.randrange(3) for task in tasks}
    endings = {task.query_id: "y" * rng.randrange(40) for task in tasks}
    answers = {
        task.query_id: format_turn(endings[task.query_id], format_answer(range(len(task.candidates))))
        for task in tasks
    }
    return lambda query_id, turn: [*turns[query_id], answers[query_id]][turn]


def recorded(engine, record=None):
    engine._pass = DecodeGraphs(engine._one_token_a_row, engine._cache, engine.max_sessions, record)
    return engine


def assert_same(found, expected, abs=1e-5):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        known = [value for value in theirs.logprobs if value is not None]
        assert [value for value in mine.logprobs if value is not None] == pytest.approx(known, abs=abs)


@pytest.mark.parametrize("block_tokens", [1, 4])
def test_filled_up_passes_give_what_plain_ones_give(model, processor, tasks, script, monkeypatch, block_tokens):
    monkeypatch.setattr(_graphs, "_COLUMNS", 32)  # several sizes in a short conversation
    expected = play(ForcedEngine(model, processor, script, max_sessions=5, prefill_tokens=2000), tasks)
    engine = recorded(ForcedEngine(model, processor, script, max_sessions=5, prefill_tokens=2000), replaying)
    engine._block_tokens = block_tokens
    record, sizes = engine._pass._recorded, set()
    monkeypatch.setattr(engine._pass, "_recorded", lambda size, values: sizes.add(size) or record(size, values))
    assert_same(play(engine, tasks), expected)
    assert {rows for rows, _ in sizes} <= {5, 2, 1} and len(sizes) > 1


def test_recording_leaves_the_rows_in_use_as_they_are(model, processor, tasks, script, monkeypatch):
    """The function runs once before it is recorded, and with it all that it writes."""
    monkeypatch.setattr(_graphs, "_PLAIN_USES", 0)
    expected = play(ForcedEngine(model, processor, script, max_sessions=12), tasks)
    engine = recorded(ForcedEngine(model, processor, script, max_sessions=12), lambda f: (f(), f(), replaying(f))[-1])
    assert_same(play(engine, tasks), expected)


def test_what_was_recorded_is_forgotten_when_the_cache_moves(model, processor, tasks, script, monkeypatch):
    monkeypatch.setattr(_graphs, "_PLAIN_USES", 0)
    count = []
    engine = recorded(
        ForcedEngine(model, processor, script, max_sessions=2), lambda f: count.append(0) or replaying(f)
    )
    play(engine, tasks[:1])
    first = len(count)
    assert first and engine._cache.layers[0].keys is None  # nothing is in use, so the memory was given back
    play(engine, tasks[:1])
    assert len(count) == 2 * first


def test_the_cache_grows_once_for_prompts_and_passes(model, processor, tasks, script, monkeypatch):
    """Recorded passes fill up rows and columns; that is foreseen when the prompts come in."""
    monkeypatch.setattr(_graphs, "_PLAIN_USES", 0)
    engine = ForcedEngine(model, processor, lambda query_id, turn: format_answer([0]), max_sessions=8)
    enlarged, sizes = _slot_cache._enlarged, []
    monkeypatch.setattr(_slot_cache, "_enlarged", lambda old, *size: sizes.append(size) or enlarged(old, *size))
    play(recorded(engine, replaying), tasks[:6])
    assert len(sizes) == 4 and {rows for rows, _ in sizes} == {8}  # keys and values, in two layers


def test_where_nothing_can_be_recorded_passes_stay_plain(model, processor, tasks, script, monkeypatch, caplog):
    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graphs, "_PLAIN_USES", 0)
    expected = play(ForcedEngine(model, processor, script), tasks[:2])
    assert_same(play(recorded(ForcedEngine(model, processor, script), fail), tasks[:2]), expected)
    assert caplog.text.count("cannot be recorded") == 1


@pytest.mark.parametrize(
    ("rows", "length", "size"),
    [(512, 700, (512, 768)), (129, 256, (512, 256)), (128, 257, (128, 512)), (3, 1, (8, 256)), (1, 9, (1, 256))],
)  # fmt: skip
def test_few_sizes(rows, length, size):
    assert DecodeGraphs(None, None, 512).size(rows, length) == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(model, processor, tasks, dtype, temperature):
    sampling = Sampling(temperature=temperature, max_turn_tokens=60, seed=1)
    runs = []
    for graphs in (False, True):
        engine = TransformersEngine(model.to("cuda", dtype), processor, max_sessions=5)
        assert isinstance(engine._pass, DecodeGraphs)
        if not graphs:
            engine._pass = engine._one_token_a_row
        runs.append(play(engine, tasks, sampling))
        assert not graphs or (engine._pass._works and engine._pass._uses)
    model.to("cpu", torch.float32)
    if dtype == torch.float32:
        assert_same(runs[1], runs[0], abs=1e-4)
