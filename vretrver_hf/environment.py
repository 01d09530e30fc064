"""The protocol as an environment of TRL's stock `GRPOTrainer`: the same prompts, tools, budget and observations.

What the stock trainer cannot do: a malformed turn ends a rollout there without a word, and every turn processes all
pictures again. [`~vretrver_hf.training.grpo.EvidenceGRPOTrainer`] answers such turns and keeps what it has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .encoding import Encoder
from .images import MAX_ASPECT, MAX_IMAGE_TOKENS, ImageRef, ItemError
from .protocol import IMAGE_MARK, Preset, get_preset, last_word
from .rewards import RolloutFacts
from .tools import Observation, VisualTools


if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from transformers import ProcessorMixin

    from .chat_templates import Family
    from .data.examples import RerankExample


class RerankEnvironment:
    """
    One rollout of one query, for `GRPOTrainer(environment_factory=…)`.

    Rows come from [`training_dataset`], rewards from [`~vretrver_hf.rewards.EvidenceReward`], which reads `facts`, and
    the trainer's arguments must fit the protocol: [`stock_arguments`]. An instance is used for one rollout after
    another.

    Every public method except `reset` is a tool of the model, so there are two, and `facts` is a property. A query
    whose pictures cannot be read is played as a remark that says so, and its reward is that of an empty output.

    Args:
        encoder (`Encoder`):
            From [`prepare_processor`]; says how large the model sees a picture.
        preset (`str` or `Preset`):
            The protocol to play.

    Attributes:
        num_calls (`int`):
            Tool calls of this rollout, carried out or not.
        num_valid_calls (`int`):
            Tool calls that were carried out.
        error (`str`, *optional*):
            Why the pictures of the query could not be read.
        facts ([`~vretrver_hf.rewards.RolloutFacts`]):
            What a reward needs to know, but for the model's text, which the trainer has.

    Example:

    ```python
    >>> from functools import partial
    >>> from trl import GRPOConfig, GRPOTrainer  # doctest: +SKIP
    >>> from vretrver_hf.data.examples import load_examples
    >>> from vretrver_hf.environment import (
    ...     RerankEnvironment, prepare_processor, stock_arguments, training_dataset
    ... )
    >>> from vretrver_hf.rewards import EvidenceReward

    >>> encoder = prepare_processor(processor, model.config.model_type, "foveated")  # doctest: +SKIP
    >>> trainer = GRPOTrainer(
    ...     model,
    ...     reward_funcs=EvidenceReward("paper"),
    ...     args=GRPOConfig("out", **stock_arguments(encoder, "foveated", max_turn_tokens=512)),
    ...     train_dataset=training_dataset(load_examples("train.parquet"), "foveated"),
    ...     processing_class=processor,
    ...     environment_factory=partial(RerankEnvironment, encoder, "foveated"),
    ... )  # doctest: +SKIP

    ```
    """

    def __init__(self, encoder: Encoder, preset: str | Preset):
        self.encoder = encoder
        self.preset = get_preset(preset)
        self.example: RerankExample | None = None
        self.num_calls = 0
        self.num_valid_calls = 0
        self.error: str | None = None
        self._calls_left = 0
        self._tools: VisualTools | None = None

    def reset(self, example: RerankExample, **columns: Any) -> Any:
        """Begins a rollout: the content blocks of the user's turn, pictures at the size the model sees."""
        self.example = example
        self.num_calls = self.num_valid_calls = 0
        self._calls_left = self.preset.max_calls
        self.error = None
        try:
            images = [
                item.load_image(name=f"candidate {number}" if number else "query") if item.image is not None else None
                for number, item in enumerate([example.query, *example.candidates])
            ]
        except ItemError as error:
            self.error = str(error)
            self._tools = VisualTools(None, [], preset=self.preset, factor=self.encoder.factor)
            return [{"type": "text", "text": "The pictures of this query cannot be read."}]
        self._tools = VisualTools(images[0], images[1:], preset=self.preset, factor=self.encoder.factor)
        blocks = example.task(self.preset).messages()[-1]["content"]
        return [self._shown(block, images) for block in blocks]

    # No return annotations on the tools: TRL would put them into the tools' schemas.
    def select_images(self, target_images: list[int]):
        """
        Look at whole images again, larger.

        Args:
            target_images: Numbers of the images, 0 = query.
        """
        return self._observe("select_images", {"target_images": target_images})

    def crop_image(self, bbox_2d: list[float], target_image: int):
        """
        Look at a region of one image, larger.

        Args:
            bbox_2d: The region, [x1, y1, x2, y2].
            target_image: Number of the image, 0 = query.
        """
        return self._observe("crop_image", {"bbox_2d": bbox_2d, "target_image": target_image})

    def _observe(self, name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        self.num_calls += 1
        if self._calls_left == 0:
            observation = Observation(last_word(len(self.example.candidates)), [], False)
        else:
            self._calls_left -= 1
            observation = self._tools.call(name, arguments)
        self.num_valid_calls += observation.valid
        pictures = [{"type": "image", "image": image} for image in observation.images]
        return [{"type": "text", "text": observation.text}, *pictures]

    def _shown(self, block: dict[str, Any], images: Sequence[Image.Image | None]) -> dict[str, Any]:
        if block["type"] != "image":
            return block
        image = images[block["index"]]
        width, height = self.encoder.overview_size(image.size, self.preset)
        return {"type": "image", "image": ImageRef(block["index"], width, height).render(image)}

    @property
    def facts(self) -> RolloutFacts:
        return RolloutFacts(
            completion=None if self.error is None else "",
            positives=[index + 1 for index in self.example.positives],
            num_candidates=len(self.example.candidates),
            valid_tool_calls=self.num_valid_calls,
        )


def prepare_processor(processor: ProcessorMixin, family: Family, preset: str | Preset) -> Encoder:
    """
    Makes a processor fit the protocol: its chat template, its response parsing and its limits of a picture's size.

    The limits are set so wide that the processor never resizes what the protocol has sized, else a picture in training
    would not be the one that the rollout saw.

    Args:
        processor (`ProcessorMixin`):
            Processor of a Qwen2.5-VL or Qwen3-VL model; changed in place.
        family (`str`):
            `config.model_type` of the model.
        preset (`str` or `Preset`):
            The protocol to play.
    """
    preset = get_preset(preset)
    encoder = Encoder(processor, family)
    square = encoder.factor**2
    budgets = [preset.overview_pixels, preset.inspect_pixels or MAX_IMAGE_TOKENS * square]
    # A very long picture may exceed its budget: its shorter side is one token at least.
    most = max(*(budget for budget in budgets if budget is not None), MAX_ASPECT * square)
    processor.image_processor.size = {"shortest_edge": square, "longest_edge": most}
    return encoder


def training_dataset(examples: Sequence[RerankExample], preset: str | Preset) -> datasets.Dataset:
    """
    The rows that a GRPO trainer reads: `prompt` (all but the user's turn, which the environment writes), `query_id`,
    and `example`. Rows are made when they are asked for, and pictures are decoded by the environment.

    Args:
        examples (sequence of `RerankExample`):
            The examples, such as [`~vretrver_hf.data.examples.load_examples`] gives them.
        preset (`str` or `Preset`):
            The protocol to play.
    """
    import datasets

    rows = datasets.Dataset.from_dict({"row": range(len(examples))})
    return rows.with_transform(_Rows(examples, get_preset(preset)))


def stock_arguments(encoder: Encoder, preset: str | Preset, max_turn_tokens: int = 1024) -> dict[str, Any]:
    """
    What a stock `GRPOConfig` needs to play the protocol.

    Args:
        encoder (`Encoder`):
            From [`prepare_processor`].
        preset (`str` or `Preset`):
            The protocol to play.
        max_turn_tokens (`int`, *optional*, defaults to 1024):
            Most tokens of one model turn; TRL's `max_completion_length` limits the whole rollout, observations and
            their image tokens included.
    """
    return {
        # One more than the calls: else the last word would not be heard.
        "max_tool_calling_iterations": get_preset(preset).max_calls + 1,
        # A sampled pad would stand for a picture that there is not.
        "generation_kwargs": {"suppress_tokens": encoder.suppressed_ids, "max_new_tokens": max_turn_tokens},
        # Pictures would be gathered over all ranks in every step.
        "log_multimodal": False,
    }


class _Rows:
    """Turns row numbers into rows; each example of a batch is read once, however often it is repeated."""

    def __init__(self, examples: Sequence[RerankExample], preset: Preset):
        self._examples = examples
        self._preset = preset

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = {row: self._examples[row] for row in dict.fromkeys(batch["row"])}
        prompts = {row: _opening(example, self._preset) for row, example in examples.items()}
        return {
            "prompt": [prompts[row] for row in batch["row"]],
            "query_id": [examples[row].query_id for row in batch["row"]],
            "example": [examples[row] for row in batch["row"]],
        }


def _opening(example: RerankExample, preset: Preset) -> list[dict[str, str]]:
    """The opening messages as text, the last one left to the environment."""
    *before, last = example.task(preset).messages()
    if any(block["type"] == "image" for message in before for block in message["content"]):
        raise ValueError(f"query {example.query_id}: its prompt shows pictures before the last message")
    return [*({"role": m["role"], "content": marked_text(m["content"])} for m in before), {**last, "content": ""}]


def marked_text(blocks: Sequence[dict[str, Any]]) -> str:
    """Content blocks as text, a mark for each picture."""
    return "".join(IMAGE_MARK if block["type"] == "image" else block["text"] for block in blocks)


__all__ = [
    "RerankEnvironment",
    "prepare_processor",
    "stock_arguments",
    "training_dataset",
]
