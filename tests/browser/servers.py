"""Starts what is to be looked at, as a user would."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx


def serve(command: list[str], port: int, cwd: Path, **environment: str) -> tuple[subprocess.Popen, float]:
    """Starts a server and waits for its page; returns it and how many seconds that took."""
    known = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(cwd / "gradio"), **environment}
    started = time.monotonic()
    with open(cwd / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=cwd, env=known, stdout=log, stderr=subprocess.STDOUT)
    while time.monotonic() - started < 300:
        assert process.poll() is None, (cwd / "server.log").read_text()
        try:
            httpx.get(f"http://127.0.0.1:{port}/", timeout=5).raise_for_status()
            return process, time.monotonic() - started
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError((cwd / "server.log").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
