"""
What can be seen at all: an ideal observer reads the scenes at the sizes that the model is shown.

    python recipes/emoji/observer.py --data recipes/emoji/data --count 1000 --out recipes/emoji/results/observer.json

The observer gets the very pixels that the package's prompt and tools give a model, with noise added, and has nothing
to learn: it knows where the target stands, up to a fraction of a pixel, and how each candidate's drawing looks at that
size and place. For each candidate it weighs how likely what it sees is, should this be the member that was asked for,
against the other members that are shown, and it picks the best. What it has seen adds up: whoever looks closer has
seen the overview too.

The noise stands for what no reader has. One that compared levels exactly could tell times apart by a few levels of
grey in one pixel. With 32 levels of 255 this observer names nine tenths of the clocks, faces and keycaps among their
whole family once they are ten pixels wide, and three to six tenths at five; half and twice the noise are in the
table as well. A network that learns nothing but such small clocks may come to read more than that, since the pictures
have no noise, so the table says what the geometry is made for, and a model's own row without tools what it gained.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from art import Art
from concepts import load_concepts
from examples import Drawing, Example, Placed
from intervals import wilson
from PIL import Image
from preset import OVERVIEW_PIXELS, PRESET
from rows import FACTOR
from scenes import FAMILIES, SIDE, SceneMaker, draw_scene
from searching import BOX_SIDES

from vretrver_hf.images import ImageRef, fit_size
from vretrver_hf.tools import VisualTools


NOISE = 32.0
"""Standard deviation of the noise in each channel of each pixel, in levels of 255."""
OTHER_NOISES = (16.0, 64.0)
JITTER, POSITIONS = 0.5, 5
"""How far off the observer's idea of a place may be, across and down, in pixels of what it sees; and how many places
in that range it reckons with, each way."""
MARGIN = 1
"""Pixels around the target that are compared as well."""
BOX_ERROR = 0.04
"""How far the middle of an imperfect crop is off each way, as a share of the scene; its sides are the oracle's."""
CONDITIONS = {
    "overview": "overview",
    "select": "select_images of four",
    "crop": "crop of every candidate",
    "loose crop": "crop of every candidate, box off",
}
FOUND = "found"
FOUND_TEXT = {FOUND: "overview: which of all things is it"}
"""Not a look at candidates: which thing in a scene is the clock, the face or the keycap, if no place is named."""
OTHERS = 150
"""Drawings that stand for all that is not of the family."""
KINDS = (*(f"detail/{name}" for name in FAMILIES), "overview")
SPLITS = ("test_combination", "test_artist")
SEED = 1

Row = dict[str, Any]


def main(
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    count: Annotated[int, typer.Option(help="Queries of each kind and split.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="JSON file of the rows.")] = None,
) -> None:
    """Shares of queries in which the ideal observer is right, by kind of question and by what it is shown."""
    jobs = [(data, split, kind, count) for split in SPLITS for kind in KINDS]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = [row for part in pool.map(_measure, jobs) for row in part]
    typer.echo(table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _measure(job: tuple[Path, str, str, int]) -> list[Row]:
    data, split, kind, count = job
    art = Art.load(data)
    return measure(art, SceneMaker(art, load_concepts(data), kind.split("/")[0], split), kind, count)


class Observer:
    """
    Picks the candidate that shows what is asked for.

    Args:
        art (`Art`): The pictures.
        noise (`float`, *optional*, defaults to 32): Standard deviation of the noise, in levels of 255.

    Example:

    ```python
    >>> Observer(art).observe(example, "overview", random.Random(0))  # doctest: +SKIP
    False
    ```
    """

    def __init__(self, art: Art, noise: float = NOISE) -> None:
        self.art, self.noise = art, noise

    def observe(self, example: Example, condition: str, rng: random.Random) -> bool:
        """
        Whether the observer is right.

        Args:
            example (`Example`): A question about scenes.
            condition (`str`): One of `CONDITIONS`.
            rng (`random.Random`): Source of noise and of errors of place.
        """
        sights = look(self.art, example, rng, tuple(dict.fromkeys(("overview", condition))))
        return judge(sights, condition, example.positive, self.noise, rng) == example.positive


@dataclass(frozen=True)
class Sight:
    """
    The target's place in one picture of each candidate.

    Args:
        seen (`np.ndarray`): Its pixels without noise, (candidates, values).
        templates (`np.ndarray`):
            The same as each candidate's drawing would give it, in every position, (candidates, positions, values).
        pixels (`float`): Width of the target, in pixels of what is seen.
    """

    seen: np.ndarray
    templates: np.ndarray
    pixels: float

    def log_likelihoods(self, noise: float, rng: np.random.Generator) -> np.ndarray:
        """Of what is seen of each candidate, should its target be each drawing, (candidates, candidates)."""
        seen = self.seen + rng.normal(0, noise, self.seen.shape)
        return log_likelihoods(seen, self.templates, noise)


def look(
    art: Art, example: Example, rng: random.Random, conditions: tuple[str, ...] = tuple(CONDITIONS)
) -> dict[str, Sight]:
    """
    What is to be seen of the targets.

    Args:
        art (`Art`): The pictures.
        example (`Example`): A question about scenes.
        rng (`random.Random`): Source of errors of place, the observer's and those of imperfect boxes.
        conditions (`tuple[str, ...]`, *optional*): Some of `CONDITIONS`; all by default.

    Returns:
        `dict[str, Sight]`: By condition, what it adds.
    """
    scenes = [entry.image for entry in example.candidates]
    pictures = [Image.fromarray(draw_scene(art, scene)) for scene in scenes]
    tools = VisualTools(None, pictures, preset=PRESET, factor=FACTOR)
    target = scenes[0].objects[scenes[0].target]
    boxes = {"crop": right_box(target), "loose crop": imperfect_box(target, rng)}
    drawings = [scene.objects[scene.target].drawing for scene in scenes]
    sights = {}
    for condition in conditions:
        if condition == "overview":
            ref = overview_ref(scenes[0].side)
            views = [ref.render(picture) for picture in pictures]
        else:
            seen = [
                tools.crop_image(boxes[condition], number) if condition in boxes else tools.select_images([number])
                for number in range(1, len(pictures) + 1)
            ]
            ref, views = seen[0].refs[0], [image for one in seen for image in one.images]
        error = (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
        left, top, right, bottom = window = window_of(target, ref)
        pixels = np.array([np.asarray(view, np.float32)[top:bottom, left:right].ravel() for view in views])
        templates = templates_of(art, drawings, target, ref, window, error)
        sights[condition] = Sight(pixels, templates, target.side * ref.width / (region(ref)[2] - region(ref)[0]))
    return sights


def judge(sights: dict[str, Sight], condition: str, asked: int, noise: float, rng: random.Random) -> int:
    """
    The candidate that the observer picks.

    Args:
        sights (`dict[str, Sight]`): What `look` found.
        condition (`str`): One of `CONDITIONS`.
        asked (`int`): The drawing that is asked for, as the number of the candidate that has it.
        noise (`float`): Standard deviation of the noise, in levels of 255.
        rng (`random.Random`): Source of noise.
    """
    noises = np.random.default_rng(rng.getrandbits(64))
    known = sights["overview"].log_likelihoods(noise, noises)
    if condition != "overview":
        more = sights[condition].log_likelihoods(noise, noises)
        if condition == "select":  # what is least likely is not looked at again
            more[np.argsort(log_odds(known, asked))[: -PRESET.max_selected]] = 0
        known = known + more
    return int(log_odds(known, asked).argmax())


def log_odds(likelihoods: np.ndarray, asked: int) -> np.ndarray:
    """Of each candidate, that it shows what is asked for and not another of the drawings."""
    return likelihoods[:, asked] - np.logaddexp.reduce(likelihoods, axis=1)


def log_likelihoods(seen: np.ndarray, templates: np.ndarray, noise: float) -> np.ndarray:
    """
    Up to a constant, of pixels under Gaussian noise when the position is not known.

    Args:
        seen (`np.ndarray`): (pictures, values).
        templates (`np.ndarray`): (drawings, positions, values).
        noise (`float`): Standard deviation.

    Returns:
        `np.ndarray`: (pictures, drawings).
    """
    flat = templates.reshape(-1, templates.shape[-1])
    errors = (seen**2).sum(1)[:, None] - 2 * seen @ flat.T + (flat**2).sum(1)
    errors = errors.reshape(len(seen), *templates.shape[:2])
    return np.logaddexp.reduce(-errors / (2 * noise**2), axis=2) - math.log(templates.shape[1])


# --- pixels ----------------------------------------------------------------------------------------------------------


def overview_ref(side: int) -> ImageRef:
    """A whole scene as it stands in the prompt."""
    return ImageRef(0, *fit_size(side, side, factor=FACTOR, min_pixels=4 * FACTOR**2, max_pixels=OVERVIEW_PIXELS))


def right_box(target: Placed) -> list[float]:
    """The target's own box, as shares of the scene."""
    return [value / SIDE for value in target.box]


def imperfect_box(target: Placed, rng: random.Random) -> list[float]:
    """A box around the target as a model may write it: larger, and a little off."""
    half = rng.uniform(*BOX_SIDES) / 2
    middles = (corner + target.side / 2 for corner in (target.left, target.top))
    x, y = (middle / SIDE + rng.uniform(-BOX_ERROR, BOX_ERROR) for middle in middles)
    return [round(min(max(value, 0.0), 1.0), 2) for value in (x - half, y - half, x + half, y + half)]


def region(ref: ImageRef) -> tuple[int, int, int, int]:
    """What a picture shows of a scene, in pixels of the scene."""
    return ref.box or (0, 0, SIDE, SIDE)


def window_of(thing: Placed, ref: ImageRef) -> tuple[int, int, int, int]:
    """Where a thing and `MARGIN` around it are in a picture: left, top, right, bottom, empty where it is out of it."""
    sides = []
    for axis, extent in ((0, ref.width), (1, ref.height)):
        start, stop = region(ref)[axis], region(ref)[axis + 2]
        low, high = ((thing.box[axis + end] - start) * extent / (stop - start) for end in (0, 2))
        first = min(max(math.floor(low) - MARGIN, 0), extent)
        sides.append((first, max(min(math.ceil(high) + MARGIN, extent), first)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def templates_of(
    art: Art,
    drawings: list[Drawing],
    thing: Placed,
    ref: ImageRef,
    window: tuple[int, int, int, int],
    error: tuple[float, float] = (0.0, 0.0),
    positions: int = POSITIONS,
) -> np.ndarray:
    """
    What a window of a picture would show if one drawing or another stood there.

    Args:
        art (`Art`): The pictures.
        drawings (`list[Drawing]`): What may stand there.
        thing (`Placed`): Where.
        ref (`ImageRef`): How the picture shows the scene.
        window (`tuple[int, int, int, int]`): Left, top, right and bottom, in pixels of the picture.
        error (`tuple[float, float]`, *optional*): How far the positions are off as a whole, in pixels of the picture.
        positions (`int`, *optional*): How many to reckon with, each way.

    Returns:
        `np.ndarray`: (drawings, positions squared, values).
    """
    left, top, right, bottom = window
    x1, y1, x2, y2 = region(ref)
    across, down = (x2 - x1) / ref.width, (y2 - y1) / ref.height
    border = math.ceil((2 * JITTER + 3) * max(across, down, 1))  # as far as a resampled pixel may look
    corner = math.floor(x1 + left * across) - border, math.floor(y1 + top * down) - border
    size = math.ceil((right - left) * across) + 2 * border + 1, math.ceil((bottom - top) * down) + 2 * border + 1
    box = (x1 + left * across, y1 + top * down, x1 + right * across, y1 + bottom * down)
    shifts = np.linspace(-JITTER, JITTER, positions) if positions > 1 else np.zeros(1)
    found = np.zeros((len(drawings), positions**2, 3 * (right - left) * (bottom - top)), np.float32)
    if not found.size:
        return found
    for drawing, row in zip(drawings, found, strict=True):
        canvas = Image.new("RGB", size, "white")
        picture = Image.fromarray(art.image(*drawing)).resize((thing.side, thing.side), Image.Resampling.BICUBIC)
        canvas.paste(picture, (thing.left - corner[0], thing.top - corner[1]))
        for place, (y, x) in enumerate((y, x) for y in shifts for x in shifts):
            shift = (x + error[0]) * across - corner[0], (y + error[1]) * down - corner[1]
            moved = [value + shift[axis % 2] for axis, value in enumerate(box)]
            seen = canvas.resize((right - left, bottom - top), Image.Resampling.BICUBIC, moved)
            row[place] = np.asarray(seen, np.float32).ravel()
    return found


class Finder:
    """
    Tells which of the things in a reduced scene is of the family that is asked about.

    It weighs how likely what it sees of each thing is for a member of the family, against anything else that may stand
    there.

    Args:
        art (`Art`): The pictures.
        maker (`SceneMaker`): Who draws the detail questions.
    """

    def __init__(self, art: Art, maker: SceneMaker) -> None:
        self.art, self.maker = art, maker
        self._known: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def find(self, example: Example, noise: float, rng: random.Random) -> bool:
        """Whether the most likely thing is the target; for questions that do not name the place."""
        scene, noises = example.candidates[0].image, np.random.default_rng(rng.getrandbits(64))
        ref = overview_ref(scene.side)
        view = np.asarray(ref.render(Image.fromarray(draw_scene(self.art, scene))), np.float32)
        view = view + noises.normal(0, noise, view.shape).astype(np.float32)
        odds = []
        for thing in scene.objects:
            left, top, right, bottom = window_of(thing, ref)
            seen = view[top:bottom, left:right].reshape(1, -1)
            family, others = (
                np.logaddexp.reduce(log_likelihoods(seen, templates, noise)[0]) - math.log(len(templates))
                for templates in self._templates(example.kind.split("/")[1], thing, ref)
            )
            odds.append(family - others)
        return int(np.argmax(odds)) == scene.target

    def _templates(self, name: str, thing: Placed, ref: ImageRef) -> tuple[np.ndarray, np.ndarray]:
        """Of the family and of other things, at a place that has the same fractions of a pixel."""
        scale, artist = region(ref)[2] // ref.width, thing.drawing.artist
        alike = thing._replace(left=4 * scale + thing.left % scale, top=4 * scale + thing.top % scale)
        key = (artist, name, *alike[1:])
        if key not in self._known:
            questions = self.maker.questions
            others = questions.others[artist, name]
            sample = random.Random(f"{artist}/{name}").sample(others, min(OTHERS, len(others)))
            window = window_of(alike, ref)
            self._known[key] = tuple(
                templates_of(self.art, [Drawing(artist, code) for code in codes], alike, ref, window, positions=3)
                for codes in (questions.whole[artist, name].codes, sample)
            )
        return self._known[key]


# --- figures ---------------------------------------------------------------------------------------------------------


def measure(art: Art, maker: SceneMaker, kind: str, count: int) -> list[Row]:
    """
    The observer's shares of right answers.

    Args:
        art (`Art`): The pictures.
        maker (`SceneMaker`): Who draws the questions.
        kind (`str`): One of `KINDS`; other questions of the maker are left out.
        count (`int`): How many queries.

    Returns:
        `list[dict]`: A row a condition and noise; "pixels" is the target's average width in what is seen.
    """
    noises = (NOISE, *OTHER_NOISES)
    right: dict[tuple[str, float], list[bool]] = defaultdict(list)
    pixels: dict[str, list[float]] = defaultdict(list)
    finder = Finder(art, maker)
    for example in examples_of(maker, kind, count):
        rng = random.Random(f"{SEED}/{example.qid}")
        sights = look(art, example, rng)
        for condition, sight in sights.items():
            pixels[condition].append(sight.pixels)
            for noise in noises:
                picked = judge(sights, condition, example.positive, noise, rng)
                right[condition, noise].append(picked == example.positive)
        if example.kind.endswith("/blob"):
            pixels[FOUND].append(sights["overview"].pixels)
            for noise in noises:
                right[FOUND, noise].append(finder.find(example, noise, rng))
    return [
        {
            "kind": kind,
            "split": maker.split,
            "condition": condition,
            "noise": noise,
            "pixels": round(float(np.mean(pixels[condition])), 1),
            "n": len(answers),
            "right": sum(answers) / len(answers),
            "interval": wilson(sum(answers), len(answers)),
        }
        for (condition, noise), answers in right.items()
    ]


def examples_of(maker: SceneMaker, kind: str, count: int) -> list[Example]:
    """The first `count` examples of a kind."""
    found: list[Example] = []
    seed = SEED
    while len(found) < count:
        found += [example for example in maker.make(count, seed) if example.kind.startswith(f"{kind}/")]
        seed += 1
    return found[:count]


def table(rows: list[Row]) -> str:
    """The rows as Markdown, one line a split, condition and kind, one column a noise."""
    noises = (NOISE, *OTHER_NOISES)
    lines = [
        f"| split | kind | condition | px | n | right, σ {NOISE:g} | 95 % interval | "
        + " | ".join(f"σ {n:g}" for n in noises[1:])
        + " |",
        "|---" * (7 + len(noises[1:])) + "|",
    ]
    by_noise = {(row["split"], row["kind"], row["condition"], row["noise"]): row for row in rows}
    for row in (row for row in rows if row["noise"] == NOISE):
        low, high = row["interval"]
        key = row["split"], row["kind"], row["condition"]
        lines.append(
            f"| {row['split'].removeprefix('test_')} | {row['kind']} | {(CONDITIONS | FOUND_TEXT)[row['condition']]} "
            f"| {row['pixels']:.1f} | {row['n']} | {row['right']:.1%} | {low:.1%} – {high:.1%} | "
            + " | ".join(f"{by_noise[*key, noise]['right']:.1%}" for noise in noises[1:])
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
