"""The released training and evaluation sets as they are: rows, image roots, coarse results, prompts.

A row says in `extra_info` what there is; `images` lists the pictures; evaluation files also bring `hit`, the coarse
results in order, and `prompt`, which exact evaluation replays.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..images import DEFAULT_LIMITS, ItemError
from ..items import Item
from ..protocol import IMAGE_MARK


if TYPE_CHECKING:
    import datasets

Messages = list[dict[str, str]]
"""`[{"role": …, "content": text with <image> marks}]`."""


@dataclasses.dataclass(frozen=True)
class ReleasedRow:
    """
    A row of the released sets, read and checked.

    Args:
        query_id (`str`):
            `extra_info.qid`.
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The candidates that the prompt shows.
        positives (`list[int]`):
            0-based indices of the relevant ones among them.
        data_source (`str`):
            The data set that the query comes from.
        prompt (`list[dict]`, *optional*):
            The row's own prompt.
        hits (`list[Item]`, *optional*):
            The coarse results, best first; `None` where the row has none.
        hit_positives (`list[int]`):
            0-based indices of the hits that are a relevant candidate, by path and text; empty where none was found.
    """

    query_id: str
    query: Item
    candidates: list[Item]
    positives: list[int]
    data_source: str
    prompt: Messages | None
    hits: list[Item] | None
    hit_positives: list[int]


def read_row(row: Mapping[str, Any], image_root: str | os.PathLike[str] | ImageRoot | None = None) -> ReleasedRow:
    """
    Reads a row.

    `extra_info` says what there is: `qid`, `query_text` and `query_image`, `candidate_texts` and `candidate_images`
    (`""` or `None` where absent, an empty list where all are), `ground_truth_position` (1-based, one or a list) and
    `num_candidates`. `images` lists the pictures, the query's first; bytes in there win over the paths. `hit` is a
    list of `{"candidate_images": path, "candidate_texts": text}`.

    Args:
        row (mapping):
            The row.
        image_root (`str`, `os.PathLike` or `ImageRoot`, *optional*):
            Where relative paths start from, and below which all pictures lie.

    Raises:
        `ValueError`: naming the field that cannot be used, or the picture that lies elsewhere.
    """
    root = image_root if isinstance(image_root, ImageRoot) else ImageRoot(image_root)
    info = _field(row, "extra_info", Mapping)
    query_id = info.get("qid")
    if not isinstance(query_id, (str, int)) or query_id == "":
        raise ValueError(f"extra_info.qid must be a string, got {query_id!r}")
    count = _field(info, "num_candidates", int, "extra_info.")
    texts = [info.get("query_text"), *_column(info, "candidate_texts", count)]
    paths = [info.get("query_image"), *_column(info, "candidate_images", count)]
    ids = [None, *_column(info, "candidate_ids", count)]
    images = _images(row.get("images"), paths, root)
    items = []
    for number, (text, image, item_id) in enumerate(zip(texts, images, ids, strict=True)):
        name = f"candidate {number}" if number else "query"
        items.append(Item.coerce({"text": text, "image": image, "id": item_id or None}, name=name))
    positives = _positives(info.get("ground_truth_position"), count)
    hits = _hits(row["hit"] if "hit" in row else info.get("hit"))
    relevant = {_identity(paths[index + 1], texts[index + 1]) for index in positives}
    return ReleasedRow(
        query_id=str(query_id),
        query=items[0],
        candidates=items[1:],
        positives=positives,
        data_source=row.get("data_source") or "",
        prompt=_prompt(row.get("prompt")),
        hits=None if hits is None else [_hit_item(hit, number, root) for number, hit in enumerate(hits)],
        hit_positives=[index for index, hit in enumerate(hits or ()) if _identity(*hit) in relevant],
    )


class ReleasedRows(Sequence[ReleasedRow]):
    """
    The rows of a data set, each read when it is asked for.

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
        # As Arrow, rows come with pictures as they are stored: decoding is the item's business, which names failures.
        self._dataset = dataset.with_format("arrow")
        self._image_root = image_root if isinstance(image_root, ImageRoot) else ImageRoot(image_root)
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> ReleasedRow: ...
    @overload
    def __getitem__(self, index: slice) -> ReleasedRows: ...
    def __getitem__(self, index: int | slice) -> ReleasedRow | ReleasedRows:
        if isinstance(index, slice):
            part = self._dataset.select(range(*index.indices(len(self))))
            return ReleasedRows(part, self._image_root, self._name)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._name} has {len(self)} rows, there is no row {index}")
        (row,) = self._dataset[index].to_pylist()
        try:
            return read_row(row, self._image_root)
        except ValueError as error:
            raise ValueError(f"{self._name}, row {index}: {error}") from error

    @property
    def query_ids(self) -> list[str]:
        """Every row's query id, read without the pictures."""
        infos = self._dataset.select_columns(["extra_info"])[:]["extra_info"]
        return [str(query_id) for query_id in infos.combine_chunks().field("qid").to_pylist()]

    @property
    def data_sources(self) -> list[str]:
        """Every row's data source."""
        if "data_source" not in self._dataset.column_names:
            return [""] * len(self)
        return [source or "" for source in self._dataset.select_columns(["data_source"])[:]["data_source"].to_pylist()]


class ImageRoot:
    """
    Finds the pictures that rows name by path: in a folder, or in zip archives that lie in it or are it.

    Released files name pictures relative to a folder that is elsewhere on every machine, or absolutely, as on the
    machine that wrote them: an absolute path is looked for by its longest tail under the root. Whoever wrote a row
    may not choose which files of this machine are read, so a picture that lies elsewhere is refused; with `"/"` as
    root, none does.

    Args:
        root (`str` or `os.PathLike`, *optional*):
            A folder or a zip archive; without one, paths stay as they are, which is for rows of one's own.

    Raises:
        `ValueError`: if `root` is a file but no zip archive.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None):
        self._folder = None if root is None else Path(root)
        self._archives: list[zipfile.ZipFile] = []
        self._opened_by: int | None = None
        if self._folder is not None and self._folder.is_file() and not zipfile.is_zipfile(self._folder):
            raise ValueError(f"image_root {self._folder} is neither a folder nor a zip archive")

    def find(self, path: Any) -> Any:
        """
        The picture that a row calls `path`: a path, or the bytes of an archive's member.

        Raises:
            `ValueError`: if `path` is no path.
            `ItemError`: if it names a file that does not lie below the root.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"the path of a picture must be a string, got {type(path).__name__}")
        path = os.fspath(path)
        if self._folder is None or path[:5].lower() == "data:":
            return path
        plain = os.path.normpath(os.path.join(self._folder, path))
        # Told by the path's words: a link that lies there was put there by whoever owns the folder.
        is_below = Path(os.path.abspath(plain)).is_relative_to(os.path.abspath(self._folder))
        if is_below and os.path.exists(plain):
            return plain
        if is_below or os.path.isabs(path):
            for tail in _tails(path):
                found = self._under_root(tail)
                if found is not None:
                    return found
        if not is_below and (os.path.exists(plain) or not os.path.isabs(path)):
            raise ItemError(
                f"the picture {path!r} lies outside of image_root {str(self._folder)!r}; give a folder that holds it, "
                "or '/' where the rows may name any file of this machine"
            )
        return plain  # whoever loads it says that it is missing

    def _under_root(self, tail: str) -> str | bytes | None:
        assert self._folder is not None
        if (self._folder / tail).is_file():
            return os.path.join(self._folder, tail)
        for archive in self._open_archives():
            names = [
                name for name in (tail, f"{Path(archive.filename or '').stem}/{tail}") if name in archive.NameToInfo
            ]
            if names:
                return _member(archive, names[0])
        return None

    def _open_archives(self) -> list[zipfile.ZipFile]:
        if self._opened_by != os.getpid():  # a forked worker would share the place at which the file is read
            assert self._folder is not None
            paths = sorted(self._folder.glob("*.zip")) if self._folder.is_dir() else [self._folder]
            self._archives = [zipfile.ZipFile(path) for path in paths if zipfile.is_zipfile(path)]
            self._opened_by = os.getpid()
        return self._archives

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_archives": [], "_opened_by": None}


class NoFiles(ImageRoot):
    """Where there is no folder that pictures could lie in, as of a data set on the hub: rows bring their bytes."""

    def find(self, path: Any) -> Any:
        path = super().find(path)
        if path[:5].lower() != "data:":
            raise ItemError(f"the picture {path!r} is a file: give image_root, the folder that such files lie below")
        return path


def _tails(path: str) -> list[str]:
    """What an absolute path may be called under another root, longest first; a relative one has its own name only."""
    parts = Path(os.path.normpath(path)).parts
    return [os.path.join(*parts[start:]) for start in (range(1, len(parts)) if os.path.isabs(path) else [0])]


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size, most = archive.getinfo(name).file_size, DEFAULT_LIMITS.max_bytes
    if size > most:  # a small archive may hold what fills the memory
        raise ItemError(f"{name} in {archive.filename} has {size:,} bytes, more than the {most:,} of a picture")
    return archive.read(name)


class PromptTemplate:
    """
    A row's own prompt, to be shown with other candidates: windows of the coarse results replay its very words.

    What lies between the candidates is found by the candidates themselves, which are known, so nothing that a text
    says can be taken for it.

    Args:
        prompt (`list[dict]`):
            The row's prompt.
        candidates (sequence of `Item`):
            The candidates that it shows, in order.

    Raises:
        `ValueError`: if these candidates are not found in it.

    Example:

    ```python
    >>> from vretrver_hf import Item
    >>> from vretrver_hf.data.vretrver import PromptTemplate

    >>> prompt = [{"role": "user", "content": "Query: cats Candidates:(1) <image>a(2) b Guidelines: rank."}]
    >>> template = PromptTemplate(prompt, [Item(text="a", image="1.png"), Item(text="b")])
    >>> template.show([Item(text="b"), Item(image="9.png")])[0]["content"]
    'Query: cats Candidates:(1) b(2) <image> Guidelines: rank.'

    ```
    """

    def __init__(self, prompt: Messages, candidates: Sequence[Item]):
        self._prompt = prompt
        pattern = r"(\s*)".join(rf"\({number}\)(\s*){_pattern(item)}" for number, item in enumerate(candidates, 1))
        for place, message in enumerate(prompt):
            found = list(re.finditer(pattern, message["content"])) if candidates else []
            if found:
                self._place, (self._start, self._stop) = place, found[-1].span()
                gaps = found[-1].groups()
                self._lead, self._gap = gaps[0], gaps[1] if len(gaps) > 1 else "\n"
                return
        raise ValueError(f"prompt does not show the row's {len(candidates)} candidates as (1), (2), …")

    def show(self, candidates: Sequence[Item]) -> Messages:
        """The prompt with these candidates instead, numbered from 1."""
        shown = self._gap.join(
            f"({number}){self._lead}{IMAGE_MARK if item.image is not None else ''}{item.text or ''}"
            for number, item in enumerate(candidates, start=1)
        )
        messages = [dict(message) for message in self._prompt]
        content = messages[self._place]["content"]
        messages[self._place]["content"] = content[: self._start] + shown + content[self._stop :]
        return messages


def open_dataset(source: str | os.PathLike[str], split: str) -> tuple[datasets.Dataset, ImageRoot]:
    """
    Opens a data set, and says where its pictures may lie: in the folder of a local one.

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

    kind, files, root = _locate(source)
    if kind is None:
        return load_dataset(str(source), split=split), root
    return load_dataset(kind, **files, split=split if "data_dir" in files else "train"), root


def stream_rows(
    source: str | os.PathLike[str], split: str = "test", image_root: str | os.PathLike[str] | ImageRoot | None = None
) -> Iterator[ReleasedRow]:
    """
    Reads a released set row by row, without a copy on the disk and with one row in memory at a time.

    Args:
        source (`str` or `os.PathLike`), split (`str`, *optional*, defaults to `"test"`):
            As [`open_dataset`] takes them.
        image_root (`str`, `os.PathLike` or `ImageRoot`, *optional*):
            Where relative picture paths start from; the folder of a local source by default.

    Raises:
        `ValueError`: naming row and field where a row cannot be used.
    """
    from datasets import load_dataset

    kind, files, root = _locate(source)
    options = {"split": split if kind is None or "data_dir" in files else "train", "streaming": True}
    rows = load_dataset(str(source), **options) if kind is None else load_dataset(kind, **files, **options)
    if image_root is not None:
        root = image_root if isinstance(image_root, ImageRoot) else ImageRoot(image_root)
    for number, table in enumerate(rows.with_format("arrow").iter(batch_size=1)):
        (row,) = table.to_pylist()
        try:
            yield read_row(row, root)
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error


def _locate(source: str | os.PathLike[str]) -> tuple[str | None, dict[str, str], ImageRoot]:
    """The kind of file, what `load_dataset` is to read, and where pictures lie; no kind for the hub."""
    path = Path(source)
    if path.is_dir():
        return "parquet", {"data_dir": str(path)}, ImageRoot(path)
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(f"{path} is neither a .parquet, .json or .jsonl file nor a folder of parquet files")
        return kind, {"data_files": str(path)}, ImageRoot(path.parent)
    if kind is not None or path.is_absolute():
        raise FileNotFoundError(f"{path} does not exist")
    return None, {}, NoFiles()


def _pattern(item: Item) -> str:
    mark = re.escape(IMAGE_MARK) if item.image is not None else ""
    return mark + (r"\s*" + re.escape(item.text.strip()) if item.text else "")


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


def _images(listed: Any, paths: list[Any], root: ImageRoot) -> list[Any]:
    """The picture of the query and of each candidate, `None` where there is none."""
    present = [number for number, path in enumerate(paths) if path]
    sources = [None] * len(paths)
    embedded: list[Any] = [None] * len(present)
    if listed is not None and len(listed) > 0:
        if len(listed) != len(present):
            raise ValueError(
                f"images has {len(listed)} entries but extra_info names {len(present)} pictures "
                "(query_image and candidate_images)"
            )
        embedded = [_embedded(entry) for entry in listed]
    for number, stored in zip(present, embedded, strict=True):
        sources[number] = stored or root.find(paths[number])
    return sources


def _embedded(entry: Any) -> Any:
    """What an entry of `images` holds besides a path."""
    if isinstance(entry, Mapping) and "image" in entry:
        entry = entry["image"]
    if isinstance(entry, Mapping):
        entry = entry.get("bytes")
    return None if isinstance(entry, (str, os.PathLike)) else entry


def _positives(value: Any, count: int) -> list[int]:
    positions = value if isinstance(value, (list, tuple)) else [value]
    if not positions or not all(type(position) is int and 1 <= position <= count for position in positions):
        raise ValueError(
            f"extra_info.ground_truth_position must be a candidate's number, 1..{count}, or a list of them, "
            f"got {value!r:.80}"
        )
    return [position - 1 for position in positions]


def _prompt(value: Any) -> Messages | None:
    if value is None or len(value) == 0:
        return None
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"prompt must be a list of messages with role and content as text, got {message!r:.80}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _hits(value: Any) -> list[tuple[Any, Any]] | None:
    """Path and text of each coarse result."""
    if value is None or len(value) == 0:
        return None
    for number, hit in enumerate(value):
        if not isinstance(hit, Mapping):
            raise ValueError(f"hit[{number}] must be a mapping, got {hit!r:.80}")
    return [(hit.get("candidate_images"), hit.get("candidate_texts")) for hit in value]


def _hit_item(hit: tuple[Any, Any], number: int, root: ImageRoot) -> Item:
    path, text = hit
    return Item.coerce({"text": text, "image": root.find(path) if path else None}, name=f"hit[{number}]")


def _identity(path: Any, text: Any) -> tuple[str, str]:
    """What makes a candidate the same as another: the released rows give them no ids."""
    return str(path or "").strip(), str(text or "").strip()
