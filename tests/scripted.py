"""Engines whose model says what a test wrote down; everything around the words is real."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Collection

import torch

from vretrver_hf.encoding import Encoded, Encoder
from vretrver_hf.engines.base import Engine, Sampling, Session, TurnResult
from vretrver_hf.engines.transformers import TransformersEngine


Script = Callable[[str, int], str]
"""Gives the text of a turn for a query id and the turn's number, from 0."""


def turn_ids(encoder: Encoder, text: str) -> list[int]:
    """A scripted turn as a model samples it: a call stops the turn, anything else ends with the end mark."""
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    return ids if ids and ids[-1] == encoder.end_of_call else [*ids, encoder.end_of_turn]


class ScriptedEngine(Engine):
    """Runs no model: quick enough for thousands of conversations."""

    def __init__(self, encoder: Encoder, script: Script, max_sessions: int = 4, max_length: int = 100_000):
        self.encoder = encoder
        self.script = script
        self.max_sessions = max_sessions
        self.max_length = max_length
        self.most_open = 0
        self._open: set[Session] = set()
        self._pending: collections.deque[tuple[Session, Sampling, float]] = collections.deque()
        self._finished: dict[Session, TurnResult] = {}

    def open(self, query_id: str = "", sample: int = 0) -> Session:
        session = Session(query_id, sample)
        self._open.add(session)
        self.most_open = max(self.most_open, len(self._open))
        return session

    def submit(self, session: Session, encoded: Encoded, sampling: Sampling) -> None:
        self._pending.append((session, sampling, time.perf_counter()))

    def poll(self, sessions: Collection[Session]) -> list[TurnResult]:
        while self._pending and not any(session in self._finished for session in sessions):
            result = self._next()
            self._finished[result.session] = result
        return [self._finished.pop(session) for session in list(sessions) if session in self._finished]

    def _next(self) -> TurnResult:
        session, sampling, started = self._pending.popleft()
        ids = turn_ids(self.encoder, self.script(session.query_id, session.turn))
        session.turn += 1
        stop = "call" if ids[-1] == self.encoder.end_of_call else "end"
        if len(ids) > sampling.max_turn_tokens:
            ids, stop = ids[: sampling.max_turn_tokens], "length"
        return TurnResult(session, ids, None, stop, time.perf_counter() - started)

    def close(self, session: Session) -> None:
        self._open.discard(session)
        self._finished.pop(session, None)
        self._pending = collections.deque(entry for entry in self._pending if entry[0] is not session)


class ForcedEngine(TransformersEngine):
    """Runs a real model and makes it say the script, so its cache and log-probabilities are those of real turns."""

    def __init__(self, model, processor, script: Script, **kwargs):
        super().__init__(model, processor, **kwargs)
        self.script = script

    def _sample(self, sessions, logits):
        forced = torch.zeros_like(logits)
        for row, session in enumerate(sessions):
            ids = turn_ids(self.encoder, self.script(session.query_id, session.turn - 1))
            forced[row, ids[len(session.sampled)]] = 1e4
        real = logits.float().log_softmax(-1)
        results = super()._sample(sessions, forced)
        for row, session in enumerate(sessions):
            session.logprobs[-1] = real[row, session.sampled[-1]].item()
        return results
