"""What a request may ask for, checked before any model runs."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..images import ImageLimits


OPEN_PATHS = ("/health", "/metrics")
"""Where no key is asked for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    Bounds of a server.

    Args:
        max_documents (`int`, *optional*, defaults to 200):
            Most documents of one request.
        max_bytes (`int`, *optional*, defaults to 64 MiB):
            Most bytes of one request.
        max_pixels (`int`, *optional*, defaults to 16,000,000):
            Most pixels of one picture.
        max_requests (`int`, *optional*, defaults to 128):
            Most requests at a time, waiting ones included; others are told to come again (429).
        seconds (`float`, *optional*, defaults to 300):
            Most time for one request.
        image_root (`Path`, *optional*):
            Folder below which documents may name picture files; none by default. URLs are never fetched.
    """

    max_documents: int = 200
    max_bytes: int = 64 * 2**20
    max_pixels: int = 16_000_000
    max_requests: int = 128
    seconds: float = 300
    image_root: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_bytes", "max_pixels", "max_requests", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def images(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


class Gate:
    """
    ASGI middleware that lets nothing in without the key, and answers 413 as soon as a request has more bytes than
    allowed, whatever its headers say.

    Args:
        app (`ASGIApp`):
            What stands behind it.
        max_bytes (`int`):
            Most bytes of a request.
        api_key (`str`, *optional*):
            Key that requests must bring, as `Authorization: Bearer …`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, api_key: str | None = None):
        self._app = app
        self._max_bytes = max_bytes
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._has_key(scope):
            refusal = error(401, "the API key is missing or wrong; send it as Authorization: Bearer …")
            await refusal(scope, receive, send)
        else:
            await self._bounded(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")[2]
        return secrets.compare_digest(sent, self._api_key.encode())

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_bytes or _declared(scope) > self._max_bytes:
                await error(413, f"the request is larger than {self._max_bytes:,} bytes")(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as clients of this API expect it."""
    return JSONResponse({"message": message}, status, headers=headers)


def _declared(scope: dict[str, Any]) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
