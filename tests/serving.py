"""A server of this package on a port of its own, in a thread; the sockets are real."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn

from vretrver_hf import Reranker
from vretrver_hf.server import create_app


class Serving:
    """Used as a context manager. `stop` asks it to end as SIGTERM does."""

    def __init__(self, reranker: Reranker, **settings):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(create_app(reranker, **settings), log_level="error"))
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

    def stop(self) -> None:
        self._server.should_exit = True
