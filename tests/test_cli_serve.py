from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import cohere
import httpx
import pytest
from teacher import Reply, ScriptedTeacher
from test_cli import run

from vretrver_hf.cli import serve
from vretrver_hf.engines import Sampling
from vretrver_hf.protocol import format_answer, format_turn, get_preset
from vretrver_hf.reranker import save_config
from vretrver_hf.samples import load_samples


KEY = "sk-not-for-logs"


def start(*args: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """`vretrver serve` on a free port, and its address, once it says that it serves."""
    command = [sys.executable, "-m", "vretrver_hf", "serve", "--port", "0", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    for line in process.stderr:
        if line.startswith("http"):
            return process, line.split()[0]
    raise RuntimeError(f"it ended with {process.wait()}")


def end(process: subprocess.Popen, number: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(number)
    return process.wait(60), process.stderr.read()


def wait_for(condition) -> None:
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.02)


def is_refused(url: str) -> bool:
    """Whether nobody listens at the address any more."""
    place = urlsplit(url)
    try:
        socket.create_connection((place.hostname, place.port), timeout=10).close()
    except ConnectionRefusedError:
        return True
    return False


def test_the_bundled_model_answers_the_cohere_sdk_and_ends_when_told():
    sample = next(sample for sample in load_samples() if sample.task == "image-to-text")
    documents = [candidate.text for candidate in sample.candidates]
    process, url = start(VRETRVER_API_KEY=KEY)
    try:
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.post(url + "/v1/rerank", json={"query": "q", "documents": documents}).status_code == 401
        client = cohere.ClientV2(api_key=KEY, base_url=url)
        ask = lambda n: client.rerank(model="vretrver-tiny", query="a guard", documents=documents, top_n=n)  # noqa: E731
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(ask, range(1, 5)))
        assert [len(reply.results) for reply in replies] == [1, 2, 3, 4]
        assert len({reply.results[0].index for reply in replies}) == 1
    finally:
        code, log = end(process)
    assert code == 0 and "Traceback" not in log and KEY not in log


def test_an_endpoint_can_stand_behind_it():
    with ScriptedTeacher(lambda body, before: format_turn("so", format_answer([1, 0]))) as endpoint:
        process, url = start("--model", "m", "--base-url", endpoint.url, OPENAI_API_KEY=KEY)
        try:
            reply = httpx.post(url + "/v1/rerank", json={"model": "m", "query": "q", "documents": ["a", "b"]})
            assert [result["index"] for result in reply.json()["results"]] == [1, 0]
        finally:
            code, log = end(process, signal.SIGINT)
    assert code in (0, 130, -signal.SIGINT) and "Traceback" not in log and KEY not in log
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = run(capsys, "serve", "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen on 127.0.0.1" in err and err.count("\n") == 1 and not out


def test_the_port_is_taken_but_answers_nobody_until_the_model_is_loaded(capsys, monkeypatch):
    """A connection is refused at once, so whoever asks may try again or ask another server."""
    load, seen = serve.load_reranker, []

    def look_then_load(*args, **settings):
        with socket.socket() as other, pytest.raises(OSError) as taken:
            other.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)
        seen.append(taken.value.errno)
        return load(*args, **settings)

    monkeypatch.setattr(serve, "load_reranker", look_then_load)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # It ends once it has looked: there is no such folder.
    code, _, err = run(capsys, "serve", "--port", port, "--model", "/no/such/model")
    assert seen == [errno.EADDRINUSE] and code == 2 and "/no/such/model" in err and "serves" not in err


def test_sigterm_finishes_the_request_under_way_and_takes_no_more():
    go = threading.Event()

    def script(body, before):
        go.wait(60)
        return format_turn("so", format_answer([1, 0]))

    with ScriptedTeacher(script) as endpoint, ThreadPoolExecutor(1) as pool:
        process, url = start("--model", "m", "--base-url", endpoint.url)
        try:
            request = {"query": "q", "documents": ["a", "b"]}
            reply = pool.submit(httpx.post, url + "/v1/rerank", json=request, timeout=60)
            wait_for(lambda: endpoint.requests)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: is_refused(url))
            assert not reply.done() and process.poll() is None
            go.set()
            assert reply.result().status_code == 200
            assert [result["index"] for result in reply.result().json()["results"]] == [1, 0]
            assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()
        finally:
            go.set()
            process.kill()
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--model", "m", "--engine", "openai"], "needs base_url"),
        (["--base-url", "http://127.0.0.1:9/v1"], "needs the name of the model"),
        (["--allow-files", "/no/such/folder"], "/no/such/folder"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--max-pixels", "100000000"], "max_pixels must be at most 64,000,000, got 100,000,000"),
        (["--max-requests", "600"], "max_connections must be more than max_requests (600), got 512"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, monkeypatch, args, reason):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    code, _, err = run(capsys, "serve", "--port", "0", *args)
    assert code == 2 and reason in err and "Traceback" not in err


def test_a_model_that_replays_the_prompts_of_a_data_set_is_not_served(capsys, tmp_path):
    save_config(tmp_path, get_preset("release", prompt_source="dataset"), 20, 10, Sampling())
    before = set(threading.enumerate())
    code, out, err = run(capsys, "serve", "--port", 0, "--model", tmp_path, "--base-url", "http://127.0.0.1:9/v1")
    assert code == 2 and err.count("\n") == 1 and not out
    assert f"{tmp_path} cannot be served: its preset replays the prompts of a data set" in err
    assert not any(thread.name == "openai-engine" for thread in set(threading.enumerate()) - before)


def test_an_endpoint_that_refuses_is_told_in_one_line(capsys):
    with ScriptedTeacher(lambda body, before: Reply(401, {"error": {"message": "no such key"}})) as endpoint:
        args = ["rank", "--query", "q", "a", "b", "--model", "m", "--base-url", endpoint.url, "--json"]
        before = set(threading.enumerate())
        code, out, err = run(capsys, *args)
    assert not any(thread.name == "openai-engine" for thread in set(threading.enumerate()) - before)
    assert code == 2 and "engine 'openai' at http://127.0.0.1" in err and "no such key" in err and not out
