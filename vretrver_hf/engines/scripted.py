"""An engine that says what was written beforehand: conversations of a teacher or an annotator, played for real."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Collection

from ..encoding import Encoded, Encoder
from .base import Engine, Sampling, Session, TurnResult


Script = Callable[[str, int], str]
"""Gives the text of a turn for a query id and the turn's number, from 0."""


class CutOff(str):
    """The text of a turn that ran into its limit of tokens, and so did not end."""


def turn_ids(encoder: Encoder, text: str) -> list[int]:
    """A written turn as a model would sample it: a call stops the turn, anything else ends with the end mark."""
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    is_over = ids and (ids[-1] == encoder.end_of_call or isinstance(text, CutOff))
    return ids if is_over else [*ids, encoder.end_of_turn]


class ScriptedEngine(Engine):
    """
    Runs no model; everything around the words is real: prompts, tools, observations, budgets, records.

    Args:
        encoder (`Encoder`):
            Tokenises what is said and shown.
        script (`Callable[[str, int], str]`):
            Gives the text of a turn for a query id and the turn's number, from 0; [`CutOff`] where it did not end.
        max_sessions (`int`, *optional*, defaults to 4):
            Most conversations at a time.
        max_length (`int`, *optional*, defaults to 100,000):
            Most tokens of one conversation.
    """

    def __init__(self, encoder: Encoder, script: Script, max_sessions: int = 4, max_length: int = 100_000):
        self.encoder = encoder
        self.script = script
        self.max_sessions = max_sessions
        self.max_length = max_length
        self._open: set[Session] = set()
        self._pending: collections.deque[tuple[Session, Sampling, float]] = collections.deque()
        self._finished: dict[Session, TurnResult] = {}

    def open(self, query_id: str = "", sample: int = 0) -> Session:
        session = Session(query_id, sample)
        self._open.add(session)
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
        stop = {self.encoder.end_of_call: "call", self.encoder.end_of_turn: "end"}.get(ids[-1], "length")
        if len(ids) > sampling.max_turn_tokens:
            ids, stop = ids[: sampling.max_turn_tokens], "length"
        return TurnResult(session, ids, None, stop, time.perf_counter() - started)

    def close(self, session: Session) -> None:
        self._open.discard(session)
        self._finished.pop(session, None)
        self._pending = collections.deque(entry for entry in self._pending if entry[0] is not session)
