"""Queries with their candidates and labels: rows of the released training and evaluation sets, read and written."""

from __future__ import annotations

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
    row: Mapping[str, Any], image_root: str | os.PathLike[str] | None = None, where: str = ""
) -> RerankExample:
    """
    Reads a row of the released training and evaluation sets.

    `extra_info` says what there is: `qid`, `query_text` and `query_image`, `candidate_texts` and `candidate_images`
    (`""` or `None` where absent, an empty list where all are), `ground_truth_position` (1-based, one or a list) and
    `num_candidates`. `images` lists the pictures, the query's first; bytes in there win over the paths.

    Args:
        row (mapping):
            The row.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths start from.
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
        return _read_row(row, image_root)
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
            Folder that relative picture paths start from; the folder of a local source by default.
        limit (`int`, *optional*):
            Most examples, from the first.

    Raises:
        `ValueError`: if the file is of another kind.
        `FileNotFoundError`: if what looks like a file does not exist.
    """
    dataset, folder = open_dataset(source, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return Examples(dataset, folder if image_root is None else image_root, str(source))


def open_dataset(source: str | os.PathLike[str], split: str) -> tuple[datasets.Dataset, Path | None]:
    """
    Opens a data set, and says in which folder a local one lies.

    Args:
        source (`str` or `os.PathLike`):
            A parquet, JSON or JSONL file, a folder of parquet files, or a data set on the hub.
        split (`str`):
            Split of a folder or of a data set on the hub; a single file is one split.

    Raises:
        `ValueError`: if the file is of another kind.
        `FileNotFoundError`: if what looks like a file does not exist.
    """
    from datasets import load_dataset

    path = Path(source)
    if path.is_dir():
        return load_dataset("parquet", data_dir=str(path), split=split), path
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(f"{path} is neither a .parquet, .json or .jsonl file nor a folder of parquet files")
        return load_dataset(kind, data_files=str(path), split="train"), path.parent
    if kind is not None or path.is_absolute():
        raise FileNotFoundError(f"{path} does not exist")
    return load_dataset(str(source), split=split), None


class Examples(Sequence[RerankExample]):
    """
    The rows of a data set as [`RerankExample`]s, each read when it is asked for.

    Args:
        dataset (`datasets.Dataset`):
            Rows of the released schema.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative picture paths start from.
        name (`str`, *optional*, defaults to `"data set"`):
            What error messages call it.
    """

    def __init__(
        self, dataset: datasets.Dataset, image_root: str | os.PathLike[str] | None = None, name: str = "data set"
    ):
        # As Arrow, rows come with pictures as they are stored: decoding is the item's business, which names failures.
        self._dataset = dataset.with_format("arrow")
        self._image_root = image_root
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> RerankExample: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> RerankExample | Examples:
        if isinstance(index, slice):
            part = self._dataset.select(range(*index.indices(len(self))))
            return Examples(part, self._image_root, self._name)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._name} has {len(self)} rows, there is no row {index}")
        (row,) = self._dataset[index].to_pylist()
        return example_from_row(row, self._image_root, where=f"{self._name}, row {index}")

    @property
    def query_ids(self) -> list[str]:
        """Every row's query id, read without the pictures."""
        rows = self._dataset.select_columns(["extra_info"])[:]["extra_info"].to_pylist()
        return [str(row["qid"]) for row in rows]


def _read_row(row: Mapping[str, Any], image_root: str | os.PathLike[str] | None) -> RerankExample:
    info = _field(row, "extra_info", Mapping)
    query_id = info.get("qid")
    if not isinstance(query_id, (str, int)) or query_id == "":
        raise ValueError(f"extra_info.qid must be a string, got {query_id!r}")
    count = _field(info, "num_candidates", int, "extra_info.")
    texts = [info.get("query_text"), *_column(info, "candidate_texts", count)]
    paths = [info.get("query_image"), *_column(info, "candidate_images", count)]
    ids = [None, *_column(info, "candidate_ids", count)]
    images = _images(row.get("images"), paths, image_root)
    items = []
    for number, (text, image, item_id) in enumerate(zip(texts, images, ids, strict=True)):
        name = f"candidate {number}" if number else "query"
        items.append(Item.coerce({"text": text, "image": image, "id": item_id or None}, name=name))
    return RerankExample(
        query_id=str(query_id),
        query=items[0],
        candidates=items[1:],
        positives=_positives(info.get("ground_truth_position"), count),
        data_source=row.get("data_source") or "",
        prompt=_prompt(row.get("prompt")),
    )


def _field(row: Mapping[str, Any], name: str, kind: type, prefix: str = "") -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        word = "an integer" if kind is int else "a mapping"
        raise ValueError(f"{prefix}{name} must be {word}, got {value!r:.80}")
    return value


def _column(info: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """One value a candidate. Shorter lists are refused: nobody could say whose values are missing."""
    values = info.get(name)
    if values is None or len(values) == 0:
        return [None] * count
    if len(values) != count:
        raise ValueError(f"extra_info.{name} has {len(values)} entries for {count} candidates; write '' where absent")
    return list(values)


def _images(listed: Any, paths: list[Any], image_root: str | os.PathLike[str] | None) -> list[Any]:
    """The picture of the query and of each candidate, `None` where there is none."""
    present = [number for number, path in enumerate(paths) if path]
    sources = [None] * len(paths)
    for number in present:
        sources[number] = _resolve(paths[number], image_root)
    if listed is None or len(listed) == 0:
        return sources
    if len(listed) != len(present):
        raise ValueError(
            f"images has {len(listed)} entries but extra_info names {len(present)} pictures "
            "(query_image and candidate_images)"
        )
    for number, entry in zip(present, listed, strict=True):
        sources[number] = _embedded(entry) or sources[number]
    return sources


def _embedded(entry: Any) -> Any:
    """What an entry of `images` holds besides a path."""
    if isinstance(entry, Mapping) and "image" in entry:
        entry = entry["image"]
    if isinstance(entry, Mapping):
        entry = entry.get("bytes")
    return None if isinstance(entry, (str, os.PathLike)) else entry


def _resolve(path: Any, image_root: str | os.PathLike[str] | None) -> Any:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"the path of a picture must be a string, got {type(path).__name__}")
    if image_root is None or os.fspath(path)[:5] == "data:":
        return path
    return os.path.join(image_root, path)


def _positives(value: Any, count: int) -> list[int]:
    positions = value if isinstance(value, (list, tuple)) else [value]
    if not positions or not all(type(position) is int and 1 <= position <= count for position in positions):
        raise ValueError(
            f"extra_info.ground_truth_position must be a candidate's number, 1..{count}, or a list of them, "
            f"got {value!r:.80}"
        )
    return [position - 1 for position in positions]


def _prompt(value: Any) -> list[dict[str, str]] | None:
    if value is None or len(value) == 0:
        return None
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"prompt must be a list of messages with role and content as text, got {message!r:.80}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


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
        `ItemError`: if the picture cannot be read.
    """
    image = item.image
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)) and os.fspath(image)[:5].lower() != "data:":
        return _read_file(Path(image), where)
    buffer = io.BytesIO()
    item.load_image(name=where).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_file(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ItemError(f"{where} ({str(path)!r}) cannot be read ({error.strerror}); check the path") from error
