"""The HTTP application."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from .. import __version__
from ..engines.base import EngineError
from ..images import ItemError
from ..ranking import Ranking
from ..ranking_loop import RankingJob
from ..reranker import Reranker
from .limits import Gate, Limits, error
from .metrics import Metrics
from .schema import RerankRequest, item_of, response_of
from .worker import Busy, Closing, Worker


PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""Where clients of Jina, Cohere and vLLM look."""

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

    Example:

    ```python
    >>> import uvicorn
    >>> from vretrver_hf import Reranker
    >>> from vretrver_hf.server import create_app

    >>> uvicorn.run(create_app(Reranker.from_pretrained()), port=8000)  # doctest: +SKIP
    ```
    """
    service = _Service(reranker, ["default", *names], limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    app = FastAPI(title="vretrver", version=__version__, lifespan=lifespan)
    app.add_middleware(Gate, max_bytes=service.limits.max_bytes, api_key=api_key)
    app.add_exception_handler(RequestValidationError, _tell_what_is_wrong)
    for path in PATHS:
        app.post(path, response_model=None, operation_id=f"rerank{PATHS.index(path)}")(service.rerank)
    app.get("/v1/models", response_model=None)(service.models)
    app.get("/health", response_model=None)(service.health)
    app.get("/metrics", response_model=None)(service.show_metrics)
    return app


class _Refused(Exception):
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        self.response = error(status, message, headers)


class _Service:
    def __init__(self, reranker: Reranker, names: list[str], limits: Limits):
        self.limits = limits
        self.worker = Worker(reranker, limits.max_requests)
        self._metrics = Metrics(self.worker)
        self._names = names

    async def rerank(self, body: RerankRequest, request: Request) -> Any:
        """Ranks documents for a query, best first."""
        started = time.perf_counter()
        try:
            self._check(body)
            ranking = await self._rank(body, request)
            self._metrics.ranked(ranking)
            status, response = 200, response_of(body, ranking)
        except _Refused as refused:
            status, response = refused.response.status_code, refused.response
        self._metrics.answered(status, time.perf_counter() - started)
        return response

    async def models(self, request: Request) -> Any:
        """The names that a request may use."""
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self._names]}

    async def health(self) -> Response:
        """200 while requests are taken."""
        return Response(status_code=200 if self.worker.is_ready else 503)

    async def show_metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4")

    def _check(self, body: RerankRequest) -> None:
        if body.model not in self._names:
            raise _Refused(404, f"no model {body.model[:100]!r} here; there is {', '.join(self._names)}")
        if len(body.documents) > self.limits.max_documents:
            raise _Refused(
                400, f"{len(body.documents)} documents are more than the {self.limits.max_documents} allowed"
            )

    async def _rank(self, body: RerankRequest, request: Request) -> Ranking:
        try:
            self.worker.check()  # before anything is decoded
            job = await asyncio.to_thread(self._job, body)
            future = asyncio.wrap_future(self.worker.submit(job))
            return await self._await(future, job, request)
        except ItemError as reason:
            raise _Refused(400, str(reason)) from None
        except Busy as reason:
            raise _Refused(429, str(reason), {"Retry-After": "1"}) from None
        except Closing as reason:
            raise _Refused(503, str(reason)) from None
        except EngineError as reason:
            raise _Refused(502, str(reason)) from None

    def _job(self, body: RerankRequest) -> RankingJob:
        """The query and its documents, each picture read once, so that a bad one is known before the model runs."""
        names = ["query", *(f"document {index}" for index in range(len(body.documents)))]
        items = [
            item_of(value, name, self.limits) for name, value in zip(names, [body.query, *body.documents], strict=True)
        ]
        for name, item in zip(names, items, strict=True):
            if item.image is not None:
                item.load_image(self.limits.images, name=name)
        return self.worker.job(items[0], items[1:])

    async def _await(self, future: asyncio.Future[Ranking], job: RankingJob, request: Request) -> Ranking:
        """The ranking, unless time is up or the client has gone: then the model stops working on it."""
        ends = time.monotonic() + self.limits.seconds
        while not future.done():
            await asyncio.wait([future], timeout=min(_LOOK_UP, max(0.0, ends - time.monotonic())))
            if future.done():
                break
            if time.monotonic() >= ends:
                self.worker.drop(job)
                raise _Refused(504, f"no ranking within {self.limits.seconds:g} s; send fewer documents")
            if await request.is_disconnected():
                self.worker.drop(job)
                raise _Refused(499, "the client has gone")
        return future.result()


async def _tell_what_is_wrong(request: Request, failure: Exception) -> Response:
    """Which field is wrong and why, without repeating what was sent: that may be a whole picture."""
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}" for problem in failure.errors()
    ]
    return error(422, "; ".join(problems[:5]))
