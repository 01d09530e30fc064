"""The Space's bound on bodies, before apps that read them in their several ways; tests/browser has the real one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import pytest
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import PlainTextResponse


sys.path.insert(0, str(Path(__file__).parents[1] / "spaces" / "rerank"))

from bodies import UPLOAD, BodyLimit  # noqa: E402
from limits import Limits  # noqa: E402


LIMITS = Limits(max_candidates=2, max_bytes=1000, max_request_bytes=100)
MOST_UPLOADED = 2 * (1000 + 4096)


async def reads(scope, receive, send):
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"read {len(body)}")(scope, receive, send)


async def gives_another_reason(scope, receive, send):
    """As FastAPI, which answers 400 to whatever happens while a body is read."""
    try:
        await Request(scope, receive).body()
    except Exception:
        await PlainTextResponse("there was an error parsing the body", 400)(scope, receive, send)


async def answers_unread(scope, receive, send):
    await PlainTextResponse("unread")(scope, receive, send)


async def fails(scope, receive, send):
    raise LookupError("its own fault")


async def reads_behind_its_answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await Request(scope, receive).body()


def post(app, size: int, path: str = "/gradio_api/queue/join", declared: bool = True) -> httpx.Response:
    async def pieces():
        for start in range(0, size, 64):
            yield b"x" * min(64, size - start)

    async def ask():
        transport = httpx.ASGITransport(BodyLimit(app, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://space") as client:
            return await client.post(path, content=b"x" * size if declared else pieces())

    return asyncio.run(ask())


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("app", [reads, gives_another_reason])
@pytest.mark.parametrize(("path", "most"), [("/gradio_api/queue/join", 100), (UPLOAD, MOST_UPLOADED)])
def test_what_is_too_large_is_answered_in_one_line(app, path, most, declared):
    refused = post(app, most + 1, path, declared)
    assert ("content-length" in refused.request.headers) == declared
    assert refused.status_code == 413 and refused.headers["content-type"].startswith("text/plain")
    assert refused.text == f"the request is larger than the {most:,} bytes allowed here"


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("path", "most"), [("/gradio_api/queue/join", 100), (UPLOAD, MOST_UPLOADED)])
def test_what_is_not_arrives_whole(path, most, declared):
    assert post(reads, most, path, declared).text == f"read {most}"


def test_what_is_declared_too_large_is_not_read():
    async def never(scope, receive, send):
        pytest.fail("it was asked")

    assert post(never, 101).status_code == 413


@pytest.mark.parametrize("path", [UPLOAD + "/", "/x" + UPLOAD, "/gradio_api/call/upload"])
def test_only_uploads_may_be_as_large_as_uploads(path):
    assert post(reads, 101, path).status_code == 413


def test_a_body_that_nobody_reads_costs_nothing():
    assert post(answers_unread, 101, declared=False).text == "unread"


def test_other_failures_stay_what_they_are():
    with pytest.raises(LookupError, match="its own fault"):
        post(fails, 10)


def test_an_answer_that_has_begun_is_not_begun_again():
    with pytest.raises(Exception, match="too large"):
        post(reads_behind_its_answer, 101, declared=False)


@pytest.mark.parametrize("declared", [b"-1", b"1", b"\xb2"])
def test_a_declared_size_is_not_believed(declared):
    async def ask() -> int:
        transport = httpx.ASGITransport(BodyLimit(reads, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://space") as client:
            return (await client.post("/", content=b"x" * 101, headers={b"Content-Length": declared})).status_code

    assert asyncio.run(ask()) == 413


@pytest.mark.parametrize(("is_whole", "seen"), [(True, "http.disconnect"), (False, "MultiPartException")])
def test_who_goes_before_the_body_is_whole(is_whole, seen):
    """Gradio removes what it has written of an upload where that is raised; behind the body, it looks who is there."""
    messages = iter([{"type": "http.request", "body": b"x", "more_body": not is_whole}, {"type": "http.disconnect"}])
    told = []

    async def looks(scope, receive, send):
        await receive()
        try:
            told.append((await receive())["type"])
        except MultiPartException:
            told.append("MultiPartException")

    async def receive():
        return next(messages)

    asyncio.run(BodyLimit(looks, LIMITS)({"type": "http", "path": UPLOAD, "headers": []}, receive, None))
    assert told == [seen]


def test_who_goes_before_anything_is_read_is_seen_to_go():
    """Streams of events, whose requests have no body, look whether their reader is still there and clean up if not."""
    told = []

    async def looks(scope, receive, send):
        told.append((await receive())["type"])

    async def receive():
        return {"type": "http.disconnect"}

    asyncio.run(BodyLimit(looks, LIMITS)({"type": "http", "path": "/", "headers": []}, receive, None))
    assert told == ["http.disconnect"]
