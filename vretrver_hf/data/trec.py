"""Runs and judgements as text files in TREC's columns, and in M-BEIR's, which have one more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Hit(NamedTuple):
    """An id that a query got, with its score."""

    id: str
    score: float


def write_run(
    path: str | os.PathLike[str],
    rankings: Iterable[tuple[str, Sequence[str | Hit]]],
    name: str = "vretrver",
    task_id: int | None = None,
) -> None:
    """
    Writes a run: `qid Q0 did rank score name`, and M-BEIR's task number behind it.

    Args:
        path (`str` or `os.PathLike`):
            The file. It appears when everything is written.
        rankings (iterable of `tuple`):
            Query ids with their ids, best first, taken one at a time. An id without a score gets n, n - 1, …, since
            trec_eval sorts by score.
        name (`str`, *optional*, defaults to `"vretrver"`):
            What the run is called.
        task_id (`int`, *optional*):
            M-BEIR's seventh column.

    Raises:
        `ValueError`: if an id holds white space, which would break the columns.
    """
    partial = Path(f"{os.fspath(path)}.part")
    end = "" if task_id is None else f" {task_id}"
    with open(partial, "w", encoding="utf-8") as file:
        for query_id, ranked in rankings:
            _check_ids(query_id, ranked)
            for rank, entry in enumerate(ranked, start=1):
                hit = entry if isinstance(entry, Hit) else Hit(entry, len(ranked) - rank + 1)
                file.write(f"{query_id} Q0 {hit.id} {rank} {hit.score!r} {name}{end}\n")
    partial.replace(path)


class RunFile(Mapping[str, "list[Hit]"]):
    """
    A run of six columns, or of M-BEIR's seven, read query by query: what is kept is where a query's lines stand.

    Hits come best first as trec_eval sorts them. It looks at scores alone: of equal ones the greater id comes first,
    whatever the rank column says.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Raises:
        `ValueError`: naming file and line where a line is not one of a run, or a query gets an id twice.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = path
        self._blocks: dict[str, list[tuple[int, int, int]]] = {}
        offset, last = 0, None
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    query_id = line.split(None, 1)[0].decode("utf-8")
                    if query_id != last:
                        self._blocks.setdefault(query_id, []).append((number, offset, offset))
                    first, start, _ = self._blocks[query_id][-1]
                    self._blocks[query_id][-1] = first, start, offset + len(line)
                    last = query_id
                offset += len(line)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __getitem__(self, query_id: str) -> list[Hit]:
        hits: dict[str, Hit] = {}
        with open(self.path, "rb") as file:
            for first, start, stop in self._blocks[query_id]:
                file.seek(start)
                lines = file.read(stop - start).decode("utf-8").split("\n")
                for number, columns in _columns(self.path, lines, (6, 7), "qid Q0 did rank score run", first):
                    item = columns[2]
                    if item in hits:
                        raise ValueError(f"{self.path}, line {number}: query {query_id} gets {item} a second time")
                    hits[item] = Hit(item, _number(self.path, number, "score", columns[4]))
        return sorted(hits.values(), key=lambda hit: (hit.score, hit.id), reverse=True)


def read_run(path: str | os.PathLike[str]) -> dict[str, list[Hit]]:
    """Reads a whole run into memory; see [`RunFile`]."""
    return dict(RunFile(path))


def write_qrels(path: str | os.PathLike[str], qrels: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Writes judgements, `qid 0 did 1`, one a line."""
    partial = Path(f"{os.fspath(path)}.part")
    with open(partial, "w", encoding="utf-8") as file:
        for query_id, relevant in qrels:
            ids = sorted(relevant)
            _check_ids(query_id, ids)
            file.writelines(f"{query_id} 0 {item} 1\n" for item in ids)
    partial.replace(path)


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """
    Reads judgements of four columns, or of M-BEIR's five: query id to id to grade.

    Raises:
        `ValueError`: naming file and line where a line is not one of judgements.
    """
    qrels: dict[str, dict[str, int]] = {}
    with open(path, encoding="utf-8") as file:
        for number, columns in _columns(path, file, (4, 5), "qid 0 did rel"):
            qrels.setdefault(columns[0], {})[columns[2]] = int(_number(path, number, "rel", columns[3]))
    return qrels


def _columns(
    path: str | os.PathLike[str], lines: Iterable[str], counts: tuple[int, ...], names: str, first: int = 1
) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, start=first):
        columns = line.split()
        if not columns:
            continue
        if len(columns) not in counts:
            raise ValueError(f"{path}, line {number}: {len(columns)} columns, but {names} are {counts[0]}")
        yield number, columns


def _number(path: str | os.PathLike[str], line: int, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}, line {line}: {name} must be a number, got {text!r}") from None


def _check_ids(query_id: str, ranked: Iterable[str | Hit]) -> None:
    for item in (query_id, *(entry.id if isinstance(entry, Hit) else entry for entry in ranked)):
        if not item or len(item.split()) != 1 or item != item.strip():
            raise ValueError(
                f"query {query_id!r}: the id {item!r} holds white space or is empty, which breaks columns"
            )
