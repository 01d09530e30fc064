"""A bound on what is sent, before anybody reads it: Gradio takes bodies of any size, and makes values of them."""

from __future__ import annotations

from limits import Limits
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


UPLOAD = "/gradio_api/upload"
"""Where Gradio takes files, which it writes to the disk as they come."""


class BodyLimit:
    """
    ASGI middleware that answers 413 to a request whose body is too large, declared or sent.

    Args:
        app (`ASGIApp`):
            What stands behind it.
        limits (`Limits`):
            What is allowed: `max_upload_bytes` of an upload, `max_request_bytes` of all else.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._limits.max_upload_bytes if scope["path"] == UPLOAD else self._limits.max_request_bytes
        body = _Body(receive, send, most)
        try:
            if not body.declares_too_much(scope):
                await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.is_refused:
                raise
        if body.is_refused:
            told = f"the request is larger than the {most:,} bytes allowed here"
            await PlainTextResponse(told, 413)(scope, receive, send)


class _Ended(MultiPartException):
    """A body that does not come whole. Of this kind, so that Gradio removes what it has written of an upload."""


class _Body:
    """Counts what comes. Once it is too much, what is answered to it is dropped, whatever the app makes of it."""

    def __init__(self, receive: Receive, send: Send, most: int):
        self.is_refused = False
        self._receive = receive
        self._send = send
        self._left = most
        self._is_begun = self._is_whole = False
        self._is_answered = False

    def declares_too_much(self, scope: Scope) -> bool:
        declared = dict(scope["headers"]).get(b"content-length", b"")
        self.is_refused = declared.isdigit() and int(declared) > self._left
        return self.is_refused

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.is_refused = not self._is_answered
            raise _Ended("the request is too large")
        if message["type"] == "http.disconnect":
            if self._is_begun and not self._is_whole:
                raise _Ended("the sender has gone")
            return message
        self._is_begun, self._is_whole = True, not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if not self.is_refused:
            self._is_answered = True
            await self._send(message)
