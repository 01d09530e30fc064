from __future__ import annotations

import math
import random

import pytest
import torch
from scripted import ForcedEngine
from tiny_models import make_model

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentLoop, AgentTask, play
from vretrver_hf.encoding import Encoded
from vretrver_hf.engines import Sampling, _slot_cache, transformers
from vretrver_hf.engines.transformers import TransformersEngine, _Draw, _Session
from vretrver_hf.protocol import build_messages, format_answer, format_call, format_turn, get_preset
from vretrver_hf.trajectory import Trajectory


PRESET = get_preset("foveated", overview_pixels=128 * 128, inspect_pixels=160 * 160, max_calls=3)
TURNS = [
    format_turn(
        "the second looks right", format_call("crop_image", {"bbox_2d": [0.2, 0, 0.7, 0.5], "target_image": 2})
    ),
    format_turn("and the others", format_call("select_images", {"target_images": [1, 2]})),
    format_turn("hm", format_call("select_images", {"target_images": [9]})),
]


# Float32 keeps seven digits; which way the last one goes depends on the CPU's kernels.
ROUNDING = {"abs": 1e-5, "rel": 5e-6}


def make_task(picture, query_id: str, num_candidates: int = 3, images: int = 2) -> AgentTask:
    candidates = [
        Item(text=f"text {i}", image=picture(90 + 40 * i, 120) if i < images else None) for i in range(num_candidates)
    ]
    return AgentTask(Item(text=f"query {query_id}"), candidates, PRESET, query_id=query_id)


def begin(engine, task):
    """A conversation whose first turn waits."""
    pictures = [None, *(item.load_image() if item.image is not None else None for item in task.candidates)]
    messages = build_messages(task.query, task.candidates, PRESET)
    session = engine.open(task.query_id)
    engine.submit(session, engine.encoder.prompt(messages, pictures.__getitem__, PRESET), Sampling())
    return session


def full_logits(model, engine, task, trajectory) -> torch.Tensor:
    """Rows of logits that the sampled tokens are drawn from, of one plain forward pass over the whole conversation."""
    items = [task.query, *task.candidates]
    pictures = [ref.render(items[ref.index].load_image()) for ref in trajectory.images]
    vision = (
        engine.encoder.processor.image_processor(pictures, do_resize=False, return_tensors="pt") if pictures else {}
    )
    ids = torch.tensor([trajectory.token_ids])
    model.model.rope_deltas = None  # transformers reuses those of the last forward pass with pictures
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == engine.encoder.image_pad).int(),
            **vision,
        ).logits[0]
    return logits[[i - 1 for i, bit in enumerate(trajectory.mask) if bit]]


def play_one(engine, task) -> tuple[Trajectory, torch.Tensor]:
    """The trajectory, and the rows of logits that its sampled tokens were drawn from."""
    rows = []
    hook = engine.model.lm_head.register_forward_hook(lambda head, args, logits: rows.append(logits.view(1, -1)))
    try:
        (trajectory,) = play(engine, [task])
    finally:
        hook.remove()
    return trajectory, torch.cat(rows)


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("num_calls", [0, 1, 2, 3])
def test_cached_turns_equal_a_full_prefill(model, processor, picture, images, num_calls):
    script = [*TURNS[:num_calls], format_turn("so", format_answer([1, 0, 2]))]
    engine = ForcedEngine(model, processor, lambda query_id, turn: script[turn])
    task = make_task(picture, "a", images=images)
    trajectory, cached = play_one(engine, task)
    assert trajectory.order == [1, 0, 2] and trajectory.num_calls == num_calls
    full = full_logits(model, engine, task, trajectory)
    assert cached.shape == full.shape == (trajectory.num_sampled_tokens, len(processor.tokenizer))
    # Of the length of a row, not of each logit: these models' logits go up to 7, and a plain pass in float32 is itself
    # 2e-5 away from one in float64.
    assert ((cached - full).norm(dim=1) <= 1e-5 * full.norm(dim=1)).all()
    sampled = [token for token, bit in zip(trajectory.token_ids, trajectory.mask, strict=True) if bit]
    logprobs = [value for value in trajectory.logprobs if value is not None]
    expected = full.log_softmax(-1)[range(len(sampled)), sampled].tolist()
    assert logprobs == pytest.approx(expected, **ROUNDING)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_cached_turns_differ_from_a_full_prefill_by_rounding_only(family, processor, picture, images):
    """In float64 every logit is the same to twelve digits, so what float32 is off by is no mistake."""
    script = [*TURNS, format_turn("so", format_answer([1, 0, 2]))]
    model = make_model(family, processor).double()
    engine = ForcedEngine(model, processor, lambda query_id, turn: script[turn])
    task = make_task(picture, "a", images=images)
    trajectory, cached = play_one(engine, task)
    assert trajectory.num_calls == 3 and cached.dtype == torch.float64
    assert (cached - full_logits(model, engine, task, trajectory)).abs().max() <= 1e-12


def test_a_batch_gives_what_single_rows_give(model, processor, picture):
    """Conversations of different lengths start, pause and end at different times, in batches of three and alone."""
    tasks = [make_task(picture, str(i), num_candidates=1 + i, images=i % 3) for i in range(7)]
    rng = random.Random(0)
    scripts = {}
    for task in tasks:
        answer = format_turn("x" * rng.randrange(20), format_answer(range(len(task.candidates))))
        scripts[task.query_id] = [*TURNS[: rng.randrange(4)], answer]

    def run(max_sessions):
        script = lambda query_id, turn: scripts[query_id][turn]  # noqa: E731
        return play(ForcedEngine(model, processor, script, max_sessions=max_sessions, prefill_tokens=2000), tasks)

    for together, alone in zip(run(3), run(1), strict=True):
        assert together.token_ids == alone.token_ids and together.mask == alone.mask
        known = [value for value in together.logprobs if value is not None]
        assert known == pytest.approx([value for value in alone.logprobs if value is not None], **ROUNDING)


def test_free_running_batches_agree_too(model, processor, picture):
    tasks = [make_task(picture, str(i), num_candidates=2 + i % 3) for i in range(5)]
    runs = [
        play(TransformersEngine(model, processor, max_sessions=n), tasks, Sampling(max_turn_tokens=12)) for n in (1, 5)
    ]
    for alone, together in zip(*runs, strict=True):
        assert alone.token_ids == together.token_ids


def test_sampling_depends_on_seed_query_sample_and_turn_alone(model, processor, picture):
    sampling = Sampling(temperature=1.0, max_turn_tokens=12, seed=5)
    tasks = [make_task(picture, str(i)) for i in range(4)]
    engine = TransformersEngine(model, processor, max_sessions=4)
    together = play(engine, tasks, sampling)
    (alone,) = play(TransformersEngine(model, processor, max_sessions=1), [tasks[2]], sampling)
    assert together[2].token_ids == alone.token_ids
    tasks[2].sample = 1
    (other_sample,) = play(engine, [tasks[2]], sampling)
    (other_seed,) = play(engine, [tasks[1]], Sampling(temperature=1.0, max_turn_tokens=12, seed=6))
    assert other_sample.token_ids != alone.token_ids
    assert other_seed.token_ids != together[1].token_ids


def test_pads_are_never_sampled(model, processor, picture):
    sampling = Sampling(temperature=50.0, max_turn_tokens=200)
    engine = TransformersEngine(model, processor)
    (trajectory,) = play(engine, [make_task(picture, "a")], sampling)
    sampled = [token for token, bit in zip(trajectory.token_ids, trajectory.mask, strict=True) if bit]
    assert len(sampled) > 300 and not set(sampled) & set(engine.encoder.suppressed_ids)


def test_eager_and_sdpa_agree(family, processor, picture):
    runs = []
    tasks = [make_task(picture, str(i), num_candidates=2 + i) for i in range(3)]
    for implementation in ("sdpa", "eager"):
        model = make_model(family, processor)
        model.set_attn_implementation(implementation)
        script = lambda query_id, turn: [*TURNS, format_answer([0, 1])][turn]  # noqa: E731
        runs.append(play(ForcedEngine(model, processor, script), tasks))
    for sdpa, eager in zip(*runs, strict=True):
        assert [v for v in sdpa.logprobs if v] == pytest.approx([v for v in eager.logprobs if v], abs=1e-4)


def test_a_closed_conversation_frees_its_row(model, processor):
    engine = TransformersEngine(model, processor, max_sessions=1)
    ids = engine.encoder.tokenizer.encode("hello", add_special_tokens=False)
    first, second = engine.open("a"), engine.open("b")
    for session in (first, second):
        engine.submit(session, Encoded(ids, [], [], "hello"), Sampling(max_turn_tokens=3))
    both = [first, second]
    assert [result.session for result in engine.poll(both)] == [first]
    assert engine.poll(both) == []  # the second waits for the row that the first still holds
    engine.close(first)
    assert [result.session for result in engine.poll(both)] == [second]
    engine.close(second)
    engine.close(second)  # closing twice is harmless


def test_closing_in_the_middle_of_a_turn_leaves_the_others_as_they_were(model, processor, picture):
    tasks = [make_task(picture, str(i)) for i in range(3)]
    lengths = {"0": 90, "1": 5, "2": 60}

    def script(query_id, turn):
        return format_turn("x" * lengths[query_id], format_answer([0, 1, 2]))

    engine = ForcedEngine(model, processor, script, max_sessions=3)
    sessions = [begin(engine, task) for task in tasks]
    assert [result.session for result in engine.poll(sessions)] == [sessions[1]]
    engine.close(sessions[1])
    engine.close(sessions[0])  # in the middle of its turn: row 2 moves into its place
    (last,) = engine.poll(sessions)
    (reference,) = play(ForcedEngine(model, processor, script, max_sessions=1), [tasks[2]])
    assert last.token_ids == reference.turns[1].token_ids
    assert last.logprobs == pytest.approx(reference.turns[1].logprobs, abs=1e-5)


def test_what_went_wrong_in_one_conversation_stays_there(model, processor, picture):
    """A row that held NaN serves the next conversation as if it were new, beside a longer one."""
    tasks = [make_task(picture, "0", num_candidates=2, images=0), make_task(picture, "1", num_candidates=4)]
    script = lambda query_id, turn: format_answer(range(2 if query_id == "0" else 4))  # noqa: E731
    clean = play(ForcedEngine(model, processor, script), tasks)
    engine = ForcedEngine(model, processor, script)
    play(engine, tasks[::-1])
    holder, victim = engine.open("1"), engine.open("1")
    ids = engine.encoder.tokenizer.encode("hello " * 400, add_special_tokens=False)
    for session in (holder, victim):
        engine.submit(session, Encoded(ids, [], [], ""), Sampling())
    engine.poll([holder, victim])
    for layer in engine._cache.layers:
        layer.keys[victim.row], layer.values[victim.row] = torch.nan, torch.nan
    engine.close(victim)
    again = play(engine, tasks)
    for before, after in zip(clean, again, strict=True):
        known = [value for value in after.logprobs if value is not None]
        assert known == pytest.approx([value for value in before.logprobs if value is not None], abs=1e-5)


def test_memory_is_given_back_when_nothing_is_under_way(model, processor, picture):
    engine = ForcedEngine(model, processor, lambda query_id, turn: format_answer([0, 1, 2]))
    play(engine, [make_task(picture, "0")])
    assert all(layer.keys is None for layer in engine._cache.layers)


def test_a_failing_prefill_tells_its_cause_and_frees_its_rows(model, processor, picture, monkeypatch):
    engine = ForcedEngine(model, processor, lambda query_id, turn: format_answer([0, 1, 2]))
    tasks = [make_task(picture, str(i)) for i in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.features, "_compute", lambda images: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play(engine, tasks)
    assert not engine._rows and not engine._waiting
    assert [trajectory.status for trajectory in play(engine, tasks)] == ["ok"] * 3


def test_the_cache_grows_once_for_all_that_wait(model, processor, picture, monkeypatch):
    """With each batch anew, a GPU's allocator would keep as many sizes of it as there are batches."""
    engine = ForcedEngine(
        model, processor, lambda query_id, turn: format_answer([0, 1, 2]), max_sessions=7, prefill_tokens=600
    )
    enlarged, calls = _slot_cache._enlarged, []
    monkeypatch.setattr(_slot_cache, "_enlarged", lambda old, *size: calls.append(size) or enlarged(old, *size))
    play(engine, [make_task(picture, str(i)) for i in range(7)])
    assert len(calls) == 4 and {rows for rows, _ in calls} == {7}  # keys and values, in two layers


def test_a_prefill_that_failed_makes_no_room_for_later_ones(model, processor, picture, monkeypatch):
    engine = ForcedEngine(model, processor, lambda query_id, turn: format_answer([0, 1, 2]))
    with monkeypatch.context() as patch:
        patch.setattr(engine.features, "_compute", lambda images: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            play(engine, [make_task(picture, str(i)) for i in range(3)])
    enlarged, calls = _slot_cache._enlarged, []
    monkeypatch.setattr(_slot_cache, "_enlarged", lambda old, *size: calls.append(size) or enlarged(old, *size))
    play(engine, [make_task(picture, "3")])
    assert {rows for rows, _ in calls} == {1}


@pytest.mark.parametrize("succeed", range(4))  # of keys and values, in two layers
def test_full_memory_when_another_conversation_joins(model, processor, picture, monkeypatch, succeed):
    """While the first one writes, the cache may get a second row in some layers, and half in one."""
    script = lambda query_id, turn: format_turn("x" * 90, format_answer([0, 1, 2]))  # noqa: E731
    engine = ForcedEngine(model, processor, script, max_sessions=2)
    tasks = [make_task(picture, str(i)) for i in range(2)]
    (expected,) = play(ForcedEngine(model, processor, script), tasks[:1])
    sessions, rows = [begin(engine, tasks[0])], []
    enlarged = _slot_cache._enlarged

    def join():
        if sessions[0].decoding and len(sessions) == 1:
            sessions.append(begin(engine, tasks[1]))

    def full(old, *size):
        rows.extend([size[0]] * (old.numel() > 0))
        if len(rows) > succeed:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return enlarged(old, *size)

    engine.on_token = join
    with monkeypatch.context() as patch:
        patch.setattr(_slot_cache, "_enlarged", full)
        with pytest.raises(torch.OutOfMemoryError):
            engine.poll(sessions)
    assert rows == [2] * (succeed + 1)
    engine.on_token = None
    for session in sessions:
        engine.close(session)
    assert not engine._rows and not engine._waiting
    assert play(engine, tasks)[0].token_ids == expected.token_ids


@pytest.mark.parametrize("succeed", range(4))  # of keys and values, in two layers
def test_full_memory_while_the_cache_grows_tells_what_to_lower(model, processor, picture, monkeypatch, succeed):
    """What is written needs more columns: the cache may grow in some layers, and half in one."""
    script = lambda query_id, turn: format_answer([0, 1, 2])  # noqa: E731
    engine = ForcedEngine(model, processor, script, max_sessions=2, prefill_tokens=600)
    tasks = [make_task(picture, str(i)) for i in range(2)]
    (expected,) = play(ForcedEngine(model, processor, script), tasks[:1])
    enlarged, calls = _slot_cache._enlarged, []

    def full(old, rows, columns):
        calls.extend([rows] * (old.numel() > 0))
        if len(calls) > succeed:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return enlarged(old, rows, columns)

    loop = AgentLoop(engine)
    with monkeypatch.context() as patch:
        patch.setattr(_slot_cache, "_enlarged", full)
        patch.setattr(_slot_cache, "_GROWTH", 0)
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory") as caught:
            list(loop.run(tasks))
    assert caught.value.__notes__ == [
        "lower max_sessions (2 now; keys and values of as many conversations) or prefill_tokens (600 now; tokens "
        "read at a time)"
    ]
    assert caught.value.__context__ is None  # nothing hides it
    assert not engine._rows and not engine._waiting
    assert play(engine, tasks)[0].token_ids == expected.token_ids


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fail_at", [0, 5])
def test_an_error_within_a_forward_pass_is_what_the_caller_sees(
    model, processor, picture, monkeypatch, layer, fail_at
):
    """In a prefill and in decode steps, in the first layer and behind it; what comes next is played as ever."""
    script = lambda query_id, turn: format_answer([0, 1, 2])  # noqa: E731
    tasks = [make_task(picture, str(i)) for i in range(3)]
    expected = play(ForcedEngine(model, processor, script), tasks)
    reranker = Reranker(ForcedEngine(model, processor, script, max_sessions=3, prefill_tokens=600), preset=PRESET)
    block = model.model.language_model.layers[layer]
    forward, count = block.forward, iter(range(10**6))

    def failing(*args, **kwargs):
        if next(count) >= fail_at:
            raise RuntimeError("the kernel failed")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", failing)
        with pytest.raises(RuntimeError, match="^the kernel failed$") as caught:
            reranker.rank_batch([(task.query, task.candidates) for task in tasks])
    assert caught.value.__context__ is None and not hasattr(caught.value, "__notes__")
    again = play(reranker.engine, tasks)
    assert [trajectory.token_ids for trajectory in again] == [trajectory.token_ids for trajectory in expected]


def test_a_device_that_failed_does_not_hide_its_first_error(model, processor, picture, monkeypatch):
    """After a failed assertion on a GPU everything fails, also the moving of rows."""
    engine = ForcedEngine(model, processor, lambda query_id, turn: format_answer([0, 1, 2]))

    def broken(*args, **kwargs):
        raise torch.AcceleratorError("device-side assert triggered")

    for method in ("move", "clear"):
        monkeypatch.setattr(engine._cache, method, broken)
    monkeypatch.setattr(engine.features, "_compute", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        play(engine, [make_task(picture, str(i)) for i in range(3)])
    assert not engine._rows and not engine._waiting


def test_a_conversation_beyond_the_context_is_refused(model, processor):
    engine = TransformersEngine(model, processor)
    engine.max_length = 10
    with pytest.raises(ValueError, match="at most 10.*fewer candidates"):
        engine.submit(engine.open(), Encoded([0] * 10, [], [], ""), Sampling())


def writers(sampling: Sampling, count: int) -> list[_Session]:
    """Conversations about to write, each with a source of its own."""
    sessions = [_Session(str(i), 0) for i in range(count)]
    for i, session in enumerate(sessions):
        session.sampling, session.random = sampling, random.Random(i)
    return sessions


def draw(logits: torch.Tensor, sessions: list[_Session]) -> tuple[torch.Tensor, torch.Tensor]:
    return _Draw(sessions, 1, [], torch.device("cpu"))(logits, 0)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4).clone()
    chosen, logprobs = draw(logits, writers(Sampling(temperature=0.5), 4000))
    shares = torch.bincount(chosen, minlength=4) / 4000
    expected = (logits[0] / 0.5).softmax(-1)
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.02)
    assert logprobs.exp().tolist() == pytest.approx(expected[chosen].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("limits", "allowed"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0}), ({"top_p": 0.85}, {0, 1})]
)
def test_truncation_limits_the_draws_but_not_the_logprobs(limits, allowed):
    # softmax of (2, 1, 0, -1) is 0.644, 0.237, 0.087, 0.032
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(500, 4).clone()
    chosen, logprobs = draw(logits, writers(Sampling(temperature=1.0, **limits), 500))
    assert set(chosen.tolist()) == allowed
    assert logprobs[chosen == 0][0].exp().item() == pytest.approx(math.exp(2) / sum(map(math.exp, (2, 1, 0, -1))))


def test_each_conversation_is_drawn_by_its_own_settings_and_never_what_is_suppressed():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(300, 4)
    sessions = writers(Sampling(), 300)
    for session in sessions[::3]:
        session.sampling = Sampling(temperature=1.0)
    mixed, logprobs = _Draw(sessions, 1, [0], torch.device("cpu"))(logits.clone(), 0)
    greedy = [chosen for i, chosen in enumerate(mixed.tolist()) if i % 3]
    assert set(greedy) == {1} and set(mixed[::3].tolist()) == {1, 2, 3}
    expected = torch.tensor([-math.inf, 2.0, 1.0, 0.0]).log_softmax(-1)
    assert logprobs.tolist() == pytest.approx(expected[mixed].tolist(), abs=1e-6)
    (alone, _) = draw(logits[:1].clone(), writers(Sampling(temperature=1.0), 1))
    assert alone.tolist() == draw(logits[:1].clone(), writers(Sampling(temperature=1.0), 1))[0].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_of_tokens_end_where_single_tokens_would(model, processor, picture, temperature):
    """Real turns of many lengths, whose rows are used again, with the host looking after each token or seldom."""
    tasks = [make_task(picture, str(i), num_candidates=2 + i % 3) for i in range(9)]
    rng = random.Random(1)
    scripts = {
        task.query_id: [*TURNS[: rng.randrange(4)], format_turn("y" * rng.randrange(30), format_answer([1, 0]))]
        for task in tasks
    }
    script = lambda query_id, turn: scripts[query_id][turn]  # noqa: E731
    sampling = Sampling(temperature=temperature, max_turn_tokens=11 if temperature else 100, seed=3)

    def run(block_tokens):
        kwargs = {"max_sessions": 4, "prefill_tokens": 2000}
        free = temperature > 0
        engine = (
            TransformersEngine(model, processor, **kwargs)
            if free
            else ForcedEngine(model, processor, script, **kwargs)
        )
        engine._block_tokens = block_tokens
        return play(engine, tasks, sampling)

    single = run(1)
    for block_tokens in (3, 8):
        for one, many in zip(single, run(block_tokens), strict=True):
            assert many.token_ids == one.token_ids and many.mask == one.mask
            known = [value for value in one.logprobs if value is not None]
            assert [value for value in many.logprobs if value is not None] == pytest.approx(known, abs=1e-5)


def test_a_block_stops_where_the_context_ends(model, processor, picture):
    def run(block_tokens):
        engine = TransformersEngine(model, processor)
        engine._block_tokens = block_tokens
        (opened,) = play(engine, [make_task(picture, "a", images=0)], Sampling(max_turn_tokens=1))
        engine.max_length = len(opened.turns[0].token_ids) + 21
        session = engine.open("a")
        prompt = opened.turns[0]
        engine.submit(session, Encoded(prompt.token_ids, [], [], ""), Sampling(temperature=1.0, max_turn_tokens=500))
        (result,) = engine.poll([session])
        assert result.stop == "length" and session.num_tokens <= engine.max_length
        return result.token_ids

    assert run(1) == run(8)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_turn_tokens": 0}, "max_turn_tokens"),
    ],
)
def test_impossible_sampling_is_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        Sampling(**values)


def test_loads_from_a_folder_in_the_asked_type(family, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    engine = TransformersEngine.from_pretrained(tmp_path, device="cpu", max_sessions=2)
    assert engine.model.dtype == torch.float32 and engine.encoder.family == family
    half = TransformersEngine.from_pretrained(tmp_path, dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert half.model.dtype == torch.bfloat16


def test_an_unsupported_family_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert' model; supported are"):
        TransformersEngine.from_pretrained(tmp_path)


def test_a_picture_passes_the_tower_once_in_all_turns_and_queries(model, processor, picture):
    """What returns is recalled, and says the same as where it is computed anew."""
    script = [*TURNS[:2], TURNS[1], format_turn("so", format_answer([1, 0, 2]))]
    first = make_task(picture, "a")
    second = AgentTask(Item(text="another query"), first.candidates[::-1], PRESET, query_id="b")
    cached, bare = (
        ForcedEngine(model, processor, lambda query_id, turn: script[turn], feature_bytes=size) for size in (2**30, 0)
    )
    for mine, theirs in zip(play(cached, [first, second]), play(bare, [first, second]), strict=True):
        assert mine.token_ids == theirs.token_ids
        known = [value for value in mine.logprobs if value is not None]
        assert known == pytest.approx([value for value in theirs.logprobs if value is not None], abs=1e-5)
    distinct = {(ref.index, ref.width, ref.height, ref.box) for ref in play(cached, [first])[0].images}
    shown_again = cached.features.num_recalled
    assert cached.features.num_computed <= 2 * len(distinct) and shown_again > len(distinct)


def test_new_turns_wait_for_each_other_while_many_write(model, processor, monkeypatch):
    """Turns of many lengths end one by one; the passes that read new ones are few, and what is said is the same."""
    lengths = {f"q{i}": i for i in range(20)}
    candidates = [Item(text="a"), Item(text="b"), Item(text="c")]
    tasks = [AgentTask(Item(text="q"), candidates, PRESET, query_id=name) for name in lengths]

    def script(query_id, turn):
        thought = "so " * (1 + 7 * lengths[query_id] * (turn + 1) % 13)
        if turn < 2:
            return format_turn(thought, format_call("select_images", {"target_images": [1]}))
        return format_turn(thought, format_answer([1, 0, 2]))

    def played(writers):
        monkeypatch.setattr(transformers, "_WRITERS_PER_READER", writers)
        engine, passes = ForcedEngine(model, processor, script, max_sessions=16), []
        read = engine._forward_prefill
        engine._forward_prefill = lambda batch: passes.append(len(batch)) or read(batch)
        return play(engine, tasks), passes

    patient, few = played(2)
    eager, many = played(10**6)
    assert sum(few) == sum(many) == 3 * len(tasks) and len(few) < 0.7 * len(many)
    for one, other in zip(patient, eager, strict=True):
        assert one.token_ids == other.token_ids and one.finish == "answer"
        known = [value for value in one.logprobs if value is not None]
        assert known == pytest.approx([value for value in other.logprobs if value is not None], abs=1e-5)
