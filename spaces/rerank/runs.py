"""Runs that share a model: they take turns on it, can be stopped in the middle of a turn, and end in time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vretrver_hf import Item, Ranking, Reranker


if TYPE_CHECKING:
    from vretrver_hf.agent import Event


class Stopped(Exception):
    """The run was to end before it was done; the message says why, in plain words."""


class Run:
    """
    One visitor's run.

    Args:
        deadline (`float`): Seconds after which it is stopped.
    """

    def __init__(self, deadline: float):
        self._deadline = deadline
        self._ends = time.monotonic() + deadline
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stops the model, at the latest after the token that it is writing."""
        self._cancelled.set()

    def wait(self) -> None:
        """
        Starts the deadline again: time for which a model is loaded does not count.

        Raises:
            `Stopped`: if the run was cancelled.
        """
        self._ends = time.monotonic() + self._deadline
        self.check()

    def check(self) -> None:
        """
        Raises:
            `Stopped`: if the run is to end.
        """
        if self._cancelled.is_set():
            raise Stopped("Cancelled. The model has stopped.")
        if time.monotonic() > self._ends:
            raise Stopped(f"Stopped: it took longer than {self._deadline:g} seconds. Try fewer or smaller candidates.")


class Runs:
    """The runs under way, by visitor; a new one of the same visitor stops the one before."""

    def __init__(self, deadline: float):
        self._deadline = deadline
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def begin(self, visitor: str) -> Iterator[Run]:
        """A run of this visitor, known until it is left."""
        run = Run(self._deadline)
        with self._lock:
            before = self._runs.get(visitor)
            self._runs[visitor] = run
        if before is not None:
            before.cancel()
        try:
            yield run
        finally:
            with self._lock:
                if self._runs.get(visitor) is run:
                    del self._runs[visitor]

    def cancel(self, visitor: str) -> bool:
        """Stops a visitor's run; returns whether there was one."""
        with self._lock:
            run = self._runs.get(visitor)
        if run is not None:
            run.cancel()
        return run is not None


class Stage:
    """
    A model that several runs play on in turns.

    Args:
        reranker (`Reranker`): The model, with the settings that were saved beside it.
    """

    def __init__(self, reranker: Reranker):
        self.reranker = reranker
        self._turn = threading.Lock()  # an engine serves one caller at a time

    def play(self, run: Run, reranker: Reranker, query: Item, candidates: Sequence[Item]) -> Iterator[Event | Ranking]:
        """
        Plays a reranker on this stage's engine; yields events, and the ranking last.

        Args:
            run (`Run`): Whose play it is.
            reranker (`Reranker`): Settings on the stage's engine.
            query (`Item`): The query.
            candidates (sequence of `Item`): The candidates.

        Raises:
            `Stopped`: if the run is to end.
        """
        stream = reranker.rank_stream(query, candidates)
        engine = self.reranker.engine
        try:
            while True:
                with self._my_turn(run):
                    engine.on_token = run.check
                    try:
                        happened = next(stream, None)
                    finally:
                        engine.on_token = None
                if happened is None:
                    return
                yield happened
        finally:
            with self._turn:
                stream.close()

    @contextlib.contextmanager
    def _my_turn(self, run: Run) -> Iterator[None]:
        run.check()
        while not self._turn.acquire(timeout=0.1):
            run.check()
        try:
            run.check()
            yield
        finally:
            self._turn.release()
