"""
Make the samples that come with the package, out of this recipe's held-out data.

    python recipes/emoji/make_samples.py --data recipes/emoji/data
    python recipes/emoji/make_samples.py --data recipes/emoji/data --check

The samples are the first fair ones of a fixed draw, whatever a model makes of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from art import SOURCES, Art, render, svgs
from concepts import Concept, load_concepts
from examples import Drawing, Entry, Example, Scene
from PIL import Image
from scenes import FAMILIES, draw_scene
from scenes import SIDE as SCENE_SIDE
from tasks import make_maker


SAMPLES = Path(__file__).parents[2] / "vretrver_hf" / "assets" / "samples"
LICENSES = Path(__file__).parent / "LICENSES"

BUNDLED_ARTISTS = ("noto", "twemoji", "fluent-flat")
"""Under Apache-2.0, CC-BY-4.0 and MIT: nothing share-alike goes into the package."""


class Draw(NamedTuple):
    """
    A task and what of it is taken.

    Args:
        name (`str`): Name of the task for people.
        task (`str`): The recipe's own name.
        split (`str`): The held-out split.
        sorts (`tuple[str, ...]`): One sample of each: an artist, or a part of the kind of question.
    """

    name: str
    task: str
    split: str
    sorts: tuple[str, ...]


DRAWS = (
    Draw("text-to-image", "t2i", "test_combination", BUNDLED_ARTISTS),
    Draw("image-to-image", "i2i", "test_concept", BUNDLED_ARTISTS),
    Draw("image-to-text", "i2t", "test_combination", BUNDLED_ARTISTS),
    Draw("image-and-text-to-image", "it2i", "test_combination", ("edit",)),
    Draw("text-to-scene", "overview", "test_combination", ("overview",)),
    Draw("text-to-detail", "detail", "test_combination", FAMILIES),
)
SEED = 2026
"""Of the draw; the evaluation examples have another."""
SIDE = 224
"""Of a picture in pixels: more than an overview shows, so that a closer look has something to find."""
SCENE_COLOURS = 256
"""Of a scene, which has thousands: with all of them the scenes would take three quarters of a megabyte."""


def main(
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    out: Annotated[Path, typer.Option(help="Folder to write; it is replaced.")] = SAMPLES,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; say what differs from OUT.")] = False,
) -> None:
    """Make the samples, or check that they are what this recipe makes."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "samples"
        make_samples(data, fresh)
        if check:
            differences = compare(fresh, out)
            for line in differences:
                typer.echo(line, err=True)
            raise typer.Exit(1 if differences else 0)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(fresh, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out}  {size / 1e3:.0f} kB")


def make_samples(data: Path, out: Path) -> None:
    """
    Write `samples.json`, its pictures, `ATTRIBUTION.md` and `LICENSES` into a new folder.

    Args:
        data (`Path`): Folder that `build_data.py` filled.
        out (`Path`): Folder to make.
    """
    out.mkdir(parents=True)
    concepts = load_concepts(data)
    art = Art.load(data, BUNDLED_ARTISTS)
    chosen = choose(art, concepts)
    rows = [_row(task, example, concepts) for task, example in chosen]
    (out / "samples.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    drawings = {artist: svgs(data / "art.zip", artist) for artist in BUNDLED_ARTISTS}
    for name, picture in {name: picture for _, example in chosen for name, picture in _pictures(example)}.items():
        if isinstance(picture, Scene):
            image = Image.fromarray(draw_scene(art, picture)).quantize(SCENE_COLOURS, dither=Image.Dither.NONE)
        else:
            image = Image.fromarray(render(drawings[picture.artist][picture.code], SIDE))
        image.convert("RGB").save(out / name, lossless=True, quality=90, method=4)
    (out / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
    (out / "LICENSES").mkdir()
    for name in sorted({SOURCES[artist].license for artist in BUNDLED_ARTISTS}):
        shutil.copyfile(LICENSES / f"{name}.txt", out / "LICENSES" / f"{name}.txt")


def choose(art: Art, concepts: dict[str, Concept]) -> list[tuple[str, Example]]:
    """
    One example a task and sort: the first of the draw that asks for something not asked for before.

    Args:
        art (`Art`): The pictures of the artists whose art may be bundled.
        concepts (`dict[str, Concept]`): All concepts.

    Returns:
        `list[tuple[str, Example]]`: Name of the task and the example.
    """
    chosen, asked = [], set()
    for name, task, split, sorts in DRAWS:
        examples = make_maker(art, concepts, task, split).make(200, SEED)
        for sort in sorts:
            example = next(e for e in examples if sort in _sorts(e) and _positive(e, concepts).base not in asked)
            asked.add(_positive(example, concepts).base)
            chosen.append((name, example))
    return chosen


def attribution() -> str:
    """Whose pictures they are, under which licence, and how they were chosen and changed."""
    lines = [
        "# Attribution",
        "",
        "These pictures are other people's work, openly licensed. Licence texts are in [LICENSES](LICENSES). Nobody",
        "named here endorses this project. File names begin with the name of the set.",
        "",
        "| files | drawings | by | package | licence |",
        "|---|---|---|---|---|",
    ]
    for artist in BUNDLED_ARTISTS:
        source = SOURCES[artist]
        package = f"npm `{source.package.name}` {source.package.version}"
        license = f"[{source.license}](LICENSES/{source.license}.txt)"
        lines.append(
            f"| `{artist}-*.webp` | [{source.title}]({source.url}) | {source.credit} | {package} | {license} |"
        )
    lines += [
        "",
        "Names of what they show come from [Emojibase](https://emojibase.dev) by Miles Johnson, npm `emojibase-data`,",
        "[MIT](LICENSES/MIT.txt); they are reworded. The licence of Twemoji is also at",
        "<https://creativecommons.org/licenses/by/4.0/>.",
        "",
        f"**Changes.** Drawings are rendered from SVG to {SIDE} x {SIDE} pixels on a white background. Scenes put",
        f"several of one set, smaller, on a white square of {SCENE_SIDE} x {SCENE_SIDE} pixels, in at most",
        f"{SCENE_COLOURS} colours.",
        "",
        "**Choice.** Held out from the training of the bundled model: combinations of attributes that it did not",
        "show; for image-to-image, things that it never showed; for scenes, their layouts. All are the first of a",
        "fixed draw, chosen before any model saw them: one a set of text-to-image, image-to-image and image-to-text,",
        "one of image-and-text-to-image and of text-to-scene, and of text-to-detail a clock, a face and a keycap.",
        "`recipes/emoji/make_samples.py` makes them, and with `--check` says whether they are what it makes.",
        "",
    ]
    return "\n".join(lines)


def compare(fresh: Path, kept: Path) -> list[str]:
    """
    What differs between two folders of samples. Pictures are compared by their pixels, since the bytes of a file
    depend on the version of the encoder.

    Args:
        fresh (`Path`): What is made now.
        kept (`Path`): What was made before.

    Returns:
        `list[str]`: One line a difference.
    """
    made, there = _files(fresh), _files(kept)
    differences = [f"{name} is missing" for name in sorted(made - there)]
    differences += [f"{name} is not made by this recipe" for name in sorted(there - made)]
    return differences + [f"{name} differs" for name in sorted(made & there) if not _equal(fresh / name, kept / name)]


def _row(task: str, example: Example, concepts: dict[str, Concept]) -> dict[str, Any]:
    def item(number: int, entry: Entry) -> dict[str, str]:
        text = {} if entry.text is None else {"text": entry.text}
        if entry.image is None:
            return text
        return text | {"image": _file(example, number), "id": concepts[entry.code].name}

    query, *candidates = (item(number, entry) for number, entry in enumerate(example.entries))
    return {
        "id": example.qid,
        "task": task,
        "query": query,
        "candidates": candidates,
        "positive": example.positive,
    }


def _pictures(example: Example) -> list[tuple[str, Drawing | Scene]]:
    """Each picture with the name of its file."""
    shown = ((number, entry.image) for number, entry in enumerate(example.entries) if entry.image is not None)
    return [(_file(example, number), image) for number, image in shown]


def _sorts(example: Example) -> set[str]:
    """Who drew the candidates, or the query where the candidates are texts, and the parts of the kind of question."""
    _, picture = _pictures(example)[-1]
    return {_artist(picture), *example.kind.split("/")}


def _artist(picture: Drawing | Scene) -> str:
    return picture.objects[0].drawing.artist if isinstance(picture, Scene) else picture.artist


def _positive(example: Example, concepts: dict[str, Concept]) -> Concept:
    return concepts[example.candidates[example.positive].code]


def _file(example: Example, number: int) -> str:
    """The set, and what is drawn: a concept, or what a scene's question is about and which of its candidates it is."""
    picture = example.entries[number].image
    if isinstance(picture, Scene):
        sort = next(part for part in example.kind.split("/") if part != "detail")
        return f"{_artist(picture)}-{sort}-{number}.webp"
    return f"{picture.artist}-{picture.code}.webp"


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _equal(one: Path, other: Path) -> bool:
    if one.suffix == ".webp":
        return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    typer.run(main)
