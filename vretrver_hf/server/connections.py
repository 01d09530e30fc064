"""uvicorn with bounds on what it leaves unbounded: how many connections are open, and what an idle one may keep."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits


PATIENCE = 10.0
"""Seconds that a connection may stay open without a request, or without taking any of its answer."""


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
    request to be answered, whatever it sends meanwhile, or takes nothing of its answer. What is sent while a request
    is being answered is bounded too. uvicorn's own `limit_concurrency` only answers 503: the connections stay, and a
    few idle ones would shut everybody out.
    """

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._timer: asyncio.TimerHandle | None = None
        self._untaken = 0
        self._sent_ahead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self.logger.warning("closed a connection beyond the %d allowed", self._max_connections)
            transport.close()
        else:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_idle() or self.cycle.more_body:
            super().data_received(data)
            return
        # Each look whether the client is still there lets some of what it sends into memory.
        self._sent_ahead += len(data)
        if self._sent_ahead > HIGH_WATER_LIMIT:
            self.transport.abort()
        else:
            super().data_received(data)

    def on_response_complete(self) -> None:
        self._untaken = self._sent_ahead = 0
        super().on_response_complete()
        self._look_later()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._look)

    def _look(self) -> None:
        before, self._untaken = self._untaken, self.transport.get_write_buffer_size()
        if before and self._untaken >= before:
            self.transport.abort()  # to close it would be to wait until the rest is taken
        elif self._is_idle() and not self._untaken:
            self.transport.close()
        else:
            self._look_later()
