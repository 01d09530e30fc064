"""The one thread that runs the model: everything that requests bring shares its batch."""

from __future__ import annotations

import collections
import itertools
import logging
import threading
from concurrent.futures import Future

from ..engines.base import EngineError
from ..items import Item
from ..ranking import Ranking
from ..ranking_loop import RankingJob, RankingLoop
from ..reranker import Reranker


logger = logging.getLogger(__name__)


class Busy(RuntimeError):
    """As many requests as allowed are here already."""


class Closing(RuntimeError):
    """No new requests are taken."""


class Worker:
    """
    Ranks what is submitted, many at a time.

    Args:
        reranker (`Reranker`):
            Ranks. Nobody else may use it meanwhile.
        max_requests (`int`):
            Most rankings at a time, waiting ones included.
    """

    def __init__(self, reranker: Reranker, max_requests: int):
        self._reranker = reranker
        self._max_requests = max_requests
        self._tickets: set[str] = set()
        self._waiting: collections.deque[RankingJob] = collections.deque()
        self._futures: dict[str, Future[Ranking]] = {}
        self._unwanted: set[str] = set()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="rerank-worker", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """Requests that are here: read, waiting or under way."""
        return len(self._tickets)

    @property
    def closed_because(self) -> str | None:
        """Why no requests are taken any more; `None` while they are."""
        if self._failure is not None:
            name = type(self._failure.__cause__ or self._failure).__name__
            return f"the engine has failed for good ({name}); start the server again, whose log says why"
        return "the server is shutting down" if self._closing else None

    def enter(self) -> str:
        """
        Takes a place for one ranking, before anything is spent on it. Who enters must [`Worker.leave`].

        Returns:
            `str`: the ticket, which names the ranking.

        Raises:
            `Busy`: if there is no room for another ranking.
            `Closing`: if none is taken any more.
        """
        with self._changed:
            if self.closed_because is not None:
                raise Closing(self.closed_because)
            if len(self._tickets) >= self._max_requests:
                raise Busy(f"{len(self._tickets)} requests are here already; try again in a moment")
            ticket = str(next(self._numbers))
            self._tickets.add(ticket)
        return ticket

    def leave(self, ticket: str) -> None:
        """Gives the place back. A ranking that is not done is stopped, and keeps its place until it is."""
        with self._changed:
            if ticket in self._futures:
                self._unwanted.add(ticket)
            else:
                self._tickets.discard(ticket)
            self._changed.notify()

    def submit(self, ticket: str, query: Item, candidates: list[Item]) -> Future[Ranking]:
        """
        Queues a ranking.

        Raises:
            `EngineError`: if the engine has failed for good.
        """
        reranker = self._reranker
        job = RankingJob(ticket, query, candidates, reranker.window, reranker.stride, passes=reranker.passes)
        future: Future[Ranking] = Future()
        future.set_running_or_notify_cancel()  # from now on nobody but this thread ends it
        with self._changed:
            if self._failure is not None:
                raise EngineError("the engine has failed for good")
            self._futures[ticket] = future
            self._waiting.append(job)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Finishes what was taken, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work(RankingLoop(self._reranker))
        except Exception as error:
            # Its device has failed, or it could not even be told to stop. Nobody is to wait for it.
            logger.exception("the engine failed for good")
            with self._changed:
                self._failure = error
            for ticket in list(self._futures):
                self._finish(ticket, error)

    def _work(self, loop: RankingLoop) -> None:
        while self._wait_for_work(loop):
            try:
                self._admit(loop)
                if loop.num_active:
                    for ranking in loop.step():
                        self._finish(ranking.query_id, ranking)
            except Exception as error:
                if self._reranker.engine.is_lost(error):
                    raise
                # What was under way is lost, and told so; the server goes on with what comes next.
                logger.exception("the engine failed")
                loop.cancel()
                with self._changed:
                    lost = set(self._futures) - {job.query_id for job in self._waiting}
                for ticket in lost:
                    self._finish(ticket, error)

    def _wait_for_work(self, loop: RankingLoop) -> bool:
        """Sleeps while there is nothing to do. Returns whether there is, or may come."""
        with self._changed:
            while not (self._waiting or loop.num_active or self._unwanted):
                if self._closing and not self._tickets:
                    return False
                self._changed.wait()
        return True

    def _admit(self, loop: RankingLoop) -> None:
        with self._changed:
            unwanted, self._unwanted = self._unwanted & set(self._futures), set()
            self._waiting = collections.deque(job for job in self._waiting if job.query_id not in unwanted)
        for ticket in unwanted:
            loop.cancel(ticket)
            self._forget(ticket)
        while self._waiting and loop.has_room:
            with self._changed:
                job = self._waiting.popleft()
            ranking = loop.submit(job)
            if ranking is not None:
                self._finish(job.query_id, ranking)

    def _finish(self, ticket: str, outcome: Ranking | Exception) -> None:
        future = self._forget(ticket)
        if isinstance(outcome, Exception):
            future.set_exception(EngineError(f"the engine failed: {outcome}"))
        elif outcome.error is not None:
            future.set_exception(EngineError(outcome.error))
        else:
            future.set_result(outcome)

    def _forget(self, ticket: str) -> Future[Ranking]:
        with self._changed:
            self._tickets.discard(ticket)
            return self._futures.pop(ticket)
