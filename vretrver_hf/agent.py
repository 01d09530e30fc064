"""The loop: generate, parse, observe, until the model answers or its budget ends; many trajectories at once."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from . import protocol
from .encoding import Encoded
from .engines.base import Engine, Sampling, Session, TurnResult
from .images import ItemError
from .parsing import ParsedTurn, parse_ranking, parse_turn
from .pictures import Picture, PictureLoader, named
from .tools import Observation, VisualTools
from .trajectory import Trajectory, Turn


if TYPE_CHECKING:
    from PIL import Image

    from .images import ImageRef
    from .items import Item
    from .protocol import Preset


_AHEAD = 0.125


def num_ahead(room: int) -> int:
    """Tasks whose pictures are read before there is room for them, where there is room for so many at a time."""
    return max(1, round(_AHEAD * room))


@dataclasses.dataclass
class AgentTask:
    """
    One window of one query, ready to be played.

    Args:
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The window's candidates, in prompt order.
        preset (`Preset`):
            The protocol to play.
        query_id (`str`, *optional*, defaults to `"0"`):
            Identifies the query within the job.
        candidate_indices (`list[int]`, *optional*):
            Where the candidates stand in the query's full list; their own order by default.
        sample (`int`, *optional*, defaults to 0):
            Number of this trajectory among several of the same query.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the model may call tools.
        prompt (`list[dict]`, *optional*):
            A data set's own prompt, `[{"role": …, "content": text with <image> marks}]`, which presets with
            `prompt_source="dataset"` replay. Its marks stand for the pictures of query and candidates in their order.
    """

    query: Item
    candidates: list[Item]
    preset: Preset
    query_id: str = "0"
    candidate_indices: list[int] | None = None
    sample: int = 0
    tools: bool = True
    prompt: list[dict[str, str]] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """
        The opening messages, from the preset or the data set as the preset says.

        Raises:
            `ValueError`: if the preset replays a data set's prompt and there is none, or one that does not fit.
        """
        if self.preset.prompt_source == "preset":
            return protocol.build_messages(self.query, self.candidates, self.preset, self.tools)
        if self.prompt is None:
            raise ValueError(f"query {self.query_id}: prompt_source is 'dataset', but the query brings no prompt")
        numbers = [number for number, item in enumerate([self.query, *self.candidates]) if item.image is not None]
        return protocol.messages_from_prompt(self.prompt, numbers)


@dataclasses.dataclass(frozen=True)
class Event:
    """
    Something that happened in a trajectory, told as it happens.

    Args:
        kind (`str`):
            `"thought"`: the model's `text`. `"call"`: `call` with name and arguments. `"observation"`: what came
            back, as `text` and `images`, and whether it was `valid`. `"answer"`: the window's `order` (0-based
            places) and `status`, and as `text` why it failed, if it did. `"window"`: a window is next, as soon as
            there is room; `order` holds the indices of its candidates.
        query_id (`str`):
            The query.
        text (`str`, *optional*):
            Thought or observation.
        call (`dict`, *optional*):
            Name and arguments of a tool call.
        valid (`bool`, *optional*):
            Whether an observation shows evidence (`True`) or says what was wrong (`False`).
        images (`tuple[PIL.Image.Image, …]`, *optional*):
            Pictures that the model now sees.
        refs (`tuple[ImageRef, …]`, *optional*):
            Which image each of them shows, and which region of it.
        order (`tuple[int, …]`, *optional*):
            See `kind`.
        status (`str`, *optional*):
            `"ok"`, `"repaired"` or `"fallback"`.
    """

    kind: Literal["thought", "call", "observation", "answer", "window"]
    query_id: str
    text: str | None = None
    call: dict[str, Any] | None = None
    valid: bool | None = None
    images: tuple[Image.Image, ...] = ()
    refs: tuple[ImageRef, ...] = ()
    order: tuple[int, ...] | None = None
    status: str | None = None


class AgentLoop:
    """
    Plays trajectories on an engine, many at a time, each at its own turn.

    Tasks wait until the engine has room; [`AgentLoop.step`] advances all that are under way and hands back those that
    ended. A turn that cannot be used, a call that cannot be carried out and a call without budget are told to the
    model in words. Each turn that is not an answer costs one of the preset's `max_calls`; when none is left the model
    is told to answer, once.

    Threads read the pictures of tasks that wait, and carry out the calls of turns that end together. Tasks that show
    the same items, such as the rollouts of a group, share what was read, and neighbours among them their prompt.

    Args:
        engine (`Engine`):
            Runs the model.
        sampling (`Sampling`, *optional*):
            How tokens are drawn; greedily by default.
        on_event (`Callable[[Event], None]`, *optional*):
            Called with each [`Event`] as it happens.

    Attributes:
        pictures (`PictureLoader`):
            Reads the tasks' pictures.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling | None = None,
        on_event: Callable[[Event], None] | None = None,
    ):
        self.engine = engine
        self.sampling = sampling or Sampling()
        self.pictures = PictureLoader(engine.encoder.factor)
        self._on_event = on_event or (lambda event: None)
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._playing: dict[Session, _Rollout] = {}
        self._last_prompt: tuple[AgentTask, Encoded] | None = None

    @property
    def num_active(self) -> int:
        """Trajectories that wait or are under way."""
        return len(self._waiting) + len(self._playing)

    @property
    def is_hungry(self) -> bool:
        """Whether more tasks should be added: those that can begin, and some whose pictures are read meanwhile."""
        room = self.engine.max_sessions
        return self.num_active < room + num_ahead(room)

    def submit(self, task: AgentTask, next_up: bool = False) -> None:
        """
        Adds a trajectory.

        Args:
            task (`AgentTask`):
                What to play.
            next_up (`bool`, *optional*, defaults to `False`):
                Whether it begins before those that wait.
        """
        pictures = [
            None if item.image is None else self.pictures.load(item, task.preset, name)
            for name, item in named([task.query, *task.candidates], task.candidate_indices)
        ]
        add = self._waiting.appendleft if next_up else self._waiting.append
        add(_Waiting(task, pictures))

    def step(self) -> list[tuple[AgentTask, Trajectory]]:
        """
        Advances everything until at least one model turn is done.

        Returns:
            `list[tuple[AgentTask, Trajectory]]`: the trajectories that ended, possibly none. One whose pictures could
            not be read, or whose engine failed it, has `finish="error"`: it costs one query and not the job.

        Raises:
            `RuntimeError`: if the engine has no room, since somebody else's conversations hold it.

        What a callback, a tool or the engine raises leaves turns without their answers: cancel the loop then.
        """
        ended = []
        while self._waiting and len(self._playing) < self.engine.max_sessions:
            waiting = self._waiting.popleft()
            task = waiting.task
            try:
                rollout = self._start(waiting)
            except ItemError as error:
                failed = _failed(task, self.sampling.seed, error)
                ended.append((task, failed))
                order = tuple(failed.order)
                self._on_event(Event("answer", task.query_id, failed.error, order=order, status=failed.status))
                continue
            if rollout.trajectory.finish == "length":
                ended.append(self._end(rollout))
        if not self._waiting:
            self._last_prompt = None  # nobody is there to share it
        results = self.engine.poll(self._playing.keys())
        if self._playing and not results:
            raise RuntimeError(
                "the engine has no room for this conversation: another ranking on it was paused and holds all of its "
                f"{self.engine.max_sessions} places; finish or close that one first"
            )
        rollouts = [self._playing[result.session] for result in results]
        for rollout, result in zip(rollouts, results, strict=True):
            self._record(rollout, result)
        for rollout, observation in zip(rollouts, self.pictures.map(_Rollout.respond, rollouts), strict=True):
            if self._advance(rollout, observation):
                ended.append(self._end(rollout))
        return ended

    def run(self, tasks: Iterable[AgentTask]) -> Iterator[tuple[AgentTask, Trajectory]]:
        """
        Plays tasks as they come and yields each with its trajectory as it ends, not in order.

        Only few more tasks are taken from `tasks` than the engine has room for, so it may be endless or large. Closing
        the iterator stops what is under way.
        """
        source = iter(tasks)
        exhausted = False
        try:
            while True:
                while not exhausted and self.is_hungry:
                    task = next(source, None)
                    if task is None:
                        exhausted = True
                    else:
                        self.submit(task)
                if not self.num_active:
                    return
                yield from self.step()
        finally:
            self.cancel()

    def cancel(self, query_id: str | None = None) -> list[tuple[AgentTask, Trajectory]]:
        """Stops one query, or everything, and frees the engine; hands back what had begun. Tells no event."""
        self._waiting = collections.deque(
            waiting for waiting in self._waiting if query_id is not None and waiting.task.query_id != query_id
        )
        chosen = [s for s, rollout in self._playing.items() if query_id is None or rollout.task.query_id == query_id]
        stopped = [self._playing.pop(session) for session in chosen]
        self._last_prompt = None
        for rollout in stopped:
            self.engine.close(rollout.session)
            rollout.trajectory.finish = "cancelled"
        return [(rollout.task, rollout.trajectory) for rollout in stopped]

    def _start(self, waiting: _Waiting) -> _Rollout:
        task = waiting.task
        rollout = _Rollout(task, waiting.pictures, self.engine.encoder.factor, self.sampling.seed)
        rollout.trajectory.exact_tokens = self.engine.exact_tokens
        started = time.perf_counter()
        encoded = self._prompt(waiting)
        seconds = time.perf_counter() - started
        rollout.trajectory.turns.append(
            Turn("prompt", encoded.token_ids, encoded.text, images=encoded.refs, seconds=seconds)
        )
        rollout.session = self.engine.open(task.query_id, task.sample)
        self._playing[rollout.session] = rollout
        self._submit(rollout, encoded)
        return rollout

    def _submit(self, rollout: _Rollout, encoded: Encoded) -> None:
        """Hands the engine what the model reads next, unless the context cannot hold it and an answer."""
        needed = rollout.trajectory.num_tokens + self.sampling.max_turn_tokens
        if needed > self.engine.max_length:
            rollout.trajectory.finish = "length"
            rollout.trajectory.problems.append(
                f"{needed} tokens are needed and the model reads at most {self.engine.max_length}: "
                "show fewer candidates, lower the pixel budgets or max_turn_tokens"
            )
        else:
            self.engine.submit(rollout.session, encoded, self.sampling)

    def _prompt(self, waiting: _Waiting) -> Encoded:
        """What the model reads first, encoded once for neighbours that show the same."""
        task, pictures = waiting.task, waiting.pictures
        if self._last_prompt is None or not _open_alike(self._last_prompt[0], task):
            encoded = self.engine.encoder.prompt(
                task.messages(),
                lambda number: pictures[number].original,
                task.preset,
                lambda ref, original: pictures[ref.index].overview,
            )
            self._last_prompt = task, encoded
        return self._last_prompt[1]

    def _record(self, rollout: _Rollout, result: TurnResult) -> None:
        """Writes down a model turn, or that there is none, and tells of it."""
        trajectory = rollout.trajectory
        if result.error is not None:
            trajectory.finish, trajectory.error = "error", result.error
            return
        if result.usage is not None:
            read, written = result.usage  # the first grows from turn to turn: it holds all turns before
            trajectory.usage = {"tokens": read + written, "sampled": trajectory.num_sampled_tokens + written}
        encoder = self.engine.encoder
        text = encoder.decode(result.token_ids) if result.text is None else result.text
        parsed = parse_turn(text) if result.stop != "length" else _cut_short(self.sampling.max_turn_tokens)
        turn = Turn(
            role="assistant",
            token_ids=result.token_ids + encoder.closing(result.token_ids),
            text=text,
            num_sampled=len(result.token_ids),
            logprobs=result.logprobs,
            seconds=result.seconds,
            kind=parsed.kind,
            thought=parsed.thought,
            call=dataclasses.asdict(parsed.call) if parsed.call else None,
            problem=parsed.problem,
        )
        trajectory.turns.append(turn)
        rollout.parsed = parsed
        if parsed.thought:
            self._on_event(Event("thought", trajectory.query_id, text=parsed.thought))
        if parsed.kind == "answer":
            trajectory.finish = "answer"
        elif turn.call:
            self._on_event(Event("call", trajectory.query_id, call=turn.call))

    def _advance(self, rollout: _Rollout, observation: Observation | None) -> bool:
        """Shows the model what it asked for. Returns whether the trajectory has ended."""
        if observation is None:
            return True
        self._on_event(
            Event(
                "observation",
                rollout.trajectory.query_id,
                observation.text,
                valid=observation.valid,
                images=tuple(observation.images),
                refs=tuple(observation.refs),
            )
        )
        started = time.perf_counter()
        encoded = self.engine.encoder.observation(observation)
        last = rollout.trajectory.turns[-1]
        rollout.trajectory.turns.append(
            Turn(
                "observation",
                encoded.token_ids,
                observation.text,
                images=encoded.refs,
                seconds=time.perf_counter() - started,
                valid=observation.valid,
            )
        )
        closing = last.token_ids[last.num_sampled :]
        self._submit(rollout, dataclasses.replace(encoded, token_ids=closing + encoded.token_ids))
        return rollout.trajectory.finish == "length"

    def _end(self, rollout: _Rollout) -> tuple[AgentTask, Trajectory]:
        self.engine.close(rollout.session)
        del self._playing[rollout.session]
        trajectory = rollout.trajectory
        last = trajectory.assistant_turns[-1].text if trajectory.assistant_turns else ""
        ranking = parse_ranking(last, trajectory.num_candidates)
        trajectory.order, trajectory.status = list(ranking.order), ranking.status
        trajectory.problems += ranking.problems
        if trajectory.finish != "answer" and trajectory.status == "ok":
            trajectory.status = "repaired"
            trajectory.problems.append("the answer did not stand in a turn of its own")
        order = tuple(trajectory.order)
        self._on_event(Event("answer", trajectory.query_id, trajectory.error, order=order, status=trajectory.status))
        return rollout.task, trajectory


@dataclasses.dataclass
class _Waiting:
    """A task, and the pictures of its query and candidates, which are being read."""

    task: AgentTask
    pictures: list[Picture | None]


def _open_alike(one: AgentTask, other: AgentTask) -> bool:
    """Whether two tasks begin with the same prompt: several samples of one window."""
    pairs = zip([one.query, *one.candidates], [other.query, *other.candidates], strict=False)
    return (
        len(one.candidates) == len(other.candidates)
        and all(item is twin for item, twin in pairs)
        and (one.preset, one.tools, one.prompt) == (other.preset, other.tools, other.prompt)
    )


class _Rollout:
    """A trajectory under way: its record, its pictures and what is left of its budget."""

    def __init__(self, task: AgentTask, pictures: Sequence[Picture | None], factor: int, seed: int):
        self.task = task
        self.session: Session | None = None
        self.parsed: ParsedTurn | None = None  # the last turn
        self.calls_left = task.preset.max_calls if task.tools else 0
        self._warned = False
        images = [None if picture is None else picture.original for picture in pictures]
        self._pictures = pictures  # those who show the same items share them as long as somebody does
        self._tools = VisualTools(images[0], images[1:], preset=task.preset, factor=factor)
        self.trajectory = _blank(task, seed)

    def respond(self) -> Observation | None:
        """What the model sees next; `None` where the trajectory has ended or the model has had its last word."""
        if self.trajectory.finish != "no_answer":
            return None
        parsed, turn = self.parsed, self.trajectory.turns[-1]
        if self.calls_left == 0:
            turn.valid = False if parsed.call else None
            if self._warned:
                return None
            self._warned = True
            return Observation(protocol.last_word(self.trajectory.num_candidates), [], False)
        self.calls_left -= 1
        if parsed.call is None:
            return Observation(protocol.malformed_observation(parsed.problem or "nothing to act on"), [], False)
        observation = self._tools.call(parsed.call.name, parsed.call.arguments)
        turn.valid = observation.valid
        return observation


def _blank(task: AgentTask, seed: int) -> Trajectory:
    count = len(task.candidates)
    return Trajectory(
        query_id=task.query_id,
        num_candidates=count,
        candidate_indices=list(range(count) if task.candidate_indices is None else task.candidate_indices),
        preset=task.preset.to_dict(),
        order=list(range(count)),
        seed=seed,
        sample=task.sample,
    )


def _failed(task: AgentTask, seed: int, error: Exception) -> Trajectory:
    trajectory = _blank(task, seed)
    trajectory.finish, trajectory.error = "error", str(error)
    return trajectory


def _cut_short(limit: int) -> ParsedTurn:
    return ParsedTurn(
        kind="malformed",
        thought=None,
        call=None,
        answer=None,
        problem=f"it did not end within {limit} tokens",
        well_formed=False,
    )


def play(
    engine: Engine,
    tasks: Sequence[AgentTask],
    sampling: Sampling | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> list[Trajectory]:
    """
    Plays all tasks and returns their trajectories in the order of the tasks.

    Args:
        engine (`Engine`):
            Runs the model.
        tasks (sequence of `AgentTask`):
            What to play.
        sampling (`Sampling`, *optional*):
            How tokens are drawn; greedily by default.
        on_event (`Callable[[Event], None]`, *optional*):
            Called with each [`Event`] as it happens.
    """
    copies = [dataclasses.replace(task) for task in tasks]  # one task may stand in several places
    places = {id(task): place for place, task in enumerate(copies)}
    trajectories: dict[int, Trajectory] = {}
    for task, trajectory in AgentLoop(engine, sampling, on_event).run(copies):
        trajectories[places[id(task)]] = trajectory
    return [trajectories[place] for place in range(len(tasks))]
