"""Processes that train together hold the same gradients and the same clock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from team import Team


def test_two_processes_agree(tmp_path):
    script = Path(__file__).with_name("emoji_team.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        tmp_path,
    ]
    subprocess.run(command, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (first["leads"], second["leads"], first["size"]) == (True, False, 2)
    for found in (first, second):
        assert found["agreed"] == [10.0, 0.0]  # the first one's
        assert found["grads"][0].tolist() == [1.5, 3.0]  # the mean of [1, 2] and [2, 4]
        assert found["grads"][1].tolist() == [[0.5, 0.5, 0.5]]
        assert found["grads"][2] is None


def test_one_alone_agrees_with_itself():
    team, weight = Team("cpu"), torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    team.average_gradients([weight])
    assert (team.agree(2.5), team.leads, team.size, weight.grad.item()) == ([2.5], True, 1, 1.0)
