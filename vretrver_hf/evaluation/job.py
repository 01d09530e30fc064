"""The job: queries through the reranker into a journal, one finished query a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ..agent import AgentTask
from ..journal import Journal, Shard
from ..ranking import Ranking
from ..reranker import RankRequest, Reranker
from ..trajectory import Trajectory
from .queries import EvaluationQuery, EvaluationSet


@dataclasses.dataclass(frozen=True)
class Window:
    """
    What one window cost and how it ended.

    Args:
        status (`str`):
            `"ok"`, `"repaired"` or `"fallback"`, of its answer.
        finish (`str`):
            Why it ended, as in [`~vretrver_hf.trajectory.Trajectory`].
        calls (`int`), valid_calls (`int`):
            Tool calls made, and those that could be carried out.
        malformed (`int`):
            Turns that were neither one call nor one answer.
        tokens (`int`), sampled (`int`):
            Tokens read and written, and those written.
        seconds (`float`):
            Sum of its turns' times. Windows of other queries share the batch meanwhile, so this is a latency: with
            several under way, the sum over all windows is more than the wall clock.
    """

    status: str
    finish: str
    calls: int
    valid_calls: int
    malformed: int
    tokens: int
    sampled: int
    seconds: float

    @classmethod
    def of(cls, trajectory: Trajectory) -> Window:
        return cls(
            status=trajectory.status,
            finish=trajectory.finish,
            calls=trajectory.num_calls,
            valid_calls=trajectory.num_valid_calls,
            malformed=sum(turn.kind == "malformed" for turn in trajectory.assistant_turns),
            tokens=trajectory.num_tokens,
            sampled=trajectory.num_sampled_tokens,
            seconds=trajectory.seconds,
        )


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """
    What came of one query.

    Args:
        coarse (`list[str]`):
            Ids of the candidates in coarse order.
        order (`list[int]`):
            Their new order: a permutation of `range(len(coarse))`, best first.
        relevant (`dict[str, int]`):
            Ids of what is relevant, with grades.
        status (`str`):
            The worst of its windows.
        windows (`list[Window]`):
            The windows, as they were ranked.
        trajectories (`list[dict]`, *optional*):
            The conversations, where they are kept.
    """

    coarse: list[str]
    order: list[int]
    relevant: dict[str, int]
    status: str
    windows: list[Window]
    trajectories: list[dict[str, Any]] | None = None

    @property
    def reranked(self) -> list[str]:
        """Ids in the new order."""
        return [self.coarse[index] for index in self.order]

    def to_dict(self) -> dict[str, Any]:
        values = {**vars(self), "windows": [vars(window) for window in self.windows]}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QueryResult:
        return cls(**{**values, "windows": [Window(**window) for window in values["windows"]]})


def evaluate_queries(
    queries: EvaluationSet,
    journal: Journal,
    reranker: Reranker,
    depth: int = 50,
    shard: Shard | None = None,
    on_query: Callable[[str, QueryResult | None], None] | None = None,
    keep_trajectories: bool = False,
) -> None:
    """
    Reranks each query's coarse results and notes what comes of it; queries that are in the journal are left out.

    A query whose row or pictures cannot be read is noted as failed, and the job goes on.

    Args:
        queries (`EvaluationSet`):
            The queries.
        journal (`Journal`):
            Where finished queries go.
        reranker (`Reranker`):
            Ranks.
        depth (`int`, *optional*, defaults to 50):
            How many of the first candidates are reranked; the others follow in coarse order.
        shard (`Shard`, *optional*):
            Which of the queries this process does; all by default.
        on_query (`Callable`, *optional*):
            Called with each query id as it is done, and with the [`QueryResult`], or `None` where it failed.
        keep_trajectories (`bool`, *optional*, defaults to `False`):
            Whether the conversations are kept too.
    """
    tell = on_query or (lambda key, result: None)
    playing: dict[str, EvaluationQuery] = {}
    replay = reranker.preset.prompt_source == "dataset"

    def fail(key: str, error: str) -> None:
        journal.fail(key, error)
        tell(key, None)

    def requests() -> Iterator[RankRequest]:
        for row in (shard or Shard()).rows(len(queries)):
            key = queries.keys[row]
            if key in journal:
                continue
            try:
                query = queries[row]
                if replay:
                    _check_prompt(query, reranker, depth)
            except ValueError as error:
                fail(key, str(error))
                continue
            playing[key] = query
            yield RankRequest(key, query.query, query.candidates[:depth], query.prompt if replay else None)

    for ranking in reranker.rank_iter(requests(), on_error="record"):
        query = playing.pop(ranking.query_id)
        if ranking.error is not None:
            fail(ranking.query_id, ranking.error)
            continue
        result = _result(query, ranking, keep_trajectories)
        journal.append(ranking.query_id, result.to_dict())
        tell(ranking.query_id, result)


def _check_prompt(query: EvaluationQuery, reranker: Reranker, depth: int) -> None:
    """A prompt that does not fit is known before it is played."""
    count = min(len(query.candidates), depth, reranker.window)
    if count > 1:
        prompt = None if query.prompt is None else query.prompt(range(count))
        task = AgentTask(query.query, query.candidates[:count], reranker.preset, query.query_id, prompt=prompt)
        task.messages()


def _result(query: EvaluationQuery, ranking: Ranking, keep_trajectories: bool) -> QueryResult:
    reranked = len(ranking.order)
    return QueryResult(
        coarse=[str(item.id) for item in query.candidates],
        order=[*ranking.order, *range(reranked, len(query.candidates))],
        relevant=query.relevant,
        status=ranking.status,
        windows=[Window.of(trajectory) for trajectory in ranking.trajectories],
        trajectories=[trajectory.to_dict() for trajectory in ranking.trajectories] if keep_trajectories else None,
    )
