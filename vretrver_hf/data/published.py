"""Trajectories as a data set that people can look through: one row each, with every picture in it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..items import Item
from ..trajectory import Trajectory
from .conversations import TrajectoryRecord
from .examples import RerankExample, image_bytes


if TYPE_CHECKING:
    import datasets


def published_features() -> datasets.Features:
    """The columns of [`to_row`]'s rows, for a `datasets.Dataset`."""
    from datasets import Features, Image, List, Value

    text, integer = Value("string"), Value("int64")
    return Features(
        {
            "query_id": text,
            "data_source": text,
            "query_text": text,
            "query_image": Image(),
            "candidate_texts": List(text),
            "candidate_images": List(Image()),
            "candidate_ids": List(text),
            "positives": List(integer),
            "order": List(integer),
            "right": Value("bool"),
            "status": text,
            "finish": text,
            "calls": integer,
            "valid_calls": integer,
            "tokens": integer,
            "seconds": Value("float64"),
            "completion": text,
            "seen": List(Image()),
            "trajectory": text,
        }
    )


def to_row(record: TrajectoryRecord) -> dict[str, Any]:
    """
    A trajectory with its query, candidates and pictures as one row; [`from_row`] reads it back without loss.

    Raises:
        `ItemError`: if a picture cannot be read.
    """
    example, trajectory = record.example, record.trajectory
    order = [trajectory.candidate_indices[place] for place in trajectory.order]
    return {
        "query_id": example.query_id,
        "data_source": example.data_source,
        "query_text": example.query.text,
        "query_image": _image(example.query, f"query {example.query_id}"),
        "candidate_texts": [item.text for item in example.candidates],
        "candidate_images": [
            _image(item, f"query {example.query_id}, candidate {number}")
            for number, item in enumerate(example.candidates, start=1)
        ],
        "candidate_ids": [item.id or "" for item in example.candidates],
        "positives": example.positives,
        "order": order,
        "right": bool(order) and order[0] in example.positives,
        "status": trajectory.status,
        "finish": trajectory.finish,
        "calls": trajectory.num_calls,
        "valid_calls": trajectory.num_valid_calls,
        "tokens": trajectory.num_tokens,
        "seconds": trajectory.seconds,
        "completion": trajectory.completion,
        "seen": _seen(record),
        "trajectory": json.dumps(trajectory.to_dict(), ensure_ascii=False),
    }


def from_row(row: Mapping[str, Any]) -> TrajectoryRecord:
    """
    The record that [`to_row`] wrote; pictures may be decoded or as the data set stores them.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from vretrver_hf.data.published import from_row

    >>> from_row(load_dataset("someone/trajectories", split="train")[0])  # doctest: +SKIP
    ```
    """
    candidates = [
        Item.coerce({"text": text, "image": image, "id": item_id or None}, name=f"candidate {number}")
        for number, (text, image, item_id) in enumerate(
            zip(row["candidate_texts"], row["candidate_images"], row["candidate_ids"], strict=True), start=1
        )
    ]
    query = Item.coerce({"text": row["query_text"], "image": row["query_image"]}, name="query")
    example = RerankExample(row["query_id"], query, candidates, list(row["positives"]), row["data_source"] or "")
    return TrajectoryRecord(example, Trajectory.from_dict(json.loads(row["trajectory"])))


def without_paths(example: RerankExample) -> RerankExample:
    """The example with the bytes of its pictures in place of paths, which say how somebody's computer is set up."""
    items = []
    for number, item in enumerate([example.query, *example.candidates]):
        name = f"candidate {number}" if number else "query"
        is_path = isinstance(item.image, (str, os.PathLike))
        image = image_bytes(item, f"query {example.query_id}, {name}") if is_path else item.image
        items.append(dataclasses.replace(item, image=image))
    return dataclasses.replace(example, query=items[0], candidates=items[1:])


def _image(item: Item, where: str) -> dict[str, Any] | None:
    return None if item.image is None else {"bytes": image_bytes(item, where), "path": None}


def _seen(record: TrajectoryRecord) -> list[dict[str, Any]]:
    """The pictures that the model's calls brought, as it saw them."""
    pictures = []
    for turn in record.trajectory.turns:
        for ref in turn.images if turn.role == "observation" else []:
            buffer = io.BytesIO()
            ref.render(record.item(ref.index).load_image()).save(buffer, "WEBP", lossless=True)
            pictures.append({"bytes": buffer.getvalue(), "path": None})
    return pictures
