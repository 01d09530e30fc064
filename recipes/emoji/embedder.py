"""A small embedder of drawings and their names, trained in a few minutes on a CPU: the worked example's coarse stage.

It sees 28 × 28 pixels and words without their order, and nothing of what `splits.py` holds out. Coarse is what it is
meant to be.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from art import TRAIN_ARTISTS, Art
from concepts import Concept
from PIL import Image
from splits import split_codes

from vretrver_hf import Item
from vretrver_hf.retrieval import normalised


SIDE, WIDTH, BUCKETS = 28, 128, 2**14
TEMPERATURE = 0.07

_WORD = re.compile(r"[^\W_]+")


class TinyEmbedder(torch.nn.Module):
    """
    Two towers: pixels through two layers, and the mean of word and letter-triple vectors.

    Attributes:
        name (`str`): What it is, for the record.
    """

    name = "emoji-embedder"

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(
            torch.nn.Linear(SIDE * SIDE * 3, 512), torch.nn.GELU(), torch.nn.Linear(512, WIDTH)
        )
        self.words = torch.nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean")
        self.text = torch.nn.Linear(WIDTH, WIDTH)

    def images(self, pixels: np.ndarray) -> torch.Tensor:
        """Vectors of drawings, uint8 of shape (N, 28, 28, 3)."""
        return self.image(torch.tensor(pixels.reshape(len(pixels), -1)).float() / 127.5 - 1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts."""
        bags = [torch.tensor(buckets(text)) for text in texts]
        offsets = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)
        return self.text(self.words(torch.cat(bags), offsets))

    @torch.inference_mode()
    def encode(self, items: Sequence[Item], side: Literal["query", "candidate"]) -> np.ndarray:
        """Vectors of items; those of text and picture are added."""
        vectors = np.zeros((len(items), WIDTH), np.float32)
        for place, item in enumerate(items):
            if item.image is not None:
                vectors[place] += normalised(self.images(shrink(np.asarray(item.load_image()))[None])[0].numpy())
            if item.text is not None:
                vectors[place] += normalised(self.texts([item.text])[0].numpy())
        return normalised(vectors)


def buckets(text: str) -> list[int]:
    """Where a text's words and their triples of letters stand in the table."""
    words = _WORD.findall(text.lower())
    pieces = [*words, *(f"<{word}>"[i : i + 3] for word in words for i in range(len(word)))]
    return [zlib.crc32(piece.encode()) % BUCKETS for piece in pieces] or [0]


def shrink(pixels: np.ndarray) -> np.ndarray:
    """A drawing at 28 × 28."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))


def train(art: Art, concepts: dict[str, Concept], steps: int = 400, batch: int = 384, seed: int = 0) -> TinyEmbedder:
    """
    Trains an embedder on training concepts by training artists: a drawing goes with its name, and with the same thing
    by another artist.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        steps (`int`, *optional*, defaults to 400): Batches.
        batch (`int`, *optional*, defaults to 384): Concepts of a batch.
        seed (`int`, *optional*, defaults to 0): Seed of weights and draws.
    """
    torch.manual_seed(seed)
    model = TinyEmbedder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for names, first, second in batches(art, concepts, steps, batch, seed):
        vectors = [
            torch.nn.functional.normalize(v, dim=-1) for v in (model.texts(names), *map(model.images, (first, second)))
        ]
        target = torch.arange(len(names))
        loss = torch.zeros(())
        for one, other in ((0, 1), (0, 2), (1, 2)):
            scores = vectors[one] @ vectors[other].T / TEMPERATURE
            loss = loss + torch.nn.functional.cross_entropy(scores, target)
            loss = loss + torch.nn.functional.cross_entropy(scores.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def batches(
    art: Art, concepts: dict[str, Concept], steps: int, batch: int, seed: int
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Names of training concepts, and two drawings of each by different artists where two drew it."""
    source = random.Random(f"{seed}/embedder")
    known = sorted(split_codes(concepts, "train"))
    drawn = {code: [artist for artist in TRAIN_ARTISTS if art.has(artist, code)] for code in known}
    codes = [code for code in known if drawn[code]]
    small: dict[tuple[str, str], np.ndarray] = {}

    def pixels(artist: str, code: str) -> np.ndarray:
        if (artist, code) not in small:
            small[artist, code] = shrink(art.image(artist, code))
        return small[artist, code]

    for _ in range(steps):
        chosen = source.sample(codes, min(batch, len(codes)))
        artists = [(source.sample(drawn[code], 2) if len(drawn[code]) > 1 else drawn[code] * 2) for code in chosen]
        pairs = [(pixels(one, code), pixels(two, code)) for (one, two), code in zip(artists, chosen, strict=True)]
        yield [concepts[code].name for code in chosen], *(np.stack(side) for side in zip(*pairs, strict=True))
