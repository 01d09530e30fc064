"""Muon on matrices of one shape at a time is PyTorch's own, matrix by matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

from muon import Muon, orthogonal


SHAPES = ((8, 8), (8, 8), (6, 10), (10, 6), (8, 8))


def test_the_steps_are_pytorchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    left_out = torch.nn.Parameter(torch.ones(4, 4))  # has no gradient, so that nothing happens to it
    mine = Muon([*ours, left_out], lr=0.1, weight_decay=0.3)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3)  # its own iteration is in bfloat16
        assert not torch.equal(one, one.new_zeros(one.shape))
    assert torch.equal(left_out, torch.ones(4, 4))


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    for shape in ((3, 12, 12), (2, 5, 20), (2, 20, 5)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert 0.5 < values.min() and values.max() < 1.3


def test_momentum_survives_a_pause():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([weight])
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    again = Muon([weight])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[weight]["momentum"], optimizer.state[weight]["momentum"])


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="give everything else to AdamW"):
        Muon([torch.nn.Parameter(torch.ones(3))])
