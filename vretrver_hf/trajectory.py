"""One typed record of one conversation: what was read, what was sampled, what was seen, and what came of it.

Token ids are the truth and text is for reading: training and scoring use the ids as they were sampled. Pictures are
kept by reference ([`ImageRef`]), so that a record is small and any of its pictures can be made again from the query's
own images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .images import ImageRef


if TYPE_CHECKING:
    import datasets

Finish = Literal["answer", "no_answer", "length", "cancelled", "error"]


@dataclasses.dataclass
class Turn:
    """
    One turn of a trajectory.

    Args:
        role (`str`):
            `"prompt"` (the opening messages), `"assistant"` (the model's own) or `"observation"` (what it was shown).
        token_ids (`list[int]`):
            The turn's tokens, image pads expanded. An observation starts with the newline that follows the end mark
            of the turn before it, so that the turns' ids simply concatenate.
        text (`str`):
            The tokens as text, for reading; never tokenised again.
        num_sampled (`int`, *optional*, defaults to 0):
            How many of `token_ids`, from the first, the model sampled. What follows them was appended by the loop.
        logprobs (`list[float]`, *optional*):
            Natural-log probability of each sampled token under the sampling temperature, before any truncation.
        images (`list[ImageRef]`, *optional*):
            The turn's pictures, in the order in which the model meets them.
        seconds (`float`, *optional*, defaults to 0.0):
            Wall-clock time from asking for the turn to having it.
        kind (`str`, *optional*):
            Of an assistant turn: `"call"`, `"answer"` or `"malformed"`.
        thought (`str`, *optional*):
            The text inside `<think>`.
        call (`dict`, *optional*):
            `{"name": …, "arguments": …}` of a parsed tool call.
        valid (`bool`, *optional*):
            Whether the call could be carried out; `None` where there was no call.
        problem (`str`, *optional*):
            What was wrong with the turn, in the words the model was told.
    """

    role: Literal["prompt", "assistant", "observation"]
    token_ids: list[int]
    text: str
    num_sampled: int = 0
    logprobs: list[float] | None = None
    images: list[ImageRef] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    kind: Literal["call", "answer", "malformed"] | None = None
    thought: str | None = None
    call: dict[str, Any] | None = None
    valid: bool | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.num_sampled <= len(self.token_ids):
            raise ValueError(f"num_sampled is {self.num_sampled} but the turn has {len(self.token_ids)} tokens")
        if self.logprobs is not None and len(self.logprobs) != self.num_sampled:
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {self.num_sampled} sampled tokens")

    @property
    def mask(self) -> list[int]:
        """1 for each token that the model sampled, else 0."""
        return [1] * self.num_sampled + [0] * (len(self.token_ids) - self.num_sampled)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "images": [ref.to_dict() for ref in self.images]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Turn:
        return cls(**{**values, "images": [ImageRef.from_dict(ref) for ref in values["images"]]})


@dataclasses.dataclass
class Trajectory:
    """
    A whole conversation about one window of one query.

    Args:
        query_id (`str`):
            Identifies the query within a job.
        num_candidates (`int`):
            Number of candidates in this window.
        candidate_indices (`list[int]`):
            0-based indices of those candidates in the query's full list; place i holds the candidate numbered i + 1.
        preset (`dict`):
            The [`Preset`] it was played under, as `Preset.to_dict()`.
        turns (`list[Turn]`, *optional*):
            The prompt, then assistant turns and observations in alternation.
        finish (`str`, *optional*, defaults to `"no_answer"`):
            Why it ended: `"answer"`, `"no_answer"` (calls and turns spent), `"length"` (the context was full),
            `"cancelled"` or `"error"`.
        order (`list[int]`, *optional*):
            Ranking of the window, best first: 0-based places, a permutation of `range(num_candidates)`.
        status (`str`, *optional*, defaults to `"fallback"`):
            `"ok"`, `"repaired"` or `"fallback"`, of the answer.
        problems (`list[str]`, *optional*):
            What was repaired.
        seed (`int`, *optional*, defaults to 0), sample (`int`, *optional*, defaults to 0):
            With `query_id` and the turn's number, all that the sampling depends on.
        exact_tokens (`bool`, *optional*, defaults to `True`):
            Whether the ids are those the model sampled; an engine that returns only text says `False`.
        error (`str`, *optional*):
            What went wrong, where `finish` is `"error"`.
        usage (`dict`, *optional*):
            `{"tokens": …, "sampled": …}`: tokens read and written, and those written, as an engine that returns only
            text counts them.
    """

    query_id: str
    num_candidates: int
    candidate_indices: list[int]
    preset: dict[str, Any]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    finish: Finish = "no_answer"
    order: list[int] = dataclasses.field(default_factory=list)
    status: Literal["ok", "repaired", "fallback"] = "fallback"
    problems: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    sample: int = 0
    exact_tokens: bool = True
    error: str | None = None
    usage: dict[str, int] | None = None

    @property
    def token_ids(self) -> list[int]:
        """All tokens, prompt included, in order."""
        return [token for turn in self.turns for token in turn.token_ids]

    @property
    def mask(self) -> list[int]:
        """1 for each token that the model sampled, else 0; as long as `token_ids`."""
        return [bit for turn in self.turns for bit in turn.mask]

    @property
    def logprobs(self) -> list[float | None]:
        """Log-probability of each sampled token where known, else `None`; as long as `token_ids`."""
        values: list[float | None] = []
        for turn in self.turns:
            values += turn.logprobs if turn.logprobs is not None else [None] * turn.num_sampled
            values += [None] * (len(turn.token_ids) - turn.num_sampled)
        return values

    @property
    def images(self) -> list[ImageRef]:
        """All pictures, in the order in which the model met them."""
        return [ref for turn in self.turns for ref in turn.images]

    @property
    def assistant_turns(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.role == "assistant"]

    @property
    def completion(self) -> str:
        """The model's own text of the whole trajectory, observations left out."""
        return "\n".join(turn.text for turn in self.assistant_turns)

    @property
    def num_calls(self) -> int:
        """Tool calls made, carried out or not."""
        return sum(turn.call is not None for turn in self.assistant_turns)

    @property
    def num_valid_calls(self) -> int:
        """Tool calls that could be carried out."""
        return sum(turn.valid is True for turn in self.assistant_turns)

    @property
    def num_tokens(self) -> int:
        """Tokens read and written, image tokens included."""
        return self.usage["tokens"] if self.usage else sum(len(turn.token_ids) for turn in self.turns)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that the model wrote."""
        return self.usage["sampled"] if self.usage else sum(turn.num_sampled for turn in self.turns)

    @property
    def seconds(self) -> float:
        """Sum of the turns' times, in seconds."""
        return sum(turn.seconds for turn in self.turns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; [`Trajectory.from_dict`] gives an equal record back."""
        return {**vars(self), "turns": [turn.to_dict() for turn in self.turns]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trajectory:
        return cls(**{**values, "turns": [Turn.from_dict(turn) for turn in values["turns"]]})


def write_jsonl(path: str | Path, trajectories: Iterable[Trajectory], append: bool = False) -> None:
    """Writes one trajectory a line, behind those that the file holds with `append`."""
    with open(path, "a" if append else "w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(json.dumps(trajectory.to_dict(), ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[Trajectory]:
    """
    Reads what [`write_jsonl`] wrote, one at a time.

    Raises:
        `ValueError`: naming file and line where a line holds no trajectory.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Trajectory.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a trajectory ({error})") from error


def to_dataset(trajectories: Sequence[Trajectory]) -> datasets.Dataset:
    """The trajectories as a `datasets.Dataset`, one a row. Needs the `train` extra."""
    import datasets

    return datasets.Dataset.from_list([_to_row(trajectory) for trajectory in trajectories], features=_features())


def from_dataset(dataset: Iterable[dict[str, Any]]) -> Iterator[Trajectory]:
    """The trajectories of a data set that [`to_dataset`] made."""
    for row in dataset:
        yield _from_row(row)


def _to_row(trajectory: Trajectory) -> dict[str, Any]:
    """Arrow columns have one type each, so what differs from row to row in shape travels as JSON text."""
    row = trajectory.to_dict()
    row["preset"] = json.dumps(row["preset"])
    for turn in row["turns"]:
        turn["call"] = None if turn["call"] is None else json.dumps(turn["call"], ensure_ascii=False)
    return row


def _from_row(row: dict[str, Any]) -> Trajectory:
    turns = []
    for turn in row["turns"]:
        turns.append({**turn, "call": None if turn["call"] is None else json.loads(turn["call"])})
    return Trajectory.from_dict({**row, "preset": json.loads(row["preset"]), "turns": turns})


def _features() -> datasets.Features:
    from datasets import Features, List, Value

    integer, text, flag = Value("int64"), Value("string"), Value("bool")
    image = {"index": integer, "width": integer, "height": integer, "box": List(integer)}
    turn = {
        "role": text,
        "token_ids": List(integer),
        "text": text,
        "num_sampled": integer,
        "logprobs": List(Value("float64")),
        "images": List(image),
        "seconds": Value("float64"),
        "kind": text,
        "thought": text,
        "call": text,
        "valid": flag,
        "problem": text,
    }
    return Features(
        {
            "query_id": text,
            "num_candidates": integer,
            "candidate_indices": List(integer),
            "preset": text,
            "turns": List(turn),
            "finish": text,
            "order": List(integer),
            "status": text,
            "problems": List(text),
            "seed": integer,
            "sample": integer,
            "exact_tokens": flag,
            "error": text,
            "usage": {"tokens": integer, "sampled": integer},
        }
    )
