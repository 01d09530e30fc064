"""Whole weights for rollouts, whatever shards them while the model is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from trl.models import unwrap_model_for_generation


if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@contextlib.contextmanager
def whole_weights(
    model: nn.Module, accelerator: Accelerator, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Iterator[nn.Module]:
    """
    Gives the bare model. While the context lasts, every process holds all of its weights, under DDP, ZeRO-3 and FSDP2
    alike, so that each may run as many forward passes as it likes. All processes enter it together.

    Args:
        model (`nn.Module`):
            The model as accelerate wrapped it.
        accelerator (`Accelerator`):
            What wrapped it.
        gradient_checkpointing_kwargs (`dict`, *optional*):
            How gradient checkpointing is switched on again, if it was on.
    """
    with (
        unwrap_model_for_generation(
            model, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        ) as bare,
        gathered(bare),
    ):
        yield bare


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """
    While the context lasts, every process holds the weights that `fully_shard` spread over them, in the precision of
    the forward pass. Other models are left as they are. All processes enter it together.

    FSDP's hooks stay in force, since they decide about the precision of what goes through them: they only find nothing
    to gather and nothing to free.

    Args:
        model (`nn.Module`):
            What `fully_shard` was called on last, or a model that it was never called on.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    _make_root(model)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    frees = [_frees_after_forward(module) for module in modules]
    try:
        model.set_reshard_after_forward(False)
        for module in modules:
            module.unshard()
        yield
    except BaseException:
        # A forward pass that was broken off would leave FSDP in the middle of it.
        if hasattr(model, "reset_iter_state"):  # older versions of PyTorch have no way to do that
            model.reset_iter_state()
        raise
    finally:
        for module, value in zip(modules, frees, strict=True):
            module.set_reshard_after_forward(value, recurse=False)
            module.reshard()


def _make_root(model: FSDPModule) -> None:
    """
    FSDP takes for its root whatever runs forward first, once and for all. Rollouts call parts of the model, and come
    before the first loss: so the whole model does nothing, as a forward pass.
    """
    model._nothing = lambda unused: None
    register_fsdp_forward_method(model, "_nothing")
    model._nothing(None)  # older versions of PyTorch fail at a forward pass without arguments on a GPU
    del model._nothing


def _frees_after_forward(module: FSDPModule) -> bool:
    group = module._get_fsdp_state()._fsdp_param_group  # there is a method to set it and none to ask
    return group is not None and group._reshard_after_forward


__all__ = ["gathered", "whole_weights"]
