"""The conversation between a model and a set of pictures, written down once.

System prompt, user turn, tool schemas, observation texts and answer format live here and nowhere else: inference,
training data, rollouts, evaluation and the demo all call these functions. A [`Preset`] holds every choice that changes
what the model reads; it is saved beside a model, so that inference plays what training played.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from .items import Item


IMAGE_MARK = "<image>"
"""Stands for one picture in the `prompt` column of a released data set."""

_SPECIAL = re.compile(r"<(?=\|[^|<>\s]{1,64}\|>)")
_CONTROL = re.compile(r"<(?=\|[^|<>\s]{1,64}\|>|/?(?:think|tool_call|answer)>)")


@dataclasses.dataclass(frozen=True)
class Preset:
    """
    What a model reads and how its tool calls are understood.

    Args:
        name (`str`):
            Name of the wording and of the observation texts: `"release"` or `"foveated"`.
        coordinates (`str`):
            What the numbers of a `crop_image` box mean. `"pixels"`: pixels of the original image, or relative where
            all four are at most 1 (the released semantics). `"relative"`: fractions of width and height. `"thousand"`:
            thousandths of width and height, as Qwen3-VL was trained to write.
        max_calls (`int`):
            Tool rounds a trajectory may take before the model is told to answer. A malformed turn counts as one.
        max_selected (`int`, *optional*):
            Most images that one `select_images` call may name; `None` allows any number.
        overview_pixels (`int`, *optional*):
            Most pixels of an image in the prompt; `None` leaves it to the limit of `inspect_pixels`.
        inspect_pixels (`int`, *optional*):
            Most pixels of an image that a tool returns; `None` is 5120 image tokens.
        crop_padding (`float`, *optional*, defaults to 0.1):
            Share of the image's width and height that is added on each side of a crop.
        crop_padding_pixels (`int`, *optional*, defaults to 600):
            Upper limit of that padding, in pixels of the original image.
        show_sizes (`bool`, *optional*, defaults to `False`):
            Writes `(WxH)`, in original pixels, beside each image. A model that sees a reduced image can name pixels of
            the original only when it is told their number.
        prompt_source (`str`, *optional*, defaults to `"preset"`):
            `"preset"` builds the prompt from items; `"dataset"` replays the prompt that a data set brings along.
    """

    name: Literal["release", "foveated"]
    coordinates: Literal["pixels", "relative", "thousand"]
    max_calls: int
    max_selected: int | None = None
    overview_pixels: int | None = None
    inspect_pixels: int | None = None
    crop_padding: float = 0.1
    crop_padding_pixels: int = 600
    show_sizes: bool = False
    prompt_source: Literal["preset", "dataset"] = "preset"

    def __post_init__(self) -> None:
        if self.name not in ("release", "foveated"):
            raise ValueError(f"unknown preset {self.name!r}: choose 'release' or 'foveated'")
        if self.coordinates not in ("pixels", "relative", "thousand"):
            raise ValueError(f"unknown coordinates {self.coordinates!r}: choose 'pixels', 'relative' or 'thousand'")
        if self.prompt_source not in ("preset", "dataset"):
            raise ValueError(f"unknown prompt_source {self.prompt_source!r}: choose 'preset' or 'dataset'")
        if self.max_calls < 0:
            raise ValueError(f"max_calls must not be negative, got {self.max_calls}")
        for name in ("max_selected", "overview_pixels", "inspect_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        if not 0 <= self.crop_padding <= 1 or self.crop_padding_pixels < 0:
            raise ValueError("crop_padding must lie in [0, 1] and crop_padding_pixels must not be negative")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preset:
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown preset settings {unknown}; this version knows {_field_names(cls)}")
        return cls(**values)


PRESETS: dict[str, Preset] = {
    "release": Preset(name="release", coordinates="pixels", max_calls=2),
    "foveated": Preset(
        name="foveated",
        coordinates="relative",
        max_calls=4,
        max_selected=4,
        overview_pixels=224 * 224,
        inspect_pixels=1024 * 1024,
    ),
}


def get_preset(preset: str | Preset, **overrides: Any) -> Preset:
    """
    The preset of that name, with single settings replaced.

    Example:

    ```python
    >>> from vretrver_hf.protocol import get_preset

    >>> get_preset("foveated", max_calls=1).max_calls
    1

    ```
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: choose from {sorted(PRESETS)}")
        preset = PRESETS[preset]
    unknown = sorted(set(overrides) - set(_field_names(Preset)))
    if unknown:
        raise ValueError(f"unknown preset settings {unknown}; choose from {_field_names(Preset)}")
    return dataclasses.replace(preset, **overrides) if overrides else preset


def tool_schemas(preset: Preset) -> list[dict[str, Any]]:
    """The two tools as JSON function schemas, in the order in which the system prompt lists them."""
    box = {
        "pixels": "[x1, y1, x2, y2] in pixels of the original image, or relative in 0..1",
        "relative": "[x1, y1, x2, y2] relative in 0..1, two decimals",
        "thousand": "[x1, y1, x2, y2] in thousandths of width and height, 0..1000",
    }[preset.coordinates]
    coordinate = {"type": "integer" if preset.coordinates == "thousand" else "number"}
    numbers: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    if preset.max_selected is not None:
        numbers["maxItems"] = preset.max_selected
    return [
        _function(
            "select_images",
            "Look at whole images again, larger.",
            {"target_images": {**numbers, "description": "image numbers, 0 = query"}},
        ),
        _function(
            "crop_image",
            "Look at a region of one image, larger.",
            {
                "bbox_2d": {"type": "array", "items": coordinate, "minItems": 4, "maxItems": 4, "description": box},
                "target_image": {"type": "integer", "description": "image number, 0 = query"},
            },
        ),
    ]


def system_prompt(preset: Preset, tools: bool = True) -> str:
    """
    The system turn. Short, since every query pays for it.

    Args:
        preset (`Preset`):
            The preset to word it for.
        tools (`bool`, *optional*, defaults to `True`):
            Whether tools may be called; without them the model is only asked to think and rank.
    """
    opening = {
        "release": "You are a helpful assistant for multimodal retrieval tasks.",
        "foveated": "Rank candidates for a query.",
    }[preset.name]
    if not tools:
        return opening
    schemas = "\n".join(json.dumps(schema) for schema in tool_schemas(preset))
    if preset.name == "foveated":
        return f"{opening} Tools:\n<tools>\n{schemas}\n</tools>\n{_call_form()}"
    return (
        f"{opening}\n\n# Tools\n\nThese functions are at your disposal, one signature a line:\n"
        f"<tools>\n{schemas}\n</tools>\n\nTo call one, write its name and arguments as a JSON object:\n{_call_form()}"
    )


def guidelines(preset: Preset, num_candidates: int, tools: bool = True) -> str:
    """The instructions that close the user turn."""
    if preset.name == "foveated":
        example = "<think>…</think> then <answer>[best, …, worst]</answer>"
        if not tools:
            return f"Rank all {num_candidates}. Write {example}."
        turn = "<think>…</think> then one <tool_call> or <answer>[best, …, worst]</answer>"
        return f"Rank all {num_candidates}. Each turn: {turn}."
    lines = [f"Rank all {num_candidates} candidates from the most to the least relevant to the query."]
    if tools:
        lines += [
            "Image 0 is the query image and image i belongs to candidate (i). When details decide, use select_images "
            "to see whole images again or crop_image to see a region of one.",
            "To use a tool: <think> what you see and need to check </think> <tool_call> one call </tool_call>",
            "To finish: <think> your comparison </think> <answer>[best, ..., worst]</answer>",
        ]
    else:
        lines.append("Write <think> your comparison </think> <answer>[best, ..., worst]</answer>")
    lines.append("The answer is a list of every candidate's number, each exactly once.")
    return "\n".join(lines)


def build_messages(
    query: Item, candidates: Sequence[Item], preset: Preset, tools: bool = True
) -> list[dict[str, Any]]:
    """
    The opening messages of a trajectory, with content blocks as chat templates of vision-language models take them.

    Pictures appear as `{"type": "image", "index": i}` where `i` is the image's number: 0 for the query's, `i` for
    candidate `i`'s. Who renders the prompt fetches pixels by that number, so that numbers never shift when an item has
    no picture. Control tokens and tags inside an item's text are defused, so no text can end a turn or pose
    as a picture.

    Args:
        query (`Item`):
            The query: text, image or both.
        candidates (sequence of `Item`):
            The candidates, numbered from 1 in this order.
        preset (`Preset`):
            The wording.
        tools (`bool`, *optional*, defaults to `True`):
            Whether tools may be called.

    Returns:
        `list[dict]`: a system and a user message.

    Example:

    ```python
    >>> from vretrver_hf import Item
    >>> from vretrver_hf.protocol import build_messages, get_preset

    >>> candidates = [Item(text="Felis catus"), Item(text="a dog")]
    >>> messages = build_messages(Item(text="a cat"), candidates, get_preset("foveated"))
    >>> print(messages[1]["content"][0]["text"].splitlines()[0])
    Query: a cat

    ```
    """
    blocks: list[dict[str, Any]] = [_text("Query: ")]
    blocks += _item_blocks(query, 0, preset)
    blocks.append(_text("\nCandidates:\n"))
    for number, candidate in enumerate(candidates, start=1):
        blocks.append(_text(f"({number}) "))
        blocks += _item_blocks(candidate, number, preset)
        blocks.append(_text("\n"))
    blocks.append(_text(guidelines(preset, len(candidates), tools)))
    return [
        {"role": "system", "content": [_text(system_prompt(preset, tools))]},
        {"role": "user", "content": _merge_text(blocks)},
    ]


def messages_from_prompt(prompt: Sequence[dict[str, str]], image_numbers: Sequence[int]) -> list[dict[str, Any]]:
    """
    Replays a data set's own prompt: each `<image>` mark becomes the picture of that place.

    Args:
        prompt (sequence of `dict`):
            `[{"role": …, "content": text with <image> marks}]`, the `prompt` column of the released files.
        image_numbers (sequence of `int`):
            The image number (0 = query, i = candidate i) that each mark stands for, in order.

    Raises:
        `ValueError`: if marks and pictures differ in number.
    """
    marks = sum(message["content"].count(IMAGE_MARK) for message in prompt)
    if marks != len(image_numbers):
        raise ValueError(f"the prompt has {marks} {IMAGE_MARK} marks but there are {len(image_numbers)} images")
    numbers = iter(image_numbers)
    messages = []
    for message in prompt:
        first, *rest = message["content"].split(IMAGE_MARK)
        # The instructions of a prompt name the tags; only tokens that would end its turn are taken out of their power.
        blocks = [_text(_SPECIAL.sub("< ", first))]
        for piece in rest:
            blocks += [{"type": "image", "index": next(numbers)}, _text(_SPECIAL.sub("< ", piece))]
        messages.append({"role": message["role"], "content": _merge_text(blocks)})
    return messages


def image_numbers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the pictures in `messages`, in the order in which the model meets them."""
    return [block["index"] for message in messages for block in message["content"] if block["type"] == "image"]


def crop_observation(preset: Preset, number: int, box: Sequence[float], size: tuple[int, int]) -> str:
    """What precedes a crop: `box` is the region shown, in fractions of the image, `size` its (width, height)."""
    if preset.name == "release":
        return f"Here is the cropped image. (Image Size: {size[0]}x{size[1]})\n"
    region = ", ".join(f"{value:.2f}" for value in box)
    return f"Image {number} [{region}]:"


def select_observation(preset: Preset, numbers: Sequence[int], size: tuple[int, int]) -> str:
    """What precedes the selected images: `size` is the (width, height) of the first of them in pixels."""
    if preset.name == "release":
        return (
            "Here are the selected images for detailed analysis. "
            f"(Image Size: {size[0]}x{size[1]}, Numbered 1 to {len(numbers)}):"
        )
    label = "Image" if len(numbers) == 1 else "Images"
    return f"{label} {', '.join(map(str, numbers))}:"


def malformed_observation(problem: str) -> str:
    """What the model reads after a turn that is neither one call nor one answer."""
    turn = "<think>…</think> and then one <tool_call>…</tool_call> or <answer>[…]</answer>"
    return f"Malformed turn: {problem}. Write {turn}."


def last_word(num_candidates: int) -> str:
    """What the model reads when it has no calls left and has not answered."""
    return f"No tool calls are left. Answer now: <answer>[all {num_candidates} numbers, best first]</answer>."


def format_call(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the protocol writes it.

    Example:

    ```python
    >>> from vretrver_hf.protocol import format_call

    >>> print(format_call("select_images", {"target_images": [2, 3]}))
    <tool_call>
    {"name": "select_images", "arguments": {"target_images": [2, 3]}}
    </tool_call>

    ```
    """
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def format_answer(order: Sequence[int]) -> str:
    """A ranking as the protocol writes it: `order` is 0-based, the text 1-based."""
    return f"<answer>[{', '.join(str(index + 1) for index in order)}]</answer>"


def format_turn(thought: str, action: str) -> str:
    """A whole model turn: the thought, then one call or answer."""
    return f"<think>{thought}</think>\n{action}"


def _call_form() -> str:
    return '<tool_call>\n{"name": …, "arguments": …}\n</tool_call>'


def _function(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _item_blocks(item: Item, number: int, preset: Preset) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if item.image is not None:
        blocks.append({"type": "image", "index": number})
        if preset.show_sizes:
            width, height = item.load_image().size
            blocks.append(_text(f"({width}x{height}) "))
    if item.text is not None:
        blocks.append(_text(_defuse(item.text)))
    return blocks


def _defuse(text: str) -> str:
    return _CONTROL.sub("< ", text)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _merge_text(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = _text(merged[-1]["text"] + block["text"])
        elif block["type"] != "text" or block["text"]:
            merged.append(block)
    return merged


def _field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
