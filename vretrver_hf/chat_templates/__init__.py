"""Chat templates of the supported model families, with what reinforcement learning needs beside the rendering.

The stock templates either know no tools or drop what a model thought in earlier turns. These render tool results as
user turns, keep every turn as it was written, mark the model's own tokens for `return_assistant_tokens_mask`, and
bring the pattern with which a tokenizer's `parse_response` finds the calls.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal


Family = Literal["qwen2_5_vl", "qwen3_vl"]

# What each family's stock template says where a conversation brings no system turn.
_DEFAULT_SYSTEM = {"qwen2_5_vl": "You are a helpful assistant.", "qwen3_vl": ""}

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        # A call that is only quoted inside a thought must not run, so no <think> may be open where a call begins.
        "tool_calls": {
            "open_pattern": r"(?<!<think>(?:(?!</think>).)*)\n?<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {
            "close_pattern": r"<\|im_end\|>\s*|<\|endoftext\|>\s*",
            "content": "text",
            "content_args": {"strip": False},
            "repeats": True,
            "join": "",
        },
    },
}


def families() -> list[str]:
    """The model types (`config.model_type`) that have a template."""
    return sorted(_DEFAULT_SYSTEM)


def load_chat_template(family: Family) -> str:
    """
    The Jinja source of a family's chat template.

    Args:
        family (`str`):
            `config.model_type` of the model: `"qwen2_5_vl"` or `"qwen3_vl"`.

    Raises:
        `ValueError`: for a family without a template.
    """
    if family not in _DEFAULT_SYSTEM:
        raise ValueError(f"no chat template for model type {family!r}; there are templates for {families()}")
    body = resources.files(__package__).joinpath("qwen_vl.jinja").read_text(encoding="utf-8")
    return f"{{%- set default_system = {_DEFAULT_SYSTEM[family]!r} -%}}\n{body}"


def apply_to(processor: Any, family: Family) -> None:
    """
    Gives a processor (and its tokenizer) the family's template and response parsing; `save_pretrained` keeps both.

    Args:
        processor (`ProcessorMixin`):
            The processor of a Qwen2.5-VL or Qwen3-VL model.
        family (`str`):
            `config.model_type` of the model.
    """
    template = load_chat_template(family)
    processor.chat_template = template
    processor.tokenizer.chat_template = template
    processor.tokenizer.response_template = RESPONSE_TEMPLATE
