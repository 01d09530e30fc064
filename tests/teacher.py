"""A chat endpoint whose model says what a test wrote down; the sockets are real."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


QUICK = {"retry-after-ms": "10"}
"""Header that has a client try again at once."""


@dataclasses.dataclass
class Reply:
    """An HTTP answer; `cut` closes the connection before it is complete."""

    status: int = 200
    body: bytes | dict[str, Any] = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: bool = False


class ScriptedTeacher:
    """
    Serves `/v1/chat/completions` on a port of its own. Used as a context manager.

    `script` gets the request and how often the same one came before, and returns the text of the reply, the fields of
    its message, a [`Reply`], or seconds to stay silent for. `num_left` counts who does not wait for that long.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], str | dict[str, Any] | Reply | float]):
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.num_left = 0
        self._at_once = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedTeacher:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, body: dict[str, Any], headers: dict[str, str], connection: socket.socket) -> Reply:
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            before = self._seen.get(key, 0)
            self._seen[key] = before + 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.script(body, before)
            if isinstance(reply, float):
                self._stay_silent(reply, connection)
                return Reply(cut=True)
        finally:
            with self._lock:
                self._at_once -= 1
        if isinstance(reply, Reply):
            return reply
        message = {"role": "assistant", **({"content": reply} if isinstance(reply, str) else reply)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return Reply(
            body={"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        )

    def _stay_silent(self, seconds: float, connection: socket.socket) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self._ended.wait(0.02):
            if select.select([connection], [], [], 0)[0]:  # nothing more is sent, so the client has closed
                with self._lock:
                    self.num_left += 1
                return

    def _handler(teacher) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with contextlib.suppress(OSError):  # a client that was killed or has lost patience
                    self._send(teacher._answer(body, headers, self.connection))

            def _send(self, reply: Reply) -> None:
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) + 100 * reply.cut))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = reply.cut

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def query_of(body: dict[str, Any]) -> str:
    """The query's text in a request that the student's prompt is part of."""
    content = body["messages"][1]["content"]
    return content[0]["text"].removeprefix("Query: ").splitlines()[0]


def turn_of(body: dict[str, Any]) -> int:
    """How many turns the teacher has had."""
    return sum(message["role"] == "assistant" for message in body["messages"])


def slowly(script: Callable[[dict[str, Any], int], Any], seconds: float) -> Callable[[dict[str, Any], int], Any]:
    """The script, with time to think."""

    def wait(body: dict[str, Any], before: int) -> Any:
        time.sleep(seconds)
        return script(body, before)

    return wait
