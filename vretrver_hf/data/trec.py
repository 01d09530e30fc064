"""Runs and judgements as text files in TREC's columns, and in M-BEIR's, which have one more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
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


def read_run(path: str | os.PathLike[str]) -> dict[str, list[Hit]]:
    """
    Reads a run of six columns, or of M-BEIR's seven, best first as trec_eval sorts it.

    Trec_eval looks at scores alone: of equal ones the greater id comes first, whatever the rank column says.

    Raises:
        `ValueError`: naming file and line where a line is not one of a run, or a query gets an id twice.
    """
    run: dict[str, list[Hit]] = {}
    seen: set[tuple[str, str]] = set()
    for number, columns in _columns(path, (6, 7), "qid Q0 did rank score run"):
        query_id, _, item, _, score = columns[:5]
        if (query_id, item) in seen:
            raise ValueError(f"{path}, line {number}: query {query_id} gets {item} a second time")
        seen.add((query_id, item))
        run.setdefault(query_id, []).append(Hit(item, _number(path, number, "score", score)))
    return {
        query_id: sorted(hits, key=lambda hit: (hit.score, hit.id), reverse=True) for query_id, hits in run.items()
    }


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
    for number, columns in _columns(path, (4, 5), "qid 0 did rel"):
        qrels.setdefault(columns[0], {})[columns[2]] = int(_number(path, number, "rel", columns[3]))
    return qrels


def _columns(path: str | os.PathLike[str], counts: tuple[int, ...], names: str) -> Iterator[tuple[int, list[str]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
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
