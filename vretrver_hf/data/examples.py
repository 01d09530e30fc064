"""Queries with their candidates and labels: rows of the released training and evaluation sets, read and written."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..agent import AgentTask
from ..images import ItemError
from ..items import Item
from ..protocol import get_preset
from .vretrver import ImageRoot, ReleasedRow, ReleasedRows, open_dataset, read_row


if TYPE_CHECKING:
    import datasets
    from PIL import Image

    from ..protocol import Preset


_ROWS_AT_A_TIME = 16
"""Rows that are in memory while a file is written; each may hold dozens of pictures."""


@dataclasses.dataclass(frozen=True)
class RerankExample:
    """
    One query, its candidates, and which of them are relevant.

    Args:
        query_id (`str`):
            Identifies the query within its data set.
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The candidates, in the order in which the model meets them.
        positives (`list[int]`):
            0-based indices of the relevant candidates, at least one.
        data_source (`str`, *optional*, defaults to `""`):
            The data set that the query comes from.
        prompt (`list[dict]`, *optional*):
            The data set's own prompt, `[{"role": …, "content": text with <image> marks}]`.

    Raises:
        `ValueError`: if the id is empty or the positives are not indices of candidates, each once.

    Example:

    ```python
    >>> from vretrver_hf import Item
    >>> from vretrver_hf.data.examples import RerankExample

    >>> example = RerankExample("q1", Item(text="a cat"), [Item(text="a dog"), Item(text="a tomcat")], positives=[1])
    >>> example.task("release").query_id
    'q1'

    ```
    """

    query_id: str
    query: Item
    candidates: list[Item]
    positives: list[int]
    data_source: str = ""
    prompt: list[dict[str, str]] | None = None

    def __post_init__(self) -> None:
        if not self.query_id:
            raise ValueError("an example needs a query_id")
        if not self.positives:
            raise ValueError(f"query {self.query_id}: no candidate is marked as relevant")
        count = len(self.candidates)
        if len(set(self.positives)) < len(self.positives) or not all(0 <= index < count for index in self.positives):
            raise ValueError(
                f"query {self.query_id}: positives must be indices 0..{count - 1}, each once, got {self.positives}"
            )

    def task(self, preset: str | Preset, sample: int = 0, tools: bool = True) -> AgentTask:
        """
        The example as the agent plays it, all candidates in one window.

        Args:
            preset (`str` or `Preset`):
                The protocol to play.
            sample (`int`, *optional*, defaults to 0):
                Number of the trajectory among several of the same query.
            tools (`bool`, *optional*, defaults to `True`):
                Whether the model may call tools.
        """
        return AgentTask(
            query=self.query,
            candidates=self.candidates,
            preset=get_preset(preset),
            query_id=self.query_id,
            sample=sample,
            tools=tools,
            prompt=self.prompt,
        )


def example_from_row(
    row: Mapping[str, Any], image_root: str | os.PathLike[str] | ImageRoot | None = None, where: str = ""
) -> RerankExample:
    """
    Reads a row of the released training and evaluation sets; see [`~vretrver_hf.data.vretrver.read_row`].

    Args:
        row (mapping):
            The row.
        image_root (`str`, `os.PathLike` or `ImageRoot`, *optional*):
            Where relative paths start from.
        where (`str`, *optional*, defaults to `""`):
            What error messages call the row, such as `"train.parquet, row 3"`.

    Raises:
        `ValueError`: naming `where` and the field that cannot be used.

    Example:

    ```python
    >>> from vretrver_hf.data.examples import example_from_row

    >>> info = {"qid": "q1", "query_text": "a cat", "candidate_texts": ["a dog", "a tomcat"]}
    >>> example_from_row({"extra_info": {**info, "num_candidates": 2, "ground_truth_position": 2}}).positives
    [1]

    ```
    """
    try:
        return _example(read_row(row, image_root))
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def to_row(example: RerankExample, embed_images: bool = True) -> dict[str, Any]:
    """
    The row that [`example_from_row`] reads back.

    Args:
        example (`RerankExample`):
            The example.
        embed_images (`bool`, *optional*, defaults to `True`):
            Whether picture files are read and their bytes stored, so that the row needs no folder of pictures.
            Otherwise paths stay paths. What was never a file is stored as bytes in any case, PIL images as PNG.

    Raises:
        `ItemError`: if a picture file cannot be read.
    """
    items = [example.query, *example.candidates]
    names = ["" if item.image is None else _name(item.image, number) for number, item in enumerate(items)]
    images = []
    for number, (item, name) in enumerate(zip(items, names, strict=True)):
        if item.image is not None:
            where = f"query {example.query_id}, image {number}"
            images.append({"image": {"bytes": _to_bytes(item, where, embed_images), "path": name}})
    return {
        "data_source": example.data_source,
        "prompt": example.prompt,
        "images": images,
        "extra_info": {
            "qid": example.query_id,
            "ground_truth_position": [index + 1 for index in example.positives],
            "num_candidates": len(example.candidates),
            "query_image": names[0],
            "query_text": example.query.text or "",
            "candidate_images": names[1:],
            "candidate_texts": [item.text or "" for item in example.candidates],
            "candidate_ids": [item.id or "" for item in example.candidates],
        },
    }


def row_features() -> datasets.Features:
    """The columns of [`to_row`]'s rows, for a `datasets.Dataset`."""
    from datasets import Features, Image, List, Value

    text, integer = Value("string"), Value("int64")
    info = {
        "qid": text,
        "ground_truth_position": List(integer),
        "num_candidates": integer,
        "query_image": text,
        "query_text": text,
        "candidate_images": List(text),
        "candidate_texts": List(text),
        "candidate_ids": List(text),
    }
    return Features(
        {
            "data_source": text,
            "prompt": List({"role": text, "content": text}),
            "images": List({"image": Image()}),
            "extra_info": info,
        }
    )


def write_examples(path: str | os.PathLike[str], examples: Iterable[RerankExample]) -> None:
    """
    Writes a parquet file with all pictures in it; [`load_examples`] reads it back.

    Args:
        path (`str` or `os.PathLike`):
            The file. It appears when everything is written, so that an interrupted run leaves none.
        examples (iterable of `RerankExample`):
            The examples, taken one at a time.
    """
    write_rows(path, map(to_row, examples), row_features())


def write_rows(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]], features: datasets.Features) -> None:
    """
    Writes rows into a parquet file that `datasets` and the hub's viewer open with these features.

    Args:
        path (`str` or `os.PathLike`):
            The file. It appears when everything is written, so that an interrupted run leaves none.
        rows (iterable of `dict`):
            The rows, taken one at a time; pictures are `{"bytes": …, "path": …}`.
        features (`datasets.Features`):
            The columns.
    """
    import pyarrow
    from pyarrow import parquet

    schema = features.arrow_schema
    partial = Path(f"{os.fspath(path)}.part")
    with parquet.ParquetWriter(partial, schema) as writer:
        for batch in _batches(rows, _ROWS_AT_A_TIME):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
    partial.replace(path)


def load_examples(
    source: str | os.PathLike[str],
    split: str = "train",
    image_root: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> Examples:
    """
    Opens a data set of examples; rows are read when they are asked for.

    Args:
        source (`str` or `os.PathLike`):
            A parquet, JSON or JSONL file, a folder of parquet files, or a data set on the hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a data set on the hub; a single file is one split.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder or zip archive that relative picture paths start from; the folder of a local source by default.
        limit (`int`, *optional*):
            Most examples, from the first.

    Raises:
        `ValueError`: if the file is of another kind.
        `FileNotFoundError`: if what looks like a file does not exist.
    """
    dataset, root = open_dataset(source, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return Examples(dataset, root if image_root is None else image_root, str(source))


class Examples(Sequence[RerankExample]):
    """
    The rows of a data set as [`RerankExample`]s, each read when it is asked for.

    Args:
        dataset (`datasets.Dataset`):
            Rows of the released schema.
        image_root (`str`, `os.PathLike` or `ImageRoot`, *optional*):
            Where relative picture paths start from.
        name (`str`, *optional*, defaults to `"data set"`):
            What error messages call it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_root: str | os.PathLike[str] | ImageRoot | None = None,
        name: str = "data set",
    ):
        self.rows = ReleasedRows(dataset, image_root, name)
        """The rows that the examples are made of."""
        self._name = name

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> RerankExample: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> RerankExample | Examples:
        if isinstance(index, slice):
            part = copy.copy(self)
            part.rows = self.rows[index]
            return part
        row = self.rows[index]
        try:
            return _example(row)
        except ValueError as error:
            raise ValueError(f"{self._name}, row {index}: {error}") from error

    @property
    def query_ids(self) -> list[str]:
        """Every row's query id, read without the pictures."""
        return self.rows.query_ids


def _example(row: ReleasedRow) -> RerankExample:
    return RerankExample(
        query_id=row.query_id,
        query=row.query,
        candidates=row.candidates,
        positives=row.positives,
        data_source=row.data_source,
        prompt=row.prompt,
    )


def _batches(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    source = iter(rows)
    while batch := list(itertools.islice(source, size)):
        yield batch


def _name(image: str | os.PathLike[str] | bytes | Image.Image, number: int) -> str:
    """The picture's path, or a name that stands for one."""
    is_path = isinstance(image, (str, os.PathLike)) and os.fspath(image)[:5].lower() != "data:"
    return os.fspath(image) if is_path else f"image-{number}"


def _to_bytes(item: Item, where: str, embed_images: bool) -> bytes | None:
    image = item.image
    is_path = isinstance(image, (str, os.PathLike)) and os.fspath(image)[:5].lower() != "data:"
    return image_bytes(item, where) if embed_images or not is_path else None


def image_bytes(item: Item, where: str) -> bytes:
    """
    The item's picture as a file's bytes: as it is stored, or as PNG where it was never a file.

    Args:
        item (`Item`):
            An item with a picture.
        where (`str`):
            What error messages call it.

    Raises:
        `ItemError`: if the picture cannot be read, or is none.
    """
    image = item.image
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)) and os.fspath(image)[:5].lower() != "data:":
        return _read_picture(item, Path(image), where)
    buffer = io.BytesIO()
    item.load_image(name=where).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_picture(item: Item, path: Path, where: str) -> bytes:
    try:
        path.stat()
        item.load_image(name=where)  # rows may name any file, and what is published must be a picture
        return path.read_bytes()
    except OSError as error:
        raise ItemError(f"{where} ({str(path)!r}) cannot be read ({error.strerror}); check the path") from error
