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
from typing import Any

from art import ARTISTS, Art
from cases import Case, CaseMaker, Side, disguise, draw_view
from concepts import Concept, caption, load_concepts
from examples import Drawing, Example
from likeness import Likeness
from locating import NUM_THINGS, PICTURES_A_ROW, Exchange, ask, ask_middle, close_up, point_out, thinned
from preset import INSPECT_PIXELS, OVERVIEW_PIXELS, PRESET
from rows import NUM_LOOKS, Batch, Picture, Row, RowMaker, by_length, collate
from searching import aim_box, conclude, finding
from tasks import make_maker, pictures
from tokenizers import Tokenizer
from trajectories import Oracle

from vretrver_hf.protocol import format_answer


STAGE0_TASKS = {
    "t2i": 0.07,
    "i2i": 0.33,
    "i2t": 0.04,
    "it2i": 0.2,
    "it2it": 0.05,
    "it2t": 0.07,
    "t2it": 0.03,
    "t2t": 0.04,
    "overview": 0.11,
    "detail": 0.06,
}
SFT_TASKS = {
    "t2i": 0.08,
    "i2i": 0.07,
    "i2t": 0.05,
    "it2i": 0.08,
    "it2it": 0.04,
    "it2t": 0.04,
    "t2it": 0.04,
    "t2t": 0.03,
    "overview": 0.07,
    "detail": 0.5,
}
"""Shares of the tasks; "overview" and "detail" are text to scene. Half of the cold start is details: of 1,100, a model
that knew where things are in nine of ten scenes kept four of five crops on target."""
COLD_START = 5000
"""Trajectories of the oracle's from which the protocol is learned."""
REHEARSAL = 0.5
"""Share of SFT's rows that are stage 0's, so that little is forgotten."""
CAPTION_ROWS, LOCATE_ROWS, MATCH_ROWS = 0.07, 0.28, 0.18
"""Shares of stage 0's rows that are captions of single pictures, places and names in scenes, and verdicts on one
candidate after another; the others are choices among candidates. A choice teaches too little at first: one number for
a whole row of pictures."""
MATCH_WEIGHT = 3.0
CAPTIONS_A_ROW = 4
TOOLS, NO_TOOLS, AT_ONCE = "tools", "no tools", "at once"
CHOICE_PROMPTS = {TOOLS: 0.12, NO_TOOLS: 0.44, AT_ONCE: 0.44}
SEARCH_PROMPTS = {TOOLS: 0.5, NO_TOOLS: 0.25, AT_ONCE: 0.25}
"""Prompts of stage 0's choices, and of its searches for a place or a detail, and their shares. All of these are
answered without a thought or a call, also under the protocol's prompts: what was learned under one prompt only is lost
in part under another. SFT rehearses under the last one alone, since it shows what the protocol asks for under the
others: when it did not, the model went on answering without a thought wherever no tools were offered."""
_AT_ONCE = {"role": "system", "content": [{"type": "text", "text": "Answer at once."}]}
DESCRIBED = 2
"""Pictures of a choice that the model is asked to describe once it has chosen: binds numbers to pictures."""
BUDGETS = ((OVERVIEW_PIXELS, 0.82), (INSPECT_PIXELS, 0.12), (56 * 56, 0.06))
"""Pixel budgets of stage 0's pictures, and their shares."""
LOCATED = {"detail": 0.6, "overview": 0.4}
"""Kinds of scenes whose things are pointed at and named."""
LOCATE_BUDGETS = {OVERVIEW_PIXELS: 0.75, INSPECT_PIXELS: 0.25}
"""In how many pixels such scenes are shown, and their shares."""
LOCATE_FORMS = {"ask": 0.32, "close": 0.08, "point": 0.2, "read": 0.4}
"""What these rows are: questions about single scenes; the same about what crops show; a query with its candidates and
where the thing is in one of these; crops of such candidates, read one by one, and the order that follows."""
READ_BEST = 0.5
"""Share of those whose crops would leave out the right candidate that show it all the same."""
ODD_SHAPES, ODD = ((3, 2), (2, 3), (2, 1), (1, 2)), 0.2
"""Shapes of pictures that are not square, and their share."""
OTHER_COUNTS = 0.4
"""Share of examples with another number of candidates than five: two to eight."""
EASY = 0.4
"""Share of stage 0's examples whose negatives are all drawn at random: what differs in everything is learned first."""
FIRST_ROWS, FIRST_COUNTS = 256_000, (2, 3)
"""Of stage 0, so many rows come first whose examples are all easy and have few candidates: pointing at one of many is
not learned from choices that are hard as well."""
DISGUISED = 0.6
"""Share of stage 0's examples from picture to picture that are shown in other colours, mirrored or upside down, all
alike: as good as new things, of which the sets have too few to learn what likeness is."""
STAGE0_CHOICE_WEIGHT, SFT_CHOICE_WEIGHT = 8.0, 4.0
"""Weight of the tokens that decide, among many that do not."""
MAX_PART_TOKENS = 64_000
"""Most tokens that go through the language model at once; a batch of more goes in parts. Few and large ones: a host
takes as long to start a part's kernels as an accelerator takes to compute a good deal of it."""


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
    def likeness(self) -> Likeness:
        return Likeness(self.art, self.concepts)

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.concepts, lambda text: len(self.rows.encode(text)), self.likeness)

    @functools.cached_property
    def _train_pictures(self) -> list[Drawing]:
        return pictures(self.art, self.concepts, "train")

    @functools.cached_property
    def _makers(self) -> dict[str, Any]:
        return {task: make_maker(self.art, self.concepts, task, "train") for task in STAGE0_TASKS}

    def prepare(self) -> None:
        """Loads everything that workers share, before they are forked."""
        _ = self.rows, self.oracle, self.cases, self._train_pictures, self._makers

    def batch(self, stage: str, number: int, size: int) -> list[Batch]:
        """Batch `number` of `stage` ("stage0" or "sft") with `size` rows, in parts of rows of like length."""
        rng = random.Random(f"{self.seed}/{stage}/{number}")
        if stage == "stage0":
            rows = self._stage0_rows(size, rng, first=number * size < FIRST_ROWS)
        else:
            rows = self._sft_rows(size, rng, number)
        return self.parts(rows, row_multiple=32, length_multiple=32)

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

    def locate_row(self, rng: random.Random, rehearsed: bool = False) -> Row:
        """Where things are in scenes and what is where, in one of `LOCATE_FORMS`."""
        form, kind = _draw(LOCATE_FORMS, rng), _draw(LOCATED, rng)
        if form in ("ask", "close"):
            return self.ask_row(kind, rng) if form == "ask" else self.close_row(kind, rng)
        (example,) = self._makers["detail" if form == "read" else kind].make(1, rng.getrandbits(48))
        case = dataclasses.replace(self.cases.plain(example), overview_pixels=_draw(dict(BUDGETS), rng))
        prompt = AT_ONCE if rehearsed else _draw(SEARCH_PROMPTS, rng)
        return self.point_row(case, rng, prompt) if form == "point" else self.read_row(case, rng, prompt)

    def ask_row(self, kind: str, rng: random.Random) -> Row:
        """Scenes of a kind, each with a question about a thing in it."""
        budget, talks, shown = _draw(LOCATE_BUDGETS, rng), [], []
        reduced = kind == "detail" or budget == OVERVIEW_PIXELS
        for example in self._makers[kind].make(PICTURES_A_ROW, rng.getrandbits(48)):
            scene = thinned(rng.choice(example.candidates).image, _draw(NUM_THINGS, rng), rng)
            talks.append(ask(scene, self.concepts, rng, reduced))
            shown.append(self.cases.view_of(scene).within(budget))
        return self._picture_talk(talks, shown)

    def close_row(self, kind: str, rng: random.Random) -> Row:
        """What crops of scenes of a kind show."""
        talks, shown = [], []
        for example in self._makers[kind].make(PICTURES_A_ROW, rng.getrandbits(48)):
            case = self.cases.plain(example)
            (side,) = close_up(dataclasses.replace(case, candidates=[rng.choice(case.candidates)]), rng).candidates
            talks.append([ask_middle(side.scene, self.concepts)])
            shown.append(side.view.within(INSPECT_PIXELS))
        return self._picture_talk(talks, shown)

    def _picture_talk(self, talks: Sequence[Sequence[Exchange]], shown: Sequence[Picture]) -> Row:
        """Talks about one picture each, which follows their first question."""
        messages = [{"role": "system", "content": "Point and name."}]
        for exchanges in talks:
            first, *others = _talk(exchanges)
            first["content"].append({"type": "image"})
            messages += [first, *others]
        return self.rows.row(messages, shown)

    def point_row(self, case: Case, rng: random.Random, prompt: str) -> Row:
        """A query and its candidates, and where in one of these the thing is that is asked for."""
        messages = _opening(case, prompt)
        shown = case.pictures(messages)
        first, *others = _talk(point_out(case, rng, self.likeness))
        messages[-1]["content"] += first["content"]
        return self.rows.row([*messages, *others], shown)

    def read_row(self, case: Case, rng: random.Random, prompt: str) -> Row:
        """A query about a detail and its candidates, some of them read from crops, and the order that follows."""
        messages = _opening(case, prompt)
        shown, tools = case.pictures(messages), case.tools()
        best, count = case.order[0] + 1, len(case.candidates)
        read = rng.sample(range(1, count + 1), rng.randint(1, min(count, PRESET.max_calls)))
        if best not in read and rng.random() < READ_BEST:
            read[rng.randrange(len(read))] = best
        for number in read:
            seen = tools.crop_image(aim_box(case.sides[number].scene, rng), number)
            shown.append(case.sides[number].view.shown(seen.refs[0]))
            messages.append({"role": "user", "content": [{"type": "text", "text": seen.text}, {"type": "image"}]})
            messages.append({"role": "assistant", "content": f"<think>{finding(case, number)}.</think>"})
        messages.append({"role": "user", "content": "Rank them."})
        messages.append({"role": "assistant", "content": format_answer(conclude(best, read, count))})
        return self.rows.row(messages, shown, choice_weight=STAGE0_CHOICE_WEIGHT)

    def choice_row(self, case: Case, rng: random.Random, prompt: str = NO_TOOLS) -> Row:
        """A case answered at once, and then what some of its pictures show."""
        messages = _opening(case, prompt)
        shown = case.pictures(messages)
        messages.append({"role": "assistant", "content": format_answer(case.order)})
        numbers = [number for number, side in enumerate(case.sides) if side.view is not None and side.concept]
        for number in rng.sample(numbers, min(DESCRIBED, len(numbers))):
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
        record = self.oracle.play(case, rng)
        return self.rows.row(record.messages, record.pictures, choice_weight=SFT_CHOICE_WEIGHT)

    def evaluation(self, task: str, split: str, count: int, seed: int = 1) -> list[Case]:
        """Cases of a split, each picture whole and square."""
        examples = make_maker(self.art, self.concepts, task, split).make(count, seed)
        return [self.cases.plain(example) for example in examples]

    def _stage0_rows(self, size: int, rng: random.Random, first: bool = False, rehearsed: bool = False) -> list[Row]:
        captions, locations = round(size * CAPTION_ROWS), round(size * LOCATE_ROWS)
        rows = [self.caption_row(rng) for _ in range(captions)]
        rows += [self.locate_row(rng, rehearsed) for _ in range(locations)]
        # The tower takes pictures size by size, so a batch has one odd shape at most, and that in one size only.
        odd = rng.choice(ODD_SHAPES)
        match_share = MATCH_ROWS / (1 - CAPTION_ROWS - LOCATE_ROWS)
        easy, few = (1.0, True) if first else (EASY, False)
        for example, task in self._draw_examples(STAGE0_TASKS, size - captions - locations, rng, easy, few):
            shape, budget = ((1, 1), _draw(dict(BUDGETS), rng)) if rng.random() >= ODD else (odd, OVERVIEW_PIXELS)
            case = self.cases.varied(example, rng, shape)
            if task == "detail":
                case, budget = close_up(case, rng), INSPECT_PIXELS
            elif task == "i2i" and _is_pictures(case) and rng.random() < DISGUISED:
                case = disguise(case, rng.randrange(1, NUM_LOOKS))
            case = dataclasses.replace(case, overview_pixels=budget)
            if rng.random() < match_share:
                rows.append(self.match_row(case))
            else:
                rows.append(self.choice_row(case, rng, AT_ONCE if rehearsed else _draw(CHOICE_PROMPTS, rng)))
        return rows

    def _sft_rows(self, size: int, rng: random.Random, number: int) -> list[Row]:
        known = round(size * REHEARSAL)
        first = number * (size - known)
        rows = [self.cold_start(place) for place in self._shuffled(first, first + size - known)]
        return rows + self._stage0_rows(known, rng, rehearsed=True)

    def _shuffled(self, start: int, stop: int) -> list[int]:
        """A part of an endless series in which every trajectory comes once an epoch."""
        series: list[int] = []
        for epoch in range(start // COLD_START, (stop - 1) // COLD_START + 1):
            order = list(range(COLD_START))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(order)
            series += order
        offset = start // COLD_START * COLD_START
        return series[start - offset : stop - offset]

    def cold_start_example(self, number: int) -> tuple[Example, random.Random]:
        """Example `number` of the cold start, and the chance that the oracle plays it with."""
        rng = random.Random(f"{self.seed}/cold-start/{number}")
        ((example, _),) = self._draw_examples(SFT_TASKS, 1, rng, 0.0)
        return example, rng

    def cold_start(self, number: int) -> Row:
        """Trajectory `number` of the cold start."""
        example, rng = self.cold_start_example(number)
        return self.trajectory_row(self.cases.plain(example), rng)

    def _draw_examples(
        self, shares: dict[str, float], count: int, rng: random.Random, easy: float, few: bool = False
    ) -> Iterator[tuple[Example, str]]:
        """Examples with their share's name, sorted by it."""

        def draw() -> tuple[str, int, bool]:
            candidates = rng.randint(2, 8) if rng.random() < OTHER_COUNTS else 5
            candidates = rng.randint(*FIRST_COUNTS) if few else candidates
            return _draw(shares, rng), candidates, rng.random() >= easy

        for (task, candidates, hard), number in sorted(collections.Counter(draw() for _ in range(count)).items()):
            maker = copy.copy(self._makers[task])
            maker.num_candidates, maker.hardness = candidates, float(hard)
            for example in maker.make(number, rng.getrandbits(48)):
                yield example, task


def _is_pictures(case: Case) -> bool:
    """Whether all that a case consists of is pictures."""
    return all(side.view is not None and side.text is None for side in case.sides)


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

    def batches(self, stage: str, size: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[list[Batch]]:
        """
        Endless batches of a stage.

        Args:
            stage (`str`):
                `"stage0"` or `"sft"`.
            size (`int`):
                Rows of a step.
            start (`int`, *optional*, defaults to 0):
                Number of the first step.
            rank (`int`, *optional*, defaults to 0), ranks (`int`, *optional*, defaults to 1):
                Which of how many equal shares of each step's rows to make.
        """
        ahead = collections.deque()
        size //= ranks
        for number in itertools.count(start * ranks + rank, ranks):
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


def _opening(case: Case, prompt: str) -> list[dict[str, Any]]:
    """A case's first messages under one of the prompts."""
    messages = case.messages(tools=prompt == TOOLS)
    return [_AT_ONCE, *messages[1:]] if prompt == AT_ONCE else messages


def _blocks(side: Side) -> list[dict[str, str]]:
    picture = [] if side.view is None else [{"type": "image"}]
    return picture if side.text is None else [*picture, {"type": "text", "text": side.text}]


def _talk(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    """Questions and answers as messages."""
    messages: list[dict[str, Any]] = []
    for question, reply, weight in exchanges:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": reply, "loss": weight})
    return messages


def _draw(shares: dict, rng: random.Random):
    return rng.choices(list(shares), list(shares.values()))[0]
