from __future__ import annotations

import dataclasses
import time
from threading import get_ident

import pytest
from scripted import ScriptedEngine

from vretrver_hf import Item, VisualTools
from vretrver_hf.agent import AgentLoop, AgentTask, play
from vretrver_hf.engines import Sampling
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=128 * 128, max_calls=2)
ANSWER = format_turn("so", format_answer([1, 0, 2]))
SELECT = format_turn("look", format_call("select_images", {"target_images": [2]}))
CROP = format_turn("closer", format_call("crop_image", {"bbox_2d": [0, 0, 0.5, 0.5], "target_image": 2}))


@pytest.fixture
def task(picture) -> AgentTask:
    return AgentTask(Item(text="q"), [Item(text="a"), Item(image=picture()), Item(text="c")], PRESET, query_id="q1")


def run(encoder, task, turns, **kwargs):
    engine = ScriptedEngine(encoder, lambda query_id, turn: turns[turn])
    (trajectory,) = play(engine, [task], **kwargs)
    return trajectory


def roles(trajectory) -> str:
    return "".join(turn.role[0] for turn in trajectory.turns)


def test_a_straight_answer(encoder, task):
    trajectory = run(encoder, task, [ANSWER])
    assert (trajectory.finish, trajectory.status, trajectory.order) == ("answer", "ok", [1, 0, 2])
    assert roles(trajectory) == "pa" and trajectory.num_calls == 0
    assert trajectory.turns[1].thought == "so" and trajectory.turns[1].token_ids[-1] == encoder.end_of_turn
    assert all(trajectory.turns[1].mask)  # the model closed its turn itself


def test_calls_are_carried_out_in_turn(encoder, task):
    trajectory = run(encoder, task, [SELECT, CROP, ANSWER])
    assert roles(trajectory) == "paoaoa" and trajectory.num_valid_calls == 2
    select, crop = trajectory.turns[2], trajectory.turns[4]
    assert [ref.index for ref in select.images] == [2] and select.images[0].box is None
    assert crop.images[0].box is not None and select.text == "Image 2:"
    # A call turn is closed by the loop: the end mark is there, and is not the model's.
    assert trajectory.turns[1].token_ids[-1] == encoder.end_of_turn and trajectory.turns[1].mask[-1] == 0


def test_the_ids_are_one_conversation(encoder, task):
    trajectory = run(encoder, task, [SELECT, ANSWER])
    text = encoder.tokenizer.decode(trajectory.token_ids).replace("<|image_pad|>", "")
    assert text.count("<|im_start|>") == text.count("<|im_end|>") == 5
    assert f"<|im_end|>\n<|im_start|>assistant\n{SELECT}<|im_end|>\n<|im_start|>user\nImage 2:" in text


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ("just talk", "Malformed turn"),
        (SELECT.replace("[2]", "[2"), "Malformed turn"),  # broken JSON
        (SELECT.replace("select_images", "delete_images"), "no such tool"),
        (SELECT.replace("[2]", "[1]"), "has no image"),  # a text-only candidate
        (SELECT.replace("[2]", "[4]"), "out of range"),
        (CROP.replace("0.5, 0.5", "0, 0"), "bbox_2d"),  # an empty box
    ],
)
def test_misuse_is_told_and_the_model_may_go_on(encoder, task, turn, told):
    trajectory = run(encoder, task, [turn, SELECT, ANSWER])
    assert told in trajectory.turns[2].text and trajectory.turns[2].valid is False
    assert not trajectory.turns[2].images
    assert trajectory.num_valid_calls == 1 and trajectory.status == "ok"


def test_beyond_the_budget_the_model_is_told_to_answer_once(encoder, task):
    answered = run(encoder, task, [SELECT, SELECT, SELECT, ANSWER])
    assert roles(answered) == "paoaoaoa" and "Answer now" in answered.turns[6].text
    assert answered.num_calls == 3 and answered.num_valid_calls == 2 and answered.status == "ok"
    assert answered.turns[5].valid is False  # the call beyond the budget
    stubborn = run(encoder, task, [SELECT] * 9)
    assert roles(stubborn) == "paoaoaoa"
    assert (stubborn.finish, stubborn.status, stubborn.order) == ("no_answer", "fallback", [0, 1, 2])


def test_without_tools_a_call_is_not_carried_out(encoder, task):
    task.tools = False
    trajectory = run(encoder, task, [SELECT, ANSWER])
    assert trajectory.num_valid_calls == 0 and "Answer now" in trajectory.turns[2].text
    assert "select_images" not in trajectory.turns[0].text


def test_a_repaired_answer_says_so(encoder, task):
    trajectory = run(encoder, task, ["<think>x</think>\n<answer>[3, 3, 9]</answer>"])
    assert (trajectory.status, trajectory.order) == ("repaired", [2, 0, 1]) and trajectory.problems


def test_a_turn_without_end_is_cut_and_told(encoder, task):
    trajectory = run(encoder, task, ["x" * 500, ANSWER], sampling=Sampling(max_turn_tokens=100))
    assert trajectory.turns[1].num_sampled == 100 and trajectory.turns[1].kind == "malformed"
    assert "100 tokens" in trajectory.turns[2].text and trajectory.status == "ok"


def test_a_full_context_ends_the_trajectory(encoder, task):
    prompt = run(encoder, task, [ANSWER]).turns[0]
    room = len(prompt.token_ids) + 300
    engine = ScriptedEngine(encoder, lambda query_id, turn: SELECT, max_length=room)
    (trajectory,) = play(engine, [task], Sampling(max_turn_tokens=250))
    assert (trajectory.finish, trajectory.status) == ("length", "fallback")
    assert "tokens are needed and the model reads at most" in trajectory.problems[0]
    engine.max_length = len(prompt.token_ids)
    (never_started,) = play(engine, [task], Sampling(max_turn_tokens=250))
    assert (never_started.finish, roles(never_started)) == ("length", "p")


def test_a_bad_picture_costs_its_query_only(encoder, task, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    bad = AgentTask(Item(text="q"), [Item(image=broken), Item(text="b")], PRESET, query_id="bad")
    engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER)
    events = []
    first, second = play(engine, [bad, task], on_event=events.append)
    assert (first.finish, first.order) == ("error", [0, 1]) and first.error
    assert second.status == "ok" and not engine._open
    assert [(event.kind, event.text) for event in events if event.query_id == "bad"] == [("answer", first.error)]


def test_events_tell_the_story_in_order(encoder, task):
    events = []
    run(encoder, task, [SELECT, "no", ANSWER], on_event=events.append)
    assert [event.kind for event in events] == [
        "thought", "call", "observation", "observation", "thought", "answer",
    ]  # fmt: skip
    assert events[1].call == {"name": "select_images", "arguments": {"target_images": [2]}}
    assert events[2].valid and len(events[2].images) == 1 and events[3].valid is False
    assert events[5].order == (1, 0, 2) and {event.query_id for event in events} == {"q1"}


def test_many_tasks_run_within_the_engines_room_and_lazily(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: [SELECT, ANSWER][turn], max_sessions=3)
    taken = []

    def tasks():
        for i in range(20):
            taken.append(i)
            yield AgentTask(task.query, task.candidates, PRESET, query_id=str(i))

    finished = []
    for done, trajectory in AgentLoop(engine).run(tasks()):
        finished.append(done.query_id)
        assert trajectory.query_id == done.query_id
        assert len(taken) <= len(finished) + 3 + 1  # one whose pictures are read meanwhile
    assert sorted(finished, key=int) == [str(i) for i in range(20)] and engine.most_open == 3


def test_what_is_next_up_begins_before_those_that_wait(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER, max_sessions=1)
    loop = AgentLoop(engine)
    assert loop.is_hungry
    for query_id in ("first", "second"):
        loop.submit(dataclasses.replace(task, query_id=query_id))
    assert not loop.is_hungry  # one to play and one to read
    loop.submit(dataclasses.replace(task, query_id="urgent"), next_up=True)
    ended = [done.query_id for _ in range(3) for done, _ in loop.step()]
    assert ended == ["urgent", "first", "second"]


def test_samples_of_a_query_read_its_pictures_once(encoder, task, monkeypatch):
    reads, load = [], Item.load_image
    monkeypatch.setattr(Item, "load_image", lambda self, **kwargs: reads.append(self) or load(self, **kwargs))
    engine = ScriptedEngine(encoder, lambda query_id, turn: [CROP, ANSWER][turn])
    play(engine, [dataclasses.replace(task, sample=sample) for sample in range(6)])
    assert len(reads) == sum(item.image is not None for item in [task.query, *task.candidates])


def test_cancelling_hands_back_what_had_begun(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: SELECT)
    loop = AgentLoop(engine)
    loop.submit(task)
    loop.step()
    ((_, trajectory),) = loop.cancel()
    assert (trajectory.finish, trajectory.order) == ("cancelled", [0, 1, 2])
    assert loop.num_active == 0 and not engine._open


def test_an_answer_outside_its_own_turn_is_repaired(encoder, task):
    both = ANSWER + "\n" + SELECT.partition("\n")[2]
    trajectory = run(encoder, task, [both] * 9)
    assert (trajectory.finish, trajectory.status, trajectory.order) == ("no_answer", "repaired", [1, 0, 2])


def test_one_task_may_be_played_several_times(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: ANSWER)
    assert [trajectory.order for trajectory in play(engine, [task, task])] == [[1, 0, 2]] * 2


@pytest.mark.parametrize("kind", ["thought", "call", "observation", "answer"])
def test_a_callback_that_raises_frees_the_engine(encoder, task, kind):
    def on_event(event):
        if event.kind == kind:
            raise InterruptedError(kind)

    engine = ScriptedEngine(encoder, lambda query_id, turn: [SELECT, ANSWER][turn], max_sessions=3)
    with pytest.raises(InterruptedError):
        play(engine, [task] * 5, on_event=on_event)
    assert not engine._open
    assert len(play(engine, [task] * 5)) == 5


def test_closing_the_iterator_frees_the_engine(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: [SELECT, ANSWER][turn], max_sessions=3)
    trajectories = AgentLoop(engine).run([task] * 5)
    next(trajectories)
    trajectories.close()
    assert not engine._open


def test_two_loops_take_turns_on_one_engine(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: [SELECT, ANSWER][turn], max_sessions=3)
    paused = AgentLoop(engine).run([task] * 2)
    first = next(paused)
    (other,) = play(engine, [task])
    assert other.order == first[1].order == next(paused)[1].order


def test_an_engine_without_room_says_so(encoder, task):
    class Full(ScriptedEngine):
        def poll(self, sessions):
            return []

    with pytest.raises(RuntimeError, match="no room.*holds all of its 4 places"):
        play(Full(encoder, lambda query_id, turn: ANSWER), [task])


def test_a_data_sets_own_prompt_is_replayed(encoder, task):
    task.preset = get_preset(PRESET, prompt_source="dataset")
    task.prompt = [{"role": "user", "content": "Mine: <image> Candidates: x"}]
    trajectory = run(encoder, task, [ANSWER])
    assert "Mine: " in trajectory.turns[0].text and "Rank" not in trajectory.turns[0].text
    assert [ref.index for ref in trajectory.turns[0].images] == [2]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "query q1: prompt_source is 'dataset', but the query brings no prompt"),
        ([{"role": "user", "content": "<image><image>"}], "2 <image> marks but there are 1"),
    ],
)
def test_a_missing_or_unfit_prompt_is_an_error(encoder, task, prompt, reason):
    task.preset = get_preset(PRESET, prompt_source="dataset")
    task.prompt = prompt
    with pytest.raises(ValueError, match=reason):
        run(encoder, task, [ANSWER])


def test_one_query_can_be_cancelled_among_others(encoder, task):
    engine = ScriptedEngine(encoder, lambda query_id, turn: [SELECT, ANSWER][turn], max_sessions=2)
    loop = AgentLoop(engine)
    for i in range(4):
        loop.submit(AgentTask(task.query, task.candidates, PRESET, query_id=str(i)))
    loop.step()
    ((_, trajectory),) = loop.cancel("1")
    assert trajectory.finish == "cancelled" and loop.cancel("3") == [] and loop.cancel("9") == []
    ended = []
    while loop.num_active:
        ended += [done.query_id for done, _ in loop.step()]
    assert sorted(ended) == ["0", "2"] and not engine._open


class TogetherEngine(ScriptedEngine):
    """Hands back the turns of all conversations at once, as the engines do that run a model."""

    def poll(self, sessions):
        while self._pending:
            result = self._next()
            self._finished[result.session] = result
        return super().poll(sessions)


def test_threads_carry_out_the_calls_of_turns_that_end_together(encoder, task, monkeypatch):
    scripts = {"q1": [SELECT, CROP, ANSWER], "q2": [CROP, "just talk", ANSWER], "q3": [ANSWER], "q4": [CROP] * 4}
    tasks = [dataclasses.replace(task, query_id=query_id) for query_id in scripts]

    together = set()
    call = VisualTools.call
    # As long as it takes for the other threads to begin too.
    monkeypatch.setattr(
        VisualTools, "call", lambda *args: together.add(get_ident()) or time.sleep(0.05) or call(*args)
    )
    engine = TogetherEngine(encoder, lambda query_id, turn: scripts[query_id][turn])
    found = {task.query_id: trajectory for task, trajectory in AgentLoop(engine).run(tasks)}
    assert len(together) > 1 and get_ident() not in together
    alone = ScriptedEngine(encoder, lambda query_id, turn: scripts[query_id][turn], max_sessions=1)
    expected = {task.query_id: trajectory for task, trajectory in AgentLoop(alone).run(tasks)}
    for query_id, trajectory in expected.items():
        assert found[query_id].token_ids == trajectory.token_ids
        assert found[query_id].num_valid_calls == trajectory.num_valid_calls
        assert (found[query_id].finish, found[query_id].order) == (trajectory.finish, trajectory.order)
