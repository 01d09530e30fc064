"""The real vLLM in this process, held against the transformers engine trajectory by trajectory, in full precision."""

from __future__ import annotations

import gc
from unittest import mock

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this folder where it is")

import vllm
from bundled import one_sample_a_task
from vllm.distributed import cleanup_dist_env_and_memory

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import EngineError, Sampling
from vretrver_hf.engines import vllm as vllm_engine
from vretrver_hf.engines.vllm import VLLMEngine
from vretrver_hf.images import picture_id
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


class Work:
    """What vLLM does within the context, in which its caches are empty at first. `take` returns what came since."""

    def __init__(self, engine):
        self.pictures: set[str] = set()
        """Ids of all pictures that were submitted."""
        self.names: set[str] = set()
        """What vLLM's caches know them by."""
        self._engine = engine
        self._patch = pytest.MonkeyPatch()
        self._turns: dict[tuple[str, int], tuple[int, int]] = {}
        self._processed: list[str] = []
        self._num_seen = 0

    def __enter__(self) -> Work:
        llm_engine = self._engine.llm.llm_engine
        for reset in (llm_engine.reset_prefix_cache, llm_engine.reset_mm_cache, llm_engine.reset_encoder_cache):
            reset()
        processor = type(self._engine.encoder.processor.image_processor)
        preprocess = processor.preprocess

        def process(processor, images, *args, **kwargs):
            self._processed += {picture_id(image) for image in images}  # a prompt may show the same one twice
            return preprocess(processor, images, *args, **kwargs)

        add_request = llm_engine.engine_core.add_request

        def add(request):
            self.names |= {feature.identifier for feature in request.mm_features or ()}
            add_request(request)

        self._patch.setattr(llm_engine.engine_core, "add_request", add)
        self._patch.setattr(processor, "preprocess", process)
        self._patch.setattr(self._engine, "submit", self._submit)
        self._patch.setattr(self._engine, "_step", self._step)
        (self._hook,) = self._engine.llm.apply_model(self._watch_tower)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        self._patch.undo()

    def take(self) -> tuple[dict[tuple[str, int], tuple[int, int]], list[str], int]:
        """
        By query and turn how many tokens the conversation had and how many of them were read before; the pictures that
        passed the processor, and how many passed the tower.
        """
        taken = self._turns, self._processed, self._num_seen
        self._turns, self._processed, self._num_seen = {}, [], 0
        return taken

    def _watch_tower(self, model):
        def see(tower, args, kwargs, output):
            self._num_seen += len(kwargs["grid_thw"])

        return model.visual.register_forward_hook(see, with_kwargs=True)

    def _submit(self, session, encoded, sampling):
        VLLMEngine.submit(self._engine, session, encoded, sampling)
        self.pictures.update(session.image_ids)

    def _step(self):
        outputs = VLLMEngine._step(self._engine)
        for output in outputs:
            session = self._engine._requests[output.request_id]
            counts = len(output.prompt_token_ids), output.num_cached_tokens
            self._turns[session.query_id, session.turn] = counts
        return outputs


def test_every_conversation_is_the_transformers_engines(rerankers):
    """Held-out samples with pictures and calls, all at once, then again with warm caches."""
    fast, plain = rerankers
    pairs = [(sample.query, sample.candidates) for sample in one_sample_a_task().values()]
    expected = plain.rank_batch(pairs)
    assert sum(ranking.num_calls for ranking in expected) >= 3
    block = fast.engine.llm.llm_engine.vllm_config.cache_config.block_size
    passes = []
    with Work(fast.engine) as work:
        for _ in range(2):
            for mine, theirs in zip(fast.rank_batch(pairs), expected, strict=True):
                assert mine.order == theirs.order
                for pair in zip(mine.trajectories, theirs.trajectories, strict=True):
                    assert_same(*pair)
            passes.append(work.take())
    (first, processed, num_seen), (second, *again) = passes
    assert max(turn for _, turn in first) >= 3 and len(work.pictures) > 20
    assert work.names == work.pictures
    # Only whole blocks are kept, and the last token is always read. Of what a conversation had before, nothing is.
    later = {place: counts for place, counts in first.items() if place[1] > 1}
    assert all(cached >= first[query, turn - 1][0] // block * block for (query, turn), (_, cached) in later.items())
    assert second == {place: (count, (count - 1) // block * block) for place, (count, _) in first.items()}
    # Each picture passes the processor and the tower once, whichever turn and query shows it.
    assert sorted(processed) == sorted(work.pictures) and num_seen == len(work.pictures) and again == [[], 0]


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


class Stopped(Exception):
    """What is raised in place of loading a model."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_num_seqs": 64, "enable_prefix_caching": True, "tensor_parallel_size": 1, "dtype": "auto"}),
        ({"max_sessions": 3, "tensor_parallel_size": 2}, {"max_num_seqs": 3, "tensor_parallel_size": 2}),
        (  # what is given goes before what the engine sets itself
            {"max_sessions": 3, "max_num_seqs": 5, "enable_prefix_caching": False, "max_model_len": 1024},
            {"max_num_seqs": 5, "enable_prefix_caching": False, "max_model_len": 1024},
        ),
        (
            {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
            {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
        ),
    ],
)
def test_settings_reach_vllm(monkeypatch, given, expected):
    """Its own class for them takes them, so they bear the names that it knows."""
    made = []

    def load(**settings):
        made.append(vllm.EngineArgs(**settings))
        raise Stopped

    monkeypatch.setattr(vllm, "LLM", load)
    with pytest.raises(Stopped):
        VLLMEngine.from_pretrained(bundled_model(), **given)
    (arguments,) = made
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert arguments.model == str(bundled_model()) and arguments.mm_processor_kwargs == {"do_resize": False}


def test_settings_are_those_that_vllm_runs_with(rerankers):
    config = rerankers[0].engine.llm.llm_engine.vllm_config
    assert config.cache_config.enable_prefix_caching
    assert (config.scheduler_config.max_num_seqs, config.model_config.max_model_len) == (8, 2048)
    assert config.parallel_config.tensor_parallel_size == 1


def test_vllm_cannot_run_replicas_in_one_process(monkeypatch):
    """What the refusal is for. Where this fails, vLLM can, and the refusal can go."""
    monkeypatch.setattr(vllm_engine, "_check_replicas", lambda name, settings: None)
    with pytest.raises(ValueError, match="data_parallel_size=2.* is not supported for single-process usage"):
        VLLMEngine.from_pretrained(bundled_model(), data_parallel_size=2, **SETTINGS)


def test_a_subfolder_is_refused():
    with pytest.raises(ValueError, match="cannot load the subfolder"):
        Reranker.from_pretrained(bundled_model(), engine="vllm", subfolder="x")
