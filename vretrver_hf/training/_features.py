"""Features of a vision tower that is not trained, each picture's computed once."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..vision import join_features, split_features


class FeatureCache:
    """
    Remembers what a frozen vision tower made of each picture.

    The rollouts of a group show the same pictures, and the loss reads all of them again: without it a picture passes
    the tower twice for every rollout. Pictures are told apart by their pixels. The tower's `forward` is replaced, so
    whoever calls the model takes part.

    Args:
        tower (`torch.nn.Module`):
            The vision tower of a Qwen2.5-VL or Qwen3-VL model, none of whose parameters are trained.

    Attributes:
        num_computed (`int`):
            Pictures that passed the tower.
        num_recalled (`int`):
            Pictures that did not have to.
    """

    def __init__(self, tower: torch.nn.Module):
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("the vision tower is trained, so its features change; freeze it first")
        self.num_computed = 0
        self.num_recalled = 0
        self._merged = tower.spatial_merge_size**2
        self._compute = tower.forward
        self._stores: dict[str, dict[Any, list[torch.Tensor]]] = {"train": {}, "eval": {}}
        self._mode = "train"
        self._output: type | None = None
        tower.forward = self._forward

    def begin(self, mode: Literal["train", "eval"]) -> None:
        """
        Forgets the features of the last batch of that mode; what training still needs outlives an evaluation.
        """
        self._mode = mode
        self._stores[mode].clear()

    def _forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        sizes = grid_thw.prod(-1).tolist()
        known = self._stores["train"] | self._stores["eval"]
        keys = self._keys(hidden_states, grid_thw, sizes)
        missing = list({key: place for place, key in enumerate(keys) if key not in known}.values())
        if missing:
            pieces = hidden_states.split(sizes)
            with torch.no_grad():
                pixels = torch.cat([pieces[place] for place in missing])
                output = self._compute(pixels, grid_thw=grid_thw[missing], **kwargs)
            self._output = type(output)
            parts = split_features(output, [sizes[place] // self._merged for place in missing])
            computed = {keys[place]: picture for place, picture in zip(missing, parts, strict=True)}
            self._stores[self._mode] |= computed
            known |= computed
        self.num_computed += len(missing)
        self.num_recalled += len(keys) - len(missing)
        return join_features([known[key] for key in keys], self._output)

    def _keys(self, pixels: torch.Tensor, grid: torch.Tensor, sizes: list[int]) -> list[tuple[int, ...]]:
        """
        A number for each picture, by which equal pixels are found: their bits in a random linear form modulo 2**64.
        Integers add up to the same in any order, so it depends neither on the batch nor on the device.
        """
        bits = pixels.view({2: torch.int16, 4: torch.int32}[pixels.element_size()]).long()
        rows = torch.cat([torch.arange(size) for size in sizes]).to(pixels.device)
        columns = torch.arange(bits.shape[1], device=pixels.device)
        owner = torch.repeat_interleave(torch.tensor(sizes)).to(pixels.device)
        sums = torch.zeros(len(sizes), dtype=torch.long, device=pixels.device)
        sums.index_add_(0, owner, (bits * _scrambled(columns, 1)).sum(1) * _scrambled(rows, 2))
        return [(number, *shape) for number, shape in zip(sums.tolist(), grid.tolist(), strict=True)]


def _scrambled(numbers: torch.Tensor, salt: int) -> torch.Tensor:
    """Odd 64-bit numbers without a pattern, the same for the same numbers."""
    mixed = (numbers + (salt << 32)) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)) | 1
