"""Many queries on one engine: each walks through its windows on its own, and all of them share the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .agent import AgentLoop, AgentTask, Event
from .images import ItemError
from .items import Item
from .pictures import PictureLoader, Reading, named
from .ranking import Ranking
from .trajectory import Trajectory
from .windows import WindowWalk


if TYPE_CHECKING:
    from .protocol import Preset
    from .reranker import Prompt, Reranker

_WORSE = ("ok", "repaired", "fallback")


class RankingJob:
    """
    One query on its way through its windows.

    Args:
        query_id (`str`):
            Names the query; no other that is under way may have the same.
        query (`Item`), candidates (`list[Item]`):
            What is ranked.
        window (`int`), stride (`int`):
            As in [`Reranker`].
        top_k (`int`, *optional*):
            As in [`Reranker.rank`].
        prompt (`list[dict]` or callable, *optional*):
            As in [`RankRequest`].
        passes (`int`, *optional*, defaults to 1):
            As in [`Reranker`].
    """

    def __init__(
        self,
        query_id: str,
        query: Item,
        candidates: list[Item],
        window: int,
        stride: int,
        top_k: int | None = None,
        prompt: Prompt | Callable[[Sequence[int]], Prompt] | None = None,
        passes: int = 1,
    ):
        self.query_id = query_id
        self.query = query
        self.candidates = candidates
        self.prompt = prompt
        self.trajectories: list[Trajectory] = []
        self.error: str | None = None
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self._top_k = top_k
        self._walk = WindowWalk(len(candidates), window, stride, passes)
        self._is_one_window = len(candidates) <= window
        self._readings: list[Reading] = []

    def begin_check(self, pictures: PictureLoader, preset: Preset) -> None:
        """
        Begins to read every picture, so that a bad one is known before the model runs.

        Where all are in one window, they are kept for it. Of several windows the pixels would be too many to keep.
        """
        for name, item in named([self.query, *self.candidates]):
            if item.image is not None:
                reading = pictures.load(item, preset, name) if self._is_one_window else pictures.check(item, name)
                self._readings.append(reading)

    def end_check(self) -> None:
        """
        Waits until every picture is read.

        Raises:
            `ItemError`: for the first that cannot be; the others are left.
        """
        try:
            for reading in self._readings:
                reading.wait()
        except ItemError:
            self._readings.clear()
            raise

    def next_window(self) -> list[int] | None:
        # One candidate needs no comparison.
        return self._walk.next() if len(self.candidates) > 1 and self.error is None else None

    def merge(self, trajectory: Trajectory) -> None:
        self.trajectories.append(trajectory)
        self._walk.merge(trajectory.order)
        self.error = self.error or trajectory.error

    def ranking(self) -> Ranking:
        statuses = [trajectory.status for trajectory in self.trajectories]
        return Ranking(
            query=self.query,
            candidates=self.candidates,
            order=self._walk.order,
            status=max(statuses, key=_WORSE.index, default="fallback" if self.error else "ok"),
            trajectories=self.trajectories,
            top_k=self._top_k,
            query_id=self.query_id,
            error=self.error,
        )


class RankingLoop:
    """
    Ranks many queries at once; they may come and go at any time.

    Args:
        reranker (`Reranker`):
            Engine and protocol.
        on_event (`Callable[[Event], None]`, *optional*):
            Called with each [`Event`] as it happens.
    """

    def __init__(self, reranker: Reranker, on_event: Callable[[Event], None] | None = None):
        self._reranker = reranker
        self._on_event = on_event
        self._agent = AgentLoop(reranker.engine, reranker.sampling, on_event)
        self._jobs: dict[str, RankingJob] = {}

    @property
    def num_active(self) -> int:
        """Queries under way."""
        return len(self._jobs)

    @property
    def has_room(self) -> bool:
        """Whether another query could begin at once."""
        return self._agent.num_active < self._reranker.engine.max_sessions

    @property
    def is_hungry(self) -> bool:
        """Whether more queries should be added; see [`AgentLoop`]."""
        return self._agent.is_hungry

    @property
    def pictures(self) -> PictureLoader:
        """Reads the queries' pictures."""
        return self._agent.pictures

    def submit(self, job: RankingJob) -> Ranking | None:
        """Begins a query; returns its ranking where there is nothing to compare."""
        if not self._submit_window(job):
            return job.ranking()
        self._jobs[job.query_id] = job
        return None

    def step(self) -> list[Ranking]:
        """Advances everything until at least one model turn is done; returns the queries that are finished."""
        finished = []
        for task, trajectory in self._agent.step():
            job = self._jobs[task.query_id]
            job.merge(trajectory)
            if not self._submit_window(job):
                del self._jobs[job.query_id]
                finished.append(job.ranking())
        return finished

    def cancel(self, query_id: str | None = None) -> None:
        """Stops one query, or all of them, and frees what they held."""
        self._agent.cancel(query_id)
        if query_id is None:
            self._jobs.clear()
        else:
            self._jobs.pop(query_id, None)

    def _submit_window(self, job: RankingJob) -> bool:
        indices = job.next_window()
        if indices is None:
            return False
        if self._on_event is not None:
            self._on_event(Event("window", job.query_id, order=tuple(indices)))
        self._agent.submit(
            AgentTask(
                query=job.query,
                candidates=[job.candidates[index] for index in indices],
                preset=self._reranker.preset,
                query_id=job.query_id,
                candidate_indices=indices,
                tools=self._reranker.tools,
                prompt=job.prompt(indices) if callable(job.prompt) else job.prompt,
            ),
            next_up=bool(job.trajectories),  # what has begun is finished before anything else begins
        )
        return True
