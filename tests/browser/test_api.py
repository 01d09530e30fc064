"""Programs use the Space: gradio's client, and a client of the Model Context Protocol."""

from __future__ import annotations

import ast
import asyncio
import base64
import dataclasses
import html
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from servers import free_port

from vretrver_hf.engines import EngineError, Sampling
from vretrver_hf.protocol import get_preset
from vretrver_hf.reranker import bundled_model, save_config, saved_settings
from vretrver_hf.samples import load_samples


APP = Path(__file__).parents[2] / "spaces" / "rerank" / "app.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(APP.parent))

from bodies import UPLOAD  # noqa: E402
from limits import Limits  # noqa: E402


SAMPLE = next(sample for sample in load_samples() if sample.candidates[0].image is not None)
PICTURES = [
    "data:image/webp;base64," + base64.b64encode(item.image.read_bytes()).decode() for item in SAMPLE.candidates
]
QUERY = SAMPLE.query.text or "a drawing"


@pytest.fixture(scope="module")
def client(space):
    from gradio_client import Client

    return Client(space, verbose=False)


def test_a_prediction(client):
    told = client.predict(QUERY, PICTURES, "", True, api_name="/rerank")
    assert sorted(told["order"]) == list(range(len(PICTURES))) and told["status"] == "ok"
    assert told["trace"][-1]["thought"] and told["tokens"] > 100


def test_only_that_is_shown(client):
    endpoints = client.view_api(return_format="dict")
    assert list(endpoints["named_endpoints"]) == ["/rerank"] and not endpoints["unnamed_endpoints"]


@pytest.mark.parametrize("given", ["/etc/passwd.png", "https://example.org/a.png", "file:///etc/hostname.png"])
def test_paths_and_urls_are_refused(client, given):
    with pytest.raises(Exception, match="files are not read here|does not fetch URLs"):
        client.predict(QUERY, ["a", given], "", True, api_name="/rerank")


def test_the_form_fetches_no_url(space):
    """A request made by hand, as no browser would make it."""
    config = httpx.get(f"{space}/config").json()
    (run,) = [fn for fn in config["dependencies"] if len(fn["inputs"]) == 14]
    picture = {"image": {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}, "caption": None}
    data = ["My own", "", "q", [picture], [], "a\nb", False, False, "bundled", 8, 4, 0, 0, 0]
    body = {"data": data, "fn_index": run["id"], "session_hash": "by-hand"}
    httpx.post(f"{space}/gradio_api/queue/join", json=body).raise_for_status()
    with httpx.stream("GET", f"{space}/gradio_api/queue/data?session_hash=by-hand", timeout=60) as stream:
        told = next(line for line in stream.iter_lines() if "process_completed" in line)
    assert json.loads(told.removeprefix("data: "))["success"] is False


def test_no_input_of_the_page_or_of_the_api_fetches(monkeypatch):
    import app
    import gradio as gr

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *_: pytest.fail("fetched"))
    page = app.build(app.Space([app.BUNDLED], app.Limits()))
    assert len(page.blocks) > 20
    for block in page.blocks.values():
        for url in ("http://example.org/a.png", "https://example.org/a.png"):
            with pytest.raises(gr.Error, match="URLs are not fetched here"):
                asyncio.run(block.async_move_resource_to_block_cache(url))


def test_an_upload_whose_sender_goes_leaves_nothing_behind(space):
    kept = Path(httpx.post(f"{space}{UPLOAD}", files={"files": ("a.png", b"x")}).json()[0])
    folder = kept.parents[1]
    before = set(folder.iterdir())
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n" % UPLOAD.encode()
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", urlsplit(space).port)) as sender:
        sender.sendall(head + b"Content-Length: 9000000\r\n\r\n" + part + b"x" * 1_000_000)
        wait_for(lambda: set(folder.iterdir()) != before)
    wait_for(lambda: set(folder.iterdir()) == before)


def wait_for(condition) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)


ROUTES = ["queue/join", "call/rerank", "run/rerank", "component_server", "mcp/"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("declared", [True, False])
def test_no_body_is_read_that_is_too_large(space, route, declared):
    size = Limits().max_request_bytes + 1

    def pieces():
        for start in range(0, size, 2**20):
            yield b" " * min(2**20, size - start)

    content = b" " * size if declared else pieces()
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    told = httpx.post(f"{space}/gradio_api/{route}", content=content, headers=headers, timeout=60)
    assert told.status_code == 413
    if declared or route != "mcp/":  # which has a bound of its own
        assert told.text == "the request is larger than the 33,554,432 bytes allowed here"


def test_uploads_may_be_larger_but_not_without_end(space):
    """As many pictures as there may be candidates, and each of them in bounds."""
    limits = Limits(max_candidates=8)  # as the fixture sets it
    largest = [("files", (f"{number}.png", b"x" * limits.max_bytes)) for number in range(8)]
    told = httpx.post(f"{space}{UPLOAD}", files=largest, timeout=120)
    assert told.status_code == 200 and len(told.json()) == 8
    folder = Path(told.json()[0]).parents[1]
    before = set(folder.iterdir())
    told = httpx.post(f"{space}{UPLOAD}", files=[*largest, ("files", ("8.png", b"x" * 100_000))], timeout=120)
    assert told.status_code == 413 and f"{limits.max_upload_bytes:,} bytes" in told.text
    told = httpx.post(f"{space}{UPLOAD}", files={"files": ("9.png", b"x" * (limits.max_bytes + 1))}, timeout=120)
    assert told.status_code == 413 and "maximum allowed size" in told.text
    assert before == set(folder.iterdir())  # nothing of what was refused stays


def test_an_upload_that_declares_no_size_leaves_nothing_behind(space):
    limits = Limits(max_candidates=8)
    folder = Path(httpx.post(f"{space}{UPLOAD}", files={"files": ("a.png", b"x")}).json()[0]).parents[1]
    before = set(folder.iterdir())

    def pieces():
        for number in range(9):
            yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="%d.png"\r\n\r\n' % number
            yield from [b"x" * 2**20] * (limits.max_bytes // 2**20)
            yield b"\r\n"
        yield b"--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    told = httpx.post(f"{space}{UPLOAD}", content=pieces(), headers=headers, timeout=120)
    assert told.status_code == 413 and f"{limits.max_upload_bytes:,} bytes" in told.text
    assert before == set(folder.iterdir())


def test_the_page_is_made_before_what_runs_the_model_is_loaded():
    program = """
import sys, app
page = app.build(app.Space([app.BUNDLED], app.Limits()))
print([block.value for block in page.blocks.values() if getattr(block, "label", "") == "Candidates at a time"])
sys.exit(any(name in sys.modules for name in ("torch", "transformers")))
"""
    made = subprocess.run([sys.executable, "-c", program], cwd=APP.parent, env=ENVIRONMENT, capture_output=True)
    assert (made.returncode, made.stdout.decode().strip()) == (0, f"[{saved_settings()['window']}]"), made.stderr


def test_a_model_that_cannot_be_loaded_ends_the_space(tmp_path):
    """Though its page was there already."""
    shutil.copytree(bundled_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {"VRETRVER_MODELS": str(tmp_path / "model"), "GRADIO_SERVER_PORT": str(free_port())}
    ended = subprocess.run([sys.executable, APP], env={**ENVIRONMENT, **settings}, capture_output=True, timeout=120)
    assert ended.returncode == 1 and b".safetensors" in ended.stderr


def test_zerogpu_is_refused_at_the_start():
    """There every visitor's run would fail."""
    environment = {**ENVIRONMENT, "SPACES_ZERO_GPU": "true", "GRADIO_SERVER_PORT": str(free_port())}
    ended = subprocess.run([sys.executable, APP], env=environment, capture_output=True, timeout=120)
    assert ended.returncode == 1 and b"does not run on ZeroGPU" in ended.stderr and not ended.stdout


def test_who_waits_for_the_model_can_cancel_and_loses_no_time(monkeypatch):
    import app
    from runs import Run, Stopped

    begun, go, model = threading.Event(), threading.Event(), object()

    def load(name):
        begun.set()
        assert name is None and go.wait(30)
        return model

    monkeypatch.setattr(app.Reranker, "from_pretrained", load)
    space = app.Space([app.BUNDLED], app.Limits())
    cancelled, short = Run(60), Run(0.5)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(space.stage, app.BUNDLED, Run(0.5))
        assert begun.wait(30)
        waiting = pool.submit(space.stage, app.BUNDLED, short)
        threading.Timer(1, cancelled.cancel).start()
        with pytest.raises(Stopped, match="Cancelled"):
            space.stage(app.BUNDLED, cancelled)
        go.set()
        assert first.result() is waiting.result() and first.result().reranker is model


FORM = (SAMPLE.id, "", None, None, "", False, False)
VISITOR = SimpleNamespace(session_hash="visitor")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("/home/me/.secret"), "Something failed here"),
        (EngineError("engine 'transformers' failed: no room\n/home/me/.secret"), "failed: no room"),
    ],
)
@pytest.mark.parametrize("where", ["from_pretrained", "rank_stream"])
def test_whatever_fails_the_next_run_is_possible(monkeypatch, where, error, text):
    import app
    import gradio as gr

    space = app.Space([app.BUNDLED], app.Limits())

    def fail(*given):
        raise error

    monkeypatch.setattr(app.Reranker, where, fail)
    settings = app._shown(space.saved, space.limits)
    *_, last = space.run(app.SAMPLE, *FORM, app.BUNDLED, *settings, VISITOR)
    message, trace, other, *downloads, run, cancel = last
    assert text in html.unescape(message) and 'role="alert"' in message and "secret" not in message
    assert run.interactive and not cancel.interactive and not any(button.visible for button in downloads)
    assert "Loading" not in trace and not other
    with pytest.raises(gr.Error, match=text) as caught:
        space.rerank("q", ["a", "b"])
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    *_, last = space.run(app.SAMPLE, *FORM, app.BUNDLED, *settings, VISITOR)
    assert "Done: candidate" in last[0]


class TestSavedBeside:
    """A model that is chosen brings the settings that it is to be played with."""

    PRESET = get_preset("foveated", max_calls=2, overview_pixels=1280 * 784, inspect_pixels=300 * 300)

    @pytest.fixture
    def model(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        save_config(tmp_path, self.PRESET, 7, 2, Sampling(temperature=0.7))
        return str(tmp_path)

    def test_they_are_shown(self, model):
        import app

        space = app.Space([app.BUNDLED, model], app.Limits())
        assert space.saved_beside(model) == ("", 7, 2, 1002, 300, 0.7)
        assert space.saved_beside(app.BUNDLED) == ("", 8, 4, 85, 125, 0)

    def test_as_far_as_their_scales_go(self, model):
        import app

        preset = dataclasses.replace(self.PRESET, max_calls=50, overview_pixels=10**7)
        save_config(Path(model), preset, 30, 2, Sampling())
        space = app.Space([app.BUNDLED, model], app.Limits(max_candidates=5))
        assert space.saved_beside(model) == ("", 5, 8, 1024, 300, 0)

    def test_what_is_left_alone_is_played_as_saved(self, model):
        import app

        saved = SimpleNamespace(**saved_settings(model))
        shown = app._shown(saved_settings(model), app.Limits())
        played = app._settings(saved, *shown)
        assert played == {"preset": self.PRESET, "window": 7, "stride": 2, "sampling": Sampling(temperature=0.7)}
        changed = app._settings(saved, 6, 1, 1000, 0, 0.5)
        assert (changed["window"], changed["stride"], changed["sampling"].temperature) == (6, 3, 0.5)
        assert changed["preset"] == dataclasses.replace(self.PRESET, max_calls=1, overview_pixels=1000**2)

    @pytest.mark.parametrize("absent", ["of/its/own", "unlisted"])
    def test_a_model_that_cannot_be_had_leaves_them(self, absent):
        import app
        import gradio as gr

        space = app.Space([app.BUNDLED, "of/its/own"], app.Limits())
        message, *settings = space.saved_beside(absent)
        assert 'role="alert"' in message and absent in message
        assert settings == [gr.skip()] * 5


def test_as_a_tool_of_an_agent(space):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def use() -> tuple:
        async with streamable_http_client(f"{space}/gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = (await session.list_tools()).tools
                arguments = {"query": QUERY, "candidates": PICTURES, "query_image": "", "tools": True}
                good = await session.call_tool(tools[0].name, arguments)
                bad = await session.call_tool(tools[0].name, {**arguments, "candidates": ["a", "https://x.org/a.png"]})
                return tools, good, bad

    tools, good, bad = asyncio.run(use())
    (tool,) = tools
    assert tool.name.endswith("rerank") and "Rank candidates for a query, best first" in tool.description
    properties = tool.inputSchema["properties"]
    assert set(properties) == {"query", "candidates", "query_image", "tools"}
    assert properties["candidates"]["type"] == "array" and "data:" in properties["candidates"]["description"]
    assert "refused" in properties["candidates"]["description"]
    for name, value in properties.items():
        assert value["description"].endswith("."), name  # Gradio reads one line an argument
    assert tool.description.endswith("calls, tokens, seconds: what it cost.")
    assert not good.isError and sorted(ast.literal_eval(good.content[0].text)["order"]) == list(range(len(PICTURES)))
    assert bad.isError and "does not fetch URLs" in bad.content[0].text
