"""Plays held-out queries with the package's own reranker and measures R@1 with intervals.

    python recipes/emoji/evaluate.py --count 1000 --out recipes/emoji/results/tools.json
    python recipes/emoji/evaluate.py --count 1000 --no-tools --out recipes/emoji/results/no-tools.json

`tables.py` makes tables and a plot of such files. Finished rows are kept when the command is run again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from art import Art
from concepts import Concept, load_concepts
from examples import Entry, Example, Scene
from intervals import wilson
from PIL import Image
from scenes import draw_scene
from tasks import make_maker
from tqdm.auto import tqdm

from vretrver_hf import Item, Reranker
from vretrver_hf.protocol import get_preset


COMBINATION_TASKS = ("t2i", "it2i", "i2t", "t2it", "it2t", "it2it", "t2t", "overview", "detail")
CONCEPT_TASKS = ("i2i", "t2i", "t2t")
ARTIST_TASKS = ("t2i", "i2i", "i2t", "it2i", "overview", "detail")
SETS = (
    *((task, "test_combination") for task in COMBINATION_TASKS),
    *((task, "test_concept") for task in CONCEPT_TASKS),
    *((task, "test_artist") for task in ARTIST_TASKS),
)
"""Task and split of each row: held-out combinations, layouts and wordings; held-out base concepts; an artist never
seen. "overview" and "detail" are scenes asked for in words."""
SEED = 1
CANDIDATES = 5
AT_A_TIME = 256
"""Queries whose pictures are in memory together."""


class Result(NamedTuple):
    """What came of one query."""

    kind: str
    right: bool
    calls: int
    valid_calls: int
    tokens: int
    status: str


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; the bundled model by default.")] = None,
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    count: Annotated[int, typer.Option(help="Queries of each row.")] = 1000,
    only: Annotated[str, typer.Option(help="Rows to play, as task/split separated by commas; all by default.")] = "",
    tools: Annotated[bool, typer.Option(help="Whether the model may look closer.")] = True,
    overview_pixels: Annotated[
        int | None, typer.Option(help="Most pixels of a picture in the prompt; the model's own by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of the rows; those in it already are kept.")] = None,
    sessions: Annotated[int, typer.Option(help="Conversations at the same time.")] = 32,
    device: Annotated[str | None, typer.Option(help="Where to run; a GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Processes that play parts of the rows at the same time.")] = 1,
) -> None:
    """R@1 of a model on held-out queries with five candidates each, with calls, tokens and answer statuses."""
    names = list(chosen(only))
    player = Player(data, count, model, tools, overview_pixels, sessions, device, dtype)
    rows = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else []
    missing = [name for name in names if not any(player.key(*name).items() <= row.items() for row in rows)]
    for row in player.rows(missing, jobs):
        rows.append(row)
        typer.echo(line(row))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Player:
    """
    A model as it is to be played, ready to be sent to another process; it is loaded where it plays.

    Args:
        data (`Path`): Folder that `build_data.py` filled.
        count (`int`): Queries of each row.
        model (`str`, *optional*): Hub id or folder; the bundled model by default.
        tools (`bool`, *optional*, defaults to `True`): Whether it may look closer.
        overview_pixels (`int`, *optional*): Most pixels of a picture in the prompt; the model's own by default.
        sessions (`int`, *optional*, defaults to 32): Conversations at the same time.
        device (`str`, *optional*): Where to run.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
    """

    data: Path
    count: int
    model: str | None = None
    tools: bool = True
    overview_pixels: int | None = None
    sessions: int = 32
    device: str | None = None
    dtype: str = "auto"

    @functools.cached_property
    def reranker(self) -> Reranker:
        options = {"max_sessions": self.sessions, "device": self.device, "dtype": self.dtype}
        reranker = Reranker.from_pretrained(self.model, tools=self.tools, **options)
        if self.overview_pixels is not None:
            reranker.preset = get_preset(reranker.preset, overview_pixels=self.overview_pixels)
        return reranker

    @functools.cached_property
    def art(self) -> Art:
        return Art.load(self.data)

    @functools.cached_property
    def concepts(self) -> dict[str, Concept]:
        return load_concepts(self.data)

    @functools.cached_property
    def _examples(self) -> dict[tuple[str, str], list[Example]]:
        return {}

    def key(self, task: str, split: str) -> dict[str, Any]:
        """What tells a row from all others."""
        pixels = self.reranker.preset.overview_pixels
        return {"task": task, "split": split, "tools": self.tools, "overview_pixels": pixels, "n": self.count}

    def examples(self, task: str, split: str) -> list[Example]:
        """A row's queries; kept, since a process plays several parts of a row and a maker of scenes takes seconds."""
        if (task, split) not in self._examples:
            maker = make_maker(self.art, self.concepts, task, split, num_candidates=CANDIDATES)
            self._examples[task, split] = maker.make(self.count, SEED)
        return self._examples[task, split]

    def play(self, task: str, split: str, part: slice = slice(None)) -> tuple[list[Result], float]:
        """Plays a row's queries, or a part of them; what came of each, and the seconds that it took."""
        examples = self.examples(task, split)[part]
        started = time.perf_counter()
        results = play(self.reranker, self.art, examples, f"{task}/{split}")
        return results, time.perf_counter() - started

    def rows(self, names: Sequence[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
        """Plays rows one after another, or parts of them side by side; a row comes when it is complete."""
        if jobs == 1:
            yield from (self._row(*name, *self.play(*name)) for name in names)
            return
        context = multiprocessing.get_context("spawn")
        fresh = dataclasses.replace(self)  # without what was loaded here
        parts = [slice(start, start + AT_A_TIME) for start in range(0, self.count, AT_A_TIME)]
        with ProcessPoolExecutor(jobs, context, initializer=_adopt, initargs=(fresh,)) as pool:
            futures = {pool.submit(_play, *name, part): name for name in names for part in parts}
            played: dict[tuple[str, str], list[tuple[list[Result], float]]] = collections.defaultdict(list)
            for future in as_completed(futures):
                name = futures[future]
                played[name].append(future.result())
                if len(played[name]) == len(parts):
                    results, seconds = zip(*played.pop(name), strict=True)
                    yield self._row(*name, [result for part in results for result in part], sum(seconds))

    def _row(self, task: str, split: str, results: list[Result], seconds: float) -> dict[str, Any]:
        return {**self.key(task, split), **figures(results), "seconds": seconds / self.count}


_PLAYER: Player | None = None


def _adopt(player: Player) -> None:
    global _PLAYER
    _PLAYER = player


def _play(task: str, split: str, part: slice) -> tuple[list[Result], float]:
    return _PLAYER.play(task, split, part)


def chosen(only: str) -> Iterator[tuple[str, str]]:
    """
    The rows to play.

    Args:
        only (`str`): As task/split, separated by commas; all where it is empty.

    Raises:
        typer.BadParameter: A row that there is not.
    """
    if not only:
        yield from SETS
    for name in filter(None, only.split(",")):
        task, _, split = name.strip().partition("/")
        if (task, split) not in SETS:
            raise typer.BadParameter(f"there is no row {name!r}; rows are {', '.join('/'.join(row) for row in SETS)}")
        yield task, split


def pair(art: Art, example: Example) -> tuple[Item, list[Item]]:
    """An example as the reranker takes it."""

    def item(entry: Entry) -> Item:
        if entry.image is None:
            return Item(text=entry.text)
        pixels = draw_scene(art, entry.image) if isinstance(entry.image, Scene) else art.image(*entry.image)
        return Item(text=entry.text, image=Image.fromarray(pixels))

    return item(example.query), [item(candidate) for candidate in example.candidates]


def play(reranker: Reranker, art: Art, examples: list[Example], name: str) -> list[Result]:
    """
    Ranks the candidates of each example.

    Args:
        reranker (`Reranker`): What is measured.
        art (`Art`): The pictures.
        examples (`list[Example]`): What is asked.
        name (`str`): Stands before the progress bar.
    """
    results = []
    with tqdm(total=len(examples), unit="query", desc=name) as bar:
        for start in range(0, len(examples), AT_A_TIME):
            part = examples[start : start + AT_A_TIME]
            for example, ranking in zip(part, reranker.rank_batch(pair(art, e) for e in part), strict=True):
                right = ranking.order[0] == example.positive
                valid = sum(trajectory.num_valid_calls for trajectory in ranking.trajectories)
                results.append(
                    Result(example.kind, right, ranking.num_calls, valid, ranking.num_tokens, ranking.status)
                )
            bar.update(len(part))
    return results


def figures(results: list[Result]) -> dict[str, Any]:
    """What a row of the table says, and how often each kind of question was answered right."""
    count, calls = len(results), sum(result.calls for result in results)
    statuses = collections.Counter(result.status for result in results)
    kinds = collections.defaultdict(list)
    for result in results:
        kinds[result.kind].append(result.right)
    return {
        **share([result.right for result in results]),
        "calls": calls / count,
        "valid_calls": sum(result.valid_calls for result in results) / calls if calls else None,
        "tokens": sum(result.tokens for result in results) / count,
        "statuses": {status: statuses[status] / count for status in ("ok", "repaired", "fallback")},
        "kinds": {kind: share(hits) for kind, hits in sorted(kinds.items())},
    }


def share(hits: list[bool]) -> dict[str, Any]:
    """How many of how many, as R@1 with its interval."""
    return {"n": len(hits), "r1": sum(hits) / len(hits), "interval": wilson(sum(hits), len(hits))}


def line(row: dict[str, Any]) -> str:
    """A row in short."""
    low, high = row["interval"]
    valid = "–" if row["valid_calls"] is None else f"{row['valid_calls']:.1%}"
    return (
        f"{row['task']:8s} {row['split']:17s} R@1 {row['r1']:6.1%} [{low:.1%}, {high:.1%}]  n {row['n']}  "
        f"calls {row['calls']:.2f}  valid {valid}  tokens {row['tokens']:.0f}  ok {row['statuses']['ok']:.1%}  "
        f"{row['seconds']:.2f} s"
    )


if __name__ == "__main__":
    typer.run(main)
