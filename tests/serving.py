"""A server of this package on a port of its own, in a thread; the sockets are real."""

from __future__ import annotations

import re
import socket
import threading
import time

import torch
import uvicorn
from scripted import ScriptedEngine

from vretrver_hf import Reranker
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.server import create_app, server_config


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=64 * 64)


class Numbers(ScriptedEngine):
    """Ranks documents whose texts are numbers, the largest first, once `go` is set."""

    def __init__(self, encoder, max_sessions: int = 4):
        super().__init__(encoder, self.answer, max_sessions=max_sessions)
        self.prompts: dict[str, str] = {}
        self.go = threading.Event()
        self.go.set()
        self.turns: list[str] = []

    def submit(self, session, encoded, sampling):
        if not session.turn:
            self.prompts[session.query_id] = encoded.text
        super().submit(session, encoded, sampling)

    def poll(self, sessions):
        self.go.wait(20)
        return super().poll(sessions)

    def answer(self, query_id, turn):
        prompt = self.prompts[query_id]
        self.turns.append(query_id)
        if "Query: crash" in prompt:
            raise MemoryError("out of memory")
        if "Query: device" in prompt:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if "Query: look" in prompt and turn == 0:
            return format_turn("closer", format_call("select_images", {"target_images": [1]}))
        numbers = re.findall(r"^\(\d+\) .*?(\d+)$", prompt, re.MULTILINE)
        order = sorted(range(len(numbers)), key=lambda i: -int(numbers[i]))
        return format_turn("by size", format_answer(order))


class Serving:
    """Used as a context manager. `stop` asks it to end as SIGTERM does."""

    def __init__(self, reranker: Reranker, **settings):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        application = create_app(reranker, **settings)
        self._server = uvicorn.Server(server_config(application, settings.get("limits"), log_level="error"))
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    def __enter__(self) -> Serving:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._listener.close()

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        self._server.should_exit = True
