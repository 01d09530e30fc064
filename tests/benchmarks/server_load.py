"""
Latency and throughput of `vretrver serve`, and how long imports and the command line take to start.

    python tests/benchmarks/server_load.py [--clients 1 8 32] [--requests 96] [--model NAME]
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vretrver_hf.samples import load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="hub id or folder; the bundled model by default")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=96, help="requests of each row")
    args = parser.parse_args()

    for label, code in [
        ("python -c pass", "pass"),
        ("import vretrver_hf", "import vretrver_hf"),
        ("vretrver --help", "import sys; sys.argv = ['vretrver', '--help']; import vretrver_hf.__main__"),
    ]:
        command = [sys.executable, "-c", f"{code}"]
        times = [run_seconds(command) for _ in range(5)]
        print(f"{label:<24}{statistics.median(times):8.3f} s")
    bodies = [body_of(sample) for sample in load_samples()]
    command = [sys.executable, "-m", "vretrver_hf", "serve", "--port", "0"]
    started = time.perf_counter()
    server = subprocess.Popen([*command, *(["--model", args.model] if args.model else [])], stderr=subprocess.PIPE)
    try:
        url = next(line.decode().split()[0] for line in server.stderr if line.startswith(b"http"))
        threading.Thread(target=server.stderr.read, daemon=True).start()  # or its log would fill the pipe and block it
        print(f"{'vretrver serve, ready':<24}{time.perf_counter() - started:8.3f} s\n")
        rank(url, bodies[0])
        print(f"{'clients':>8}{'p50 s':>10}{'p95 s':>10}{'p99 s':>10}{'requests/s':>12}")
        for clients in args.clients:
            measure(url, bodies, clients, args.requests)
    finally:
        server.terminate()
        server.wait(60)


def run_seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def measure(url: str, bodies: list[bytes], clients: int, requests: int) -> None:
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = list(pool.map(lambda number: rank(url, bodies[number % len(bodies)]), range(requests)))
    seconds = time.perf_counter() - started
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    print(f"{clients:>8}{cuts[49]:>10.2f}{cuts[94]:>10.2f}{cuts[98]:>10.2f}{requests / seconds:>12.2f}")


def rank(url: str, body: bytes) -> float:
    """Seconds of one request."""
    request = urllib.request.Request(url + "/v1/rerank", body, {"Content-Type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as reply:
        assert json.load(reply)["results"]
    return time.perf_counter() - started


def body_of(sample) -> bytes:
    documents = [item_of(item) for item in sample.candidates]
    return json.dumps({"query": item_of(sample.query), "documents": documents}).encode()


def item_of(item) -> dict[str, str]:
    values = {} if item.text is None else {"text": item.text}
    if item.image is not None:
        data = base64.b64encode(Path(item.image).read_bytes()).decode()
        values["image"] = f"data:image/webp;base64,{data}"
    return values


if __name__ == "__main__":
    main()
