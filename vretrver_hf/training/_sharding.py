"""Whole weights for rollouts, whatever shards them while the model is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.utils import _apply_to_tensors
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

    Meanwhile FSDP is told nothing of forward passes. It would note which modules run, and gather by that later, while
    rollouts differ from process to process: each ends with another part of the model, and a CUDA graph runs what was
    recorded in it without any hooks. Of modules in one group, such as an embedding and the head that shares its
    weights, FSDP would then wait for the rest and not free the group, on that process alone; and in the backward pass
    it would prefetch what ran last before it. Either leaves processes waiting in different collectives.

    Args:
        model (`nn.Module`):
            What `fully_shard` was called on last, or a model that it was never called on.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.reshard)
            module.unshard()
            stack.enter_context(_casting_alone(module))
        yield


@contextlib.contextmanager
def _casting_alone(module: FSDPModule) -> Iterator[None]:
    """While the context lasts, FSDP's hooks decide about the precision of what goes through a module, and no more."""
    state = module._get_fsdp_state()  # there are methods to add hooks and none to find them
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    ids = {one.id for handle in handles for one in getattr(handle, "handles", [handle])}
    cast = _Cast(state._mp_policy)
    replaced = []
    for hooks, instead in [(module._forward_pre_hooks, cast.inputs), (module._forward_hooks, cast.output)]:
        for number in ids & hooks.keys():
            replaced.append((hooks, number, hooks[number]))
            hooks[number] = instead
    try:
        yield
    finally:
        for hooks, number, hook in replaced:
            hooks[number] = hook


class _Cast:
    """What FSDP's hooks do to the inputs and the output of a module."""

    def __init__(self, policy: MixedPrecisionPolicy):
        self._inputs = policy.param_dtype if policy.cast_forward_inputs else None
        self._output = policy.output_dtype

    def inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast(args, self._inputs), _cast(kwargs, self._inputs)

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, self._output)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return values
    return _apply_to_tensors(lambda value: value.to(dtype) if value.is_floating_point() else value, values)


__all__ = ["gathered", "whole_weights"]
