"""M-BEIR in the files it is released in: queries, candidate pools, judgements, instructions."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..items import Item
from .trec import read_qrels
from .vretrver import ImageRoot


if TYPE_CHECKING:
    import numpy as np

MODALITIES = ("text", "image", "image,text")
CANDIDATES_OF_TASK = {0: "image", 1: "text", 2: "image,text", 3: "text", 4: "image", 6: "text", 7: "image"}
CANDIDATES_OF_TASK[8] = "image,text"
"""What the candidates of a task are, by its number. There is no task 5."""

_NUMBER_BITS = 40


@dataclasses.dataclass(frozen=True)
class Instructions:
    """
    The instructions of M-BEIR: several wordings for each data set and kind of query and candidates.

    UniIR draws one at random for each query, at test time too. Here it is the first, or a draw that depends on the
    seed and the query id alone; a run records which ([`Instructions.name`]).

    Args:
        prompts (mapping):
            (query modality, candidate modality, data set number) to wordings.
        seed (`int`, *optional*):
            Draws a wording for each query; `None` takes the first.
    """

    prompts: Mapping[tuple[str, str, str], Sequence[str]]
    seed: int | None = None

    @property
    def name(self) -> str:
        """`"first"` or `"seed 0"`, for the record."""
        return "first" if self.seed is None else f"seed {self.seed}"

    def choose(self, query_id: str, query_modality: str, candidate_modality: str) -> str:
        """
        The instruction of a query.

        Raises:
            `ValueError`: if there is none for such a query.
        """
        key = (query_modality, candidate_modality, query_id.partition(":")[0])
        wordings = self.prompts.get(key)
        if not wordings:
            raise ValueError(
                f"query {query_id}: there are no instructions for {key[0]} → {key[1]} of data set {key[2]}"
            )
        return wordings[0] if self.seed is None else random.Random(f"{self.seed}/{query_id}").choice(wordings)


@dataclasses.dataclass(frozen=True)
class MBEIRQuery:
    """
    A query of M-BEIR.

    Args:
        query_id (`str`):
            `"data set:number"`.
        item (`Item`):
            The query, its text without the instruction.
        modality (`str`):
            `"text"`, `"image"` or `"image,text"`.
        relevant (`dict[str, int]`):
            Ids of the pool with their grades, from the judgements.
        instruction (`str`, *optional*):
            What is asked for, in words.
    """

    query_id: str
    item: Item
    modality: str
    relevant: dict[str, int]
    instruction: str | None = None

    @property
    def instructed(self) -> Item:
        """The query as a model reads it: the instruction, then its own text."""
        if self.instruction is None:
            return self.item
        return dataclasses.replace(self.item, text=f"{self.instruction} {self.item.text or ''}".strip())


class MBEIR:
    """
    A copy of M-BEIR on the disk.

    Args:
        folder (`str` or `os.PathLike`):
            The folder with `query`, `cand_pool`, `qrels` and `instructions`; a copy of the hub's `TIGER-Lab/M-BEIR`.
        image_root (`str` or `os.PathLike`, *optional*):
            Where picture paths start from: a folder or a zip archive; `folder` by default.

    Raises:
        `ValueError`: if `folder` holds no M-BEIR.

    Example:

    ```python
    mbeir = MBEIR("data/M-BEIR")
    pool = mbeir.pool("cirr_task7")
    for query in mbeir.queries("cirr_task7", mbeir.instructions()):
        print(query.instructed, [pool[did] for did in query.relevant])
    ```
    """

    def __init__(self, folder: str | os.PathLike[str], image_root: str | os.PathLike[str] | ImageRoot | None = None):
        self.folder = Path(folder)
        if not (self.folder / "query").is_dir():
            raise ValueError(f"{folder} holds no M-BEIR: there is no folder {self.folder / 'query'}")
        root = self.folder if image_root is None else image_root
        self.images = root if isinstance(root, ImageRoot) else ImageRoot(root)

    def tasks(self, split: str = "test") -> list[str]:
        """The tasks that are there, such as `"cirr_task7"`."""
        names = (path.name for path in (self.folder / "query" / split).glob(f"mbeir_*_{split}.jsonl"))
        return sorted(name.removeprefix("mbeir_").removesuffix(f"_{split}.jsonl") for name in names)

    def instructions(self, seed: int | None = None) -> Instructions:
        """
        The instructions.

        Args:
            seed (`int`, *optional*):
                Draws a wording for each query; the first by default.

        Raises:
            `ValueError`: naming the line that cannot be used.
        """
        path = self.instructions_path
        prompts = {}
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            next(rows, None)
            for number, row in enumerate(rows, start=2):
                if not row:
                    continue
                wordings = [cell.strip() for cell in row[4:] if cell.strip()]
                if not wordings:
                    raise ValueError(f"{path}, line {number}: prompts are missing in {row!r:.80}")
                prompts[row[0].strip(), row[1].strip(), row[3].strip()] = wordings
        return Instructions(prompts, seed)

    def qrels(self, task: str, split: str = "test") -> dict[str, dict[str, int]]:
        """The judgements of a task: query id to id to grade."""
        return read_qrels(self.qrels_path(task, split))

    def queries(self, task: str, instructions: Instructions | None = None, split: str = "test") -> MBEIRQueries:
        """
        The queries of a task, in the order of the file.

        Args:
            task (`str`):
                Such as `"cirr_task7"`.
            instructions (`Instructions`, *optional*):
                Puts one before each query; none by default.
            split (`str`, *optional*, defaults to `"test"`):
                `"train"`, `"val"` or `"test"`.

        Raises:
            `ValueError`: naming file, line and field where a query cannot be used.
        """
        return MBEIRQueries(self.query_path(task, split), task, self.qrels(task, split), self.images, instructions)

    def pool(self, task: str | None = None) -> Pool:
        """The local pool of a task, or the global pool of all of them where `task` is `None`."""
        return Pool(self.pool_path(task), self.images)

    @property
    def instructions_path(self) -> Path:
        """The file of the instructions of all tasks; a copy that is used without them may have none."""
        return self.folder / "instructions" / "query_instructions.tsv"

    def query_path(self, task: str, split: str = "test") -> Path:
        """The file of a task's queries."""
        return self._file(f"query/{split}/mbeir_{task}_{split}.jsonl", task, split)

    def qrels_path(self, task: str, split: str = "test") -> Path:
        """The file of a task's judgements."""
        return self._file(f"qrels/{split}/mbeir_{task}_{split}_qrels.txt", task, split)

    def pool_path(self, task: str | None = None) -> Path:
        """The file of a pool. MSCOCO has a pool for the test split alone."""
        if task is None:
            return self._file("cand_pool/global/mbeir_union_test_cand_pool.jsonl", "the global pool", "test")
        local = self.folder / "cand_pool" / "local"
        for name in (f"mbeir_{task}_cand_pool.jsonl", f"mbeir_{task}_test_cand_pool.jsonl"):
            if (local / name).is_file():
                return local / name
        raise ValueError(f"task {task} has no candidate pool in {local}")

    def _file(self, name: str, task: str, split: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{task}: {path} does not exist; there are {', '.join(self.tasks(split)) or 'no tasks'}")
        return path


class MBEIRQueries(Sequence[MBEIRQuery]):
    """
    The queries of a task; their pictures are looked for when a query is asked for.

    Args:
        path (`Path`):
            The JSONL file.
        task (`str`):
            Such as `"cirr_task7"`.
        qrels (mapping):
            Query id to id to grade.
        images (`ImageRoot`):
            Finds the pictures.
        instructions (`Instructions`, *optional*):
            Puts one before each query.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        qrels: Mapping[str, dict[str, int]],
        images: ImageRoot,
        instructions: Instructions | None = None,
    ):
        self._path, self._qrels, self._images, self._instructions = path, qrels, images, instructions
        self._kind = _candidate_modality(task)
        self._rows = [(number, _query_fields(path, number, row)) for number, row in _read_jsonl(path)]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> MBEIRQuery: ...
    @overload
    def __getitem__(self, index: slice) -> list[MBEIRQuery]: ...
    def __getitem__(self, index: int | slice) -> MBEIRQuery | list[MBEIRQuery]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        number, (query_id, text, path, modality) = self._rows[index]
        try:
            item = _item(text, path, None, self._images, "query_txt and query_img_path")
            wording = self._instructions and self._instructions.choose(query_id, modality, self._kind)
        except ValueError as error:
            raise ValueError(f"{self._path}, line {number}: {error}") from error
        relevant = {did: grade for did, grade in self._qrels.get(query_id, {}).items() if grade > 0}
        return MBEIRQuery(query_id, item, modality, relevant, wording)

    @property
    def query_ids(self) -> list[str]:
        """Every query's id."""
        return [fields[0] for _, fields in self._rows]


class Pool:
    """
    The candidates of a pool, each read when it is asked for.

    Where each line begins is kept as numbers, so that the global pool's 5.6 million candidates take 90 MB.

    Args:
        path (`str` or `os.PathLike`):
            The pool's JSONL file.
        images (`ImageRoot`, *optional*):
            Finds its pictures.

    Raises:
        `ValueError`: naming the line that is no candidate, or whose id another one has.
    """

    def __init__(self, path: str | os.PathLike[str], images: ImageRoot | None = None):
        import numpy as np

        self.path = Path(path)
        self._images = images or ImageRoot()
        keys, starts = _index(self.path)
        order = np.argsort(keys, kind="stable")
        self._keys, self._starts, self._sorted_starts = keys[order], starts, starts[order]
        same = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(same):
            did = self._read(int(self._sorted_starts[same[0] + 1]))["did"]
            raise ValueError(f"{self.path}: two candidates have the did {did!r}")

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, did: object) -> bool:
        return isinstance(did, str) and self._place(did) is not None

    def __getitem__(self, did: str) -> Item:
        place = self._place(did)
        if place is None:
            raise KeyError(f"{self.path} has no candidate {did!r}")
        return self._item(self._read(int(self._sorted_starts[place])))

    def __iter__(self) -> Iterator[Item]:
        """All candidates in the order of the file, one in memory at a time."""
        return self.slice(0, len(self))

    def slice(self, start: int, stop: int) -> Iterator[Item]:
        """The candidates from place `start` to `stop` of the file."""
        for offset in self._starts[start:stop]:
            yield self._item(self._read(int(offset)))

    def ids(self) -> Iterator[str]:
        """All ids in the order of the file."""
        for _, row in _read_jsonl(self.path):
            yield row["did"]

    def _place(self, did: str) -> int | None:
        import numpy as np

        try:
            key = _key(did)
        except ValueError:
            return None
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None

    def _read(self, offset: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def _item(self, row: Mapping[str, Any]) -> Item:
        try:
            return _item(row.get("txt"), row.get("img_path"), row["did"], self._images, "txt and img_path")
        except ValueError as error:
            raise ValueError(f"{self.path}, candidate {row['did']}: {error}") from error


def _query_fields(path: Path, number: int, row: Mapping[str, Any]) -> tuple[str, Any, Any, str]:
    query_id, modality = row.get("qid"), row.get("query_modality")
    if not isinstance(query_id, str) or not query_id:
        raise ValueError(f"{path}, line {number}: qid must be a string, got {query_id!r}")
    if modality not in MODALITIES:
        raise ValueError(
            f"{path}, line {number}: query_modality must be one of {', '.join(MODALITIES)}, got {modality!r}"
        )
    return query_id, row.get("query_txt"), row.get("query_img_path"), modality


def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A number for each candidate's id, and where its line begins."""
    from array import array

    import numpy as np

    keys, starts, offset = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    keys.append(_key(json.loads(line)["did"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: did must be 'data set:number' ({error!r})") from error
                starts.append(offset)
            offset += len(line)
    return np.frombuffer(keys, np.int64) if keys else np.zeros(0, np.int64), np.array(starts, np.int64)


def _key(did: str) -> int:
    source, _, number = did.partition(":")
    if not (source.isascii() and source.isdigit() and number.isascii() and number.isdigit()):
        raise ValueError(f"got {did!r}")
    return (int(source) << _NUMBER_BITS) + int(number)


def _item(text: Any, path: Any, item_id: str | None, images: ImageRoot, fields: str) -> Item:
    if not text and not path:
        raise ValueError(f"{fields} are both empty")
    return Item.coerce(
        {"text": text or None, "image": images.find(path) if path else None, "id": item_id}, name=fields
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
            yield number, row


def _candidate_modality(task: str) -> str:
    number = task.rpartition("_task")[2]
    if not number.isdigit() or int(number) not in CANDIDATES_OF_TASK:
        raise ValueError(f"task {task!r} does not end in the number of an M-BEIR task, as in 'cirr_task7'")
    return CANDIDATES_OF_TASK[int(number)]
