"""Examples as files that any trainer or evaluation reads: the released row schema, pictures embedded."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from art import Art
from concepts import Concept
from examples import Drawing, Entry, Example, Scene
from PIL import Image
from preset import PRESET
from scenes import KINDS, draw_scene
from tasks import make_maker

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample, row_features, to_row
from vretrver_hf.protocol import IMAGE_MARK, build_messages


TRAIN_SHARES = {
    "t2i": 0.14,
    "i2i": 0.12,
    "i2t": 0.1,
    "it2i": 0.2,
    "it2it": 0.08,
    "it2t": 0.1,
    "t2it": 0.08,
    "t2t": 0.05,
    "overview": 0.05,
    "detail": 0.08,
}
"""What the training set is made of."""
ROWS_AT_A_TIME = 1000
"""Rows of a row group: each picture is stored once a group."""
DICTIONARY_BYTES = 1 << 26

_DRAWING = {"lossless": True, "quality": 50, "method": 1}
_SCENE = {"quality": 80, "method": 2}


class Exporter:
    """
    Makes rows of examples.

    Args:
        art (`Art`): The pictures.
    """

    def __init__(self, art: Art) -> None:
        self.art = art
        self._encode_drawing = functools.lru_cache(maxsize=20_000)(
            lambda drawing: _webp(self.art.image(*drawing), _DRAWING)
        )

    def rerank_example(self, example: Example) -> RerankExample:
        """The example as the package knows it, with the prompt that the recipe's preset makes of it."""
        query, *candidates = (self._item(entry) for entry in example.entries)
        return RerankExample(
            query_id=example.qid,
            query=query,
            candidates=candidates,
            positives=[example.positive],
            data_source=f"emoji/{task_name(example)}",
            prompt=flat_prompt(query, candidates),
        )

    def row(self, example: Example) -> dict[str, Any]:
        """
        A row of the released schema; its `ability` is the kind of question.

        `extra_info.target_boxes` says where in each candidate that is a scene the drawing stands that decides, as x1,
        y1, x2, y2 in pixels: nothing that a model is shown, but what tells whether a crop met it.
        """
        row = to_row(self.rerank_example(example))
        row["extra_info"]["images"] = [image["image"]["path"] for image in row["images"]]
        row["extra_info"]["target_boxes"] = [_target_box(entry) for entry in example.candidates]
        reward = {"style": "rule", "ground_truth": example.positive + 1}
        return row | {"ability": example.kind, "reward_model": reward}

    def rows(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """Rows of examples, in order, made by as many processes as there are cores: scenes take long to encode."""
        context, workers = multiprocessing.get_context("fork"), len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(self,)) as pool:
            yield from pool.map(_row, examples, chunksize=16)

    def _item(self, entry: Entry) -> Item:
        image = entry.image
        if isinstance(image, Scene):
            image = _webp(draw_scene(self.art, image), _SCENE)
        elif image is not None:
            image = self._encode_drawing(Drawing(*image))
        return Item(text=entry.text, image=image)


def task_name(example: Example) -> str:
    """The task of an example, or the kind of its scenes, which are text to image too but measure something else."""
    kind = example.kind.partition("/")[0]
    return kind if kind in KINDS else example.task


def flat_prompt(query: Item, candidates: list[Item]) -> list[dict[str, str]]:
    """The opening messages as text, with a mark for each picture."""
    return [
        {
            "role": message["role"],
            "content": "".join(
                IMAGE_MARK if block["type"] == "image" else block["text"] for block in message["content"]
            ),
        }
        for message in build_messages(query, candidates, PRESET)
    ]


def training_examples(art: Art, concepts: dict[str, Concept], count: int, seed: int) -> list[Example]:
    """
    Training examples of all tasks, mixed.

    Args:
        art (`Art`): The pictures.
        concepts (`dict[str, Concept]`): All concepts.
        count (`int`): How many.
        seed (`int`): Seed of the draw.

    Returns:
        `list[Example]`: The examples.
    """
    rng = random.Random(f"{seed}/export")
    tasks = rng.choices(list(TRAIN_SHARES), list(TRAIN_SHARES.values()), k=count)
    drawn = {
        task: iter(make_maker(art, concepts, task, "train").make(tasks.count(task), seed))
        for task in sorted(set(tasks))
    }
    return [next(drawn[task]) for task in tasks]


def write_parquet(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """
    Write rows to a parquet file; it appears when everything is written.

    Args:
        path (`str` or `Path`): The file.
        rows (`Iterable[dict]`): The rows, taken a few at a time.
    """
    import pyarrow
    from pyarrow import parquet

    schema = _schema()
    partial = Path(f"{path}.part")
    # One dictionary a row group keeps a picture once, however many candidates show it.
    with parquet.ParquetWriter(
        partial, schema, compression="zstd", dictionary_pagesize_limit=DICTIONARY_BYTES
    ) as writer:
        for batch in _batches(rows):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    partial.replace(path)


_EXPORTER: Exporter | None = None


def _adopt(exporter: Exporter) -> None:
    global _EXPORTER
    _EXPORTER = exporter


def _row(example: Example) -> dict[str, Any]:
    return _EXPORTER.row(example)


def _target_box(entry: Entry) -> list[int]:
    """Empty for what is no scene."""
    scene = entry.image
    return list(scene.objects[scene.target].box) if isinstance(scene, Scene) else []


def _schema() -> Any:
    from datasets import Features, List, Value

    columns = row_features()
    info = columns["extra_info"] | {"images": List(Value("string")), "target_boxes": List(List(Value("int64")))}
    reward = {"style": Value("string"), "ground_truth": Value("int64")}
    columns = {**columns, "extra_info": info, "ability": Value("string"), "reward_model": reward}
    return Features(columns).arrow_schema


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


def _webp(pixels: np.ndarray, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", **options)
    return buffer.getvalue()
