"""Programs use the Space: gradio's client, and a client of the Model Context Protocol."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
from pathlib import Path

import httpx
import pytest

from vretrver_hf.samples import load_samples


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
    import gradio as gr

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "spaces" / "rerank"))
    import app

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *_: pytest.fail("fetched"))
    page = app.build(app.Space([app.BUNDLED], app.Limits()))
    assert len(page.blocks) > 20
    for block in page.blocks.values():
        for url in ("http://example.org/a.png", "https://example.org/a.png"):
            with pytest.raises(gr.Error, match="URLs are not fetched here"):
                asyncio.run(block.async_move_resource_to_block_cache(url))


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
    assert not good.isError and sorted(ast.literal_eval(good.content[0].text)["order"]) == list(range(len(PICTURES)))
    assert bad.isError and "does not fetch URLs" in bad.content[0].text
