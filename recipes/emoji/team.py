"""The processes that train together, one a GPU, as `torchrun` starts them; or the one there is."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed


class Team:
    """
    What the processes of one training have in common.

    Args:
        device_type (`str`):
            `"cuda"` or `"cpu"`. On several GPUs each process takes that of its local rank.
    """

    def __init__(self, device_type: str):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = torch.device(device_type)
        if self.size > 1:
            if device_type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The first process's values, for all: clocks differ, and weights must not. Waits for no accelerator."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        distributed.broadcast(shared, 0)
        return shared.tolist()

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """Makes each gradient the mean of all processes', in one exchange."""
        if self.size == 1:
            return
        grads = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        pieces = (flat / self.size).split([grad.numel() for grad in grads])
        for grad, piece in zip(grads, pieces, strict=True):
            grad.copy_(piece.view_as(grad))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def close(self) -> None:
        """Ends the group."""
        if self.size > 1:
            distributed.destroy_process_group()
