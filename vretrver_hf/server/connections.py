"""uvicorn with bounds on what it leaves unbounded: how many connections are open, and how long one may be idle."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits


PATIENCE = 10.0
"""Seconds that a connection may stay open without a request."""


def server_config(app: FastAPI, limits: Limits | None = None, **settings: Any) -> uvicorn.Config:
    """
    How uvicorn runs an application with bounded connections.

    Args:
        app (`FastAPI`):
            What [`create_app`] made.
        limits (`Limits`, *optional*):
            Says how many connections may be open.
        settings:
            Further arguments of `uvicorn.Config`.
    """
    most = (limits or Limits()).max_connections
    # A web socket would leave the count, and there are none here.
    return uvicorn.Config(app, http=functools.partial(BoundedProtocol, max_connections=most), ws="none", **settings)


class BoundedProtocol(H11Protocol):
    """
    uvicorn's HTTP/1.1 that closes a connection beyond `max_connections`, and one that for [`PATIENCE`] seconds has no
    request to be answered, whatever it sends meanwhile. uvicorn's own `limit_concurrency` only answers 503: the
    connections stay, and a few idle ones would shut everybody out.
    """

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self.logger.warning("closed a connection beyond the %d allowed", self._max_connections)
            transport.close()
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_request()

    def _wait_for_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
