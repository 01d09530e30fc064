"""Processes of their own, since a group of processes is for good; see the functions `check…` for what they do."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from scripted import ForcedEngine
from tiny_models import make_model, make_processor
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vretrver_hf import Item
from vretrver_hf.agent import AgentTask, play
from vretrver_hf.engines._graphs import DecodeGraphs, _Recorded
from vretrver_hf.protocol import get_preset
from vretrver_hf.training._sharding import gathered


class Model(nn.Module):
    """Embedding, blocks, a norm and a head of the embedding's weights; accelerate puts all but the blocks together."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def body(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.norm(x)

    def forward(self, x):
        return self.head(self.body(x))


def start(rank: int, folder: str, num_processes: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/group", rank=rank, world_size=num_processes, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)


def shard(model: nn.Module, blocks: list[nn.Module], tail: list[nn.Module], **settings) -> nn.Module:
    """As accelerate shards a model."""
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **settings)
    fully_shard(tail, reshard_after_forward=False, **settings)
    return fully_shard(model, **settings)


def shard_small(model: Model, **settings) -> Model:
    return shard(model, list(model.blocks), [model.norm, model.embed, model.head], **settings)


def is_sharded(model: nn.Module) -> bool:
    kinds = {isinstance(parameter, DTensor) for parameter in model.parameters()}
    assert len(kinds) == 1
    return kinds.pop()


def train(model: nn.Module, inputs: list[torch.Tensor], rate: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    outputs = [model(x) for x in inputs]
    sum(getattr(output, "logits", output).square().mean() / len(inputs) for output in outputs).backward()
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
            x = torch.tensor([i % 5, rank, 2])
            torch.testing.assert_close(model.head(model.body(x)), plain.head(plain.body(x)))
            assert not is_sharded(model)
        # Each ends with another one. Where a CUDA graph replays the body, nothing but the head is called.
        [model.blocks[2], model.head][rank](torch.ones(2, 8))
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
    start(rank, folder, num_processes)
    plain = Model()
    model = shard_small(copy.deepcopy(plain))
    frees = [is_freed_behind(block) for block in model.blocks]
    inputs = [torch.randint(5, (4,)) for _ in range(num_processes)]
    for step in range(3):
        roll_out(model, plain, rank, count=1 + 4 * rank)  # before the first forward pass of the whole model, too
        assert [is_freed_behind(block) for block in model.blocks] == frees == [True] * 3
        train(model, inputs[rank : rank + 1])
        train(plain, inputs)
        assert_equal(model, plain)
        if step == 1:
            fail(model)
    check_precision()
    distributed.destroy_process_group()


def check_precision() -> None:
    """A part that is called by itself computes what it computes within the whole model."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = shard_small(Model(), mp_policy=half)
    seen = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.arange(5)
    with torch.no_grad():
        expected = model(x)
        with gathered(model):
            found = model.head(model.body(x).float())
            assert model.blocks[0](torch.ones(2, 8)).dtype == torch.bfloat16
    hook.remove()
    assert [value.dtype for value in seen] == [torch.bfloat16] * 2  # what others hooked on is called as ever
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_engine(rank: int, folder: str) -> None:
    """One process plays with recorded passes and the other without; both go on training the same model."""
    start(rank, folder, 2)
    processor = make_processor("qwen2_5_vl")
    plain = make_model("qwen2_5_vl", processor)
    model = copy.deepcopy(plain)
    inner = model.model
    blocks = [*inner.visual.blocks, *inner.language_model.layers]
    shard(model, blocks, [inner.language_model.embed_tokens, model.lm_head])
    inputs = [torch.randint(90, (1, 12)) for _ in range(2)]
    for _ in range(2):
        with gathered(model):
            engine = ForcedEngine(model, processor, lambda *unused: "y" * 12)
            if rank:
                engine._pass = DecodeGraphs(engine._one_token_a_row, engine._cache, 1, replayed_past_hooks)
            found = played(engine)
            assert not rank or engine._pass._graphs
        assert is_sharded(model)
        assert found == pytest.approx(played(ForcedEngine(plain, processor, lambda *unused: "y" * 12)), abs=1e-3)
        train(model, inputs[rank : rank + 1], rate=1e-3)
        train(plain, inputs, rate=1e-3)
        assert_equal(model, plain)
    distributed.destroy_process_group()


def played(engine: ForcedEngine) -> list[float]:
    """Log-probabilities of what it was made to say about two texts."""
    preset = get_preset("foveated", max_calls=1)
    (trajectory,) = play(engine, [AgentTask(Item(text="q"), [Item(text="a"), Item(text="b")], preset)])
    return [value for value in trajectory.logprobs if value is not None]


def replayed_past_hooks(function) -> _Recorded:
    """What a CUDA graph does, on a CPU: the same again, while no module's hooks are called."""
    result = function().clone()

    def replay() -> None:
        with mock.patch.object(nn.Module, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs)):
            result.copy_(function())

    return _Recorded(replay, result)


def is_freed_behind(block: nn.Module) -> bool:
    return block._get_fsdp_state()._fsdp_param_group._reshard_after_forward


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_whole_weights_for_any_number_of_forward_passes(num_processes: int, tmp_path: Path):
    multiprocessing.spawn(check, (str(tmp_path), num_processes), nprocs=num_processes)


def test_one_process_replays_what_another_computes(tmp_path: Path):
    multiprocessing.spawn(check_engine, (str(tmp_path),), nprocs=2)


def test_other_models_are_left_as_they_are():
    model = Model()
    before = dict(model.named_parameters())
    with gathered(model):
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
