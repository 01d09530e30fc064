"""The HTTP application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI, Request, Response

from .. import __version__
from ..engines.base import EngineError
from ..images import ItemError
from ..items import Item
from ..ranking import Ranking
from ..reranker import CONFIG_NAME, Reranker
from .body import read_body
from .limits import Gate, Limits, Refused, error
from .metrics import Metrics
from .schema import RerankRequest, items_of, request_of, response_of
from .worker import Busy, Closing, Worker


logger = logging.getLogger(__name__)

PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Where clients of Jina, Cohere and vLLM look."""

_DEFINITIONS = "#/paths/~1v1~1rerank/post/requestBody/content/application~1json/schema/$defs"
"""Where the parts of a request are described in the API's documentation."""

_LOOK_UP = 0.5
"""Seconds between looks whether the client is still there."""


def create_app(
    reranker: Reranker, names: Sequence[str] = (), limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """
    A server of one model.

    Args:
        reranker (`Reranker`):
            Ranks; concurrent requests share its batch.
        names (sequence of `str`, *optional*):
            Names that requests may call the model by, besides `"default"`.
        limits (`Limits`, *optional*):
            What a request may ask for.
        api_key (`str`, *optional*):
            Key that requests must bring, as `Authorization: Bearer …`.

    Raises:
        `ValueError`: if the reranker's preset replays the prompts of a data set, which requests do not bring.

    Example:

    ```python
    >>> import uvicorn
    >>> from vretrver_hf import Reranker
    >>> from vretrver_hf.server import create_app, server_config

    >>> app = create_app(Reranker.from_pretrained())  # doctest: +SKIP
    >>> uvicorn.Server(server_config(app, port=8000)).run()  # doctest: +SKIP
    ```
    """
    if reranker.preset.prompt_source == "dataset":
        raise ValueError(
            "its preset replays the prompts of a data set, which requests do not bring; "
            f'set "prompt_source" to "preset" in its {CONFIG_NAME} to have the preset write them'
        )
    service = _Service(reranker, ["default", *names], limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="vretrver", version=__version__, lifespan=lifespan)
    app.add_middleware(Gate, api_key=api_key)
    # The request is read by hand, within limits; this documents it.
    schema = RerankRequest.model_json_schema(ref_template=_DEFINITIONS + "/{model}")
    documented = {"requestBody": {"content": {"application/json": {"schema": schema}}}}
    for index, path in enumerate(PATHS):
        app.post(path, response_model=None, operation_id=f"rerank{index}", openapi_extra=documented)(service.rerank)
    app.get("/v1/models", response_model=None)(service.models)
    app.get("/health", response_model=None)(service.health)
    app.get("/metrics", response_model=None)(service.show_metrics)
    return app


class _Service:
    def __init__(self, reranker: Reranker, names: list[str], limits: Limits):
        self.worker = Worker(reranker, limits.max_requests)
        self._limits = limits
        self._metrics = Metrics(self.worker)
        self._names = names

    async def rerank(self, request: Request) -> Any:
        """Ranks documents for a query, best first."""
        started = time.perf_counter()
        request_id = f"rerank-{uuid.uuid4().hex}"
        try:
            response, status = await self._answer(request, request_id), 200
        except Refused as refused:
            response, status = refused.response, refused.status
        except Exception as failure:
            # Why is for the operator: it may name files, addresses, or what others asked.
            logger.error("%s: %s", request_id, failure, exc_info=not isinstance(failure, EngineError))
            status = 502 if isinstance(failure, EngineError) else 500
            response = error(status, f"the ranking failed; the server's log says why, under {request_id}")
        self._metrics.answered(status, time.perf_counter() - started)
        return response

    async def models(self, request: Request) -> Any:
        """The names that a request may use."""
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self._names]}

    async def health(self) -> Response:
        """200 while requests are taken, and 503 with the reason once they are not."""
        reason = self.worker.closed_because
        return Response(status_code=200) if reason is None else error(503, reason)

    async def show_metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, request_id: str) -> Response:
        """The response, or `Refused`. The place is taken before anything is read, so that waiting costs no memory."""
        ends = asyncio.get_running_loop().time() + self._limits.seconds
        ticket = self._enter()
        try:
            body = await self._read(request, ends)
            async with asyncio.timeout_at(ends):
                asked, items = await asyncio.to_thread(self._understand, body)
                ranking = await self._wait(self.worker.submit(ticket, items[0], items[1:]), request)
        except ItemError as reason:
            raise Refused(400, str(reason)) from None
        except TimeoutError:
            raise Refused(504, f"no ranking within {self._limits.seconds:g} s; send fewer documents") from None
        finally:
            self.worker.leave(ticket)
        self._metrics.ranked(ranking)
        # In ASCII: half a surrogate pair that a document had goes back with it, and UTF-8 has no such thing.
        return Response(json.dumps(response_of(asked, ranking, request_id)), media_type="application/json")

    def _enter(self) -> str:
        try:
            return self.worker.enter()
        except Busy as reason:
            raise Refused(429, str(reason), {"Retry-After": "1"}) from None
        except Closing as reason:
            raise Refused(503, str(reason)) from None

    async def _read(self, request: Request, ends: float) -> bytes:
        try:
            async with asyncio.timeout_at(ends):
                return await read_body(request, self._limits.max_bytes)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {self._limits.seconds:g} s") from None

    def _understand(self, body: bytes) -> tuple[RerankRequest, list[Item]]:
        asked = request_of(body, self._limits)
        if asked.model not in self._names:
            raise Refused(404, f"no model {asked.model[:100]!r} here; there is {', '.join(self._names)}")
        return asked, items_of(asked, self._limits)

    async def _wait(self, ranking: Future[Ranking], request: Request) -> Ranking:
        """The ranking, unless the client has gone."""
        future = asyncio.wrap_future(ranking)
        while not future.done():
            await asyncio.wait([future], timeout=_LOOK_UP)
            if not future.done() and await request.is_disconnected():
                raise Refused(499, "the client has gone")
        return future.result()
