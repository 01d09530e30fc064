"""Messages into token ids, with the pads of each picture in place.

The prompt is rendered by the chat template; every later turn is appended to the ids that already stand, so what was
sampled is never decoded and tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import chat_templates
from .images import MAX_IMAGE_TOKENS, MIN_IMAGE_TOKENS, ImageRef, fit_size
from .protocol import IMAGE_MARK, image_numbers
from .tools import Observation


if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

    from .protocol import Preset


_END_OF_TURN = "<|im_end|>"
_TEXT = "observation"
"""Stands for an observation's text while the chat template is asked what it writes around it."""
_PIECES = 1024
"""Pieces of text whose tokens are remembered."""


@dataclasses.dataclass
class Encoded:
    """
    Tokens to append to a conversation.

    Args:
        token_ids (`list[int]`):
            The tokens, each picture's pads expanded.
        images (`list[PIL.Image.Image]`):
            The pictures, at the size the model sees, in the order of their pads.
        refs (`list[ImageRef]`):
            The same pictures by reference.
        text (`str`):
            The rendered text, one pad a picture.
        messages (`list[dict]`, *optional*):
            The same as chat messages, for engines that take those; a `{"type": "image"}` block stands for each
            picture.
    """

    token_ids: list[int]
    images: list[Image.Image]
    refs: list[ImageRef]
    text: str
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def overview_size(size: tuple[int, int], preset: Preset, factor: int) -> tuple[int, int]:
    """Width and height, in pixels, that a picture of `size` has in a prompt; both are multiples of `factor`."""
    limit = preset.overview_pixels or preset.inspect_pixels or MAX_IMAGE_TOKENS * factor**2
    least = min(MIN_IMAGE_TOKENS * factor**2, limit)
    return fit_size(*size, factor=factor, min_pixels=least, max_pixels=limit)


def overviews(
    messages: Sequence[dict[str, Any]],
    load_image: Callable[[int], Image.Image],
    preset: Preset,
    factor: int,
    render: Callable[[ImageRef, Image.Image], Image.Image] = ImageRef.render,
) -> tuple[list[ImageRef], list[Image.Image]]:
    """The pictures of the opening messages as the prompt shows them, by reference and as such."""
    refs, images = [], []
    for number in image_numbers(messages):
        original = load_image(number)
        width, height = overview_size(original.size, preset, factor)
        refs.append(ImageRef(index=number, width=width, height=height))
        images.append(render(refs[-1], original))
    return refs, images


def collapse_pads(token_ids: Sequence[int], pad: int) -> list[int]:
    """
    One pad for each picture, as vLLM's `prompt_token_ids` want it: vLLM expands them itself. The pads of two pictures
    are never neighbours, since each picture stands between marks of its own.

    Example:

    ```python
    >>> from vretrver_hf.encoding import collapse_pads

    >>> collapse_pads([1, 9, 9, 9, 2, 1, 9, 2], pad=9)
    [1, 9, 2, 1, 9, 2]

    ```
    """
    return [
        token for place, token in enumerate(token_ids) if token != pad or place == 0 or token_ids[place - 1] != pad
    ]


class Encoder:
    """
    Turns messages and observations into token ids for one model family.

    Args:
        processor (`ProcessorMixin`):
            Processor of a Qwen2.5-VL or Qwen3-VL model. It gets this project's chat template.
        family (`str`):
            `config.model_type` of the model.
    """

    def __init__(self, processor: ProcessorMixin, family: chat_templates.Family):
        chat_templates.apply_to(processor, family)
        self.processor = processor
        self.family = family
        self.tokenizer = processor.tokenizer
        image_processor = processor.image_processor
        self.factor: int = image_processor.patch_size * image_processor.merge_size
        """Sides of a picture are multiples of this many pixels; one image token covers a square of it."""
        self._frames: dict[int, tuple[str, str]] = {}
        self._pieces: dict[str, list[int]] = {}
        self.end_of_turn: int = self._special(_END_OF_TURN)
        self.end_of_call: int = self._special("</tool_call>")
        self.image_pad: int = self._special("<|image_pad|>")
        self.stop_ids: list[int] = [self.end_of_turn, self._special("<|endoftext|>"), self.end_of_call]
        self.suppressed_ids: list[int] = [
            self._special(token)
            for token in ("<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        ]

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        load_image: Callable[[int], Image.Image],
        preset: Preset,
        render: Callable[[ImageRef, Image.Image], Image.Image] = ImageRef.render,
    ) -> Encoded:
        """
        The opening of a conversation, up to where the model begins to write.

        Args:
            messages (sequence of `dict`):
                From [`~protocol.build_messages`] or [`~protocol.messages_from_prompt`].
            load_image (`Callable[[int], PIL.Image.Image]`):
                Gives the picture of an image number, in its original size.
            preset (`Preset`):
                Says how many pixels a picture in the prompt may have.
            render (`Callable[[ImageRef, PIL.Image.Image], PIL.Image.Image]`, *optional*):
                Gives a picture at the size the model sees, from the original.
        """
        refs, images = overviews(messages, load_image, preset, self.factor, render)
        return self._encode(self._render(messages, add_generation_prompt=True), images, refs)

    def observation(self, observation: Observation) -> Encoded:
        """A user turn with what a tool returned, from the newline after the model's turn to where it writes again."""
        head, tail = self._frame(len(observation.images))
        return self._encode(head + observation.text + tail, list(observation.images), list(observation.refs))

    def overview_size(self, size: tuple[int, int], preset: Preset) -> tuple[int, int]:
        """Width and height, in pixels, that a picture of `size` has in the prompt."""
        return overview_size(size, preset, self.factor)

    def image_tokens(self, ref: ImageRef) -> int:
        """Number of pads that a picture takes."""
        return (ref.width // self.factor) * (ref.height // self.factor)

    def closing(self, token_ids: Sequence[int]) -> list[int]:
        """What the loop appends to a model's turn so that it ends as every turn does."""
        return [] if token_ids[-1] == self.end_of_turn else [self.end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The model's own text, control tokens left out but tags kept."""
        ends = {self.end_of_turn, *self.stop_ids} - {self.end_of_call}
        kept = [token for token in token_ids if token not in ends]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _frame(self, num_images: int) -> tuple[str, str]:
        """What the chat template writes before and behind an observation's text, pictures included."""
        if num_images not in self._frames:
            opening = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            blocks = [{"type": "text", "text": _TEXT}, *({"type": "image"} for _ in range(num_images))]
            before = self._render(opening)
            after = self._render([*opening, {"role": "user", "content": blocks}], add_generation_prompt=True)
            if not after.startswith(before):
                raise ValueError("the chat template does not preserve prefixes, so turns cannot be appended to it")
            head, tail = after[before.rindex(_END_OF_TURN) + len(_END_OF_TURN) :].split(_TEXT)
            self._frames[num_images] = head, tail
        return self._frames[num_images]

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _encode(self, text: str, images: list[Image.Image], refs: list[ImageRef]) -> Encoded:
        # The pads are put in as ids and never as text: one tokenisation of the pieces between them is enough.
        pieces = text.split("<|image_pad|>")
        if len(pieces) != len(refs) + 1:
            raise ValueError(f"the rendered text has {len(pieces) - 1} pictures but {len(refs)} were given")
        token_ids: list[int] = []
        for piece, ref in zip(pieces, [*refs, None], strict=True):
            token_ids += self._tokens(piece)
            if ref is not None:
                token_ids += [self.image_pad] * self.image_tokens(ref)
        return Encoded(token_ids=token_ids, images=images, refs=refs, text=text)

    def _tokens(self, piece: str) -> list[int]:
        """Remembered, since what stands between pictures comes again and again."""
        if piece not in self._pieces:
            if len(self._pieces) >= _PIECES:
                self._pieces.clear()
            self._pieces[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
        return self._pieces[piece]

    def _special(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer has no single token for {token}; is this a {self.family} model?")
        return ids[0]


class MessageEncoder:
    """
    Leaves messages as they are, for a model that only its endpoint can tokenise. It has no token ids.

    Args:
        factor (`int`, *optional*, defaults to 28):
            Sides of pictures are multiples of it: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
    """

    def __init__(self, factor: int = 28):
        self.factor = factor

    def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        load_image: Callable[[int], Image.Image],
        preset: Preset,
        render: Callable[[ImageRef, Image.Image], Image.Image] = ImageRef.render,
    ) -> Encoded:
        """The opening of a conversation; see [`Encoder.prompt`]."""
        refs, images = overviews(messages, load_image, preset, self.factor, render)
        text = "\n".join(block.get("text", IMAGE_MARK) for message in messages for block in message["content"])
        return Encoded([], images, refs, text, list(messages))

    def observation(self, observation: Observation) -> Encoded:
        """A user turn with what a tool returned."""
        blocks = [{"type": "text", "text": observation.text}, *({"type": "image"} for _ in observation.images)]
        message = {"role": "user", "content": blocks}
        return Encoded([], list(observation.images), list(observation.refs), observation.text, [message])

    def closing(self, token_ids: Sequence[int]) -> list[int]:
        """Nothing: the endpoint ends turns itself."""
        return []
