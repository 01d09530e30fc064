"""What is evaluated: queries with their coarse results and what is relevant, whatever files they come from."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..data.mbeir import MBEIR, Instructions
from ..data.trec import Hit, RunFile
from ..data.vretrver import (
    ImageRoot,
    Messages,
    PromptTemplate,
    ReleasedRow,
    ReleasedRows,
    dataset_digest,
    open_dataset,
)
from ..items import Item
from ..journal import file_digest
from ..protocol import IMAGE_MARK
from .benchmarks import find_benchmark


@dataclasses.dataclass(frozen=True)
class EvaluationQuery:
    """
    A query, its coarse results and its judgements.

    Args:
        query_id (`str`):
            Identifies the query.
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The coarse results, best first, each with an id.
        relevant (`dict[str, int]`):
            Ids of what is relevant with their grades; they need not be among the candidates.
        prompt (`Callable`, *optional*):
            Makes the data set's own prompt for the candidates of these 0-based indices.
    """

    query_id: str
    query: Item
    candidates: list[Item]
    relevant: dict[str, int]
    prompt: Callable[[Sequence[int]], Messages] | None = None


class EvaluationSet(Sequence[EvaluationQuery]):
    """
    The queries of a job, each read when its turn comes.

    Attributes:
        keys (`list[str]`): All query ids.
        groups (`list[str]`): The data set of each query: a row of the tables.
        has_prompts (`bool`): Whether the data bring prompts of their own.
        facts (`dict`): What the results depend on and the files' names do not say.
    """

    keys: list[str]
    groups: list[str]
    has_prompts: bool = False
    facts: Mapping[str, object] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def __getitem__(self, index: int) -> EvaluationQuery:  # type: ignore[override]
        """Raises `ValueError`, naming row and field, where a query cannot be used."""


class ReleasedSet(EvaluationSet):
    """
    Queries of the released evaluation files, or of files in their schema.

    Candidates without ids go by their 0-based place. The relevant one is found among the coarse results by path and
    text; where it is not among them the query counts 0.

    Args:
        rows (`ReleasedRows`):
            The rows.
        coarse (`bool`, *optional*, defaults to `True`):
            Whether the coarse results (`hit`) are ranked where a row has them; otherwise the candidates that its
            prompt shows. Those always hold a relevant one, so figures over them are higher and stand for another
            question; `facts["candidates"]` says over which a set is.

    Raises:
        `ValueError`: if two rows have the same query id.
    """

    def __init__(self, rows: ReleasedRows, coarse: bool = True):
        self._rows, self._coarse = rows, coarse
        self.keys, sources = rows.query_ids, rows.data_sources
        self.groups = [_group(source) for source in sources]
        self.has_prompts = len(rows) > 0 and rows[0].prompt is not None
        self.facts = {"candidates": _kind([coarse and has for has in rows.have_hits])}
        places: dict[str, int] = {}
        for place, key in enumerate(self.keys):
            if places.setdefault(key, place) != place:
                raise ValueError(f"rows {places[key]} and {place} have the same query id {key!r}; give each its own")

    @classmethod
    def open(
        cls,
        source: str,
        split: str = "test",
        image_root: str | Path | None = None,
        limit: int | None = None,
        coarse: bool = True,
    ) -> ReleasedSet:
        """Opens a parquet, JSON or JSONL file, a folder of parquet files, or a data set on the hub."""
        dataset, root = open_dataset(source, split)
        digest = dataset_digest(source, dataset)
        if limit is not None:
            dataset = dataset.select(range(min(limit, len(dataset))))
        queries = cls(ReleasedRows(dataset, root if image_root is None else image_root, source), coarse)
        queries.facts = {**queries.facts, "digests": {"data": digest}}
        return queries

    def __getitem__(self, index: int) -> EvaluationQuery:  # type: ignore[override]
        row = self._rows[index]
        from_hits = self._coarse and row.hits is not None
        items = row.hits if from_hits and row.hits is not None else row.candidates
        candidates = _with_ids(items)
        relevant = {str(candidates[i].id): 1 for i in (row.hit_positives if from_hits else row.positives)}
        if not relevant:
            relevant = {"(not among the candidates)": 1}
        prompt = None if row.prompt is None else functools.partial(_show, row, items)
        return EvaluationQuery(row.query_id, row.query, candidates, relevant, prompt)


class MBEIRSet(EvaluationSet):
    """
    Queries of an M-BEIR task with the coarse results of a run.

    Args:
        mbeir (`MBEIR`):
            The files.
        task (`str`):
            Such as `"cirr_task7"`.
        run (mapping of `str` to `list[Hit]`):
            The coarse results, such as a [`RunFile`]. A query that it lacks has no candidates and counts 0.
        instructions (`Instructions`, *optional*):
            Puts one before each query; none by default.
        union (`bool`, *optional*, defaults to `False`):
            Whether the run is over the global pool.
        limit (`int`, *optional*):
            Most queries, from the first.
    """

    def __init__(
        self,
        mbeir: MBEIR,
        task: str,
        run: Mapping[str, list[Hit]],
        instructions: Instructions | None = None,
        union: bool = False,
        limit: int | None = None,
    ):
        self._queries, self._pool = mbeir.queries(task, instructions), mbeir.pool(None if union else task)
        self._run = run
        self.keys = self._queries.query_ids[:limit]
        self.groups = [task] * len(self.keys)
        self.facts = {"task": task, "pool": "global" if union else "local"}
        self.facts = {**self.facts, "instruction": instructions.name if instructions else "none"}
        if not any(key in run for key in self.keys):
            raise ValueError(f"the run has none of the {len(self.keys)} queries of {task}")

    @classmethod
    def open(
        cls,
        folder: str | Path,
        task: str,
        run: str | Path,
        instruction: str = "first",
        union: bool = False,
        image_root: str | Path | None = None,
        limit: int | None = None,
    ) -> MBEIRSet:
        """
        Opens a task on the disk.

        Args:
            folder (`str` or `Path`), image_root (`str` or `Path`, *optional*):
                As [`MBEIR`] takes them.
            task (`str`):
                Such as `"cirr_task7"`.
            run (`str` or `Path`):
                A run file of coarse results.
            instruction (`str`, *optional*, defaults to `"first"`):
                `"first"`, `"none"`, or a seed that draws one for each query.
            union (`bool`, *optional*, defaults to `False`), limit (`int`, *optional*):
                As the class takes them.
        """
        mbeir = MBEIR(folder, None if image_root is None else ImageRoot(image_root))
        queries = cls(mbeir, task, RunFile(run), choose_instructions(mbeir, instruction), union, limit)
        qrels = file_digest(mbeir.qrels_path(task))
        digests = {**mbeir_digests(mbeir, task, union), "qrels": qrels, "run": file_digest(run)}
        queries.facts = {**queries.facts, "digests": digests}
        return queries

    def __getitem__(self, index: int) -> EvaluationQuery:  # type: ignore[override]
        query = self._queries[index]
        candidates = []
        for hit in self._run.get(query.query_id, ()):
            if hit.id not in self._pool:
                raise ValueError(f"query {query.query_id}: the pool has no candidate {hit.id!r} of the run")
            candidates.append(self._pool[hit.id])
        return EvaluationQuery(query.query_id, query.instructed, candidates, query.relevant)


def choose_instructions(mbeir: MBEIR, instruction: str) -> Instructions | None:
    """
    The instructions that a word stands for.

    Args:
        mbeir (`MBEIR`):
            Where they are.
        instruction (`str`):
            `"first"`, `"none"`, or a number, the seed that draws one for each query.

    Raises:
        `ValueError`: for any other word.
    """
    if instruction == "none":
        return None
    if instruction != "first" and not (instruction.isascii() and instruction.isdigit()):
        raise ValueError(f"unknown instruction {instruction!r}: choose 'first', 'none', or a seed such as '0'")
    return mbeir.instructions(None if instruction == "first" else int(instruction))


def mbeir_digests(mbeir: MBEIR, task: str, union: bool = False) -> dict[str, str]:
    """
    Tells the files that a task's queries and candidates are read from, from others of the same names.

    Args:
        mbeir (`MBEIR`):
            Where they are.
        task (`str`):
            Such as `"cirr_task7"`.
        union (`bool`, *optional*, defaults to `False`):
            Whether the candidates are those of the global pool.
    """
    files = {
        "queries": mbeir.query_path(task),
        "pool": mbeir.pool_path(None if union else task),
        "instructions": mbeir.instructions_path,
    }
    return {name: file_digest(path) for name, path in files.items() if path.is_file()}


def _show(row: ReleasedRow, items: Sequence[Item], indices: Sequence[int]) -> Messages:
    """The row's own prompt with these of its candidates; as it is where they are those that it shows."""
    assert row.prompt is not None
    shown = [items[index] for index in indices]
    plain = [_without_marks(item) for item in shown]
    if shown == row.candidates == plain:
        return row.prompt
    return PromptTemplate(row.prompt, row.candidates).show(plain)


def _without_marks(item: Item) -> Item:
    """The item with a text that cannot be taken for a picture."""
    if item.text is None or IMAGE_MARK not in item.text:
        return item
    return dataclasses.replace(item, text=item.text.replace(IMAGE_MARK, IMAGE_MARK.replace("<", "< ")))


def _kind(from_hits: Sequence[bool]) -> str:
    """What is ranked, by whether each row's candidates are its coarse results."""
    if all(from_hits):
        return "hits"
    rest = from_hits.count(False)
    return "shown" if rest == len(from_hits) else f"hits, and shown in {rest} of {len(from_hits)} rows"


def _with_ids(items: Sequence[Item]) -> list[Item]:
    """The candidates with their own ids, or all with their places where any has none."""
    if all(item.id is not None for item in items):
        return list(items)
    return [dataclasses.replace(item, id=str(place)) for place, item in enumerate(items)]


def _group(source: str) -> str:
    benchmark = find_benchmark(source)
    return benchmark.name if benchmark else source or "all"
