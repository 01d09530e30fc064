from __future__ import annotations

import base64
import io
import logging
import time

import pytest
from faulty_proxy import FaultyProxy
from PIL import Image
from teacher import QUICK, Reply, ScriptedTeacher, query_of, slowly, turn_of

from vretrver_hf import Item, Reranker
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines import EngineError, Sampling
from vretrver_hf.engines.openai import OpenAIEngine
from vretrver_hf.engines.scripted import ScriptedEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.trajectory import Trajectory


PRESET = get_preset("foveated", overview_pixels=128 * 128, inspect_pixels=160 * 160, max_calls=3)
CALL = format_turn("the second?", format_call("crop_image", {"bbox_2d": [0.2, 0, 0.7, 0.5], "target_image": 2}))
ANSWER = format_turn("so", format_answer([1, 0]))
TURNS = [CALL, ANSWER]


def by_turn(body, before):
    return TURNS[turn_of(body)]


@pytest.fixture
def make_reranker():
    made = []

    def make(url, **settings):
        engine = OpenAIEngine("m", url, **{"retries": 4, "timeout": 5, "deadline": 20, **settings})
        made.append(engine)
        return Reranker(engine, PRESET)

    yield make
    for engine in made:
        engine.shutdown()


def pairs_of(picture, count):
    return [(f"query {i}", [picture(90, 120), Item(text="b", image=picture(200, 50))]) for i in range(count)]


def test_a_conversation_with_calls_and_pictures(make_reranker, picture):
    pictures = [picture(90, 120), picture(200, 50)]
    with ScriptedTeacher(by_turn) as server:
        ranking = make_reranker(server.url).rank("a cat", pictures)
    (trajectory,) = ranking.trajectories
    assert (ranking.order, ranking.status, ranking.num_calls) == ([1, 0], "ok", 1)
    assert trajectory.exact_tokens is False and trajectory.token_ids == [] and trajectory.seconds > 0
    assert [turn.text for turn in trajectory.assistant_turns] == TURNS
    first, second = server.requests
    assert first["messages"] == second["messages"][:2] and isinstance(first["messages"][0]["content"], str)
    assert second["messages"][2] == {"role": "assistant", "content": CALL}
    shown = [pixels(block) for message in second["messages"][1::2] for block in message["content"]]
    items = [None, *pictures]
    rendered = [ref.render(items[ref.index]).tobytes() for ref in trajectory.images]
    assert [image.tobytes() for image in shown if image is not None] == rendered and len(rendered) == 3


def test_tokens_are_those_that_the_endpoint_counts(make_reranker, picture):
    usage = [{"prompt_tokens": 100, "completion_tokens": 20}, {"prompt_tokens": 150, "completion_tokens": 7}]

    def count(body, before):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": by_turn(body, 0)}}
        counts = {**usage[turn_of(body)], "total_tokens": 0}
        return Reply(body={"id": "1", "object": "chat.completion", "created": 0, "choices": [choice], "usage": counts})

    with ScriptedTeacher(count) as server:
        ranking = make_reranker(server.url).rank("a cat", [picture(), picture()])
    (trajectory,) = ranking.trajectories
    assert (ranking.num_tokens, trajectory.num_sampled_tokens) == (157, 27)
    assert Trajectory.from_dict(trajectory.to_dict()) == trajectory


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 5}, {"prompt_tokens": None, "completion_tokens": 1}])
def test_an_endpoint_that_does_not_count(make_reranker, usage):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}
    reply = Reply(body={"id": "1", "object": "chat.completion", "created": 0, "choices": [choice], "usage": usage})
    with ScriptedTeacher(lambda body, before: reply) as server:
        ranking = make_reranker(server.url).rank("a cat", ["a", "b"])
    assert ranking.order == [1, 0] and ranking.num_tokens == 0 and ranking.trajectories[0].usage is None


def pixels(block) -> Image.Image | None:
    if block["type"] == "text":
        return None
    header, _, data = block["image_url"]["url"].partition(",")
    assert header == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_same_conversation_as_with_tokens(make_reranker, encoder, picture):
    """What the model reads and is told is the same as where tokens go in and out."""
    turns = [CALL, "just talk", format_turn("x", format_call("select_images", {"target_images": [9]})), ANSWER]
    task = AgentTask(Item(text="a cat"), [Item(image=picture()), Item(image=picture())], PRESET)
    with ScriptedTeacher(lambda body, before: turns[turn_of(body)]) as server:
        engine = make_reranker(server.url, factor=encoder.factor).engine
        (asked,) = play(engine, [task])
    (played,) = play(ScriptedEngine(encoder, lambda query_id, turn: turns[turn]), [task])
    fields = ("role", "text", "images", "kind", "thought", "call", "valid", "problem")
    for mine, theirs in zip(asked.turns[1:], played.turns[1:], strict=True):
        assert [getattr(mine, name) for name in fields] == [getattr(theirs, name) for name in fields]
    assert asked.turns[0].images == played.turns[0].images and asked.order == played.order


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"content": CALL.removesuffix("</tool_call>")}, CALL),  # stopped before the mark that stopped it
        ({"content": CALL + "\nand then", "role": "assistant"}, CALL),  # a server that knows no stops
        (  # taken apart by a server with its own parsers
            {
                "content": "",
                "reasoning_content": "so",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "select_images", "arguments": '{"target_images": [2]}'},
                    }
                ],
            },
            format_turn("so", format_call("select_images", {"target_images": [2]})),
        ),
    ],
)
def test_calls_are_whole_however_the_server_hands_them_over(make_reranker, picture, reply, text):
    with ScriptedTeacher(lambda body, before: ANSWER if turn_of(body) else reply) as server:
        ranking = make_reranker(server.url).rank("q", [picture(), picture()])
    assert ranking.trajectories[0].turns[1].text == text and ranking.trajectories[0].num_valid_calls == 1


def test_a_turn_at_its_limit_is_told_so(make_reranker, picture):
    def script(body, before):
        if turn_of(body):
            return ANSWER
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "<think>on"}}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        return Reply(body={**head, "choices": [choice]})

    with ScriptedTeacher(script) as server:
        ranking = make_reranker(server.url).rank("q", [picture(), picture()])
    assert "did not end within" in ranking.trajectories[0].turns[2].text and ranking.status == "ok"


def test_sampling_is_passed_on_and_each_turn_has_a_seed_of_its_own(make_reranker, picture):
    with ScriptedTeacher(by_turn) as server:
        reranker = make_reranker(server.url, extra_body={"min_p": 0.1})
        reranker.sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_turn_tokens=77, seed=3)
        for _ in range(2):
            reranker.rank("q", [picture(), "b"])
    first, second, again, _ = server.requests
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_completion_tokens": 77, "min_p": 0.1, "model": "m"}
    assert {name: first[name] for name in expected} == expected
    assert first["seed"] == again["seed"] != second["seed"]


def test_many_at_a_time_but_no_more_than_allowed(make_reranker, picture):
    with ScriptedTeacher(slowly(by_turn, 0.1)) as server:
        rankings = make_reranker(server.url, max_sessions=3).rank_batch(pairs_of(picture, 8))
    assert all(ranking.status == "ok" for ranking in rankings) and server.most_at_once == 3


FAULTS = ["429", "500", "hang", "cut", "truncate"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing_but_time(make_reranker, picture, fault):
    with (
        ScriptedTeacher(by_turn) as server,
        FaultyProxy(server.url, lambda number: fault if number < 2 else None) as p,
    ):
        rankings = make_reranker(p.url, timeout=0.5).rank_batch(pairs_of(picture, 3))
    assert [(ranking.order, ranking.status, ranking.error) for ranking in rankings] == [([1, 0], "ok", None)] * 3
    assert p.faults.count(fault) == 2 and len(p.faults) == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_names_engine_and_query_and_the_rest_is_finished(make_reranker, picture, fault):
    """One query's requests always fail; they are told apart by their text."""

    def script(body, before):
        if query_of(body) != "query 1":
            return by_turn(body, before)
        return {
            "429": Reply(429, {"error": "slow down"}, QUICK),
            "500": Reply(500, {"error": "oh"}, QUICK),
            "hang": 9.0,
            "cut": Reply(body=b'{"id"', cut=True),
            "truncate": Reply(body=b'{"id": "1", "choi'),
        }[fault]

    with ScriptedTeacher(script) as server:
        reranker = make_reranker(server.url, timeout=0.3, retries=1)
        good, bad, last = reranker.rank_batch(pairs_of(picture, 3), on_error="record")
        with pytest.raises(EngineError, match="engine 'openai' at http://127.0.0.1.*query '1'"):
            reranker.rank_batch(pairs_of(picture, 3))
    assert (good.status, last.status, bad.status) == ("ok", "ok", "fallback")
    assert "engine 'openai' at http://127.0.0.1" in bad.error and "query '1'" in bad.error
    assert bad.trajectories[0].finish == "error" and bad.order == [0, 1]


def test_a_deadline_ends_what_only_ever_retries(make_reranker):
    with ScriptedTeacher(lambda body, before: Reply(503, {"error": "later"})) as server:
        reranker = make_reranker(server.url, retries=100, deadline=1)
        started = time.monotonic()
        with pytest.raises(EngineError, match="no usable reply within 1 s"):
            reranker.rank("q", ["a", "b"])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(400, {"error": {"message": "the prompt is too long"}}), "the prompt is too long"),
        (Reply(401, {"error": {"message": "no such key"}}), "no such key"),
        (Reply(404, {"error": {"message": "no such model"}}), "no such model"),
        (Reply(body={"object": "list", "data": []}), "no chat completion"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(make_reranker, reply, reason):
    with ScriptedTeacher(lambda body, before: reply) as server:
        with pytest.raises(EngineError, match=reason):
            make_reranker(server.url).rank("q", ["a", "b"])
    assert len(server.requests) == 1


def test_nobody_listens(make_reranker):
    with pytest.raises(EngineError, match="engine 'openai' at http://127.0.0.1:9/v1 failed for query '0'"):
        make_reranker("http://127.0.0.1:9/v1", retries=0).rank("q", ["a", "b"])


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(make_reranker, monkeypatch, caplog):
    secret = "sk-very-secret-123"
    monkeypatch.setenv("MY_KEY", secret)
    caplog.set_level(logging.DEBUG)
    with ScriptedTeacher(lambda body, before: Reply(401, {"error": {"message": f"bad key {secret}"}})) as server:
        reranker = make_reranker(server.url.replace("//", "//user:pass@"), api_key_env="MY_KEY")
        with pytest.raises(EngineError) as caught:
            reranker.rank("q", ["a", "b"])
    assert secret in server.headers[0]["authorization"] or server.headers[0]["authorization"].startswith("Basic")
    assert secret not in str(caught.value) and "pass" not in str(caught.value)
    assert secret not in caplog.text and secret not in repr(vars(caught.value))


@pytest.mark.parametrize("answers", [True, False])
def test_the_key_is_sent_as_a_bearer_and_never_logged(make_reranker, monkeypatch, caplog, answers):
    """At the lowest level of all loggers, in what they format and in what they are given to format."""
    secret = "sk-very-secret-123"
    monkeypatch.setenv("MY_KEY", secret)
    caplog.set_level(logging.DEBUG)
    reply = ANSWER if answers else Reply(401, {"error": {"message": f"bad key {secret}"}})
    with ScriptedTeacher(lambda body, before: reply) as server:
        (ranking,) = make_reranker(server.url, api_key_env="MY_KEY").rank_batch([("q", ["a", "b"])], on_error="record")
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {secret}"]
    assert (ranking.error is None) == answers and secret not in repr(ranking)
    assert any(record.name.startswith("openai") for record in caplog.records)
    assert not any(secret in f"{record.getMessage()} {vars(record)}" for record in caplog.records)


class Enough(Exception):
    """What a caller raises who does not want to wait any more."""


def begin(engine, query="q"):
    """A conversation that waits for its first turn."""
    task = AgentTask(Item(text=query), [Item(text="a"), Item(text="b")], PRESET)
    session = engine.open(query)
    engine.submit(session, engine.encoder.prompt(task.messages(), [].__getitem__, PRESET), Sampling())
    return session


def wait_for(condition) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.02)


def test_closing_ends_the_request(make_reranker):
    with ScriptedTeacher(lambda body, before: 30.0) as server:
        engine = make_reranker(server.url, timeout=30).engine
        session = begin(engine)
        with pytest.raises(RuntimeError, match="already waits"):
            engine.submit(session, None, Sampling())
        wait_for(lambda: server.requests)
        engine.close(session)
        wait_for(lambda: server.num_left == 1)
        engine.close(session)  # closing twice is harmless
        assert engine.poll([session]) == []


def test_who_waits_is_asked_all_the_time_whether_to_go_on(make_reranker):
    calls = []

    def count():
        calls.append(time.monotonic())
        if len(calls) == 6:
            raise Enough

    with ScriptedTeacher(lambda body, before: 30.0) as server:
        engine = make_reranker(server.url, timeout=30).engine
        session = begin(engine)
        engine.on_token = count
        with pytest.raises(Enough):
            engine.poll([session])
        assert (calls[-1] - calls[0]) / 5 < 0.3  # 0.1 on a machine with nothing else to do
        engine.close(session)
        wait_for(lambda: server.num_left == 1)


def test_stopping_to_wait_leaves_every_conversation_as_it_was(make_reranker):
    """One is closed; another goes on, and so does one that was asked for and is asked for again."""

    def stop():
        raise Enough

    def script(body, before):
        if query_of(body) == "silent":
            return 30.0
        time.sleep(1)
        return ANSWER

    with ScriptedTeacher(script) as server:
        engine = make_reranker(server.url, timeout=30).engine
        silent, asked, other = (begin(engine, name) for name in ("silent", "asked", "other"))
        engine.on_token = stop
        for _ in range(2):
            with pytest.raises(Enough):
                engine.poll([silent, asked])
        engine.on_token = None
        engine.close(silent)
        (first,), (second,) = engine.poll([asked]), engine.poll([other])
    assert (first.session, second.session) == (asked, other) and first.text == second.text == ANSWER
    assert len(server.requests) == 3 and server.num_left == 1


def test_the_protocol_saved_beside_a_model_is_played(bundled, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    reranker = Reranker.from_pretrained(bundled, engine="openai")
    assert reranker.window == 8 and reranker.preset.name == "foveated" and reranker.engine.model_name == str(bundled)
    reranker.engine.shutdown()


@pytest.fixture
def bundled():
    from vretrver_hf.reranker import bundled_model

    return bundled_model()


def test_a_name_that_only_the_endpoint_knows_is_played_as_released(caplog):
    with caplog.at_level(logging.WARNING, logger="vretrver_hf"):
        reranker = Reranker.from_pretrained("my-model", engine="openai", base_url="http://127.0.0.1:9/v1")
    assert reranker.preset == get_preset("release") and "reranker_config.json" in caplog.text
    reranker.engine.shutdown()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "m"}, "needs base_url"),
        ({"base_url": "http://x/v1"}, "needs the name of the model"),
        ({"name": "m", "base_url": "http://x/v1", "max_sessions": 0}, "max_sessions must be positive"),
        ({"name": "m", "base_url": "http://x/v1", "image_format": "gif"}, "image_format 'gif'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, reason, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match=reason):
        Reranker.from_pretrained(engine="openai", **settings)
