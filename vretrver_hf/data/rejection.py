"""Rejection sampling: several trajectories a query, of which the sound and right ones are kept to learn from.

Sampling and choosing are two steps. Everything that was sampled stays in the journal, so another rule or another
number a query can be tried without asking the model again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..agent import AgentLoop, AgentTask
from ..engines.base import Engine, Sampling
from ..items import Item
from ..journal import Journal, Shard
from ..protocol import Preset
from ..tables import markdown_table, percent
from ..trajectory import Trajectory
from .conversations import TrajectoryRecord, write_records
from .examples import RerankExample


CARD = "README.md"
"""Name of the data card in a folder of records."""

REASONS = {
    "context full": "the conversation grew longer than the model reads",
    "no answer": "calls and turns were spent without an answer",
    "malformed turn": "a turn is not exactly one thought and one call or answer",
    "invalid call": "a call could not be carried out",
    "not a permutation": "the answer does not name every candidate once",
    "wrong": "no relevant candidate is ranked high enough",
    "duplicate": "word for word an accepted trajectory of the same query",
}
"""Why a trajectory is rejected: the first of these that applies."""


@dataclasses.dataclass
class Query:
    """
    What was sampled for one query.

    Args:
        query_id (`str`):
            The query.
        positives (`list[int]`):
            0-based indices of the relevant candidates.
        data_source (`str`):
            The data set that the query comes from.
        modalities (`str`):
            What the query and its candidates are, such as `"text → image"`.
        trajectories (`list[Trajectory]`):
            The trajectories, by sample number.
    """

    query_id: str
    positives: list[int]
    data_source: str
    modalities: str
    trajectories: list[Trajectory]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. The prompt, which all trajectories share and which is most of their length, is stored once."""
        trajectories = [trajectory.to_dict() for trajectory in self.trajectories]
        prompt = trajectories[0]["turns"][0]
        for trajectory in trajectories:
            trajectory["turns"] = trajectory["turns"][1:]
        return {**vars(self), "prompt": prompt, "trajectories": trajectories}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Query:
        values = dict(values)
        prompt = values.pop("prompt")
        trajectories = [{**entry, "turns": [prompt, *entry["turns"]]} for entry in values["trajectories"]]
        return cls(**{**values, "trajectories": [Trajectory.from_dict(entry) for entry in trajectories]})


def sample_queries(
    examples: Sequence[RerankExample],
    keys: Sequence[str],
    journal: Journal,
    engine: Engine,
    preset: Preset,
    sampling: Sampling,
    num_samples: int,
    tools: bool = True,
    shard: Shard | None = None,
    on_query: Callable[[str, Query | None], None] | None = None,
) -> None:
    """
    Plays each query several times and notes it in the journal; queries that are there already are left out.

    A trajectory's draws depend on the seed, the query id, the number of the sample and of the turn only. A query
    whose row or pictures cannot be read is noted as failed, and the job goes on.

    Args:
        examples (sequence of `RerankExample`):
            The queries, read when their turn comes.
        keys (sequence of `str`):
            Their query ids.
        journal (`Journal`):
            Where finished queries go.
        engine (`Engine`):
            Runs the model.
        preset (`Preset`):
            The protocol to play.
        sampling (`Sampling`):
            How tokens are drawn.
        num_samples (`int`):
            Trajectories a query.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the model may call tools.
        shard (`Shard`, *optional*):
            Which of the queries this process does; all by default.
        on_query (`Callable`, *optional*):
            Called with each query id as it is done, and with the [`Query`], or `None` where it failed.
    """
    tell = on_query or (lambda key, query: None)
    playing: dict[str, tuple[RerankExample, dict[int, Trajectory]]] = {}

    def fail(key: str, error: str) -> None:
        journal.fail(key, error)
        tell(key, None)

    def tasks() -> Iterator[AgentTask]:
        for row in (shard or Shard()).rows(len(keys)):
            if keys[row] in journal:
                continue
            try:
                example = examples[row]
                example.task(preset, tools=tools).messages()  # a prompt that does not fit is known before it is played
            except ValueError as error:
                fail(keys[row], str(error))
                continue
            playing[example.query_id] = example, {}
            yield from (example.task(preset, sample, tools) for sample in range(num_samples))

    for task, trajectory in AgentLoop(engine, sampling).run(tasks()):
        example, ended = playing[task.query_id]
        ended[task.sample] = trajectory
        if len(ended) < num_samples:
            continue
        del playing[task.query_id]
        query = _query(example, [ended[sample] for sample in range(num_samples)])
        errors = [trajectory.error for trajectory in query.trajectories if trajectory.finish == "error"]
        if errors:
            fail(task.query_id, str(errors[0]))
            continue
        journal.append(task.query_id, query.to_dict())
        tell(task.query_id, query)


def parse_keep(rule: str) -> int | None:
    """
    The worst rank that the best relevant candidate may have under a rule; `None` where any will do.

    Args:
        rule (`str`):
            `"first"`: a relevant candidate is ranked first. `"top-3"`: one is among the first three. `"any"`: every
            ranking is kept.

    Raises:
        `ValueError`: for any other rule.
    """
    if rule == "any":
        return None
    match = re.fullmatch(r"first|top-([1-9]\d{0,5})", rule)
    if match is None:
        raise ValueError(f"unknown rule {rule!r}: choose 'first', 'top-' and a number such as 'top-3', or 'any'")
    return int(match[1] or 1)


def judge(trajectories: Iterable[Trajectory], positives: Sequence[int], max_rank: int | None = 1) -> list[str | None]:
    """
    Why each trajectory of a query is rejected, one of [`REASONS`], or `None` where it is accepted.

    Args:
        trajectories (iterable of `Trajectory`):
            All trajectories of one query.
        positives (sequence of `int`):
            0-based indices of the relevant candidates.
        max_rank (`int`, *optional*, defaults to 1):
            The worst rank that the best relevant candidate may have; `None` does not look at the ranking.
    """
    verdicts: list[str | None] = []
    accepted: set[str] = set()
    for trajectory in trajectories:
        verdict = reason(trajectory, positives, max_rank)
        if verdict is None and trajectory.completion in accepted:
            verdict = "duplicate"
        if verdict is None:
            accepted.add(trajectory.completion)
        verdicts.append(verdict)
    return verdicts


def reason(trajectory: Trajectory, positives: Sequence[int], max_rank: int | None = 1) -> str | None:
    """Why a trajectory is rejected whatever the others of its query are; see [`judge`]."""
    turns = trajectory.assistant_turns
    if trajectory.finish == "length":
        return "context full"
    if any(turn.problem is not None for turn in turns):  # in a turn that is not well-formed something was wrong
        return "malformed turn"
    if any(turn.valid is False for turn in turns):
        return "invalid call"
    if trajectory.finish != "answer":
        return "no answer"
    if trajectory.status != "ok":
        return "not a permutation"
    indices = [trajectory.candidate_indices[place] for place in trajectory.order[:max_rank]]
    return "wrong" if max_rank is not None and not set(indices) & set(positives) else None


def select(
    accepted: Sequence[Mapping[int, bool]],
    max_per_query: int,
    tool_share: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """
    Chooses among the accepted trajectories, balanced between those that used a tool and those that did not.

    Within a query the two kinds take turns. The kind that is short so far begins, so that one a query is balanced
    too. With a `tool_share`, trajectories of the kind that is too frequent are then left out, first where the query
    keeps another.

    Args:
        accepted (sequence of mappings):
            For each query, the numbers of its accepted samples and whether each used a tool.
        max_per_query (`int`):
            Most trajectories of a query.
        tool_share (`float`, *optional*):
            Share of trajectories with tools that the whole set is to have.
        seed (`int`, *optional*, defaults to 0):
            Which trajectories are left out for `tool_share` is drawn with it.

    Returns:
        `list[list[int]]`: for each query, the numbers of its chosen samples.

    Raises:
        `ValueError`: if `tool_share` cannot be reached, since all accepted trajectories are of one kind.

    Example:

    ```python
    >>> from vretrver_hf.data.rejection import select

    >>> select([{0: True, 1: True, 2: False}, {3: False}], max_per_query=2)
    [[0, 2], [3]]

    ```
    """
    if max_per_query < 1:
        raise ValueError(f"max_per_query must be at least 1, got {max_per_query}")
    if tool_share is not None and not 0 <= tool_share <= 1:
        raise ValueError(f"tool_share must lie in [0, 1], got {tool_share}")
    share = 0.5 if tool_share is None else tool_share
    counts = {True: 0, False: 0}
    chosen = []
    for samples in accepted:
        short = counts[False] * share - counts[True] * (1 - share)
        tool_first = short > 0 or (short == 0 and share >= 0.5)
        chosen.append(_take_turns(samples, max_per_query, tool_first))
        counts.update({kind: counts[kind] + sum(samples[s] is kind for s in chosen[-1]) for kind in counts})
    if tool_share is not None:
        _trim(chosen, accepted, tool_share, random.Random(f"{seed}/tool_share"))
    return chosen


@dataclasses.dataclass
class Tally:
    """Counts over a group of queries."""

    queries: int = 0
    covered: int = 0
    sampled: int = 0
    sampled_with_tools: int = 0
    accepted: int = 0
    kept: int = 0
    kept_with_tools: int = 0


@dataclasses.dataclass
class Summary:
    """
    What came of a sampling job.

    Args:
        total (`Tally`), by_source (`dict[str, Tally]`), by_modalities (`dict[str, Tally]`):
            Counts over everything, a data source, and a kind of query and candidates.
        reasons (`Counter`):
            Rejected trajectories by reason.
        sampled_calls (`Counter`), kept_calls (`Counter`):
            Trajectories by their number of tool calls.
        errors (`dict[str, str]`):
            Queries that failed, and why.
    """

    total: Tally = dataclasses.field(default_factory=Tally)
    by_source: dict[str, Tally] = dataclasses.field(default_factory=lambda: collections.defaultdict(Tally))
    by_modalities: dict[str, Tally] = dataclasses.field(default_factory=lambda: collections.defaultdict(Tally))
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sampled_calls: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    kept_calls: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, query: Query, verdicts: Sequence[str | None], chosen: Sequence[int]) -> None:
        """Counts one query: why each trajectory was rejected, if it was, and which were chosen."""
        tools = [trajectory.num_valid_calls > 0 for trajectory in query.trajectories]
        for tally in (self.total, self.by_source[query.data_source], self.by_modalities[query.modalities]):
            tally.queries += 1
            tally.covered += bool(chosen)
            tally.sampled += len(tools)
            tally.sampled_with_tools += sum(tools)
            tally.accepted += verdicts.count(None)
            tally.kept += len(chosen)
            tally.kept_with_tools += sum(tools[sample] for sample in chosen)
        self.reasons.update(verdict for verdict in verdicts if verdict is not None)
        self.sampled_calls.update(trajectory.num_calls for trajectory in query.trajectories)
        self.kept_calls.update(query.trajectories[sample].num_calls for sample in chosen)

    def group_table(self) -> str:
        """Rates by data source and by modalities, as a Markdown table."""
        groups = {**dict(sorted(self.by_source.items())), **dict(sorted(self.by_modalities.items()))}
        rows = [_tally_row(name or "(none)", tally) for name, tally in groups.items()]
        head = ["queries", "count", "with a kept one", "sampled", "with tools", "accepted", "kept", "with tools"]
        return markdown_table(head, [*rows, _tally_row("all", self.total)])

    def reason_table(self, explanations: Mapping[str, str] = REASONS) -> str:
        """Rejections by reason, as a Markdown table."""
        rows = [
            [name, count, percent(count, self.total.sampled), explanations[name]]
            for name, count in sorted(self.reasons.items(), key=lambda entry: (-entry[1], entry[0]))
        ]
        return markdown_table(["rejected", "count", "share", "because"], rows)

    def call_table(self) -> str:
        """How many trajectories made how many calls, as a Markdown table."""
        numbers = sorted(self.sampled_calls)
        rows = [[number, self.sampled_calls[number], self.kept_calls[number]] for number in numbers]
        return markdown_table(["calls", "sampled", "kept"], rows)


def write_selection(
    folder: str | os.PathLike[str],
    examples: Sequence[RerankExample],
    keys: Sequence[str],
    journal: Journal,
    max_rank: int | None,
    max_per_query: int,
    tool_share: float | None = None,
    seed: int = 0,
) -> Summary:
    """
    Chooses from a journal and writes the chosen trajectories as records, in the order of the queries.

    Times are left out of the records, so that they depend on what was sampled alone.

    Args:
        folder (`str` or `os.PathLike`):
            Where [`write_records`] writes.
        examples (sequence of `RerankExample`), keys (sequence of `str`), journal (`Journal`):
            As [`sample_queries`] had them.
        max_rank (`int`, *optional*):
            See [`judge`].
        max_per_query (`int`), tool_share (`float`, *optional*), seed (`int`, *optional*, defaults to 0):
            See [`select`].

    Raises:
        `ValueError`: if `tool_share` cannot be reached, or the data is not what was sampled.
    """
    rows = [row for row, key in enumerate(keys) if key in journal]
    verdicts, accepted = [], []
    for row in rows:
        query = Query.from_dict(journal[keys[row]])
        verdicts.append(judge(query.trajectories, query.positives, max_rank))
        kinds = [trajectory.num_valid_calls > 0 for trajectory in query.trajectories]
        accepted.append({s: kinds[s] for s, verdict in enumerate(verdicts[-1]) if verdict is None})
    chosen = select(accepted, max_per_query, tool_share, seed)
    errors = journal.errors
    summary = Summary(errors={key: errors[key] for key in keys if key in errors})

    def records() -> Iterator[TrajectoryRecord]:
        for row, verdict, numbers in zip(rows, verdicts, chosen, strict=True):
            query = Query.from_dict(journal[keys[row]])
            summary.add(query, verdict, numbers)
            if numbers:
                example = examples[row]
                yield from (TrajectoryRecord(example, _timeless(query.trajectories[number])) for number in numbers)

    write_records(folder, records())
    return summary


def write_card(
    folder: str | os.PathLike[str], summary: Summary, settings: Mapping[str, Any], choice: Mapping[str, Any]
) -> None:
    """
    Writes the data card: what was sampled, with what, how much of it was accepted and why the rest was not.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the records.
        summary (`Summary`):
            What came of the job.
        settings (mapping):
            What was sampled with.
        choice (mapping):
            What was chosen by.
    """
    total = summary.total
    card = f"""---
tags:
- vretrver
- rejection-sampling
configs:
- config_name: default
  data_files: examples.parquet
---

# Accepted trajectories

{total.kept} trajectories of {total.covered} queries. A model wrote {total.sampled} trajectories for {total.queries} \
queries; those that keep to the protocol and rank a relevant candidate high enough were accepted, and among them some \
of each query chosen, with and without tools in turn.

| file | holds |
|---|---|
| `trajectories.jsonl` | one conversation a line: token ids as sampled, text, calls, pictures by reference |
| `examples.parquet` | their queries and candidates with the pictures |

```python
from vretrver_hf.data.conversations import read_records

records = read_records("path/of/this/folder")
records[0].trajectory.completion
```

## Acceptance

{summary.group_table()}

{summary.reason_table()}

{summary.call_table()}
{settings_section(summary, {**settings, **choice})}
"""
    Path(folder, CARD).write_text(card, encoding="utf-8")


def settings_section(summary: Summary, settings: Mapping[str, Any]) -> str:
    """The end of a data card: queries that failed, and what the data were made with."""
    block = json.dumps(settings, indent=2, ensure_ascii=False)
    return f"{_error_section(summary.errors)}\n## Settings\n\n```json\n{block}\n```"


def modalities(example: RerankExample) -> str:
    """What the query and its candidates are, such as `"text → image"`."""
    kinds = {_modality(candidate) for candidate in example.candidates}
    return f"{_modality(example.query)} → {' or '.join(sorted(kinds))}"


def _modality(item: Item) -> str:
    return "+".join(name for name in ("image", "text") if getattr(item, name) is not None)


def _query(example: RerankExample, trajectories: list[Trajectory]) -> Query:
    return Query(
        query_id=example.query_id,
        positives=example.positives,
        data_source=example.data_source,
        modalities=modalities(example),
        trajectories=trajectories,
    )


def _take_turns(samples: Mapping[int, bool], limit: int, tool_first: bool) -> list[int]:
    kinds = [[sample for sample, tool in samples.items() if tool is kind] for kind in (tool_first, not tool_first)]
    turns = [sample for pair in itertools.zip_longest(*kinds) for sample in pair if sample is not None]
    return sorted(turns[:limit])


def _trim(
    chosen: list[list[int]], accepted: Sequence[Mapping[int, bool]], share: float, source: random.Random
) -> None:
    """Leaves out trajectories of the kind that is too frequent, until the share is as near as it gets."""
    members: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for query, samples in enumerate(chosen):
        for sample in samples:
            members[accepted[query][sample]].append((query, sample))
    shares = {True: share, False: 1 - share}
    frequent = len(members[True]) * shares[False] > len(members[False]) * shares[True]
    surplus, others = members[frequent], members[not frequent]
    if surplus and not others and shares[frequent] < 1:
        raise ValueError(
            f"tool_share {share:g} cannot be reached: all {len(surplus)} trajectories to choose from "
            f"{'use' if frequent else 'do without'} tools"
        )
    if not others or shares[not frequent] == 0:
        return
    excess = len(surplus) - round(len(others) * shares[frequent] / shares[not frequent])
    source.shuffle(surplus)
    for only_spare in (True, False):
        for query, sample in surplus:
            if excess > 0 and sample in chosen[query] and (len(chosen[query]) > 1 or not only_spare):
                chosen[query].remove(sample)
                excess -= 1


def _timeless(trajectory: Trajectory) -> Trajectory:
    turns = [dataclasses.replace(turn, seconds=0.0) for turn in trajectory.turns]
    return dataclasses.replace(trajectory, turns=turns)


def _tally_row(name: str, tally: Tally) -> list[Any]:
    return [
        name,
        tally.queries,
        percent(tally.covered, tally.queries),
        tally.sampled,
        percent(tally.sampled_with_tools, tally.sampled),
        percent(tally.accepted, tally.sampled),
        tally.kept,
        percent(tally.kept_with_tools, tally.kept),
    ]


def _error_section(errors: Mapping[str, str], limit: int = 20) -> str:
    if not errors:
        return ""
    rows = [[key, " ".join(error.split())] for key, error in itertools.islice(errors.items(), limit)]
    more = f"\n\nand {len(errors) - limit} more" if len(errors) > limit else ""
    return f"\n{markdown_table(['failed query', 'because'], rows)}{more}\n"
