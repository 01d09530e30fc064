"""The real vLLM in this process, held against the transformers engine trajectory by trajectory, in full precision."""

from __future__ import annotations

import gc
from unittest import mock

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this folder where it is")

from bundled import one_sample_a_task
from vllm.distributed import cleanup_dist_env_and_memory

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import EngineError, Sampling
from vretrver_hf.reranker import bundled_model
from vretrver_hf.samples import load_samples


SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_batched_tokens": 4096}


@pytest.fixture(scope="module")
def rerankers():
    fast = Reranker.from_pretrained(engine="vllm", max_sessions=8, max_images=24, **SETTINGS)
    yield fast, Reranker.from_pretrained(device="cpu", max_sessions=8)
    fast.engine.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


def assert_same(mine, theirs, tolerance: float = 1e-4) -> None:
    assert mine.token_ids == theirs.token_ids and mine.mask == theirs.mask
    assert (mine.order, mine.status, mine.finish) == (theirs.order, theirs.status, theirs.finish)
    assert mine.images == theirs.images and mine.exact_tokens
    assert [turn.text for turn in mine.turns] == [turn.text for turn in theirs.turns]
    known = [value for value in mine.logprobs if value is not None]
    assert known == pytest.approx([value for value in theirs.logprobs if value is not None], abs=tolerance)


def test_every_conversation_is_the_transformers_engines(rerankers):
    """Held-out samples with pictures and calls, all at once, then again with warm caches."""
    fast, plain = rerankers
    pairs = [(sample.query, sample.candidates) for sample in one_sample_a_task().values()]
    expected = plain.rank_batch(pairs)
    assert sum(ranking.num_calls for ranking in expected) >= 3
    for _ in range(2):
        for mine, theirs in zip(fast.rank_batch(pairs), expected, strict=True):
            assert mine.order == theirs.order
            for pair in zip(mine.trajectories, theirs.trajectories, strict=True):
                assert_same(*pair)


def test_windows_too(rerankers):
    fast, plain = rerankers
    candidates = [item for sample in load_samples() for item in sample.candidates if item.image is not None][:20]
    candidates = [Item(text=item.text, image=item.image, id=str(i)) for i, item in enumerate(candidates)]
    pairs = [("a dark-skinned woman guard", candidates), ("a swimmer", candidates[::-1])]
    for mine, theirs in zip(fast.rank_batch(pairs), plain.rank_batch(pairs), strict=True):
        assert len(mine.trajectories) > 2 and mine.order == theirs.order
        for pair in zip(mine.trajectories, theirs.trajectories, strict=True):
            assert_same(*pair)


def test_many_turns_and_pictures_of_many_sizes(rerankers):
    """Turns are cut short, so that the model is told so and goes on; each picture has a shape of its own."""
    from PIL import Image

    fast, plain = rerankers
    noise = [Image.effect_noise((60 + 31 * i, 90 + 17 * i), 80).convert("RGB") for i in range(5)]
    task = AgentTask(Item(text="the noisy one"), [Item(image=image) for image in noise], fast.preset)
    for limit in (5, 40):
        sampling = Sampling(max_turn_tokens=limit)
        for pair in zip(play(fast.engine, [task], sampling), play(plain.engine, [task], sampling), strict=True):
            assert_same(*pair)


def test_sampling_depends_on_seed_query_sample_and_turn_alone(rerankers):
    fast, _ = rerankers
    samples = load_samples()[:3]
    tasks = [AgentTask(s.query, s.candidates, fast.preset, query_id=s.id) for s in samples]
    sampling = Sampling(temperature=1.5, max_turn_tokens=24, seed=5)
    together = play(fast.engine, tasks, sampling)
    (alone,) = play(fast.engine, [tasks[1]], sampling)
    assert alone.token_ids == together[1].token_ids
    tasks[1].sample = 1
    (other,) = play(fast.engine, [tasks[1]], sampling)
    assert other.token_ids != alone.token_ids


def test_control_tokens_are_never_sampled_and_truncated_draws_have_no_logprobs(rerankers):
    fast, _ = rerankers
    sample = load_samples()[0]
    task = AgentTask(sample.query, sample.candidates, fast.preset)
    (wild,) = play(fast.engine, [task], Sampling(temperature=2.0, max_turn_tokens=100))
    sampled = [token for token, bit in zip(wild.token_ids, wild.mask, strict=True) if bit]
    assert len(sampled) > 30 and not set(sampled) & set(fast.engine.encoder.suppressed_ids)
    (truncated,) = play(fast.engine, [task], Sampling(temperature=1.0, top_k=5, max_turn_tokens=10))
    assert all(turn.logprobs is None for turn in truncated.assistant_turns)


def begin(reranker, count):
    """Conversations that wait for their first turn, and their tasks."""
    tasks = [AgentTask(s.query, s.candidates, reranker.preset, query_id=s.id) for s in load_samples()[:count]]
    engine, sessions = reranker.engine, []
    for task in tasks:
        pictures = [item.load_image() if item.image is not None else None for item in [task.query, *task.candidates]]
        encoded = engine.encoder.prompt(task.messages(), pictures.__getitem__, reranker.preset)
        sessions.append(engine.open(task.query_id))
        engine.submit(sessions[-1], encoded, reranker.sampling)
    return sessions, tasks


def finish(engine, plain, sessions, tasks) -> None:
    """Plays these turns to their ends, which are those of the other engine."""
    results = {}
    while left := set(sessions) - set(results):
        results |= {result.session: result for result in engine.poll(left)}
    for session, (reference,) in zip(sessions, [play(plain.engine, [task]) for task in tasks], strict=True):
        assert results[session].token_ids == reference.turns[1].token_ids[: reference.turns[1].num_sampled]
        engine.close(session)
    assert not engine._requests and not engine.llm.llm_engine.has_unfinished_requests()


def test_closing_in_the_middle_of_a_turn_leaves_the_others_as_they_were(rerankers):
    fast, plain = rerankers
    sessions, tasks = begin(fast, 3)
    fast.engine.close(sessions[0])
    finish(fast.engine, plain, sessions[1:], tasks[1:])


def test_who_waits_is_asked_at_each_step_whether_to_go_on(rerankers):
    """In the middle of a turn; what is closed then is aborted, and all others go on."""
    fast, plain = rerankers
    engine, calls = fast.engine, []

    def stop():
        calls.append(None)
        if len(calls) == 4:
            raise InterruptedError

    sessions, tasks = begin(fast, 3)
    engine.on_token = stop
    try:
        with pytest.raises(InterruptedError):
            engine.poll(sessions[:2])
    finally:
        engine.on_token = None
    assert len(engine._requests) == 3
    engine.close(sessions[0])
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 2
    finish(engine, plain, sessions[1:], tasks[1:])


def test_what_vllm_refuses_costs_its_query_only(rerankers):
    """More pictures than the engine was made for."""
    from PIL import Image

    fast, _ = rerankers
    many = [Image.new("RGB", (28, 28), (9 * i, 0, 0)) for i in range(25)]
    reranker = Reranker(fast.engine, fast.preset, window=25, stride=12)
    bad, good = reranker.rank_batch([("q", many), ("a cat", many[:3])], on_error="record")
    assert "engine 'vllm' failed for query '0'" in bad.error and sorted(bad.order) == list(range(25))
    assert good.error is None and len(good.trajectories) == 1
    with pytest.raises(EngineError, match="query '0'"):
        reranker.rank("q", many)


def test_an_engine_whose_process_has_died_is_lost(rerankers, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    engine = rerankers[0].engine
    for error, is_lost in ((EngineDeadError(), True), (ValueError("this step"), False)):
        sessions, _ = begin(rerankers[0], 1)
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm.llm_engine, "step", mock.Mock(side_effect=error))
            with pytest.raises(EngineError, match=f"queries {sessions[0].query_id}") as caught:
                engine.poll(sessions)
        engine.close(sessions[0])
        assert engine.is_lost(caught.value) == is_lost
    with monkeypatch.context() as patch:  # it died while nothing was under way
        patch.setattr(engine.llm.llm_engine, "add_request", mock.Mock(side_effect=EngineDeadError()))
        with pytest.raises(EngineError) as caught:
            begin(rerankers[0], 1)
        assert engine.is_lost(caught.value)


def test_a_subfolder_is_refused():
    with pytest.raises(ValueError, match="cannot load the subfolder"):
        Reranker.from_pretrained(bundled_model(), engine="vllm", subfolder="x")
