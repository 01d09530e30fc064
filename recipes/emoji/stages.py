"""What each stage of training reads: rows of captions, choices and whole trajectories, made by worker processes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from art import ARTISTS, Art
from cases import Case, CaseMaker, Side, draw_view
from concepts import Concept, caption, load_concepts
from examples import Example
from preset import INSPECT_PIXELS, OVERVIEW_PIXELS
from rows import Batch, Row, RowMaker, by_length, collate
from tasks import TASKS, ExampleMaker, pictures
from tokenizers import Tokenizer
from trajectories import Oracle

from vretrver_hf.protocol import format_answer


STAGE0_TASKS = {"t2i": 0.45, "i2i": 0.35, "i2t": 0.2}
SFT_TASKS = {"t2i": 0.45, "i2i": 0.35, "i2t": 0.2}
CAPTION_ROWS, MATCH_ROWS = 0.2, 0.25
"""Shares of stage 0's rows that are captions of single pictures and verdicts on one candidate after another; the
others are choices among candidates. A choice teaches too little at first: one number for a whole row of pictures."""
MATCH_WEIGHT = 3.0
CAPTIONS_A_ROW = 4
DESCRIBED = 2
"""Pictures of a choice that the model is asked to describe once it has chosen: binds numbers to pictures."""
BUDGETS = ((OVERVIEW_PIXELS, 0.82), (INSPECT_PIXELS, 0.12), (56 * 56, 0.06))
"""Pixel budgets of stage 0's pictures, and their shares."""
ODD_SHAPES, ODD = ((3, 2), (2, 3), (2, 1), (1, 2)), 0.2
"""Shapes of pictures that are not square, and their share."""
OTHER_COUNTS = 0.4
"""Share of examples with another number of candidates than five: two to eight."""
EASY = 0.4
"""Share of stage 0's examples whose negatives are all drawn at random: what differs in everything is learned first."""
STAGE0_CHOICE_WEIGHT, SFT_CHOICE_WEIGHT = 8.0, 4.0
"""Weight of the tokens that decide, among many that do not."""
MAX_PART_TOKENS = 96_000
"""Most tokens that go through the model at once; a batch of more goes in parts."""


@dataclasses.dataclass
class Source:
    """
    Makes batches of any stage. A batch depends on the seed, the stage and its number alone.

    Args:
        data (`Path`):
            The folder that `build_data.py` filled.
        processor (`Path`):
            The folder that `tokenizer.py` filled.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.
    """

    data: Path
    processor: Path
    seed: int = 0

    @functools.cached_property
    def art(self) -> Art:
        return Art.load(self.data, tuple(a for a in ARTISTS if (self.data / "images" / f"{a}.json").exists()))

    @functools.cached_property
    def concepts(self) -> dict[str, Concept]:
        return load_concepts(self.data)

    @functools.cached_property
    def cases(self) -> CaseMaker:
        return CaseMaker(self.art, self.concepts)

    @functools.cached_property
    def rows(self) -> RowMaker:
        return RowMaker(Tokenizer.from_file(str(self.processor / "tokenizer.json")))

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.concepts)

    @functools.cached_property
    def _train_pictures(self) -> list[tuple[str, str]]:
        return pictures(self.art, self.concepts, "train")

    @functools.cached_property
    def _examples(self) -> dict[str, ExampleMaker]:
        return {task: ExampleMaker(self.art, self.concepts, task, "train") for task in TASKS}

    def prepare(self) -> None:
        """Loads everything that workers share, before they are forked."""
        _ = self.rows, self.oracle, self.cases, self._train_pictures, self._examples

    def batch(self, stage: str, number: int, size: int) -> list[Batch]:
        """Batch `number` of `stage` ("stage0" or "sft") with `size` rows, in parts of rows of like length."""
        rng = random.Random(f"{self.seed}/{stage}/{number}")
        make = {"stage0": self._stage0_rows, "sft": self._sft_rows}[stage]
        return self.parts(make(size, rng), row_multiple=32, length_multiple=64)

    def parts(
        self,
        rows: Sequence[Row],
        marks: Sequence[Sequence[int]] | None = None,
        row_multiple: int = 1,
        length_multiple: int = 32,
    ) -> list[Batch]:
        """Rows as batches of rows of like length; each row is marked with `marks`, or else its place."""
        marks = marks or [[place] for place in range(len(rows))]
        pad = self.rows.image_pad
        return [
            collate(
                [rows[place] for place in part], pad, [marks[place] for place in part], length_multiple, row_multiple
            )
            for part in by_length(rows, MAX_PART_TOKENS)
        ]

    def caption_row(self, rng: random.Random) -> Row:
        """Several pictures, one after another, each with what it shows."""
        messages, shown = [{"role": "system", "content": "Describe each image."}], []
        budget = _draw(dict(BUDGETS), rng)
        for _ in range(CAPTIONS_A_ROW):
            artist, code = rng.choice(self._train_pictures)
            view = draw_view(self.cases.row(artist, code), (1, 1), rng)
            shown.append(view.within(budget))
            messages.append({"role": "user", "content": [{"type": "image"}]})
            messages.append({"role": "assistant", "content": caption(self.concepts[code], rng)})
        return self.rows.row(messages, shown)

    def choice_row(self, case: Case, rng: random.Random, described: int = DESCRIBED) -> Row:
        """A case answered at once, and then what some of its pictures show."""
        messages = case.messages(tools=False)
        shown = case.pictures(messages)
        messages.append({"role": "assistant", "content": format_answer(case.order)})
        numbers = [number for number, side in enumerate(case.sides) if side.view is not None and side.concept]
        for number in rng.sample(numbers, min(described, len(numbers))):
            messages.append({"role": "user", "content": f"Describe image {number}."})
            messages.append({"role": "assistant", "content": caption(case.sides[number].concept, rng)})
        return self.rows.row(messages, shown, choice_weight=STAGE0_CHOICE_WEIGHT)

    def match_row(self, case: Case) -> Row:
        """The candidates of a case one by one, each with whether it fits."""
        messages = [{"role": "system", "content": "Does it fit?"}]
        messages += [{"role": "user", "content": blocks} for blocks in map(_blocks, case.sides)]
        for place in range(len(case.candidates), 0, -1):
            verdict = "yes" if place - 1 == case.order[0] else "no"
            messages.insert(place + 2, {"role": "assistant", "content": verdict, "loss": MATCH_WEIGHT})
        shown = [side.view.within(case.overview_pixels) for side in case.sides if side.view is not None]
        return self.rows.row(messages, shown)

    def open_row(self, case: Case, tools: bool) -> Row:
        """A case up to where the model begins to write."""
        messages = case.messages(tools=tools)
        return self.rows.row(messages, case.pictures(messages), close=False)

    def trajectory_row(self, case: Case, rng: random.Random) -> Row:
        """A whole conversation of the oracle's."""
        return self.rows.row(*self.oracle.play(case, rng), choice_weight=SFT_CHOICE_WEIGHT)

    def evaluation(self, task: str, split: str, count: int, seed: int = 1) -> list[Case]:
        """Cases of a split, each picture whole and square."""
        examples = ExampleMaker(self.art, self.concepts, task, split).make(count, seed)
        return [self.cases.plain(example) for example in examples]

    def _stage0_rows(self, size: int, rng: random.Random) -> list[Row]:
        captions = round(size * CAPTION_ROWS)
        rows = [self.caption_row(rng) for _ in range(captions)]
        # The tower takes pictures size by size, so a batch has one odd shape at most, and that in one size only.
        odd = rng.choice(ODD_SHAPES)
        match_share = MATCH_ROWS / (1 - CAPTION_ROWS)
        for example in self._draw_examples(STAGE0_TASKS, size - captions, rng, EASY):
            shape, budget = ((1, 1), _draw(dict(BUDGETS), rng)) if rng.random() >= ODD else (odd, OVERVIEW_PIXELS)
            case = self.cases.varied(example, rng, shape)
            case = dataclasses.replace(case, overview_pixels=budget)
            rows.append(self.match_row(case) if rng.random() < match_share else self.choice_row(case, rng))
        return rows

    def _sft_rows(self, size: int, rng: random.Random) -> list[Row]:
        examples = self._draw_examples(SFT_TASKS, size, rng, 0.0)
        rows = []
        for example in examples:
            shape = (1, 1) if rng.random() >= ODD else rng.choice(ODD_SHAPES)
            rows.append(self.trajectory_row(self.cases.varied(example, rng, shape), rng))
        return rows

    def _draw_examples(
        self, shares: dict[str, float], count: int, rng: random.Random, easy: float
    ) -> Iterator[Example]:
        def draw() -> tuple[str, int, bool]:
            candidates = rng.randint(2, 8) if rng.random() < OTHER_COUNTS else 5
            return _draw(shares, rng), candidates, rng.random() >= easy

        for (task, candidates, hard), number in sorted(collections.Counter(draw() for _ in range(count)).items()):
            maker = copy.copy(self._examples[task])
            maker.num_candidates, maker.hardness = candidates, float(hard)
            yield from maker.make(number, rng.getrandbits(48))


class Feed:
    """
    Batches from worker processes, in order, a bounded number ahead.

    Make it before the accelerator is touched: its workers are forked.

    Args:
        source (`Source`):
            Makes the batches.
        workers (`int`):
            Number of processes; 0 makes each batch when it is asked for.
    """

    def __init__(self, source: Source, workers: int):
        self.source, self.workers = source, workers
        source.prepare()
        self._pool = None
        if workers:
            self._pool = multiprocessing.get_context("fork").Pool(workers, _adopt, (source,))

    def batches(self, stage: str, size: int, start: int = 0) -> Iterator[list[Batch]]:
        """Endless batches of a stage with `size` rows each, from number `start` on."""
        ahead = collections.deque()
        for number in itertools.count(start):
            if self._pool is None:
                yield self.source.batch(stage, number, size)
                continue
            ahead.append(self._pool.apply_async(_make, (stage, number, size)))
            if len(ahead) >= 3 * self.workers:
                yield ahead.popleft().get()

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


_SOURCE: Source | None = None


def _adopt(source: Source) -> None:
    global _SOURCE
    _SOURCE = source


def _make(stage: str, number: int, size: int) -> list[Batch]:
    return _SOURCE.batch(stage, number, size)


def _blocks(side: Side) -> list[dict[str, str]]:
    picture = [] if side.view is None else [{"type": "image"}]
    return picture if side.text is None else [*picture, {"type": "text", "text": side.text}]


def _draw(shares: dict, rng: random.Random):
    return rng.choices(list(shares), list(shares.values()))[0]
