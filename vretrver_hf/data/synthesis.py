"""Cold-start synthesis: a strong model writes worked examples, and rules decide which are fit to learn from.

The teacher reads the student's own prompt behind an annotation prompt, its calls are carried out for real, and what it
wrote is recorded as if the student had written it: the annotation prompt is left out. By default the teacher is not
told which candidate is right. A thought that leads to an answer which somebody else gave away is an excuse and not a
reason, and whether the answer is right then says nothing about the thought; so the labels filter instead.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..encoding import overviews
from ..engines._chat import image_block, make_client, reason_of, text_of, turn_seed
from ..images import load_image
from ..journal import Journal
from ..parsing import parse_ranking, parse_turn
from ..pictures import named
from ..protocol import IMAGE_MARK, Preset, format_answer, format_call, format_turn
from ..tools import VisualTools
from ..trajectory import Trajectory, Turn
from .examples import RerankExample, to_row
from .rejection import CARD, REASONS, Query, Summary, modalities, reason, settings_section


CONVERSATIONS, IMAGES = "conversations.json", "images"
"""What [`write_conversations`] writes: the released form, conversations and pictures."""

TEACHER_REASONS = {
    **REASONS,
    "no conclusion": 'the last thought does not end with "Best first:" and numbers',
    "contradiction": "the answer does not begin with what the last thought concludes",
    "hint": "a thought speaks of the revealed answer",
}
"""Why a conversation of a teacher is rejected."""

_CONCLUSION = re.compile(r"best first:\W*(\d{1,6}(?:[\s,>]+\d{1,6})*)\W*\Z", re.IGNORECASE)
_HINT = re.compile(r"\b(was|been|were) (told|given)\b|\bgiven answer\b|\bground.truth\b|\brevealed\b", re.IGNORECASE)
_STORED = re.compile(r"[0-9a-f]{32}\.\w+(\.part)?")
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "observation": "human"}
_PATIENCE = 10
"""Queries that may fail one after another before the teacher is taken to be out of order."""


class TeacherError(RuntimeError):
    """A query for which the teacher gave no usable reply, after all retries."""


class TeacherDown(RuntimeError):
    """A teacher that will not serve any query: wrong address, key or model, or many failures in a row."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """
    A model behind an OpenAI-compatible chat endpoint.

    Args:
        base_url (`str`):
            Address of the endpoint, such as `"http://localhost:8000/v1"`.
        model (`str`):
            Name of the model there.
        api_key (`str`, *optional*, defaults to `"none"`):
            Key of the endpoint; servers of one's own take any.
        temperature (`float`, *optional*, defaults to 0.7):
            Of the sampling.
        max_turn_tokens (`int`, *optional*, defaults to 2048):
            Most tokens of one turn.
        timeout (`float`, *optional*, defaults to 600):
            Seconds that one reply may take.
        retries (`int`, *optional*, defaults to 5):
            How often a request is tried again, with growing pauses, after 408, 409, 429, 5xx, a time-out or a broken
            connection.
    """

    base_url: str
    model: str
    api_key: str = dataclasses.field(default="none", repr=False)
    temperature: float = 0.7
    max_turn_tokens: int = 2048
    timeout: float = 600
    retries: int = 5


def annotation_prompt(preset: Preset, positives: Sequence[int] | None = None) -> str:
    """
    What the teacher is asked to do, in front of the student's own prompt.

    Args:
        preset (`Preset`):
            The student's protocol.
        positives (sequence of `int`, *optional*):
            0-based indices of the relevant candidates, to reveal them.
    """
    rounds = f"{preset.max_calls} call{'' if preset.max_calls == 1 else 's'}"
    lines = [
        "You write worked examples for a smaller model, which will learn to compare candidates as you do. What it "
        "reads stands below; answer as it should.",
        "",
        "1. Say which features of the query decide, in a few words.",
        "2. Hold every candidate against them, a few words each.",
        "3. Name the few candidates that may be right.",
        f"4. Where their pictures are too small to tell, look closer with a tool, one call a turn, {rounds} at most. "
        "After a call, stop; what the tool shows comes in the next message. Where you can tell, call nothing.",
        "5. Close your last thought with the line `Best first:` and the numbers of those few, such as "
        "`Best first: 3, 1`. Then answer: those numbers in that order, and behind them all the others.",
        "",
        "Every turn is <think>…</think> and then exactly one <tool_call>…</tool_call> or one <answer>…</answer>, with "
        "nothing around them. Claim nothing that you have not seen.",
    ]
    if positives is not None:
        numbers = ", ".join(str(index + 1) for index in sorted(positives))
        lines.append(
            f"Between us: relevant {'is' if len(positives) == 1 else 'are'} {numbers}. Argue from what can be seen "
            "and never mention that you knew."
        )
    return "\n".join(lines)


def synthesize_queries(
    examples: Sequence[RerankExample],
    keys: Sequence[str],
    journal: Journal,
    teacher: Teacher,
    preset: Preset,
    *,
    seed: int = 0,
    factor: int = 28,
    reveal: bool = False,
    concurrency: int = 8,
    on_query: Callable[[str, Query | None], None] | None = None,
) -> None:
    """
    Has the teacher play each query and notes it in the journal; queries that are there already are left out.

    A turn that departs from the protocol, or a call that cannot be carried out, ends the conversation: it would be
    rejected anyway. A query that the teacher does not answer, or whose pictures cannot be read, is noted as failed.

    Args:
        examples (sequence of `RerankExample`):
            The queries, read when their turn comes.
        keys (sequence of `str`):
            Their query ids.
        journal (`Journal`):
            Where finished queries go.
        teacher (`Teacher`):
            Who is asked.
        preset (`Preset`):
            The student's protocol.
        seed (`int`, *optional*, defaults to 0):
            With query id and turn, the seed that is sent along with each request.
        factor (`int`, *optional*, defaults to 28):
            Sides of pictures are multiples of it: 28 for Qwen2.5-VL students, 32 for Qwen3-VL.
        reveal (`bool`, *optional*, defaults to `False`):
            Whether the teacher is told which candidates are relevant.
        concurrency (`int`, *optional*, defaults to 8):
            Queries under way at a time.
        on_query (`Callable`, *optional*):
            Called with each query id as it is done, and with the [`Query`], or `None` where it failed.

    Raises:
        `TeacherDown`: if the endpoint refuses address, key or model, or fails ten queries in a row.
    """
    tell = on_query or (lambda key, query: None)
    failures = 0

    async def one(client: Any, key: str, example: RerankExample) -> None:
        nonlocal failures
        talk = await asyncio.to_thread(_Talk, example, preset, seed, factor, reveal)
        try:
            await talk.play(lambda messages, turn_seed: _ask(client, teacher, messages, turn_seed))
        except TeacherError as error:
            failures += 1
            if failures >= _PATIENCE:
                raise TeacherDown(f"the teacher failed {failures} queries in a row; the last: {error}") from error
            raise
        failures = 0
        query = Query(key, example.positives, example.data_source, modalities(example), [talk.trajectory])
        journal.append(key, query.to_dict())
        tell(key, query)

    async def work(client: Any, rows: Iterator[int]) -> None:
        for row in rows:
            try:
                await one(client, keys[row], examples[row])
            except (TeacherError, ValueError) as error:
                journal.fail(keys[row], str(error))
                tell(keys[row], None)

    async def run() -> None:
        rows = iter([row for row, key in enumerate(keys) if key not in journal])
        async with make_client(teacher.base_url, teacher.api_key, teacher.timeout, teacher.retries) as client:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work(client, rows))

    try:
        asyncio.run(run())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def judge(query: Query, max_rank: int | None = 1, revealed: bool = False) -> str | None:
    """
    Why a teacher's conversation is rejected, one of [`TEACHER_REASONS`], or `None` where it is fit to learn from.

    Args:
        query (`Query`):
            The query with its one conversation.
        max_rank (`int`, *optional*, defaults to 1):
            The worst rank that the best relevant candidate may have; `None` does not look at the labels.
        revealed (`bool`, *optional*, defaults to `False`):
            Whether the teacher knew the relevant candidates; then thoughts that speak of it are rejected.
    """
    (trajectory,) = query.trajectories
    turns = trajectory.assistant_turns
    sound = reason(trajectory, query.positives, max_rank=None)
    if sound is not None:
        return sound
    conclusion = _CONCLUSION.search(turns[-1].thought or "")
    if conclusion is None:
        return "no conclusion"
    numbers = [int(number) for number in re.findall(r"\d+", conclusion[1])]
    if [place + 1 for place in trajectory.order[: len(numbers)]] != numbers:
        return "contradiction"
    if revealed and any(_HINT.search(turn.thought or "") for turn in turns):
        return "hint"
    return reason(trajectory, query.positives, max_rank)


def write_conversations(
    folder: str | os.PathLike[str],
    examples: Sequence[RerankExample],
    keys: Sequence[str],
    journal: Journal,
    max_rank: int | None = 1,
    revealed: bool = False,
) -> Summary:
    """
    Writes the accepted conversations in the released form, in the order of the queries.

    `conversations.json` is a list of `{"conversations": [{"from": system|human|gpt, "value": …}], "images": [path]}`,
    with an `<image>` mark for each picture; the paths start from the folder. Pictures are stored as they came, each
    once, and regions cut from them: whoever learns from them fits them to its own budgets, as inference does.

    Args:
        folder (`str` or `os.PathLike`):
            Where to write.
        examples (sequence of `RerankExample`), keys (sequence of `str`), journal (`Journal`):
            As [`synthesize_queries`] had them.
        max_rank (`int`, *optional*, defaults to 1), revealed (`bool`, *optional*, defaults to `False`):
            See [`judge`].
    """
    errors = journal.errors
    summary = Summary(errors={key: errors[key] for key in keys if key in errors})
    used: set[str] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for row, key in enumerate(keys):
            if key not in journal:
                continue
            query = Query.from_dict(journal[key])
            verdict = judge(query, max_rank, revealed)
            summary.add(query, [verdict], [0] if verdict is None else [])
            if verdict is None:
                entry = _released(query.trajectories[0], examples[row], Path(folder))
                used.update(entry["images"])
                yield entry

    Path(folder, IMAGES).mkdir(parents=True, exist_ok=True)
    _write_json_list(Path(folder, CONVERSATIONS), rows())
    for path in Path(folder, IMAGES).iterdir():  # of an earlier choice
        if _STORED.fullmatch(path.name) and f"{IMAGES}/{path.name}" not in used:
            path.unlink()
    return summary


def write_card(folder: str | os.PathLike[str], summary: Summary, settings: Mapping[str, Any], keep: str) -> None:
    """
    Writes the data card: who wrote the conversations, how many were accepted, and why the rest was not.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the conversations.
        summary (`Summary`):
            What came of the job.
        settings (mapping):
            What the teacher was asked with.
        keep (`str`):
            The rule for the ranking.
    """
    total = summary.total
    known = "was told" if settings["reveal"] else "was not told"
    card = f"""---
tags:
- vretrver
- synthetic
configs:
- config_name: default
  data_files: {CONVERSATIONS}
---

# Worked examples

{total.kept} conversations in which `{settings["teacher"]}` ranks candidates for a query, of {total.queries} that it \
was asked for. It {known} which candidates are relevant. Its tool calls were carried out for real, and rules chose \
which conversations to keep.

`{CONVERSATIONS}` holds a list of `{{"conversations": [{{"from", "value"}}], "images": [path]}}`; an `<image>` mark \
stands for each picture, and paths start from this folder. The annotation prompt is not part of the conversations.

## Acceptance

{summary.group_table()}

{summary.reason_table(TEACHER_REASONS)}

{summary.call_table()}
{settings_section(summary, {**settings, "keep": keep})}
"""
    Path(folder, CARD).write_text(card, encoding="utf-8")


class _Talk:
    """One conversation with the teacher: what it is sent, and the record of it as the student would have it."""

    def __init__(self, example: RerankExample, preset: Preset, seed: int, factor: int, reveal: bool):
        example = _decoded(example)
        self._seed = seed
        self._images: list[Image.Image | None] = [item.image for item in [example.query, *example.candidates]]
        self._tools = VisualTools(self._images[0], self._images[1:], preset=preset, factor=factor)
        self._calls_left = preset.max_calls
        prompt = example.task(preset).messages()
        refs, pictures = overviews(prompt, self._images.__getitem__, preset, factor)
        self.trajectory = Trajectory(
            query_id=example.query_id,
            num_candidates=len(example.candidates),
            candidate_indices=list(range(len(example.candidates))),
            preset=preset.to_dict(),
            turns=[Turn("prompt", [], "\n".join(text for _, text in _marked(prompt)), images=refs)],
            order=list(range(len(example.candidates))),
            seed=seed,
            exact_tokens=False,
        )
        annotation = annotation_prompt(preset, example.positives if reveal else None)
        self._messages = self._for_teacher(prompt, pictures, annotation)

    async def play(self, ask: Callable[[list[dict[str, Any]], int], Any]) -> None:
        """Lets the teacher write turns until it answers or leaves the protocol."""
        while True:
            turn = self._read(await ask(self._messages, self._turn_seed()))
            self.trajectory.turns.append(turn)
            if turn.kind == "answer":
                self._finish(turn)
            if turn.kind != "call" or turn.problem is not None:
                return
            if not await asyncio.to_thread(self._observe, turn):
                return

    def _read(self, text: str) -> Turn:
        parsed = parse_turn(text)
        call = None if parsed.call is None else dataclasses.asdict(parsed.call)
        if parsed.well_formed:
            # What the student learns to write is the protocol's own spelling, not the teacher's.
            ranking = parse_ranking(text, self.trajectory.num_candidates)
            action = format_call(**call) if call else f"<answer>{parsed.answer}</answer>"
            if parsed.kind == "answer" and ranking.status == "ok":
                action = format_answer(ranking.order)
            text = format_turn(parsed.thought or "", action)
        return Turn("assistant", [], text, kind=parsed.kind, thought=parsed.thought, call=call, problem=parsed.problem)

    def _observe(self, turn: Turn) -> bool:
        """Carries out a call and shows the teacher what came of it. Returns whether it could be carried out."""
        turn.valid = False
        if self._calls_left == 0:
            return False
        self._calls_left -= 1
        observation = self._tools.call(turn.call["name"], turn.call["arguments"])
        if not observation.valid:
            return False
        turn.valid = True
        refs = list(observation.refs)
        self.trajectory.turns.append(Turn("observation", [], observation.text, images=refs, valid=True))
        pictures = [image_block(image, "jpeg") for image in observation.images]
        self._messages += [
            {"role": "assistant", "content": turn.text},
            {"role": "user", "content": [{"type": "text", "text": observation.text}, *pictures]},
        ]
        return True

    def _finish(self, turn: Turn) -> None:
        ranking = parse_ranking(turn.text, self.trajectory.num_candidates)
        self.trajectory.finish = "answer"
        self.trajectory.order, self.trajectory.status = list(ranking.order), ranking.status
        self.trajectory.problems = ranking.problems

    def _turn_seed(self) -> int:
        turn = len(self.trajectory.assistant_turns)
        return turn_seed(random.Random(f"{self._seed}/{self.trajectory.query_id}/{turn}"))

    def _for_teacher(
        self, prompt: list[dict[str, Any]], pictures: list[Image.Image], annotation: str
    ) -> list[dict[str, Any]]:
        rendered = (image_block(picture, "jpeg") for picture in pictures)
        messages = [
            {
                "role": message["role"],
                "content": [block if block["type"] == "text" else next(rendered) for block in message["content"]],
            }
            for message in prompt
        ]
        # Some servers take a system turn as text only, and only in front.
        system = [annotation]
        while messages and messages[0]["role"] == "system":
            system.append("".join(block["text"] for block in messages.pop(0)["content"]))
        return [{"role": "system", "content": "\n\n".join(system)}, *messages]


async def _ask(client: Any, teacher: Teacher, messages: list[dict[str, Any]], seed: int) -> str:
    import openai

    try:
        reply = await client.chat.completions.create(
            model=teacher.model,
            messages=messages,
            temperature=teacher.temperature,
            max_completion_tokens=teacher.max_turn_tokens,
            seed=seed,
        )
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise TeacherDown(f"the teacher refuses: {reason_of(error, teacher.api_key)}") from error
    except (openai.OpenAIError, ValueError) as error:  # ValueError: a reply that is no JSON
        raise TeacherError(f"no reply from the teacher: {reason_of(error, teacher.api_key)}") from error
    try:
        return text_of(reply)
    except ValueError as error:
        raise TeacherError(str(error)) from None


def _marked(messages: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Roles and texts with a mark for each picture. A mark in somebody's text is defused, for marks are counted."""
    return [
        (
            message["role"],
            "".join(_defuse(block["text"]) if block["type"] == "text" else IMAGE_MARK for block in message["content"]),
        )
        for message in messages
    ]


def _defuse(text: str) -> str:
    return text.replace(IMAGE_MARK, "< image>")


def _released(trajectory: Trajectory, example: RerankExample, folder: Path) -> dict[str, Any]:
    """A conversation in the released form, its pictures stored."""
    items = [example.query, *example.candidates]
    with_image = [number for number, item in enumerate(items) if item.image is not None]
    files = {
        number: entry["image"]["bytes"] for number, entry in zip(with_image, to_row(example)["images"], strict=True)
    }
    paths = [_store(files[ref.index], ref.box, folder) for ref in trajectory.images]
    entries = _marked(example.task(Preset.from_dict(trajectory.preset)).messages())
    entries += [(turn.role, _defuse(turn.text) + IMAGE_MARK * len(turn.images)) for turn in trajectory.turns[1:]]
    conversations = [{"from": _SPEAKERS[role], "value": value} for role, value in entries]
    return {"id": trajectory.query_id, "conversations": conversations, "images": paths}


def _store(data: bytes, box: tuple[int, int, int, int] | None, folder: Path) -> str:
    """Writes a picture or a region of it under a name made of its content; returns its path within the folder."""
    if box is not None:
        buffer = io.BytesIO()
        load_image(data).crop(box).save(buffer, "PNG")
        data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        suffix = str(image.format).lower()
    name = f"{IMAGES}/{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
    if not (folder / name).exists():
        draft = folder / f"{name}.part"
        draft.write_bytes(data)
        draft.replace(folder / name)
    return name


def _write_json_list(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One entry a line, so that nothing has to be held; the file appears when it is complete."""
    partial = path.with_suffix(".part")
    with open(partial, "w", encoding="utf-8") as file:
        separator = "[\n"
        for row in rows:
            file.write(separator + json.dumps(row, ensure_ascii=False))
            separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")
    partial.replace(path)


def _decoded(example: RerankExample) -> RerankExample:
    """The example with its pictures read, and with a name for one that is broken."""
    items = []
    for name, item in named([example.query, *example.candidates]):
        if item.image is not None:
            item = dataclasses.replace(item, image=item.load_image(name=name))
        items.append(item)
    return dataclasses.replace(example, query=items[0], candidates=items[1:])
