"""The vision tower on many pictures: pieces of equal length attend as one batch, and each picture passes once."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from .images import picture_id


if TYPE_CHECKING:
    from PIL import Image


def attend(attention: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """
    Attention of a Qwen-VL vision tower on pieces of equal length, each within itself.

    Args:
        attention (`nn.Module`):
            `block.attn` of the tower.
        hidden (`Tensor`):
            (pieces, patches, width).
        rotation (`tuple[Tensor, Tensor]`):
            Cosines and sines of the patches' places, (patches, size of a head) or one such table a piece.

    Returns:
        `Tensor`: (pieces, patches, width).
    """
    count, patches, width = hidden.shape
    query, key, value = attention.qkv(hidden).view(count, patches, 3, attention.num_heads, -1).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotation)
    mixed = functional.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attention.proj(mixed.transpose(1, 2).reshape(count, patches, width))


@contextlib.contextmanager
def batched_attention(tower: nn.Module) -> Iterator[None]:
    """
    While the context lasts, pictures (or windows of them) of equal length attend as one batch.

    transformers' `sdpa` goes through them one by one, in every layer. Other implementations are left as they are.

    Args:
        tower (`nn.Module`):
            `model.model.visual` of a Qwen2.5-VL or Qwen3-VL model.
    """
    modules = [block.attn for block in tower.blocks] if tower.config._attn_implementation == "sdpa" else []
    modules = [module for module in modules if "forward" not in vars(module)]  # somebody's hook stays in force
    for module in modules:
        module.forward = partial(_attend_in_groups, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class PictureFeatures:
    """
    Features of pictures, each computed once: a picture comes again in a later turn, window or query.

    Pictures are told apart by their pixels; those that were not used for longest are forgotten first. It must be made
    anew when the tower's weights change.

    Args:
        tower (`nn.Module`):
            `model.model.visual` of a Qwen2.5-VL or Qwen3-VL model.
        image_processor (`BaseImageProcessor`):
            That of the model. Pictures come at their final size and are not resized.
        max_bytes (`float`, *optional*, defaults to 1 GiB):
            Most memory for features that are kept, on the model's device; 0 keeps none, infinity all.

    Attributes:
        num_computed (`int`):
            Pictures that passed the tower.
        num_recalled (`int`):
            Pictures that did not have to.
    """

    def __init__(self, tower: nn.Module, image_processor: Any, max_bytes: float = 2**30):
        self.num_computed = 0
        self.num_recalled = 0
        self.max_bytes = max_bytes
        self._tower = tower
        self._image_processor = image_processor
        self._known: collections.OrderedDict[str, list[Tensor]] = collections.OrderedDict()
        self._bytes = 0
        self._output: type | None = None

    @contextlib.contextmanager
    def shown(self, images: Sequence[Image.Image]) -> Iterator[dict[str, Tensor]]:
        """
        Gives the model's inputs for these pictures. While the context lasts, the tower answers with their features
        whatever it is given, and computes nothing.
        """
        if not images:
            yield {}
            return
        output = self.tower_output(images)
        grid = picture_grid(images, self._image_processor)
        original = vars(self._tower).get("forward")
        self._tower.forward = lambda *args, **kwargs: output
        try:
            yield {"pixel_values": torch.empty(0), "image_grid_thw": grid}
        finally:
            if original is None:
                del self._tower.forward
            else:
                self._tower.forward = original

    def tower_output(self, images: Sequence[Image.Image]) -> Any:
        """What the tower returns for these pictures; those that are known do not pass it."""
        return join_features(self._features(images), self._output)

    def _features(self, images: Sequence[Image.Image]) -> list[list[Tensor]]:
        keys = picture_ids(images)
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        fresh = dict(zip(missing, self._compute(list(missing.values())), strict=True)) if missing else {}
        self.num_computed += len(missing)
        self.num_recalled += len(images) - len(missing)
        found = [fresh[key] if key in fresh else self._known[key] for key in keys]
        self._remember(dict(zip(keys, found, strict=True)))
        return found

    def _compute(self, images: list[Image.Image]) -> list[list[Tensor]]:
        weight = next(self._tower.parameters())
        # Bytes travel to the tower's device, not floats, and are scaled there.
        inputs = self._image_processor(images, do_resize=False, return_tensors="pt", device=weight.device)
        pixels, grid = inputs["pixel_values"].to(weight.dtype), inputs["image_grid_thw"]
        with batched_attention(self._tower):
            output = self._tower(pixels, grid_thw=grid.to(weight.device))
        self._output = type(output)
        merged = self._tower.spatial_merge_size**2
        parts = split_features(output, [size // merged for size in grid.prod(-1).tolist()])
        # Copies, since a view would hold the memory of all pictures that were computed with it.
        return [[part.clone() for part in picture] for picture in parts]

    def _remember(self, features: dict[str, list[Tensor]]) -> None:
        for key, parts in features.items():
            if key not in self._known:
                self._known[key] = parts
                self._bytes += _size(parts)
            self._known.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._known.popitem(last=False)[1])


@contextlib.contextmanager
def equal_pictures_once(image_processor: Any) -> Iterator[None]:
    """
    While the context lasts, an image processor works on equal pictures once, and returns what it would have returned.

    Args:
        image_processor (`BaseImageProcessor`):
            That of a Qwen2.5-VL or Qwen3-VL model.
    """
    original = image_processor.preprocess

    def preprocess(images: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(images, list) or not all(isinstance(image, PIL.Image.Image) for image in images):
            return original(images, *args, **kwargs)
        keys = picture_ids(images)
        distinct = dict(zip(keys, images, strict=True))
        result = original(list(distinct.values()), *args, **kwargs)
        if len(distinct) < len(images) and isinstance(result.get("pixel_values"), Tensor):
            grid = result["image_grid_thw"]
            pieces = result["pixel_values"].split(grid.prod(-1).tolist())
            places = {key: place for place, key in enumerate(distinct)}
            order = [places[key] for key in keys]
            result["pixel_values"] = torch.cat([pieces[place] for place in order])
            result["image_grid_thw"] = grid[order]
        elif len(distinct) < len(images):
            return original(images, *args, **kwargs)
        return result

    image_processor.preprocess = preprocess
    try:
        yield
    finally:
        del image_processor.preprocess


def picture_ids(images: Sequence[Image.Image]) -> list[str]:
    """A name made of the pixels of each picture; of one that stands in several places they are read once."""
    names = {id(image): picture_id(image) for image in {id(image): image for image in images}.values()}
    return [names[id(image)] for image in images]


def picture_grid(images: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """`image_grid_thw` of pictures that are not resized: frames, and patches down and across."""
    patch = image_processor.patch_size
    return torch.tensor([[1, image.height // patch, image.width // patch] for image in images])


def rope_index(
    is_image: Tensor, grid: Tensor | None, merge_size: int, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Rotary positions of conversations with pictures.

    They are those of the models' own `get_rope_index` for still pictures, but found for all rows at once: that one
    goes through them piece by piece, and on a GPU waits for it many times a picture.

    Args:
        is_image (`Tensor` of shape `(rows, tokens)`):
            Which tokens are pads of pictures.
        grid (`Tensor`, *optional*):
            `image_grid_thw` of the pictures, in the order in which the rows show them.
        merge_size (`int`):
            Patches down and across that make one token.
        attention_mask (`Tensor` of shape `(rows, tokens)`, *optional*):
            Which tokens are no padding.

    Returns:
        `tuple[Tensor, Tensor]`: positions in time, down and across, (3, rows, tokens), and by how much the position
        behind each row differs from the number of its tokens, (rows, 1).
    """
    read = torch.ones_like(is_image, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image = is_image.bool() & read
    steps = (read & ~image).long()
    if grid is None or not len(grid):
        positions = (steps.cumsum(1) - steps).masked_fill(~read, 0).expand(3, -1, -1)
        return positions.contiguous(), steps.new_zeros(len(steps), 1)
    height, width = (grid.to(image.device).long()[:, 1:] // merge_size).unbind(1)
    begins = image & ~functional.pad(image, (1, -1))
    number = (begins.flatten().cumsum(0) - 1).clamp(min=0).view_as(steps)  # of the picture that a pad belongs to
    ends = image & ~functional.pad(image, (-1, 1))
    steps = steps + torch.where(ends, torch.maximum(height, width)[number], 0)
    first = steps.cumsum(1) - steps
    places = torch.arange(steps.shape[1], device=steps.device).expand_as(steps)
    offset = places - torch.where(begins, places, 0).cummax(1).values
    across = width[number]
    positions = torch.stack([first, first + image * (offset // across), first + image * (offset % across)])
    return positions.masked_fill(~read, 0), (steps.sum(1) - read.sum(1))[:, None]


def quick_positions(model: nn.Module) -> None:
    """Makes a model find rotary positions by [`rope_index`] wherever it is shown no video."""
    inner = model.model
    original, merge_size = inner.get_rope_index, model.config.vision_config.spatial_merge_size

    def get_rope_index(
        input_ids: Tensor, mm_token_type_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        known = {"image_grid_thw", "attention_mask"}
        if args or any(value is not None for name, value in kwargs.items() if name not in known):
            return original(input_ids, mm_token_type_ids, *args, **kwargs)
        return rope_index(
            mm_token_type_ids == 1, kwargs.get("image_grid_thw"), merge_size, kwargs.get("attention_mask")
        )

    inner.get_rope_index = get_rope_index


def split_features(output: Any, tokens: Sequence[int]) -> list[list[Tensor]]:
    """What the tower returned, picture by picture: its features, and those for deeper layers if there are any."""
    deepstack = getattr(output, "deepstack_features", None) or []
    columns = [part.split(list(tokens)) for part in [output.pooler_output, *deepstack]]
    return [list(parts) for parts in zip(*columns, strict=True)]


def join_features(pictures: Sequence[Sequence[Tensor]], output: type) -> Any:
    """The inverse of [`split_features`], as the tower's own `output` type."""
    pooled, *deepstack = (torch.cat(parts) for parts in zip(*pictures, strict=True))
    return output(pooler_output=pooled, **({"deepstack_features": deepstack} if deepstack else {}))


def _attend_in_groups(
    attention: nn.Module, hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> Tensor:
    """In place of the module's own `forward`, which takes pieces of different lengths in one row."""
    cos, sin = position_embeddings
    lengths = cu_seqlens.diff()
    distinct = lengths.unique().tolist()
    if len(distinct) == 1:
        shape = (len(lengths), distinct[0])
        rotation = cos.view(*shape, -1), sin.view(*shape, -1)
        return attend(attention, hidden.view(*shape, -1), rotation).flatten(0, 1)
    mixed = None
    for length in distinct:
        starts = cu_seqlens[:-1][lengths == length]
        rows = starts[:, None] + torch.arange(length, device=hidden.device)
        part = attend(attention, hidden[rows], (cos[rows], sin[rows]))
        if mixed is None:  # under autocast what comes out has another type than what goes in
            mixed = part.new_empty(hidden.shape)
        mixed[rows] = part
    return mixed


def _size(parts: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in parts)
