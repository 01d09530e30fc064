"""A proxy between a client and a real server that breaks some of the answers on the way; the sockets are real."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit


Fault = Literal["429", "500", "hang", "cut", "truncate"]


class FaultyProxy:
    """
    Forwards to `upstream` and injects what `plan` says. Used as a context manager.

    `plan` gets the number of the request, from 0, and returns a [`Fault`] or `None`: an error status without asking
    the server, silence until the proxy ends, a connection closed within the reply, or JSON that stops in its middle.
    """

    def __init__(self, upstream: str, plan: Callable[[int], Fault | None]):
        self.upstream = urlsplit(upstream)
        self.plan = plan
        self.faults: list[Fault | None] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}{self.upstream.path}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self) -> Fault | None:
        with self._lock:
            fault = self.plan(len(self.faults))
            self.faults.append(fault)
            return fault

    def _forward(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=120)
        with contextlib.closing(connection):
            kept = {name: value for name, value in headers.items() if name.lower() not in ("host", "accept-encoding")}
            connection.request("POST", path, body, kept)
            reply = connection.getresponse()
            return reply.status, {"Content-Type": reply.getheader("Content-Type", "")}, reply.read()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = proxy._next_fault()
                with contextlib.suppress(OSError):  # a client that has lost patience, or a server that is down
                    if fault == "hang":
                        proxy._ended.wait()
                    elif fault in ("429", "500"):
                        self._send(int(fault), {"Content-Type": "application/json"}, b'{"error": {"message": "no"}}')
                    else:
                        self._send(*proxy._forward(self.path, body, dict(self.headers)), fault=fault)
                    return
                self.close_connection = True

            def _send(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
                kept = body if fault is None else body[: len(body) // 2]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body if fault == "cut" else kept)))
                self.end_headers()
                self.wfile.write(kept)
                self.close_connection = fault is not None

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
