"""A real `vllm serve` with the bundled model, in a process of its own, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from vretrver_hf.reranker import bundled_model


STARTS_WITHIN = 240


class VLLMServer:
    """Used as a context manager; ready when it is entered."""

    def __init__(self, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._log = log
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> VLLMServer:
        self.start()
        self.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill(signal.SIGTERM)

    def start(self) -> None:
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(bundled_model())]
        command += ["--port", str(self._port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "2048", "--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 24}']
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A process of its own for the model, as a user's server has.
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            )

    def wait(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve did not start: {self._log.read_text()[-3000:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends the server and the processes that it started."""
        try:
            os.killpg(self._process.pid, number)
            self._process.wait(60)
        except ProcessLookupError:
            pass
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # what outlived its parent
            except ProcessLookupError:
                pass
