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
        self._waiting: collections.deque[RankingJob] = collections.deque()
        self._futures: dict[str, Future[Ranking]] = {}
        self._unwanted: set[str] = set()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rerank-worker", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """Rankings that wait or are under way."""
        return len(self._futures)

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def check(self) -> None:
        """
        Raises:
            `Busy`: if there is no room for another ranking.
            `Closing`: if none is taken any more.
        """
        if self._closing:
            raise Closing("the server is shutting down")
        if len(self._futures) >= self._max_requests:
            raise Busy(f"{len(self._futures)} requests are here already; try again in a moment")

    def job(self, query: Item, candidates: list[Item]) -> RankingJob:
        """A query to be submitted."""
        reranker = self._reranker
        return RankingJob(
            str(next(self._numbers)), query, candidates, reranker.window, reranker.stride, passes=reranker.passes
        )

    def submit(self, job: RankingJob) -> Future[Ranking]:
        """
        Queues a ranking.

        Raises:
            `Busy`, `Closing`: see [`Worker.check`].
        """
        with self._changed:
            self.check()
            future: Future[Ranking] = Future()
            self._futures[job.query_id] = future
            self._waiting.append(job)
            self._changed.notify()
        return future

    def drop(self, job: RankingJob) -> None:
        """Stops a ranking that nobody waits for any more."""
        with self._changed:
            self._unwanted.add(job.query_id)
            self._changed.notify()

    def close(self) -> None:
        """Finishes what was taken, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        loop = RankingLoop(self._reranker)
        while self._wait_for_work(loop):
            try:
                self._admit(loop)
                if loop.num_active:
                    for ranking in loop.step():
                        self._finish(ranking.query_id, ranking)
            except Exception as error:
                # What was under way is lost, and told so; the server goes on with what comes next.
                logger.exception("the engine failed")
                loop.cancel()
                with self._changed:
                    lost = set(self._futures) - {job.query_id for job in self._waiting}
                for query_id in lost:
                    self._finish(query_id, error)

    def _wait_for_work(self, loop: RankingLoop) -> bool:
        """Sleeps while there is nothing to do. Returns whether there is, or may come."""
        with self._changed:
            while not (self._waiting or loop.num_active or self._unwanted):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self, loop: RankingLoop) -> None:
        with self._changed:
            unwanted, self._unwanted = self._unwanted, set()
            self._waiting = collections.deque(job for job in self._waiting if job.query_id not in unwanted)
        for query_id in unwanted & set(self._futures):
            loop.cancel(query_id)
            self._futures.pop(query_id).cancel()
        while self._waiting and loop.has_room:
            with self._changed:
                job = self._waiting.popleft()
            ranking = loop.submit(job)
            if ranking is not None:
                self._finish(job.query_id, ranking)

    def _finish(self, query_id: str, outcome: Ranking | Exception) -> None:
        future = self._futures.pop(query_id)
        if isinstance(outcome, Exception):
            future.set_exception(EngineError(f"the engine failed: {outcome}"))
        elif outcome.error is not None:
            future.set_exception(EngineError(outcome.error))
        else:
            future.set_result(outcome)
