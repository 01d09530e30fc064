"""LamRA-Ret as an embedder: the paper's coarse stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .items import Item


if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, ProcessorMixin

    from .retrieval import Side

_WORDS = {(True, True): "image and sentence", (True, False): "image", (False, True): "sentence"}
"""What is summarised, by whether there are an image and a text."""


class LamRAEmbedder:
    """
    A Qwen-VL model that was trained to put what it reads into one word.

    LamRA writes `<emb>.` as the answer and takes the hidden state of the token before `<emb>`. A causal model's state
    there does not depend on what follows, so the prompt ends where the answer would begin and its last state is taken;
    `<emb>` itself need not be in the vocabulary.

    Args:
        model (`PreTrainedModel`):
            Qwen2-VL or Qwen2.5-VL with LamRA-Ret's weights.
        processor (`ProcessorMixin`):
            Its processor, with the chat template it was trained with.
        name (`str`, *optional*, defaults to `"LamRA-Ret"`):
            For the record.
        batch_size (`int`, *optional*, defaults to 32):
            Items at a time.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, name: str = "LamRA-Ret", batch_size: int = 32
    ):
        self.model, self.processor, self.name, self.batch_size = model.eval(), processor, name, batch_size
        processor.tokenizer.padding_side = "left"

    @classmethod
    def from_pretrained(
        cls, name: str | Path, batch_size: int = 32, device: str | None = None, dtype: str = "auto", **options: Any
    ) -> LamRAEmbedder:
        """
        Loads `code-kunkun/LamRA-Ret`, or a folder like it.

        Args:
            name (`str` or `Path`):
                Hub id or folder.
            batch_size (`int`, *optional*, defaults to 32):
                Items at a time.
            device (`str`, *optional*):
                Where it runs; a GPU where there is one.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Number format.
            options:
                Passed to the processor: `min_pixels`, `max_pixels`, …
        """
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(place)
        return cls(model, AutoProcessor.from_pretrained(name, **options), str(name), batch_size)

    def encode(self, items: Sequence[Item], side: Side) -> np.ndarray:
        """Embeds items; LamRA reads queries, which bring their instruction, and candidates alike."""
        import numpy as np

        blocks = [
            self._encode(items[start : start + self.batch_size]) for start in range(0, len(items), self.batch_size)
        ]
        return np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)

    def prompt(self, item: Item) -> list[dict[str, Any]]:
        """The conversation that an item is put into."""
        content: list[dict[str, Any]] = [{"type": "image"}] if item.image is not None else []
        words = _WORDS[item.image is not None, item.text is not None]
        text = f"{item.text or ''}\nSummarize above {words} in one word: "
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def _encode(self, items: Sequence[Item]) -> np.ndarray:
        import torch

        from .retrieval import normalised

        texts = [
            self.processor.apply_chat_template(self.prompt(item), tokenize=False, add_generation_prompt=True)
            for item in items
        ]
        images = [[item.load_image()] for item in items if item.image is not None]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.model.model(**inputs.to(self.model.device), use_cache=False).last_hidden_state
        return normalised(states[:, -1].float().cpu().numpy())
