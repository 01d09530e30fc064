"""The interface between the agent loop and whatever runs the model."""

from __future__ import annotations

import dataclasses
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, Literal, Self

from ..encoding import Encoded, Encoder, MessageEncoder


class EngineError(RuntimeError):
    """A query that an engine could not finish, after all retries. The message names the engine and the query."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """
    How the model's tokens are drawn.

    Args:
        temperature (`float`, *optional*, defaults to 0.0):
            0 takes the most probable token.
        top_p (`float`, *optional*, defaults to 1.0):
            Least total probability of the tokens to draw from.
        top_k (`int`, *optional*, defaults to 0):
            Most tokens to draw from; 0 is no limit.
        max_turn_tokens (`int`, *optional*, defaults to 1024):
            Most tokens of one model turn.
        seed (`int`, *optional*, defaults to 0):
            With a trajectory's query id, sample number and turn number, all that its draws depend on.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_turn_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if self.max_turn_tokens < 1:
            raise ValueError(f"max_turn_tokens must be positive, got {self.max_turn_tokens}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sampling:
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown sampling settings {unknown}; this version knows {known}")
        return cls(**values)


class Session:
    """One conversation as an engine sees it. Engines subclass it to keep their own state."""

    def __init__(self, query_id: str = "", sample: int = 0):
        self.query_id = query_id
        self.sample = sample
        self.turn = 0
        self.num_tokens = 0

    def generator(self, seed: int) -> random.Random:
        """The current turn's own source of chance, the same whatever else is in the batch."""
        return random.Random(f"{seed}/{self.query_id}/{self.sample}/{self.turn}")


@dataclasses.dataclass
class TurnResult:
    """
    A finished model turn.

    Args:
        session (`Session`):
            Whose turn it is.
        token_ids (`list[int]`):
            The sampled tokens, the stop token included.
        logprobs (`list[float]`, *optional*):
            Natural-log probability of each sampled token under the sampling temperature.
        stop (`str`):
            `"end"`: the model closed its turn; `"call"`: stopped behind a tool call; `"length"`: the turn's limit;
            `"error"`: it failed.
        seconds (`float`):
            Wall-clock time since the turn was asked for.
        text (`str`, *optional*):
            The turn as text, from engines that return no tokens; `token_ids` is empty then.
        error (`str`, *optional*):
            Why there is no turn, naming the engine and the query; `stop` is `"error"` then.
        usage (`tuple[int, int]`, *optional*):
            Tokens of the conversation that the turn continues, and of the turn, as an engine that returns no tokens
            counts them.
    """

    session: Session
    token_ids: list[int]
    logprobs: list[float] | None
    stop: Literal["end", "call", "length", "error"]
    seconds: float
    text: str | None = None
    error: str | None = None
    usage: tuple[int, int] | None = None


class Engine(ABC):
    """
    Runs many conversations at once, each at its own turn.

    The caller opens a session, submits what the model reads next, and polls; each poll advances everything that is
    under way until at least one turn is done. A session keeps its state between turns until it is
    closed. Several callers may take turns on one engine, in one thread. As a context manager it ends with
    [`Engine.shutdown`].
    """

    encoder: Encoder | MessageEncoder
    exact_tokens: bool = True
    """Whether turns come as the token ids that were sampled; else they come as text."""
    place: str = ""
    """Where the model runs, for people."""
    max_length: int
    """Most tokens of one conversation."""
    max_sessions: int
    """Conversations that can be under way at the same time."""
    on_token: Callable[[], None] | None = None
    """
    Called between two tokens, on a GPU between a few at a time, or every 0.1 s where the engine sees none. What it
    raises ends the poll and leaves every conversation as it was: the way to stop in the middle of a turn.
    """

    @abstractmethod
    def open(self, query_id: str = "", sample: int = 0) -> Session:
        """A new, empty conversation."""

    @abstractmethod
    def submit(self, session: Session, encoded: Encoded, sampling: Sampling) -> None:
        """Appends what the model reads and asks for its next turn."""

    @abstractmethod
    def poll(self, sessions: Collection[Session]) -> list[TurnResult]:
        """
        Advances all turns until at least one of these sessions' is done. Finished turns of other sessions are kept for
        whoever asks for them. Empty when none of these can be advanced.
        """

    @abstractmethod
    def close(self, session: Session) -> None:
        """Ends a conversation, also in the middle of a turn, and frees what it held."""

    def is_lost(self, error: Exception) -> bool:
        """
        Whether the engine that raised this fails at everything from now on, so that only a new process helps: a device
        that has failed stays so.
        """
        torch = sys.modules.get("torch")  # where it is not loaded it has not failed
        return torch is not None and isinstance(error.__cause__ or error, torch.AcceleratorError)

    def shutdown(self) -> None:  # noqa: B027 - most engines hold nothing
        """Frees what the engine holds beyond the process's memory. It cannot be used any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
