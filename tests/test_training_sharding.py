"""Processes of their own, since a group of processes is for good; see `check` for what they do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vretrver_hf.training._sharding import gathered


class Model(nn.Module):
    """Blocks, a norm and a head; accelerate puts the last two into one group."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def body(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.norm(x)

    def forward(self, x):
        return self.head(self.body(x))


def shard(model: Model) -> Model:
    """As accelerate shards a model."""
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=True)
    fully_shard([model.norm, model.head], reshard_after_forward=False)
    return fully_shard(model)


def is_sharded(model: nn.Module) -> bool:
    kinds = {isinstance(parameter, DTensor) for parameter in model.parameters()}
    assert len(kinds) == 1
    return kinds.pop()


def train(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(model(x).square().mean() / len(inputs) for x in inputs).backward()
    optimizer.step()


def assert_equal(model: nn.Module, plain: nn.Module) -> None:
    weights = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), weights[name], msg=name)


def roll_out(model: Model, plain: Model, rank: int, count: int) -> None:
    """Parts of the model, as the engine calls them, more often on one process than on the other."""
    with gathered(model), torch.no_grad():
        assert not is_sharded(model)
        for i in range(count):
            x = torch.full((2, 3), i + rank / 10)
            torch.testing.assert_close(model.head(model.body(x)), plain.head(plain.body(x)))
            assert not is_sharded(model)
    assert is_sharded(model)


def fail(model: Model) -> None:
    """A forward pass that breaks off in a block and one between norm and head."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), gathered(model), torch.no_grad():
        model.blocks[1](torch.ones(2, 7))
    assert is_sharded(model)
    with pytest.raises(ZeroDivisionError), gathered(model), torch.no_grad():
        model.norm(torch.ones(2, 8))
        raise ZeroDivisionError
    assert is_sharded(model)


def check(rank: int, folder: str, num_processes: int) -> None:
    """Rollouts, training and failures take turns; the model stays what an ordinary one becomes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=num_processes)
    torch.manual_seed(0)
    plain = Model()
    model = shard(copy.deepcopy(plain))
    frees = [is_freed_behind(block) for block in model.blocks]
    inputs = [torch.randn(4, 3) for _ in range(num_processes)]
    for step in range(3):
        roll_out(model, plain, rank, count=1 + 4 * rank)  # before the first forward pass of the whole model, too
        assert [is_freed_behind(block) for block in model.blocks] == frees == [True] * 3
        train(model, inputs[rank : rank + 1])
        train(plain, inputs)
        assert_equal(model, plain)
        if step == 1 and hasattr(model, "reset_iter_state"):
            fail(model)
    distributed.destroy_process_group()


def is_freed_behind(block: nn.Module) -> bool:
    return block._get_fsdp_state()._fsdp_param_group._reshard_after_forward


@pytest.mark.parametrize("num_processes", [1, 2])
def test_whole_weights_for_any_number_of_forward_passes(num_processes: int, tmp_path: Path):
    multiprocessing.spawn(check, (str(tmp_path), num_processes), nprocs=num_processes)


def test_other_models_are_left_as_they_are():
    model = Model()
    before = dict(model.named_parameters())
    with gathered(model):
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
