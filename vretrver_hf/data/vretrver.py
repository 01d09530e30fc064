"""The released training and evaluation sets as they are: rows, image roots, coarse results, prompts.

A row says in `extra_info` what there is; `images` lists the pictures; evaluation files also bring `hit`, the coarse
results in order, and `prompt`, which exact evaluation replays.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..images import DEFAULT_LIMITS, ItemError
from ..items import Item
from ..journal import file_digest
from ..protocol import IMAGE_MARK


if TYPE_CHECKING:
    import datasets

Messages = list[dict[str, str]]
"""`[{"role": …, "content": text with <image> marks}]`."""

_Entry = tuple[str, Any]
"""What a value is called in error messages, and the value."""

_SPACE = re.compile(r"\s*")


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

    The released preparation script leaves out what a candidate does not have, so that `candidate_texts` and
    `candidate_images` may be shorter than `num_candidates`. Whose the entries are is then read from the prompt, which
    shows every candidate as `(n) <image>text`; where it does not say, the row is refused.

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
    prompt = _prompt(row.get("prompt"))
    texts, paths = _texts_and_paths(info, count, prompt)
    ids = _column(info, "candidate_ids", count)
    images = _images(row.get("images"), [("extra_info.query_image", info.get("query_image")), *paths], root)
    query_text = "extra_info.query_text", info.get("query_text")
    query = _item("extra_info.query_text and query_image: query", query_text, images[0])
    candidates = []
    for place, (text, image, item_id) in enumerate(zip(texts, images[1:], ids, strict=True)):
        name = f"{text[0]} and {paths[place][0]}: candidate {place + 1}"
        candidates.append(_item(name, text, image, (f"extra_info.candidate_ids[{place}]", item_id)))
    positives = _positives(info.get("ground_truth_position"), count)
    hits = _hits("hit", row["hit"]) if "hit" in row else _hits("extra_info.hit", info.get("hit"))
    relevant = {_identity(paths[index], texts[index]) for index in positives}
    return ReleasedRow(
        query_id=str(query_id),
        query=query,
        candidates=candidates,
        positives=positives,
        data_source=row.get("data_source") or "",
        prompt=prompt,
        hits=None if hits is None else [_hit_item(*hit, root) for hit in hits],
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

    @property
    def have_hits(self) -> list[bool]:
        """Whether each row has coarse results, told without reading them."""
        import pyarrow.compute

        name = "hit" if "hit" in self._dataset.column_names else "extra_info"
        column = self._dataset.select_columns([name])[:][name]
        if name == "extra_info":
            if column.type.get_field_index("hit") < 0:
                return [False] * len(self)
            column = pyarrow.compute.struct_field(column, "hit")
        if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_large_list(column.type):
            return column.is_valid().to_pylist()  # whoever reads such a row says what is wrong with it
        return [bool(length) for length in pyarrow.compute.list_value_length(column).to_pylist()]


class ImageRoot:
    """
    Finds the pictures that rows name by path: in a folder, or in zip archives that lie anywhere below it or are it.

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
        self._archives: list[tuple[str, zipfile.ZipFile]] = []
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
        for place, archive in self._open_archives():
            # A path may start where the archive lies, and the archive may have been made of a folder of its name.
            starts = [tail, tail[len(place) :]] if place and tail.startswith(place) else [tail]
            names = [name for start in starts for name in (start, f"{Path(archive.filename or '').stem}/{start}")]
            found = next((name for name in names if name in archive.NameToInfo), None)
            if found is not None:
                return _member(archive, found)
        return None

    def _open_archives(self) -> list[tuple[str, zipfile.ZipFile]]:
        """The archives, each with the folder below the root that it lies in."""
        if self._opened_by != os.getpid():  # a forked worker would share the place at which the file is read
            assert self._folder is not None
            folder = self._folder if self._folder.is_dir() else self._folder.parent
            # The walk through all folders is made once, and only where a picture does not lie there as a file.
            paths = sorted(folder.rglob("*.zip")) if folder is self._folder else [self._folder]
            places = [path.parent.relative_to(folder).as_posix() for path in paths]
            self._archives = [
                ("" if place == "." else f"{place}/", zipfile.ZipFile(path))
                for place, path in zip(places, paths, strict=True)
                if zipfile.is_zipfile(path)
            ]
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


def dataset_digest(source: str | os.PathLike[str], dataset: datasets.Dataset) -> str:
    """
    Tells what [`open_dataset`] opened from what has the same name at another time.

    Args:
        source (`str` or `os.PathLike`):
            A file, a folder of parquet files, or a data set on the hub.
        dataset (`datasets.Dataset`):
            What was opened. The library's fingerprint of it stands for a data set on the hub, and holds its revision.
    """
    path = Path(source)
    if path.is_dir():
        return file_digest(*sorted(path.rglob("*.parquet")))
    return file_digest(path) if path.is_file() else dataset._fingerprint


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


def _listed(info: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """The values as they are listed, and `None` for each candidate where there are none."""
    values = info.get(name)
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        if values is not None:
            raise ValueError(f"extra_info.{name} must be a list, got {values!r:.80}")
        values = []
    return list(values) if len(values) else [None] * count


def _column(info: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """One value a candidate. Shorter lists are refused: nobody could say whose values are missing."""
    values = _listed(info, name, count)
    if len(values) != count:
        raise ValueError(f"extra_info.{name} has {len(values)} entries for {count} candidates; write '' where absent")
    return values


def _texts_and_paths(
    info: Mapping[str, Any], count: int, prompt: Messages | None
) -> tuple[list[_Entry], list[_Entry]]:
    """Text and path of each candidate."""
    texts, paths = (_listed(info, name, count) for name in ("candidate_texts", "candidate_images"))
    places: list[_Place] | None = [(place, place) for place in range(count)]
    if len(texts) < count or len(paths) < count:
        places = _places(prompt or [], paths, texts, count)
    if places is None or max(len(texts), len(paths)) > count:
        for name in ("candidate_texts", "candidate_images"):
            _column(info, name, count)  # says which is the short one
    assert places is not None

    def entries(name: str, values: list[Any], indices: Sequence[int | None]) -> list[_Entry]:
        field = f"extra_info.{name}"
        return [(field, None) if index is None else (f"{field}[{index}]", values[index]) for index in indices]

    return (
        entries("candidate_texts", texts, [text for _, text in places]),
        entries("candidate_images", paths, [path for path, _ in places]),
    )


_Place = tuple[int | None, int | None]
"""Indices of a candidate's picture and text in lists that may leave out what candidates do not have."""


def _places(prompt: Messages, paths: list[Any], texts: list[Any], count: int) -> list[_Place] | None:
    """Whose each entry is, as the prompt shows the candidates; `None` where it does not say, or is ambiguous."""
    for message in prompt:
        starts = [match.start() for match in re.finditer(r"\(1\)", message["content"])]
        for start in reversed(starts):  # the query comes before the candidates and may hold such a number too
            ways = _ways(message["content"], start, paths, texts, count)
            if ways:
                return list(ways[0]) if len(ways) == 1 else None
    return None


def _ways(content: str, start: int, paths: list[Any], texts: list[Any], count: int) -> list[tuple[_Place, ...]]:
    """
    The ways, two at most, in which `(1) <image>text(2) …` from `start` on uses up all pictures and texts in order.

    The texts are known, so nothing that one says can be taken for a number or a picture. What is kept after each
    candidate is where it may end and how much is used up, so that no text makes this slow.
    """
    states: dict[tuple[int, int, int], list[tuple[_Place, ...]]] = {(start, 0, 0): [()]}
    for number in range(1, count + 1):
        reached: dict[tuple[int, int, int], list[tuple[_Place, ...]]] = {}
        for (at, used_paths, used_texts), ways in states.items():
            choices = _choices(paths, used_paths, number - 1, count), _choices(texts, used_texts, number - 1, count)
            for path, text in itertools.product(*choices):
                mark = IMAGE_MARK if path is not None and paths[path] else ""
                words = str(texts[text]).strip() if text is not None and texts[text] else ""
                end = _end(content, at, [f"({number})", mark, words]) if mark or words else None
                if end is not None:
                    key = (end, used_paths if path is None else path + 1, used_texts if text is None else text + 1)
                    known = reached.setdefault(key, [])
                    known += [(*way, (path, text)) for way in ways[: 2 - len(known)]]
        states = reached
    used_up = [
        ways for (at, *used), ways in states.items() if used == [len(paths), len(texts)] and _is_end(content, at)
    ]
    return list(itertools.chain(*used_up))[:2]


def _choices(values: list[Any], used: int, place: int, count: int) -> list[int | None]:
    """Indices that the candidate at `place` may have: its own in a whole list, the next or none in a short one."""
    return [place] if len(values) == count else [*range(used, min(used + 1, len(values))), None]


def _end(content: str, at: int, parts: list[str]) -> int | None:
    """Where these parts end, one after the other from `at` on; `None` where something else stands there."""
    for part in parts:
        if not content.startswith(part, at):
            return None
        at = _SPACE.match(content, at + len(part)).end()  # type: ignore[union-attr]  # it matches anything
    return at


def _is_end(content: str, at: int) -> bool:
    """Whether the candidates end here, rather than with a text that is in no list."""
    gap = content[len(content[:at].rstrip()) : at]
    return at == len(content) or "\n" in gap or content.startswith("Guidelines", at)


def _item(name: str, text: _Entry, image: _Entry, item_id: _Entry = ("", None)) -> Item:
    """The item, with each mistake under the field that it is in, or under `name` where there is nothing."""
    for field, value in (text, item_id):
        if value is not None and not isinstance(value, str):
            raise ItemError(f"{field} must be a string, got {value!r:.80}")
    values = {"text": text[1], "image": image[1], "id": item_id[1] or None}
    return Item.coerce(values, name=name if image[1] is None else image[0])


def _found(root: ImageRoot, path: _Entry) -> _Entry:
    """The picture in place of its path."""
    field, value = path
    try:
        return field, root.find(value) if value else None
    except ValueError as error:
        raise ItemError(f"{field}: {error}") from error


def _images(listed: Any, paths: list[_Entry], root: ImageRoot) -> list[_Entry]:
    """The picture of the query and of each candidate, `None` where there is none."""
    present = [number for number, (_, path) in enumerate(paths) if path]
    embedded: dict[int, _Entry] = {}
    if listed is not None and len(listed) > 0:
        if len(listed) != len(present):
            raise ValueError(
                f"images has {len(listed)} entries but extra_info names {len(present)} pictures "
                "(query_image and candidate_images)"
            )
        entries = [(f"images[{place}]", _embedded(entry)) for place, entry in enumerate(listed)]
        embedded = {number: entry for number, entry in zip(present, entries, strict=True) if entry[1]}
    return [embedded.get(number) or _found(root, path) for number, path in enumerate(paths)]


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


def _hits(field: str, value: Any) -> list[tuple[_Entry, _Entry]] | None:
    """Path and text of each coarse result."""
    if value is None or len(value) == 0:
        return None
    for number, hit in enumerate(value):
        if not isinstance(hit, Mapping):
            raise ValueError(f"{field}[{number}] must be a mapping, got {hit!r:.80}")
    path, text = "candidate_images", "candidate_texts"
    return [
        ((f"{field}[{number}].{path}", hit.get(path)), (f"{field}[{number}].{text}", hit.get(text)))
        for number, hit in enumerate(value)
    ]


def _hit_item(path: _Entry, text: _Entry, root: ImageRoot) -> Item:
    return _item(path[0].rpartition(".")[0], text, _found(root, path))


def _identity(path: _Entry, text: _Entry) -> tuple[str, str]:
    """What makes a candidate the same as another: the released rows give them no ids."""
    return str(path[1] or "").strip(), str(text[1] or "").strip()
