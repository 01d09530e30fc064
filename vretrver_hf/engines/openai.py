"""Asks a model behind an OpenAI-compatible endpoint: vLLM's server, a provider, or anything that speaks the same."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from ..encoding import Encoded, MessageEncoder
from . import _chat
from .base import Engine, Sampling, Session, TurnResult


_CALL, _END_OF_CALL = "<tool_call>", "</tool_call>"

_LOOK_UP = 0.1
"""Seconds of waiting between two calls of `on_token`: tokens are not seen as they come."""


class OpenAIEngine(Engine):
    """
    Engine for OpenAI-compatible chat endpoints.

    Conversations are under way at the same time, up to `max_sessions`; each turn is one request with the whole
    conversation, pictures as data URLs. Tool calls are read from the text by this package's parser, so the endpoint
    needs no tool support. It returns text and no token ids, which trajectories say with `exact_tokens=False`; their
    numbers of tokens are those that the endpoint tells, and 0 where it tells none.

    A request that fails for a reason that may pass is tried again with growing pauses, within `retries` and
    `deadline`. A turn that fails for good ends its own conversation, with an error that names the engine and the
    query; the others go on.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        base_url (`str`, *optional*):
            Address of the endpoint, such as `"http://localhost:8000/v1"`; `OPENAI_BASE_URL` of the environment by
            default.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key, where the endpoint needs one. Keys are never logged.
        max_sessions (`int`, *optional*, defaults to 32):
            Most conversations, and so requests, at the same time.
        factor (`int`, *optional*, defaults to 28):
            Sides of pictures are multiples of it: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        image_format (`str`, *optional*, defaults to `"png"`):
            `"png"` sends the pixels as they are; `"jpeg"` sends fewer bytes.
        timeout (`float`, *optional*, defaults to 120):
            Seconds that one reply may take.
        retries (`int`, *optional*, defaults to 12):
            How often a request is tried again; with pauses of up to 8 s, this outlives the restart of a server.
        deadline (`float`, *optional*, defaults to 600):
            Seconds that a turn may take, all tries together.
        max_length (`int`, *optional*):
            Most tokens of a conversation; left to the endpoint by default, which refuses what is too long.
        extra_body (`dict`, *optional*):
            Further fields of each request, such as `{"repetition_penalty": 1.05}`.

    Example:

    ```python
    >>> from vretrver_hf import Reranker

    >>> reranker = Reranker.from_pretrained(  # doctest: +SKIP
    ...     "V-Retrver/V-Retrver-7B", engine="openai", base_url="http://localhost:8000/v1"
    ... )
    ```
    """

    exact_tokens = False

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_sessions: int = 32,
        factor: int = 28,
        image_format: _chat.ImageFormat = "png",
        timeout: float = 120,
        retries: int = 12,
        deadline: float = 600,
        max_length: int | None = None,
        extra_body: dict[str, Any] | None = None,
    ):
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not base_url:
            raise ValueError("engine 'openai' needs base_url, such as 'http://localhost:8000/v1', or OPENAI_BASE_URL")
        if max_sessions < 1:
            raise ValueError(f"max_sessions must be positive, got {max_sessions}")
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"unknown image_format {image_format!r}: choose 'png' or 'jpeg'")
        self.model = None
        self.model_name = model
        self.encoder = MessageEncoder(factor)
        self.max_sessions = max_sessions
        self.max_length = max_length or 2**62
        self.place = _without_credentials(base_url)
        self._image_format = image_format
        self._deadline = deadline
        self._extra_body = extra_body or {}
        self._key = os.environ.get(api_key_env) or ""
        self._client = _chat.make_client(base_url, self._key or "none", timeout, retries)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()

    def open(self, query_id: str = "", sample: int = 0) -> _Session:
        return _Session(query_id, sample)

    def submit(self, session: _Session, encoded: Encoded, sampling: Sampling) -> None:
        if session.turn_under_way is not None:
            raise RuntimeError("this conversation already waits for a turn")
        seed = _chat.turn_seed(session.generator(sampling.seed))
        session.turn += 1
        turn = self._take_turn(session, encoded, sampling, seed)
        session.turn_under_way = asyncio.run_coroutine_threadsafe(turn, self._loop)

    def poll(self, sessions: Collection[Session]) -> list[TurnResult]:
        asked = {s.turn_under_way: s for s in sessions if s.turn_under_way is not None}
        while True:
            done, waiting = concurrent.futures.wait(asked, _LOOK_UP, concurrent.futures.FIRST_COMPLETED)
            if done or not waiting:
                break
            if self.on_token is not None:
                self.on_token()
        for future in done:
            asked[future].turn_under_way = None
        return [future.result() for future in done]

    def close(self, session: _Session) -> None:
        if session.turn_under_way is not None:
            session.turn_under_way.cancel()  # which ends the request, so that the endpoint can stop too
            session.turn_under_way = None

    def shutdown(self) -> None:
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _take_turn(self, session: _Session, encoded: Encoded, sampling: Sampling, seed: int) -> TurnResult:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._deadline):
                session.messages += await asyncio.to_thread(self._chat_messages, encoded)
                reply = await self._client.chat.completions.create(**self._request(session, sampling, seed))
            text, stop = _read(reply)
        except Exception as error:  # whatever it is, it must not cost the other conversations
            return self._failed(session, error, time.perf_counter() - started)
        session.messages.append({"role": "assistant", "content": text})
        seconds = time.perf_counter() - started
        return TurnResult(session, [], None, stop, seconds, text=text, usage=_usage(reply))

    def _request(self, session: _Session, sampling: Sampling, seed: int) -> dict[str, Any]:
        extra = {"top_k": sampling.top_k} if sampling.top_k else {}
        return {
            "model": self.model_name,
            "messages": session.messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_completion_tokens": sampling.max_turn_tokens,
            "seed": seed,
            "stop": [_END_OF_CALL],
            "extra_body": {**extra, **self._extra_body},
        }

    def _chat_messages(self, encoded: Encoded) -> list[dict[str, Any]]:
        pictures = iter(encoded.images)
        messages = []
        for message in encoded.messages:
            blocks = [
                block if block["type"] == "text" else _chat.image_block(next(pictures), self._image_format)
                for block in message["content"]
            ]
            # Some servers take a system turn as text only.
            plain = message["role"] == "system" and all(block["type"] == "text" for block in blocks)
            content = "".join(block["text"] for block in blocks) if plain else blocks
            messages.append({"role": message["role"], "content": content})
        return messages

    def _failed(self, session: _Session, error: Exception, seconds: float) -> TurnResult:
        if isinstance(error, TimeoutError):
            error = TimeoutError(f"no usable reply within {self._deadline:g} s")
        reason = _chat.reason_of(error, self._key)
        message = f"engine 'openai' at {self.place} failed for query {session.query_id!r}: {reason}"
        return TurnResult(session, [], None, "error", seconds, error=message)


class _Session(Session):
    def __init__(self, query_id: str, sample: int):
        super().__init__(query_id, sample)
        self.messages: list[dict[str, Any]] = []
        self.turn_under_way: concurrent.futures.Future[TurnResult] | None = None


def _read(reply: Any) -> tuple[str, Any]:
    """The turn's text, and how it ended. A call that was stopped behind its end gets the mark back that stopped it."""
    text = _chat.text_of(reply)
    choice = reply.choices[0]
    if choice.finish_reason == "length":
        return text, "length"
    stopped_by = getattr(choice, "stop_reason", None)  # vLLM says so; others leave it to guess
    is_open = text.count(_CALL) > text.count(_END_OF_CALL)
    if not text.endswith(_END_OF_CALL) and (stopped_by == _END_OF_CALL or (stopped_by is None and is_open)):
        text += _END_OF_CALL
    return text, "call" if text.endswith(_END_OF_CALL) else "end"


def _usage(reply: Any) -> tuple[int, int] | None:
    """Tokens read and written, where the endpoint tells both."""
    usage = getattr(reply, "usage", None)
    read, written = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return (read, written) if isinstance(read, int) and isinstance(written, int) else None


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


__all__ = ["OpenAIEngine"]
