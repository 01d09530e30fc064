"""Whole conversations to learn from: trajectories with their pictures, and conversations of other data sets."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, overload

from ..agent import AgentLoop, AgentTask
from ..encoding import Encoded, Encoder
from ..engines.base import Sampling, Session
from ..engines.scripted import CutOff, ScriptedEngine
from ..images import ImageRef, ItemError
from ..items import Item
from ..protocol import IMAGE_MARK, Preset
from ..trajectory import Trajectory, Turn
from .examples import RerankExample, load_examples, write_examples
from .vretrver import ImageRoot, open_dataset


if TYPE_CHECKING:
    import datasets
    from PIL import Image


TRAJECTORIES, EXAMPLES = "trajectories.jsonl", "examples.parquet"
"""The two files of a folder of records."""


@dataclasses.dataclass(frozen=True)
class TrajectoryRecord:
    """
    A trajectory with the example that it was played on, so that its pictures can be made again.

    Args:
        example (`RerankExample`):
            The query with all its candidates.
        trajectory (`Trajectory`):
            The conversation; its `candidate_indices` say which of the candidates it shows.

    Raises:
        `ValueError`: if the two do not belong together.
    """

    example: RerankExample
    trajectory: Trajectory

    def __post_init__(self) -> None:
        query_id, indices = self.trajectory.query_id, self.trajectory.candidate_indices
        if query_id != self.example.query_id:
            raise ValueError(f"a trajectory of query {query_id!r} was paired with query {self.example.query_id!r}")
        count = len(self.example.candidates)
        if len(indices) != self.trajectory.num_candidates or not all(0 <= index < count for index in indices):
            raise ValueError(f"query {query_id}: candidate_indices {indices} do not fit its {count} candidates")

    def item(self, number: int) -> Item:
        """The item that the trajectory calls by this number: 0 is the query, i its i-th candidate."""
        if number == 0:
            return self.example.query
        return self.example.candidates[self.trajectory.candidate_indices[number - 1]]


def write_records(path: str | os.PathLike[str], records: Iterable[TrajectoryRecord]) -> None:
    """
    Writes records into a folder: `trajectories.jsonl`, and `examples.parquet` with the pictures, each example once
    however many trajectories show it. Each file appears when it is complete.

    Args:
        path (`str` or `os.PathLike`):
            The folder; made where there is none.
        records (iterable of `TrajectoryRecord`):
            The records, taken one at a time.

    Raises:
        `ValueError`: if two different examples have the same query id.

    Example:

    ```python
    >>> from vretrver_hf.data.conversations import read_records, write_records

    >>> write_records("records", [])  # doctest: +SKIP
    >>> len(read_records("records"))  # doctest: +SKIP
    0

    ```
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TRAJECTORIES}.part"
    with open(partial, "w", encoding="utf-8") as file:
        write_examples(folder / EXAMPLES, _write_trajectories(file, records))
    partial.replace(folder / TRAJECTORIES)


def read_records(path: str | os.PathLike[str]) -> Records:
    """
    Opens a folder that [`write_records`] wrote; records are read when they are asked for.

    Args:
        path (`str` or `os.PathLike`):
            The folder.

    Raises:
        `FileNotFoundError`: if one of the two files is missing.
    """
    return Records(path)


class Unusable(ValueError):
    """
    A conversation that cannot be learned from.

    Args:
        reason (`str`):
            Why, in a few words that are the same for all such conversations, to count them by.
        message (`str`):
            What exactly is wrong.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Conversation:
    """
    A conversation as a model reads and writes it.

    Args:
        token_ids (`list[int]`):
            The tokens, each picture's pads expanded.
        mask (`list[int]`):
            1 for each token that the model is to learn, else 0.
        images (`list[PIL.Image.Image]`):
            The pictures at the size the model sees, in the order of their pads.
        source (`str`):
            How the tokens came about: `"stored"` as they were sampled, or `"rendered"` from text.
    """

    token_ids: list[int]
    mask: list[int]
    images: list[Image.Image]
    source: Literal["stored", "rendered"]


class Conversations(Sequence[Conversation]):
    """
    Conversations in the tokens of one model, each made when it is asked for.

    Asking for one that cannot be learned from raises [`Unusable`], or [`~vretrver_hf.images.ItemError`] where a
    picture cannot be read.
    """

    @abstractmethod
    def __getitem__(self, index: int) -> Conversation: ...


def load_conversations(
    source: str | os.PathLike[str],
    encoder: Encoder,
    preset: Preset,
    split: str = "train",
    image_root: str | os.PathLike[str] | None = None,
) -> Conversations:
    """
    Opens conversations to learn from.

    Args:
        source (`str` or `os.PathLike`):
            A folder that [`write_records`] wrote; or a JSON, JSONL or parquet file or a data set on the hub whose rows
            have `conversations` (`[{"from": …, "value": text with <image> marks}]`) or `messages`
            (`[{"role": …, "content": text or blocks}]`), and `images`.
        encoder (`Encoder`):
            Of the model that is to learn them.
        preset (`Preset`):
            The protocol. Trajectories must have been played under it; pictures of other data sets are fitted to its
            budgets.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a data set on the hub.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative picture paths start from; the folder of a local source by default.

    Raises:
        `ValueError`: if the rows have none of these columns.
        `FileNotFoundError`: if what looks like a file does not exist.
    """
    if Path(source, TRAJECTORIES).is_file():
        return TrajectoryConversations(read_records(source), encoder, preset)
    dataset, root = open_dataset(source, split)
    return MessageConversations(dataset, encoder, preset, root if image_root is None else image_root, str(source))


class TrajectoryConversations(Conversations):
    """
    Recorded trajectories.

    Their tokens are taken as they were sampled where the model that is to learn them would read the same prompt. If it
    has another tokenizer or picture size, or if the trajectory was made under another prompt or by an engine that
    returns text only, the trajectory is played again: what its model wrote is said once more in the new model's
    tokens, and the tools answer.

    Args:
        records (sequence of `TrajectoryRecord`):
            The trajectories.
        encoder (`Encoder`):
            Of the model that is to learn them.
        preset (`Preset`):
            The protocol under which they were played.
    """

    def __init__(self, records: Sequence[TrajectoryRecord], encoder: Encoder, preset: Preset):
        self._records, self._encoder, self._preset = records, encoder, preset

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        record = self._records[index]
        trajectory = record.trajectory
        if not trajectory.assistant_turns:
            raise Unusable("no assistant turn", f"query {trajectory.query_id}: the model wrote nothing")
        self._check_preset(trajectory)
        task = _task(record, self._preset)
        if trajectory.exact_tokens:
            load = functools.cache(lambda number: record.item(number).load_image(name=_place(record, number)))
            prompt = self._encoder.prompt(task.messages(), load, self._preset)
            if prompt.token_ids == trajectory.turns[0].token_ids:
                later = [ref for turn in trajectory.turns[1:] for ref in turn.images]
                images = prompt.images + [ref.render(load(ref.index)) for ref in later]
                return Conversation(trajectory.token_ids, trajectory.mask, images, "stored")
        return _play_again(task, trajectory, self._encoder)

    def _check_preset(self, trajectory: Trajectory) -> None:
        played, asked = Preset.from_dict(trajectory.preset).to_dict(), self._preset.to_dict()
        if different := [name for name in asked if asked[name] != played[name]]:
            theirs, ours = ({name: values[name] for name in different} for values in (played, asked))
            raise ValueError(
                f"query {trajectory.query_id} was played under {theirs}, but the model is to be trained under {ours}; "
                "set preset and preset_overrides to those of the trajectories"
            )


class MessageConversations(Conversations):
    """
    Conversations of other data sets, as text with pictures.

    Texts are kept, but a control token such as `<|im_end|>` inside one is defused. The model's own tokens are those
    that the chat template marks; what follows the last of them is cut off. Pictures of the opening turns are fitted to
    the preset's overview budget and later ones to its inspection budget.

    Args:
        dataset (`datasets.Dataset`):
            The rows; see [`load_conversations`].
        encoder (`Encoder`):
            Of the model that is to learn them.
        preset (`Preset`):
            The protocol, for its picture budgets.
        image_root (`str`, `os.PathLike` or `ImageRoot`, *optional*):
            Folder that relative picture paths start from.
        name (`str`, *optional*, defaults to `"data set"`):
            What error messages call the data set.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        encoder: Encoder,
        preset: Preset,
        image_root: str | os.PathLike[str] | ImageRoot | None = None,
        name: str = "data set",
    ):
        columns = [column for column in ("messages", "conversations") if column in dataset.column_names]
        if not columns:
            raise ValueError(
                f"{name} has the columns {dataset.column_names}: conversations are read from `messages` or "
                f"`conversations`, and trajectories from a folder with {TRAJECTORIES} and {EXAMPLES}"
            )
        self._column = columns[0]
        self._dataset = dataset.with_format("arrow")  # pictures as they are stored: decoding names the broken ones
        self._encoder, self._name = encoder, name
        self._images = image_root if isinstance(image_root, ImageRoot) else ImageRoot(image_root)
        self._overview, self._inspect = preset, dataclasses.replace(preset, overview_pixels=None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Conversation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._name} has {len(self)} rows, there is no row {index}")
        (row,) = self._dataset[index].to_pylist()
        where = f"{self._name}, row {index % len(self)}"
        messages, sources = _messages(row[self._column], where), row.get("images") or []
        count = len(_images_of(messages))
        if count != len(sources):
            raise Unusable(
                "pictures do not fit", f"{where}: {count} pictures in the text but {len(sources)} in `images`"
            )
        if all(message["role"] != "assistant" for message in messages):
            raise Unusable("no assistant turn", f"{where}: no turn is the model's")
        return self._encode(messages, sources, where)

    def _encode(self, messages: list[dict[str, Any]], sources: list[Any], where: str) -> Conversation:
        rendered = self._encoder.tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        end = len(mask) - mask[::-1].index(1)  # what follows is read but nothing is written after it
        opening = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        in_opening = len(_images_of(messages[:opening]))
        images: list[Image.Image] = []
        token_ids: list[int] = []
        learned: list[int] = []
        for token, bit in zip(ids[:end], mask[:end], strict=True):
            repeats = 1
            if token == self._encoder.image_pad:
                number = len(images)
                name = f"{where}, image {number + 1}"
                image = self._item(sources[number], name).load_image(name=name)
                preset = self._overview if number < in_opening else self._inspect
                ref = ImageRef(number, *self._encoder.overview_size(image.size, preset))
                images.append(ref.render(image))
                repeats = self._encoder.image_tokens(ref)
            token_ids += [token] * repeats
            learned += [bit] * repeats
        return Conversation(token_ids, learned, images, "rendered")

    def _item(self, image: Any, name: str) -> Item:
        """The picture, by its bytes or its path from `image_root`."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            try:
                image = self._images.find(image)
            except ItemError as error:
                raise ItemError(f"{name}: {error}") from None
        return Item.coerce({"image": image}, name=name)


class Records(Sequence[TrajectoryRecord]):
    """
    The records of a folder, each read when it is asked for.

    Args:
        path (`str` or `os.PathLike`):
            The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        for name in (TRAJECTORIES, EXAMPLES):
            if not Path(path, name).is_file():
                raise FileNotFoundError(f"{path} has no {name}: it is no folder that write_records wrote")
        self.path = Path(path)
        with open(self.path / TRAJECTORIES, "rb") as file:
            self._starts = list(_line_starts(file))
        self._rows: dict[str, int] = {}
        if self._starts:  # a data set without rows cannot be opened
            self.examples = load_examples(self.path / EXAMPLES)
            self._rows = {query_id: row for row, query_id in enumerate(self.examples.query_ids)}

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> TrajectoryRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrajectoryRecord]: ...
    def __getitem__(self, index: int | slice) -> TrajectoryRecord | list[TrajectoryRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no record {index}")
        where = f"{self.path / TRAJECTORIES}, line {index % len(self) + 1}"
        # Opened each time: a file cannot be shared by the processes that load data.
        with open(self.path / TRAJECTORIES, "rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            trajectory = Trajectory.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: not a trajectory ({error})") from error
        if trajectory.query_id not in self._rows:
            raise ValueError(f"{where}: query {trajectory.query_id!r} is not in {EXAMPLES}")
        return TrajectoryRecord(self.examples[self._rows[trajectory.query_id]], trajectory)


def _write_trajectories(file: IO[str], records: Iterable[TrajectoryRecord]) -> Iterator[RerankExample]:
    """Writes every trajectory and hands on each example when it is first met."""
    seen: dict[str, tuple[object, ...]] = {}
    for record in records:
        file.write(json.dumps(record.trajectory.to_dict(), ensure_ascii=False) + "\n")
        example = record.example
        mark = (example.query.text, *(item.text for item in example.candidates), *example.positives)
        if example.query_id not in seen:
            seen[example.query_id] = mark
            yield example
        elif seen[example.query_id] != mark:
            raise ValueError(f"two examples have the query id {example.query_id!r}; give each query an id of its own")


def _line_starts(file: IO[bytes]) -> Iterator[int]:
    start = 0
    for line in file:
        if line.strip():
            yield start
        start += len(line)


_ROLES = {"human": "user", "gpt": "assistant", "observation": "user", "tool": "user"}
"""Other names of roles; what a tool returned is a user turn."""

_CONTROL = re.compile(r"<(?=\|[^|<>\s]{1,64}\|>)")


def _messages(turns: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """The turns as chat templates take them, one block a picture."""
    messages = []
    for turn in turns or []:
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        role = _ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise Unusable("unknown role", f"{where}: a turn has the role {role!r}")
        blocks = _split_marks(content) if isinstance(content, str) else [_block(block) for block in content or []]
        if role == "assistant" and any(block["type"] == "image" for block in blocks):
            raise Unusable("picture in an assistant turn", f"{where}: a turn of the model's shows a picture")
        messages.append({"role": role, "content": blocks})
    return messages


def _split_marks(text: str) -> list[dict[str, str]]:
    first, *rest = text.split(IMAGE_MARK)
    blocks = [_text(first)]
    for piece in rest:
        blocks += [{"type": "image"}, _text(piece)]
    return blocks


def _block(block: Mapping[str, Any]) -> dict[str, str]:
    return {"type": "image"} if block["type"] == "image" else _text(block["text"])


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": _CONTROL.sub("< ", text)}


def _images_of(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [block for message in messages for block in message["content"] if block["type"] == "image"]


def _task(record: TrajectoryRecord, preset: Preset) -> AgentTask:
    """What the trajectory's model was given to play."""
    trajectory = record.trajectory
    return AgentTask(
        query=record.example.query,
        candidates=[record.item(number) for number in range(1, trajectory.num_candidates + 1)],
        preset=preset,
        query_id=trajectory.query_id,
        candidate_indices=trajectory.candidate_indices,
        sample=trajectory.sample,
        tools="<tools>" in trajectory.turns[0].text,
        prompt=record.example.prompt,
    )


def _place(record: TrajectoryRecord, number: int) -> str:
    return f"query {record.example.query_id}, " + (f"candidate {number}" if number else "query image")


def _play_again(task: AgentTask, trajectory: Trajectory, encoder: Encoder) -> Conversation:
    engine = _Replay(encoder, trajectory)
    ((_, played),) = AgentLoop(engine, Sampling(max_turn_tokens=_NO_LIMIT)).run([task])
    if played.error is not None:
        raise ItemError(f"query {trajectory.query_id}: {played.error}")
    if len(played.assistant_turns) != len(trajectory.assistant_turns):
        raise engine.ended()
    return Conversation(played.token_ids, played.mask, engine.images, "rendered")


_NO_LIMIT = 2**62
"""Tokens: how long is too long is for the caller to say."""


class _Replay(ScriptedEngine):
    """Says what a trajectory's model wrote, in another model's tokens, and keeps the pictures that it is shown."""

    def __init__(self, encoder: Encoder, trajectory: Trajectory):
        super().__init__(encoder, self._written, max_sessions=1, max_length=2 * _NO_LIMIT)
        self.images: list[Image.Image] = []
        self._query_id = trajectory.query_id
        self._turns = trajectory.assistant_turns

    def submit(self, session: Session, encoded: Encoded, sampling: Sampling) -> None:
        self.images += encoded.images
        super().submit(session, encoded, sampling)

    def _written(self, query_id: str, number: int) -> str:
        if number == len(self._turns):
            raise self.ended()
        turn = self._turns[number]
        return CutOff(turn.text) if _was_cut(turn) else turn.text

    def ended(self) -> Unusable:
        """What to raise where the conversation does not go as it was recorded."""
        message = f"query {self._query_id}: played again, the conversation has another number of turns"
        return Unusable("does not play again", message)


def _was_cut(turn: Turn) -> bool:
    """Whether the turn ran into its token limit: the loop then closed it, though it did not end in a call."""
    return turn.num_sampled < len(turn.token_ids) and not turn.text.endswith("</tool_call>")
