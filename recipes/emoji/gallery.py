"""
Chooses traces of an evaluation for people to read, and writes them as Markdown with one picture each.

    python recipes/emoji/gallery.py outputs/emoji/proof/evaluations/full-0/test --out recipes/emoji/results/traces

The evaluation must have kept its trajectories (`--trajectories`). Of each sort the first that fit its rule are taken,
in an order drawn from the seed, whatever they look like. What people remark on them goes into `comments.yaml` in the
folder, one line a query id; run the command again, and the remarks stand beneath the traces.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
import yaml
from PIL import Image, ImageDraw
from proof_runs import query_kinds, target_boxes
from searching import shows
from sheets import BLACK, GAP, GREEN, GREY, LINE, RED, draw_text, plain

from vretrver_hf import Item
from vretrver_hf.data.examples import Examples, RerankExample, load_examples
from vretrver_hf.evaluation.job import QueryResult
from vretrver_hf.evaluation.results import Results
from vretrver_hf.html import rankings_html
from vretrver_hf.images import ImageRef
from vretrver_hf.journal import finished_entries
from vretrver_hf.ranking import Ranking
from vretrver_hf.trajectory import Trajectory, Turn


CELL = 168
"""Side of a picture on the page: twice what the model sees of a candidate, and one and a half times what it sees of a
crop. It is enlarged from that, since with more pixels it would show what the model cannot see."""
PAGE, COMMENTS = "README.md", "comments.yaml"
ATTRIBUTION = Path(__file__).with_name("ATTRIBUTION.md")


class Look(NamedTuple):
    """
    A call and what came of it.

    Args:
        turn (`Turn`): The model's turn.
        reply (`Turn`, *optional*): What it was told or shown.
        number (`int`, *optional*): Which candidate it cropped; 0 is the query.
        on_target (`bool`, *optional*): Whether a crop of a scene shows what is asked for.
    """

    turn: Turn
    reply: Turn | None
    number: int | None
    on_target: bool | None


@dataclasses.dataclass
class Trace:
    """
    A query and what a model made of it.

    Args:
        key (`str`): Id of the query.
        kind (`str`): Kind of question.
        positive (`int`): 0-based index of the right candidate.
        trajectory (`Trajectory`): The conversation.
        targets (`list[list[int]]`): Where in each candidate that is a scene what is asked for stands.
    """

    key: str
    kind: str
    positive: int
    trajectory: Trajectory
    targets: list[list[int]]

    @property
    def is_right(self) -> bool:
        return self.trajectory.order[0] == self.positive

    @property
    def is_detail(self) -> bool:
        """Whether only a closer look can tell."""
        return self.kind.startswith("detail/")

    @property
    def looks(self) -> list[Look]:
        turns = self.trajectory.turns
        pairs = itertools.zip_longest(turns, turns[1:])
        return [self._look(turn, after) for turn, after in pairs if turn.role == "assistant" and turn.call is not None]

    def _look(self, turn: Turn, reply: Turn | None) -> Look:
        crops = [ref for ref in (reply.images if reply else ()) if ref.box]
        if not crops:
            return Look(turn, reply, None, None)
        number = crops[0].index
        target = self.targets[number - 1] if number else []
        return Look(turn, reply, number, shows(crops[0].box, target) if target else None)


def recovered(trace: Trace) -> bool:
    """A detail put first after a crop of its scene beside it, or a call that was refused, and a later crop that shows
    it."""
    looks = trace.looks if trace.is_detail and trace.is_right else []
    return any(
        later.on_target
        and later.number == trace.positive + 1
        and (first.on_target is False and first.number == later.number or first.turn.valid is False)
        for first, later in itertools.combinations(looks, 2)
    )


def needed(trace: Trace) -> bool:
    """A detail put first after a crop that shows it; no call went wrong."""
    looks = trace.looks if trace.is_detail and trace.is_right else []
    met = [look.number for look in looks if look.on_target]
    return trace.positive + 1 in met and len(met) == len(looks)


def wrong(trace: Trace) -> bool:
    """Another candidate was put first, although the model looked."""
    return not trace.is_right and any(look.turn.valid for look in trace.looks)


def needless(trace: Trace) -> bool:
    """Right, and looked at something all the same that the first look shows well enough."""
    return trace.is_right and not trace.is_detail and any(look.turn.valid for look in trace.looks)


SORTS: dict[str, tuple[str, Callable[[Trace], bool]]] = {
    "needed": ("Right, and the crop was needed", needed),
    "recovery": ("Right after a look that failed", recovered),
    "wrong": ("Wrong", wrong),
    "needless": ("Right, and the call was needless", needless),
}
"""Sorts of traces, each with its heading and its rule. No trace is of two sorts."""


def main(
    evaluation: Annotated[Path, typer.Argument(help="Folder that vretrver evaluate wrote with --trajectories.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("recipes/emoji/results/traces"),
    count: Annotated[int, typer.Option(min=1, help="Traces of each sort.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the order in which they are looked through.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Also write one large page with every picture in full.")] = None,
) -> None:
    """Choose traces and write them down, with what people remarked on them."""
    results = Results.load(evaluation)
    data = Path(results.settings["data"])
    chosen = choose(read_traces(evaluation, data), count, seed)
    if not chosen:
        raise typer.BadParameter(f"{evaluation} has no trajectory of any sort; evaluate with --trajectories")
    comments = read_comments(out / COMMENTS, [trace.key for _, trace in chosen])
    examples = load_examples(data)
    write_gallery(out, results.name, chosen, examples, comments, seed)
    size = sum(path.stat().st_size for path in out.iterdir())
    typer.echo(f"{out}  {len(chosen)} traces, {size / 1e3:.0f} kB, {sum(not c for c in comments.values())} unremarked")
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(full_page(results.name, chosen, examples), encoding="utf-8")
        typer.echo(f"{html}  {html.stat().st_size / 1e6:.1f} MB")


def read_traces(evaluation: Path, data: Path) -> Iterator[Trace]:
    """
    The trajectories of an evaluation.

    Args:
        evaluation (`Path`): Folder that `vretrver evaluate` wrote.
        data (`Path`): The file of queries.
    """
    kinds, targets = query_kinds(data), target_boxes(data)
    for key, value in finished_entries(evaluation / "journal"):
        result = QueryResult.from_dict(value)
        positive = result.coarse.index(next(iter(result.relevant)))
        for trajectory in map(Trajectory.from_dict, result.trajectories or ()):
            yield Trace(key, kinds[key], positive, trajectory, targets[key])


def choose(traces: Iterator[Trace] | Sequence[Trace], count: int, seed: int) -> list[tuple[str, Trace]]:
    """
    So many of each sort, or as many as there are.

    Args:
        traces (`Sequence[Trace]`): All there are.
        count (`int`): How many of each sort.
        seed (`int`): Of the order in which they are looked through.

    Returns:
        `list[tuple[str, Trace]]`: The sort of each, and the trace.
    """
    order = sorted(traces, key=lambda trace: trace.key)
    random.Random(seed).shuffle(order)
    return [
        (sort, trace) for sort, (_, fits) in SORTS.items() for trace in itertools.islice(filter(fits, order), count)
    ]


def read_comments(path: Path, keys: Sequence[str]) -> dict[str, str]:
    """
    What people remarked on the traces; without a file one is written for them to fill in.

    Args:
        path (`Path`): The file.
        keys (`Sequence[str]`): Ids of the chosen queries.

    Raises:
        typer.BadParameter: It has remarks on queries that are not shown, which would be lost.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f'{key}: ""\n' for key in keys), encoding="utf-8")
    comments = {key: str(text or "") for key, text in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items()}
    if lost := [key for key, text in comments.items() if text and key not in keys]:
        raise typer.BadParameter(
            f"{path} has remarks on {', '.join(lost)}, which the gallery does not show; remove them"
        )
    return {key: " ".join(comments.get(key, "").split()) for key in keys}


def write_gallery(
    out: Path,
    name: str,
    chosen: Sequence[tuple[str, Trace]],
    examples: Examples,
    comments: dict[str, str],
    seed: int,
) -> None:
    """
    Write the page and its pictures.

    Args:
        out (`Path`): Folder to write.
        name (`str`): Of the model.
        chosen (`Sequence[tuple[str, Trace]]`): Sorts and traces.
        examples (`Examples`): The queries with their pictures.
        comments (`dict[str, str]`): What was remarked on each.
        seed (`int`): That they were chosen with.
    """
    rows = {key: row for row, key in enumerate(examples.query_ids)}
    for old in out.glob("*.webp"):
        old.unlink()
    rules = "\n".join(f"- **{title}:** {' '.join(rule.__doc__.split())}" for title, rule in SORTS.values())
    credit = os.path.relpath(ATTRIBUTION, out)
    parts = [
        f"# Traces of {name}\n",
        f"The first of each sort in an order drawn from seed {seed}, whatever they look like:\n",
        f"{rules}\n",
        "Pictures are enlarged from what the model saw. The right candidate has a green frame, a crop a red one.",
        f"The drawings are other people's work, openly licensed: see [{ATTRIBUTION.name}]({credit}).\n",
    ]
    for number, (sort, trace) in enumerate(chosen, start=1):
        example, picture = examples[rows[trace.key]], f"{number:02d}.webp"
        draw_trace(example, trace).save(out / picture, quality=72, method=6)
        parts.append(_section(number, SORTS[sort][0], example, trace, picture, comments[trace.key]))
    (out / PAGE).write_text("\n".join(parts), encoding="utf-8")


def full_page(name: str, chosen: Sequence[tuple[str, Trace]], examples: Examples) -> str:
    """The same traces on one self-contained web page, as the package shows rankings."""
    rows = {key: row for row, key in enumerate(examples.query_ids)}
    rankings = []
    for _, trace in chosen:
        example, trajectory = examples[rows[trace.key]], trace.trajectory
        named = [dataclasses.replace(item, id=str(place)) for place, item in enumerate(example.candidates)]
        status = trajectory.status
        rankings.append(Ranking(example.query, named, trajectory.order, status, [trajectory], query_id=trace.key))
    return rankings_html(
        rankings,
        title=f"Traces of {name}",
        headings=[f"{SORTS[sort][0]}: {trace.key}" for sort, trace in chosen],
        positives=[trace.positive for _, trace in chosen],
    )


def draw_trace(example: RerankExample, trace: Trace) -> Image.Image:
    """
    What the model saw: the query's picture and the candidates above, and what its calls showed below.

    Args:
        example (`RerankExample`): The query, with its pictures.
        trace (`Trace`): What the model made of it.
    """
    items = [example.query, *example.candidates]
    opening = {ref.index: ref for ref in trace.trajectory.turns[0].images}
    shown = list(_shown(trace))
    above = []
    for number, item in enumerate(items):
        if number or item.image is not None:
            boxes = [(label, ref.box) for label, ref, _ in shown if ref.index == number and ref.box]
            cell = _cell(item, opening.get(number), boxes)
            colour = GREEN if number == trace.positive + 1 else GREY
            above.append(_framed(cell, str(number) if number else "query", colour))
    below = [
        _framed(_seen(items[ref.index], ref), f"{label}: of {ref.index or 'query'}{', beside' * missed}", GREY)
        for label, ref, missed in shown
    ]
    strips = [_beside(cells) for cells in (above, below) if cells]
    return _beneath(strips)


def _shown(trace: Trace) -> Iterator[tuple[str, ImageRef, bool]]:
    """What calls showed, each with its letter, and whether it is a crop beside what is asked for."""
    shown = ((ref, look.on_target is False) for look in trace.looks if look.reply for ref in look.reply.images)
    letters = itertools.chain("abcdefghijklmnopqrstuvwxyz", itertools.repeat("?"))
    for letter, (ref, missed) in zip(letters, shown, strict=False):
        yield letter, ref, missed


def _section(number: int, title: str, example: RerankExample, trace: Trace, picture: str, comment: str) -> str:
    trajectory = trace.trajectory
    asked = example.query.text or "the picture"
    calls = f"{trajectory.num_calls} call{'' if trajectory.num_calls == 1 else 's'}"
    facts = f"`{trace.key}`, {trace.kind}; right is {trace.positive + 1}; {calls}, {trajectory.num_tokens:,} tokens"
    remark = comment or "*(no remark yet)*"
    lines = [f"## {number}. {title}\n", f"**{asked}**\n", f"{facts}\n", f"![What the model saw]({picture})\n"]
    return "\n".join([*lines, "~~~text", *_words(trace), "~~~\n", f"> {remark}\n"])


def _words(trace: Trace) -> Iterator[str]:
    """What the model wrote, and in short what it was told."""
    letters = {id(ref): label for label, ref, _ in _shown(trace)}
    for turn in trace.trajectory.turns[1:]:
        if turn.role == "assistant":
            yield turn.text.removesuffix("<|im_end|>").strip()
        elif turn.images:
            yield "→ " + ", ".join(f"{letters.get(id(ref), '?')}, {ref.width} × {ref.height}" for ref in turn.images)
        else:
            yield "→ " + " ".join(turn.text.split())


def _cell(item: Item, ref: ImageRef | None, boxes: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """A query or a candidate, with what was cropped of it."""
    lines = textwrap.wrap(plain(item.text or ""), CELL // 7)
    picture = _seen(item, ref) if ref is not None else None
    height = (CELL if picture else 0) + LINE * len(lines) + (4 if lines else 0)
    cell = Image.new("RGB", (CELL, max(height, LINE)), "white")
    draw = ImageDraw.Draw(cell)
    if picture is not None:
        cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
        width, height = item.load_image().size
        scale = min(CELL / width, CELL / height)
        for label, (left, top, right, bottom) in boxes:
            draw.rectangle([value * scale for value in (left, top, right, bottom)], outline=RED, width=2)
            draw_text(draw, label, (left * scale + 3, top * scale + 1), RED)
    for place, line in enumerate(lines):
        draw_text(draw, line, (2, (CELL if picture else 0) + 2 + LINE * place))
    return cell


def _seen(item: Item, ref: ImageRef) -> Image.Image:
    """A picture with the pixels that the model got, enlarged to a cell."""
    picture = ref.render(item.load_image())
    scale = CELL / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _framed(cell: Image.Image, label: str, colour: tuple[int, int, int]) -> Image.Image:
    framed = Image.new("RGB", (CELL + 6, cell.height + LINE + 8), "white")
    draw = ImageDraw.Draw(framed)
    draw_text(draw, label, (3, 0), BLACK if colour == GREY else colour)
    framed.paste(cell, (3 + (CELL - cell.width) // 2, LINE + 5))
    frame = (0, LINE + 2, framed.width - 1, framed.height - 1)
    draw.rectangle(frame, outline=colour, width=1 if colour == GREY else 3)
    return framed


def _beside(cells: Sequence[Image.Image]) -> Image.Image:
    size = sum(cell.width for cell in cells) + GAP * (len(cells) - 1), max(cell.height for cell in cells)
    strip, left = Image.new("RGB", size, "white"), 0
    for cell in cells:
        strip.paste(cell, (left, 0))
        left += cell.width + GAP
    return strip


def _beneath(strips: Sequence[Image.Image]) -> Image.Image:
    size = max(strip.width for strip in strips), sum(strip.height + GAP for strip in strips)
    page, top = Image.new("RGB", size, "white"), 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height + GAP
    return page


if __name__ == "__main__":
    typer.run(main)
