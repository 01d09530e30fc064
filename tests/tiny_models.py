"""Random models of both supported families, small enough to build in a test, with their real processors."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


FAMILIES = ("qwen2_5_vl", "qwen3_vl")
FACTORS = {"qwen2_5_vl": 28, "qwen3_vl": 32}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
PLAIN = ("<tool_call>", "</tool_call>")
THINK = ("<think>", "</think>")


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a byte, with the family's control tokens: Qwen3 has the thinking tags as single tokens."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.add_tokens([*PLAIN, *(THINK if family == "qwen3_vl" else ())])
    for name in ("image", "video"):
        setattr(fast, f"{name}_token", f"<|{name}_pad|>")
        setattr(fast, f"{name}_token_id", fast.convert_tokens_to_ids(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(fast, f"vision_{name}_token", f"<|vision_{name}|>")
        setattr(fast, f"vision_{name}_token_id", fast.convert_tokens_to_ids(f"<|vision_{name}|>"))
    return fast


def make_processor(family: str):
    tokenizer = make_tokenizer(family)
    patch = FACTORS[family] // 2
    image = Qwen2VLImageProcessor(patch_size=patch, merge_size=2)
    if family == "qwen2_5_vl":
        video = Qwen2VLVideoProcessor(patch_size=patch, merge_size=2)
        return Qwen2_5_VLProcessor(image_processor=image, tokenizer=tokenizer, video_processor=video)
    video = Qwen3VLVideoProcessor(patch_size=patch, merge_size=2)
    return Qwen3VLProcessor(image_processor=image, tokenizer=tokenizer, video_processor=video)


def vision_token_ids(tokenizer) -> dict[str, int]:
    """The control tokens of pictures, under the names that configurations give them."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def make_model(family: str, processor, seed: int = 0, heads: int = 4):
    """A random model in float32, with weights so large that its tokens depend on what it reads."""
    tokenizer = processor.tokenizer
    ids = vision_token_ids(tokenizer)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    section = [8 // heads, 12 // heads, 12 // heads]
    torch.manual_seed(seed)
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1], "initializer_range": 0.2}
        config = Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=True, **ids
        )
        return Qwen2_5_VLForConditionalGeneration(config).eval()
    rope = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": 64 // heads, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen3VLForConditionalGeneration(config).eval()
