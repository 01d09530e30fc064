"""Rollouts of the project's own agent loop, in the form in which TRL's GRPO trainer takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..agent import AgentLoop, AgentTask
from ..data.examples import RerankExample
from ..encoding import Encoded, Encoder
from ..engines.base import Engine, Sampling
from ..environment import RerankEnvironment, marked_text
from ..rewards import RolloutFacts
from ..trajectory import Trajectory, Turn


class RecordedEnvironment(RerankEnvironment):
    """
    Where the project's loop plays in place of TRL's: it hands the trainer its row and keeps the rollout's record.

    Its prompt is text, for logs only, since TRL gathers prompts over all ranks in every step.

    Attributes:
        trajectory (`Trajectory`, *optional*):
            What was played.
        tools (`bool`):
            Whether the model might call tools.
    """

    def __init__(self, encoder: Encoder, preset: Any):
        super().__init__(encoder, preset)
        self.trajectory: Trajectory | None = None
        self.tools = True

    def reset(self, example: RerankExample, **columns: Any) -> str:
        self.example = example
        self.trajectory = None
        return marked_text(example.task(self.preset).messages()[-1]["content"])

    @property
    def facts(self) -> RolloutFacts:
        return RolloutFacts(
            completion=self.trajectory.completion,
            positives=[index + 1 for index in self.example.positives],
            num_candidates=len(self.example.candidates),
            valid_tool_calls=self.trajectory.num_valid_calls,
            tools=self.tools,
        )


@dataclasses.dataclass
class Rollout:
    """
    A trajectory as the trainer takes it.

    Args:
        trajectory (`Trajectory`):
            The record, cut to what is trained on.
        prompt_ids (`list[int]`):
            The prompt's tokens, pads expanded.
        completion_ids (`list[int]`):
            All tokens behind the prompt; at least one.
        mask (`list[int]`):
            1 for each token of `completion_ids` that the model sampled.
        logprobs (`list[float]`, *optional*):
            Log-probability of each of them, 0 for the others.
        images (`list[PIL.Image.Image]`):
            The pictures of prompt and completion at the size the rollout saw.
        messages (`list[dict]`):
            The completion as text, for reading.
    """

    trajectory: Trajectory
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float] | None
    images: list[Image.Image]
    messages: list[dict[str, str]]


def play_rollouts(
    engine: Engine, tasks: Sequence[AgentTask], sampling: Sampling, max_completion_length: int
) -> list[Rollout]:
    """
    Plays every task and returns their rollouts in order.

    Args:
        engine (`Engine`):
            Runs the model.
        tasks (sequence of `AgentTask`):
            What to play; those of one example next to each other.
        sampling (`Sampling`):
            How tokens are drawn.
        max_completion_length (`int`):
            Most tokens behind the prompt.
    """
    tasks = [dataclasses.replace(task) for task in tasks]  # one task may stand in several places
    places = {id(task): place for place, task in enumerate(tasks)}
    rollouts: dict[int, Rollout] = {}
    loop = _RolloutLoop(engine, sampling)
    for task, trajectory in loop.run(tasks):
        shown = loop.shown.pop(id(trajectory), [])
        cut = cut_trajectory(trajectory, max_completion_length, engine.encoder)
        rollouts[places[id(task)]] = to_rollout(cut, shown, engine.encoder)
    return [rollouts[place] for place in range(len(tasks))]


def cut_trajectory(trajectory: Trajectory, limit: int, encoder: Encoder) -> Trajectory:
    """
    The trajectory with at most `limit` tokens behind its prompt, and nothing behind the model's last turn.

    An observation is kept whole or not at all: a part of a picture's pads would fit no picture.
    """
    kept: list[Turn] = trajectory.turns[:1]
    room = limit
    for turn in trajectory.turns[1:]:
        if len(turn.token_ids) <= room:
            kept.append(turn)
            room -= len(turn.token_ids)
            continue
        if turn.role == "assistant" and room:
            kept.append(_shortened(turn, room, encoder))
        break
    while kept and kept[-1].role == "observation":
        kept.pop()
    if sum(turn.num_sampled for turn in kept) == trajectory.num_sampled_tokens:
        return dataclasses.replace(trajectory, turns=kept)
    return dataclasses.replace(
        trajectory,
        turns=kept,
        finish="length",
        order=list(range(trajectory.num_candidates)),
        status="fallback",
        problems=[f"cut off at max_completion_length, {limit} tokens"],
    )


def to_rollout(trajectory: Trajectory, pictures: Sequence[Image.Image], encoder: Encoder) -> Rollout:
    """
    The trajectory as the trainer takes it. One in which the model never spoke becomes a single end mark behind
    another, of which nothing is learned.

    Args:
        trajectory (`Trajectory`):
            From [`cut_trajectory`].
        pictures (sequence of `PIL.Image.Image`):
            What it showed, in order; more than the trajectory refers to where it was cut.
        encoder (`Encoder`):
            That of the engine that played it.
    """
    if not trajectory.assistant_turns:
        end = [encoder.end_of_turn]
        return Rollout(trajectory, end, list(end), [0], [0.0], [], [{"role": "assistant", "content": ""}])
    prompt, *turns = trajectory.turns
    completion_ids = [token for turn in turns for token in turn.token_ids]
    mask = [bit for turn in turns for bit in turn.mask]
    logprobs = [0.0 if value is None else value for value in trajectory.logprobs[len(prompt.token_ids) :]]
    last = turns[-1]
    if last.token_ids[last.num_sampled - 1] not in encoder.stop_ids:
        # The end mark that the loop wrote would make a turn that was cut off look finished.
        appended = len(last.token_ids) - last.num_sampled
        kept = len(completion_ids) - appended
        completion_ids, mask, logprobs = completion_ids[:kept], mask[:kept], logprobs[:kept]
    images = list(pictures[: len(trajectory.images)])
    _check_pads(prompt.token_ids + completion_ids, images, encoder)
    return Rollout(
        trajectory=trajectory,
        prompt_ids=prompt.token_ids,
        completion_ids=completion_ids,
        mask=mask,
        logprobs=None if any(turn.logprobs is None for turn in trajectory.assistant_turns) else logprobs,
        images=images,
        messages=[
            {"role": "assistant" if turn.role == "assistant" else "tool", "content": turn.text} for turn in turns
        ],
    )


def with_unseen_picture(rollout: Rollout, encoder: Encoder) -> Rollout:
    """
    The rollout with a blank picture behind its end, which nothing attends to. The models fail at a batch that has no
    picture where TRL, which looks at all batches of a step together, says that it has some. And where a tower that is
    trained is sharded (ZeRO-3, FSDP), a process without any would skip it and leave the others waiting for it.
    """
    # The last token comes again, since TRL tells by it whether a completion was cut off.
    appended = [encoder.image_pad, rollout.completion_ids[-1]]
    return dataclasses.replace(
        rollout,
        completion_ids=rollout.completion_ids + appended,
        mask=rollout.mask + [0] * len(appended),
        logprobs=None if rollout.logprobs is None else rollout.logprobs + [0.0] * len(appended),
        images=[unseen_picture(encoder)],
    )


def unseen_picture(encoder: Encoder) -> Image.Image:
    """What [`with_unseen_picture`] adds: one token of black."""
    return Image.new("RGB", (encoder.factor, encoder.factor))


class _RolloutLoop(AgentLoop):
    """Keeps the pictures that each trajectory shows, since they are what the loss must read."""

    def __init__(self, engine: Engine, sampling: Sampling):
        super().__init__(engine, sampling)
        self.shown: dict[int, list[Image.Image]] = {}

    def _submit(self, rollout: Any, encoded: Encoded) -> None:
        self.shown.setdefault(id(rollout.trajectory), []).extend(encoded.images)
        super()._submit(rollout, encoded)


def _shortened(turn: Turn, room: int, encoder: Encoder) -> Turn:
    sampled = min(turn.num_sampled, room)
    shorter = dataclasses.replace(
        turn,
        token_ids=turn.token_ids[:room],
        num_sampled=sampled,
        logprobs=None if turn.logprobs is None else turn.logprobs[:sampled],
    )
    if sampled == turn.num_sampled:  # nothing of the model's own is lost
        return shorter
    return dataclasses.replace(
        shorter,
        text=encoder.decode(shorter.token_ids),
        kind="malformed",
        thought=None,
        call=None,
        valid=None,
        problem="it was cut off",
    )


def _check_pads(token_ids: Sequence[int], images: Sequence[Image.Image], encoder: Encoder) -> None:
    """TRL drops every picture of a batch, in silence, where pads and pictures do not fit."""
    pads = sum(token == encoder.image_pad for token in token_ids)
    expected = sum((image.width // encoder.factor) * (image.height // encoder.factor) for image in images)
    if pads != expected:
        raise RuntimeError(f"a rollout has {pads} image tokens but its {len(images)} pictures take {expected}")
