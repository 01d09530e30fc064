"""The OpenAI engine against a real `vllm serve`, through a proxy that breaks things, and over a restart."""

from __future__ import annotations

import itertools
import threading

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this folder where it is")

from bundled import one_sample_a_task
from faulty_proxy import FaultyProxy
from server import VLLMServer

from vretrver_hf import Item, Reranker
from vretrver_hf.engines import EngineError, Sampling
from vretrver_hf.reranker import bundled_model


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with VLLMServer(tmp_path_factory.mktemp("vllm") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def pairs():
    return [(sample.query, sample.candidates) for sample in one_sample_a_task().values()]


@pytest.fixture(scope="module")
def expected(pairs):
    return Reranker.from_pretrained(device="cpu").rank_batch(pairs)


def connect(url: str, **settings) -> Reranker:
    return Reranker.from_pretrained(bundled_model(), engine="openai", base_url=url, max_sessions=8, **settings)


def assert_same(rankings, expected) -> None:
    for mine, theirs in zip(rankings, expected, strict=True):
        assert (mine.error, mine.order, mine.status) == (None, theirs.order, theirs.status)
        for played, reference in zip(mine.trajectories, theirs.trajectories, strict=True):
            assert [turn.text for turn in played.assistant_turns] == [turn.text for turn in reference.assistant_turns]
            assert played.images == reference.images and not played.exact_tokens


def test_every_conversation_reads_as_the_transformers_engines(server, pairs, expected):
    assert_same(connect(server.url).rank_batch(pairs), expected)


def test_turns_that_are_cut_short(server, pairs):
    sampling = Sampling(max_turn_tokens=5)
    expected = Reranker.from_pretrained(device="cpu", sampling=sampling).rank_batch(pairs[:2])
    rankings = connect(server.url, sampling=sampling).rank_batch(pairs[:2])
    assert [ranking.order for ranking in rankings] == [ranking.order for ranking in expected]
    texts = [[turn.text for turn in ranking.trajectories[0].assistant_turns] for ranking in rankings]
    assert texts == [[turn.text for turn in ranking.trajectories[0].assistant_turns] for ranking in expected]


def test_one_request_in_three_fails_and_nothing_is_lost(server, pairs, expected):
    faults = itertools.cycle(["429", None, None, "500", None, None, "cut", None, None, "truncate", None, "hang", None])
    with FaultyProxy(server.url, lambda number: next(faults)) as proxy:
        assert_same(connect(proxy.url, timeout=10).rank_batch(pairs), expected)
    assert {"429", "500", "cut", "truncate", "hang"} <= set(proxy.faults)


def test_what_the_server_refuses_costs_its_query_only(server, pairs, expected):
    """A prompt beyond the server's context."""
    long = ("q", [Item(text="word " * 3000), Item(text="b")])
    bad, good = connect(server.url).rank_batch([long, pairs[0]], on_error="record")
    assert "engine 'openai' at http://127.0.0.1" in bad.error and "query '0'" in bad.error and bad.order == [0, 1]
    assert_same([good], expected[:1])
    with pytest.raises(EngineError, match="query '0'"):
        connect(server.url).rank(*long)


def test_a_server_that_is_killed_and_started_again_mid_run(server, pairs, expected):
    """Last in this file, since it costs a start."""
    answered = []

    def on_event(event):
        if event.kind == "answer":
            answered.append(event.query_id)
            if len(answered) == 3:
                server.kill()
                threading.Timer(3, server.start).start()

    rankings = connect(server.url, retries=100, deadline=300).rank_batch(pairs * 2, on_event=on_event)
    server.wait()
    assert len(answered) == len(pairs) * 2
    assert_same(rankings, [*expected, *expected])
