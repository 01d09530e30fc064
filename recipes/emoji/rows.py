"""Conversations into rows of tokens that know which of them to learn, and rows into padded batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizer import SPECIAL_TOKENS, VISIBLE_TOKENS
from tokenizers import Tokenizer


FACTOR = 28
"""Side in pixels of the square that one image token covers."""

NUM_LOOKS = 24
"""Ways to show a picture: six orders of its colour channels, each as it is, mirrored, upside down, or both. 0 is as it
is drawn."""

_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS + VISIBLE_TOKENS)) + ")")
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


Layer = tuple[int, tuple[float, float, float, float]]
"""A stored picture, by its place in the table of all of them, and x1, y1, x2, y2 of the part of it that is shown, in
stored pixels. The part may reach beyond the picture, where all is white."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """
    A picture as the model is to see it.

    Args:
        layers (`tuple[Layer, ...]`):
            The stored pictures in it, which do not overlap: one, or those of a scene.
        size (`tuple[int, int]`):
            Width and height that the model sees, multiples of 28.
        look (`int`, *optional*, defaults to 0):
            One of [`NUM_LOOKS`]: other colours, mirrored, upside down.
    """

    layers: tuple[Layer, ...]
    size: tuple[int, int]
    look: int = 0

    @property
    def num_tokens(self) -> int:
        return (self.size[0] // FACTOR) * (self.size[1] // FACTOR)


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One conversation, ready for training.

    Args:
        ids (`np.ndarray`):
            Token ids, pads expanded.
        weights (`np.ndarray`):
            Weight of each token's loss; 0 where the model only reads.
        pictures (`list[Picture]`):
            In the order of their pads.
    """

    ids: np.ndarray
    weights: np.ndarray
    pictures: list[Picture]


@dataclasses.dataclass
class PictureGroup:
    """
    All pictures of a batch that have one size.

    Args:
        size (`tuple[int, int]`):
            Width and height in pixels.
        reach (`int`):
            How far outside a stored picture the filter that resizes it may begin and still meet it, in stored pixels.
        picture_of (array of int64, (layers,)):
            Which picture each layer belongs to.
        rows (array of int64, (layers,)):
            Places in the table of all stored pictures.
        columns, lines (arrays of float32, (spans, 2)):
            The spans of pixels, across and down, that are shown of any of them.
        column_of, line_of (arrays of int64, (layers,)):
            Which of those spans each layer shows.
        places (array of int64, (pictures, tokens)):
            Where their tokens stand in the flattened batch.
        looks (array of int64, (pictures,), *optional*):
            How each is to look; none where all are as they are drawn.
    """

    size: tuple[int, int]
    reach: int
    picture_of: Any
    rows: Any
    columns: Any
    column_of: Any
    lines: Any
    line_of: Any
    places: Any
    looks: Any = None

    @classmethod
    def of(cls, pictures: Sequence[Picture], places: Sequence[np.ndarray]) -> PictureGroup:
        """Pictures of one size, and where the tokens of each stand."""
        boxes = np.array([box for picture in pictures for _, box in picture.layers], np.float32)
        columns, column_of = np.unique(boxes[:, [0, 2]], axis=0, return_inverse=True)
        lines, line_of = np.unique(boxes[:, [1, 3]], axis=0, return_inverse=True)
        rows = np.array([row for picture in pictures for row, _ in picture.layers], np.int32)
        picture_of = np.repeat(np.arange(len(pictures), dtype=np.int32), [len(picture.layers) for picture in pictures])
        size = pictures[0].size
        widest = max(np.ptp(columns, axis=1).max() / size[0], np.ptp(lines, axis=1).max() / size[1])
        layers = (picture_of, rows, columns, column_of.ravel(), lines, line_of.ravel())
        looks = np.array([picture.look for picture in pictures], np.int32)
        return cls(size, 4 * math.ceil(widest), *layers, np.stack(places), looks if looks.any() else None)

    @classmethod
    def join(cls, groups: Sequence[PictureGroup], offsets: Sequence[int]) -> PictureGroup:
        """Groups of one size as one, the tokens of each so much further on."""
        counts = [len(group.places) for group in groups]
        looks = [np.zeros(n, np.int32) if g.looks is None else g.looks for g, n in zip(groups, counts, strict=True)]

        def shifted(name: str, steps: Sequence[int]) -> np.ndarray:
            return np.concatenate([getattr(group, name) + step for group, step in zip(groups, steps, strict=True)])

        def starts(sizes: Sequence[int]) -> list[int]:
            return [0, *itertools.accumulate(sizes)][: len(groups)]

        return cls(
            groups[0].size,
            max(group.reach for group in groups),
            shifted("picture_of", starts(counts)),
            np.concatenate([group.rows for group in groups]),
            np.concatenate([group.columns for group in groups]),
            shifted("column_of", starts([len(group.columns) for group in groups])),
            np.concatenate([group.lines for group in groups]),
            shifted("line_of", starts([len(group.lines) for group in groups])),
            shifted("places", offsets),
            np.concatenate(looks) if any(group.looks is not None for group in groups) else None,
        )

    def to(self, device: Any) -> PictureGroup:
        """The same group as tensors on a device."""
        arrays = {name: _move(value, device) for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return dataclasses.replace(self, **arrays)


@dataclasses.dataclass
class Batch:
    """
    Rows padded on the right to one length; arrays until [`Batch.to`] makes tensors of them.

    Args:
        ids (array of int64, (rows, length)):
            Token ids.
        positions (array of int64, (3, rows, length)):
            Time, height and width of each token, as the model's `get_rope_index` counts them.
        targets (array of int64, (targets,)):
            Places of the tokens to write in the flattened batch.
        weights (array of float32, (targets,)):
            Weights of their losses.
        groups (`list[PictureGroup]`):
            The pictures, by size.
        marks (array of int64, (rows, …)):
            What the maker wants to know of each row.
    """

    ids: Any
    positions: Any
    targets: Any
    weights: Any
    groups: list[PictureGroup]
    marks: Any

    def to(self, device: Any) -> Batch:
        """The same batch as tensors on a device."""
        arrays = (_move(array, device) for array in (self.ids, self.positions, self.targets, self.weights))
        return Batch(*arrays, [group.to(device) for group in self.groups], _move(self.marks, device))


def share_pictures(parts: Sequence[Batch]) -> tuple[list[Batch], list[PictureGroup]]:
    """
    Takes the pictures out of the parts of a batch: those of one size go through the tower together.

    Args:
        parts (sequence of `Batch`):
            The parts, as arrays.

    Returns:
        `tuple[list[Batch], list[PictureGroup]]`: the parts without pictures, and the pictures of all, whose tokens'
        places are counted through the parts one after another.
    """
    starts = [0, *itertools.accumulate(part.ids.size for part in parts)]
    found: dict[tuple[int, int], list[tuple[PictureGroup, int]]] = {}
    for part, start in zip(parts, starts, strict=False):
        for group in part.groups:
            found.setdefault(group.size, []).append((group, start))
    groups = [PictureGroup.join(*zip(*members, strict=True)) for members in found.values()]
    return [dataclasses.replace(part, groups=[]) for part in parts], groups


def _move(array: np.ndarray, device: Any) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
    return tensor if tensor.is_floating_point() else tensor.long()


class RowMaker:
    """
    Turns messages into rows, with the same ids as the chat template's rendering.

    Args:
        tokenizer (`tokenizers.Tokenizer`):
            The backend of the truncated tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decisive = {tokenizer.token_to_id(digit) for digit in "0123456789"}
        verdicts = [tokenizer.encode(verdict) for verdict in (" yes", " no")]
        # A tokenizer of few merges spells them; then what they begin with is a space, which decides nothing.
        self._decisive |= {verdict.ids[0] for verdict in verdicts if verdict.tokens[0] != "Ġ"}
        marks = ("<tool_call>", "<", "[", ",")
        self._call, self._tag, self._bracket, self._comma = map(tokenizer.token_to_id, marks)
        self._special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS + VISIBLE_TOKENS}
        self.image_pad, self.end_of_turn = self._special["<|image_pad|>"], self._special["<|im_end|>"]
        # Control tokens cut a text before it is tokenised, so the pieces between them can be kept and used again.
        self._encode_piece = functools.lru_cache(maxsize=200_000)(self._encode_piece)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text, one pad a picture."""
        ids: list[int] = []
        for piece in _SPLIT.split(text):
            if piece:
                ids += self._encode_piece(piece)
        return ids

    def row(
        self,
        messages: Sequence[dict[str, Any]],
        pictures: Sequence[Picture],
        close: bool = True,
        choice_weight: float = 1.0,
    ) -> Row:
        """
        One conversation as a row.

        Args:
            messages (sequence of `dict`):
                System, user and assistant messages. An assistant message may bring its weight as `"loss"`; with
                `False` it is only read. Its loss reaches to the end mark, but ends with the call where the turn is
                one: the loop closes that.
            pictures (sequence of `Picture`):
                The pictures of all image blocks, in order.
            close (`bool`, *optional*, defaults to `True`):
                Whether the conversation is over; `False` leaves it where the model begins to write.
            choice_weight (`float`, *optional*, defaults to 1.0):
                Weight of the tokens that decide: the numbers and verdicts of a thought and the first number of an
                answer. They are few among many that are easy.

        Raises:
            `ValueError`: where image blocks and pictures differ in number.
        """
        ids: list[int] = []
        weights: list[float] = []

        def put(text: str, weight: float = 0.0) -> None:
            new = self.encode(text)
            ids.extend(new)
            weights.extend(weight * each for each in self._weigh(new, choice_weight))

        for message in messages:
            if message["role"] != "assistant":
                put(f"<|im_start|>{message['role']}\n{_render(message['content'])}<|im_end|>\n")
                continue
            weight = float(message.get("loss", True))
            put("<|im_start|>assistant\n")
            put(message["content"], weight)
            put("<|im_end|>", weight > 0 and not message["content"].endswith("</tool_call>"))
            put("\n")
        if not close:
            put("<|im_start|>assistant\n")
        return self._expand(np.array(ids, np.int32), np.array(weights, np.float32), list(pictures))

    def _weigh(self, ids: list[int], choice_weight: float) -> list[float]:
        """Full weight for what decides up to a call or up to the second number of a list; captions decide nothing."""
        weights = [1.0] * len(ids)
        if ids[0] != self._tag:
            return weights
        listed = False
        for place, token in enumerate(ids):
            if token == self._call or (listed and token == self._comma):
                break
            listed |= token == self._bracket
            if token in self._decisive:
                weights[place] = choice_weight
        return weights

    def _expand(self, ids: np.ndarray, weights: np.ndarray, pictures: list[Picture]) -> Row:
        pads = ids == self.image_pad
        if pads.sum() != len(pictures):
            raise ValueError(f"the conversation shows {pads.sum()} pictures but {len(pictures)} were given")
        repeats = np.ones(len(ids), np.int64)
        repeats[pads] = [picture.num_tokens for picture in pictures]
        return Row(ids.repeat(repeats), weights.repeat(repeats), pictures)

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        special = self._special.get(piece)
        return (special,) if special is not None else tuple(self.tokenizer.encode(piece, add_special_tokens=False).ids)


def collate(
    rows: Sequence[Row],
    image_pad: int,
    marks: Sequence[Sequence[int]] = (),
    multiple: int = 32,
    row_multiple: int = 1,
) -> Batch:
    """
    Pads rows to one length and sorts their pictures by size.

    Args:
        rows (sequence of `Row`):
            The rows.
        image_pad (`int`):
            Id of the image token.
        marks (sequence of sequences of `int`, *optional*):
            One entry a row, handed through.
        multiple (`int`, *optional*, defaults to 32):
            The common length is a multiple of it.
        row_multiple (`int`, *optional*, defaults to 1):
            The number of rows is a multiple of it; what is missing is blank and carries no loss. Few different shapes
            train faster, since an accelerator's libraries prepare anew for each.
    """
    length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    count = -(-len(rows) // row_multiple) * row_multiple
    ids = np.zeros((count, length), np.int32)
    positions = np.zeros((3, count, length), np.int32)
    weights = np.zeros((count, length), np.float32)
    sizes: dict[tuple[int, int], tuple[list[Picture], list[np.ndarray]]] = {}
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        weights[place, : len(row.ids)] = row.weights
        positions[:, place, : len(row.ids)] = token_positions(row, image_pad)
        pads = np.flatnonzero(row.ids == image_pad).astype(np.int32) + place * length
        start = 0
        for picture in row.pictures:
            pictures, places = sizes.setdefault(picture.size, ([], []))
            pictures.append(picture)
            places.append(pads[start : start + picture.num_tokens])
            start += picture.num_tokens
    weights = weights.ravel()
    targets = np.flatnonzero(weights)
    groups = [PictureGroup.of(*found) for found in sizes.values()]
    return Batch(ids, positions, targets, weights[targets], groups, np.array(marks, np.int64))


def by_length(rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Places of rows of like length, cut so that no part has more than `max_tokens` tokens once padded."""
    parts: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place].ids)):
        if not parts or len(rows[parts[-1][0]].ids) * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
        parts[-1].append(place)
    return parts


def token_positions(row: Row, image_pad: int) -> np.ndarray:
    """
    Time, height and width of each token, (3, length).

    Text counts on in all three. The tokens of a picture share one time and lie on a grid; what follows begins behind
    the longer side of that grid.
    """
    positions = np.empty((3, len(row.ids)), np.int32)
    pads = np.flatnonzero(row.ids == image_pad)
    place = position = start = 0
    for picture in row.pictures:
        across, down = picture.size[0] // FACTOR, picture.size[1] // FACTOR
        first = pads[start]
        positions[:, place:first] = np.arange(position, position + first - place)
        position += first - place
        grid = np.indices((1, down, across)).reshape(3, -1)
        place = first + across * down
        positions[:, first:place] = grid + position
        position += max(across, down)
        start += across * down
    positions[:, place:] = np.arange(position, position + len(row.ids) - place)
    return positions


def _render(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(_IMAGE if block["type"] == "image" else block["text"] for block in content)
