"""What a request may ask for, checked before any model runs."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..images import DEFAULT_LIMITS, ImageLimits


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
            Most bytes of one request. A picture may have those of [`~vretrver_hf.images.ImageLimits`] at most.
        max_characters (`int`, *optional*, defaults to 20,000):
            Most characters of one text: the query's, or a document's.
        max_pixels (`int`, *optional*, defaults to 16,000,000):
            Most pixels of one picture, at most those of [`~vretrver_hf.images.ImageLimits`].
        max_total_pixels (`int`, *optional*, defaults to 160,000,000):
            Most pixels of all pictures of one request.
        max_requests (`int`, *optional*, defaults to 128):
            Most requests at a time, those that are still read included; others are told to come again (429).
        max_connections (`int`, *optional*, defaults to 512):
            Most open connections, busy or not; others are closed. [`server_config`] sees to it.
        seconds (`float`, *optional*, defaults to 300):
            Most time for one request, from its arrival: reading it counts.
        image_root (`Path`, *optional*):
            Folder below which documents may name picture files; none by default. URLs are never fetched.
    """

    max_documents: int = 200
    max_bytes: int = 64 * 2**20
    max_characters: int = 20_000
    max_pixels: int = 16_000_000
    max_total_pixels: int = 160_000_000
    max_requests: int = 128
    max_connections: int = 512
    seconds: float = 300
    image_root: Path | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "image_root" and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.max_pixels > DEFAULT_LIMITS.max_pixels:  # the model's loop would refuse what was admitted
            raise ValueError(f"max_pixels must be at most {DEFAULT_LIMITS.max_pixels:,}, got {self.max_pixels:,}")
        if self.max_connections <= self.max_requests:
            raise ValueError(
                f"max_connections must be more than max_requests ({self.max_requests}), got {self.max_connections}: "
                "who comes on the others is told that the server is busy"
            )

    @property
    def images(self) -> ImageLimits:
        return ImageLimits(min(self.max_bytes, DEFAULT_LIMITS.max_bytes), self.max_pixels)

    @property
    def max_parts(self) -> int:
        """Most parts of a request's JSON: several times what documents have, and fields that are ignored."""
        return 1000 + 100 * self.max_documents


class Refused(Exception):
    """
    A request that gets no ranking.

    Args:
        status (`int`):
            HTTP status.
        message (`str`):
            What the client is told.
        headers (`dict[str, str]`, *optional*):
            Further headers.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.response = error(status, message, headers)


class Gate:
    """
    ASGI middleware that lets nothing in without the key.

    Args:
        app (`ASGIApp`):
            What stands behind it.
        api_key (`str`, *optional*):
            Key that requests must bring, as `Authorization: Bearer …`.
    """

    def __init__(self, app: ASGIApp, api_key: str | None = None):
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._has_key(scope):
            await self._app(scope, receive, send)
        else:
            refusal = error(401, "the API key is missing or wrong; send it as Authorization: Bearer …")
            await refusal(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")[2]
        return secrets.compare_digest(sent, self._api_key.encode())


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as clients expect it: Cohere's read `message`, Jina's `detail`."""
    return JSONResponse({"message": message, "detail": message}, status, headers=headers)
