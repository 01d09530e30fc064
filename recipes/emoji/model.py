"""The tiny model and the quick way through it that its training takes.

The model is an ordinary `Qwen2_5_VLForConditionalGeneration`. Two things are done differently here than in its own
forward, with its own weights and to the same result: all pictures of one size go through the vision tower as one batch
instead of one by one, and the vocabulary is only scored at the positions that carry loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rows import Batch, PictureGroup
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vretrver_hf.vision import attend


PATCH = 14
MERGE = 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_CHANNEL_ORDERS = tuple(itertools.permutations(range(3)))


def tiny_config(tokenizer: PreTrainedTokenizerBase, **text_overrides: Any) -> Qwen2_5_VLConfig:
    """
    The configuration of `vretrver-tiny`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The truncated tokenizer: its size and its control tokens go into the configuration.
        text_overrides:
            Replaces single settings of the language model, for tests at toy size.
    """
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 320,
        "intermediate_size": 576,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        # Contexts are short, hence the small base. Of a head's 32 frequencies the highest go to time, then height,
        # then width: with shares like those of large models, width would turn by 0.003 from one image token to the
        # next, and with three tokens in a row nothing of that can be read. Where in a picture a thing is was not
        # learned at all then.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 27]},
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
        **text_overrides,
    }
    vision = {
        "depth": 4,
        "hidden_size": 224,
        "intermediate_size": 448,
        "num_heads": 7,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        # Every layer sees the whole picture: windows would only cut up pictures that are small anyway.
        "fullatt_block_indexes": [0, 1, 2, 3],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def make_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A model with fresh weights in fp32, the same for the same seed."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.generation_config.eos_token_id = [config.text_config.eos_token_id, config.text_config.pad_token_id]
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.generation_config.do_sample = False
    return model


def num_parameters(model: nn.Module) -> int:
    """Weights that are stored, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def render_group(group: PictureGroup, table: Tensor) -> Tensor:
    """
    Cuts a box out of each layer of a group and resizes it as Pillow's bicubic filter does, all at once.

    Resizing is linear along each axis, so it is two matrix products, with matrices that hold the box, the scale and
    the filter. What lies outside a stored picture is white, and those of a scene do not overlap, so that their ink
    adds up.

    Args:
        group (`PictureGroup`):
            Which pictures, which part of each, and how large.
        table (`Tensor`):
            All stored pictures, uint8, (pictures, height, width, 3).

    Returns:
        `Tensor`: (pictures, 3, height, width), whole values in 0..255.
    """
    (width, height), (_, stored_height, stored_width, _) = group.size, table.shape
    dtype = torch.float16 if table.is_cuda else torch.float32
    # White is zero here, so that what lies outside needs no terms of its own.
    ink = (255 - table[group.rows]).to(dtype)
    across = _resize_matrices(group.columns, width, stored_width, group.reach).to(dtype)[group.column_of]
    down = _resize_matrices(group.lines, height, stored_height, group.reach).to(dtype)[group.line_of]
    # Pillow goes across first, and rounds in between.
    count = len(ink)
    ink = ink.permute(0, 2, 1, 3).reshape(count, stored_width, stored_height * 3)
    ink = torch.bmm(across, ink).clamp(0, 255).round()
    ink = ink.view(count, width, stored_height, 3).permute(0, 2, 1, 3).reshape(count, stored_height, width * 3)
    ink = torch.bmm(down, ink).clamp(0, 255).round().view(count, height, width, 3)
    if len(ink) > len(group.places):
        ink = ink.new_zeros(len(group.places), *ink.shape[1:]).index_add_(0, group.picture_of, ink).clamp(max=255)
    return 255 - ink.permute(0, 3, 1, 2).float()


def change_looks(pixels: Tensor, looks: Tensor) -> Tensor:
    """
    Pictures in other colours, mirrored or upside down.

    Args:
        pixels (`Tensor`):
            (pictures, 3, height, width).
        looks (`Tensor`):
            (pictures,), each below `rows.NUM_LOOKS`.

    Returns:
        `Tensor`: the same shape.
    """
    orders = torch.tensor(_CHANNEL_ORDERS, device=pixels.device)[looks // 4]
    pixels = pixels.gather(1, orders[:, :, None, None].expand_as(pixels))
    for bit, axis in ((1, -1), (2, -2)):
        pixels = torch.where((looks & bit > 0)[:, None, None, None], pixels.flip(axis), pixels)
    return pixels


def patches_of(pixels: Tensor) -> Tensor:
    """
    Normalised patches in the order of the model's image processor: the four patches of a merged token side by side.

    Args:
        pixels (`Tensor`):
            (pictures, 3, height, width), values in 0..255.

    Returns:
        `Tensor`: (pictures, patches, 3 · 14 · 14).
    """
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(1, 3, 1, 1)
    pixels = (pixels / 255 - mean) / std
    count, channels, height, width = pixels.shape
    down, across = height // (PATCH * MERGE), width // (PATCH * MERGE)
    blocks = pixels.view(count, channels, down, MERGE, PATCH, across, MERGE, PATCH)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return blocks.reshape(count, down * across * MERGE**2, channels * PATCH**2)


def encode_pictures(visual: nn.Module, patches: Tensor, size: tuple[int, int]) -> Tensor:
    """
    The vision tower on many pictures of one size at once; equal to the tower's own forward.

    Args:
        visual (`nn.Module`):
            `model.model.visual`, with full attention in every layer.
        patches (`Tensor`):
            From [`patches_of`].
        size (`tuple[int, int]`):
            Width and height of the pictures in pixels.

    Returns:
        `Tensor`: (pictures, image tokens, hidden size of the language model).
    """
    # A still picture is shown to the tower's pairs of frames twice, which is the sum of the two frames' weights.
    kernel = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)
    hidden = functional.linear(patches, kernel)
    rotation = visual.rotary_pos_emb(hidden, _patch_positions(size, patches.device))
    for block in visual.blocks:
        hidden = hidden + attend(block.attn, block.norm1(hidden), rotation)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(len(patches), -1, visual.config.out_hidden_size)


def embed(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, table: Tensor, augment: bool = False) -> Tensor:
    """
    Token embeddings of a batch with its pictures in place.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`):
            The model.
        batch (`Batch`):
            Rows of one step, on the model's device.
        table (`Tensor`):
            All stored pictures, uint8, (pictures, height, width, 3).
        augment (`bool`, *optional*, defaults to `False`):
            Varies each picture's exposure a little.
    """
    return embed_parts(model, [batch], batch.groups, table, augment).view(*batch.ids.shape, -1)


def embed_parts(
    model: Qwen2_5_VLForConditionalGeneration,
    parts: Sequence[Batch],
    groups: Sequence[PictureGroup],
    table: Tensor,
    augment: bool = False,
) -> Tensor:
    """
    Token embeddings of all parts of a batch one after another, with the pictures that they share in place.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`), table (`Tensor`), augment (`bool`):
            As in [`embed`].
        parts (sequence of `Batch`), groups (sequence of `PictureGroup`):
            From [`share_pictures`], on the model's device.

    Returns:
        `Tensor`: (tokens of all parts, hidden size).
    """
    flat = model.get_input_embeddings()(torch.cat([part.ids.flatten() for part in parts]))
    for group in groups:
        features = encode_group(model.model.visual, group, table, augment)
        flat = flat.index_put((group.places.flatten(),), features.flatten(0, 1).to(flat.dtype))
    return flat


def encode_group(visual: nn.Module, group: PictureGroup, table: Tensor, augment: bool = False) -> Tensor:
    """Image tokens of all pictures of one size, from stored pixels to the language model's width."""
    with torch.no_grad(), torch.autocast(table.device.type, enabled=False):
        pixels = render_group(group, table)
        if group.looks is not None:
            pixels = change_looks(pixels, group.looks)
        if augment:
            exposure = torch.empty(len(pixels), 1, 1, 1, device=pixels.device).uniform_(0.94, 1.06)
            pixels = (pixels * exposure).clamp(0, 255)
        patches = patches_of(pixels)
    count = len(patches)
    # Rounded up with blank pictures, since an accelerator's libraries prepare anew for each shape that they meet.
    padded = functional.pad(patches, (0, 0, 0, 0, 0, -count % (32 if count < 256 else 128)))
    return encode_pictures(visual, padded, group.size)[:count]


def hidden_states(model: Qwen2_5_VLForConditionalGeneration, embeds: Tensor, positions: Tensor) -> Tensor:
    """
    Last hidden states of rows that are padded on the right.

    No attention mask is needed: attention is causal and the padding stands behind everything that is read. Under
    autocast everything between the layers is in its type too, as it is where the saved model is used.
    """
    if torch.is_autocast_enabled(embeds.device.type):
        embeds = embeds.to(torch.get_autocast_dtype(embeds.device.type))
    return model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False
    ).last_hidden_state


def target_losses(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, table: Tensor, augment: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Cross-entropy of each token that the model is to write.

    Returns:
        `tuple[Tensor, Tensor]`: the losses, and the logits that they were taken from; one row a target.
    """
    return losses_of(model, embed(model, batch, table, augment), batch)


def losses_of(model: Qwen2_5_VLForConditionalGeneration, embeds: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same of rows whose token embeddings (rows, length, hidden size) are given."""
    hidden = hidden_states(model, embeds, batch.positions)
    flat_hidden, flat_ids = hidden.flatten(0, 1), batch.ids.flatten()
    logits = model.lm_head(flat_hidden[batch.targets - 1])
    return functional.cross_entropy(logits.float(), flat_ids[batch.targets], reduction="none"), logits


@contextmanager
def fused_norms() -> Iterator[None]:
    """Runs the model's norms as one kernel instead of six while the context lasts."""
    original = Qwen2_5_VLRMSNorm.forward
    Qwen2_5_VLRMSNorm.forward = _fused_norm
    try:
        yield
    finally:
        Qwen2_5_VLRMSNorm.forward = original


def _fused_norm(self: Qwen2_5_VLRMSNorm, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return functional.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.variance_epsilon)


def _patch_positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of each patch, (patches, 2), the four patches of a merged token side by side."""
    across, down = size[0] // PATCH, size[1] // PATCH
    grid = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), dim=-1)
    blocks = grid.view(down // MERGE, MERGE, across // MERGE, MERGE, 2).transpose(1, 2)
    return blocks.reshape(-1, 2).to(device)


def _resize_matrices(spans: Tensor, out: int, side: int, reach: int) -> Tensor:
    """Matrices (spans, out, side) that cut [low, high) out of `side` pixels and resize it to `out` pixels."""
    low, high = spans[:, :1, None], spans[:, 1:, None]
    scale = (high - low) / out
    centers = low + (torch.arange(out, device=spans.device)[None, :, None] + 0.5) * scale
    # The white around the picture has its weights too, wherever the filter reaches both.
    taps = torch.arange(-reach, side + reach, device=spans.device)[None, None, :]
    weights = _bicubic((taps + 0.5 - centers) / scale.clamp(min=1.0))
    weights = weights * ((taps >= low.floor()) & (taps < high.ceil()))
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)  # far off there is none at all
    return weights[:, :, reach : reach + side]


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
