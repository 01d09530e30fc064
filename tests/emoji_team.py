"""One of two processes that train together; started by torchrun from test_recipes_emoji_team.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from team import Team


def main(out: Path) -> None:
    team = Team("cpu")
    weights = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1, 3)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    weights[0].grad = torch.tensor([1.0, 2.0]) * (team.rank + 1)
    weights[1].grad = torch.full((1, 3), float(team.rank))
    team.average_gradients(weights)
    agreed = team.agree(10.0 + team.rank, 5.0 * team.rank)
    team.wait()
    found = {"grads": [weight.grad for weight in weights], "agreed": agreed, "leads": team.leads, "size": team.size}
    torch.save(found, out / f"{team.rank}.pt")
    team.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
