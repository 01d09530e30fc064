"""The benchmarks run to their end: each once, as small as it can be. What they measure so is worth nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent / "benchmarks"
HELPERS = {"subject", "timing"}
SMALL = {
    "agent_loop": ["--rows", "2", "--tokens", "2", "--repeats", "1"],
    "decode_graphs": ["--queries", "1", "--samples", "1", "--dtype", "float32"],
    "evaluation_stream": ["--queries", "20", "--hits", "5"],
    "flash_attention": ["--attention", "eager", "--rollouts", "1", "--repeat", "1", "--factor", "10"],
    "grpo_step": ["--rollouts", "2", "--candidates", "2", "--thought", "2", "--steps", "1", "--freeze"],
    "retrieval": ["--count", "2000", "--dimensions", "8", "--queries", "3"],
    "rollout_pictures": ["--side", "56", "--groups", "1", "--rollouts", "2", "--repeat", "1"],
    "server_load": ["--clients", "1", "--requests", "2"],
    "tools": ["--side", "112", "--calls", "1", "--repeats", "1"],
    "turns_and_windows": [
        *["--rows", "2", "--turns", "2", "--tokens", "1", "--queries", "2", "--windows", "2", "--median", "2"],
        *["--repeats", "1"],
    ],
    "vision": ["--pictures", "2", "--side", "56", "--repeats", "1"],
}

pytestmark = pytest.mark.nightly


def test_each_benchmark_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == SMALL.keys() | HELPERS


@pytest.mark.parametrize("name", SMALL)
def test_runs(name, tmp_path):
    arguments = [*SMALL[name], *(["--out", tmp_path / "out"] if name == "evaluation_stream" else [])]
    command = [sys.executable, FOLDER / f"{name}.py", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
