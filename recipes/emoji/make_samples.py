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
from typing import Annotated, Any

import numpy as np
import typer
from art import SOURCES, Art, render, svgs
from concepts import Concept, load_concepts
from examples import Drawing, Entry, Example
from PIL import Image
from tasks import ExampleMaker


SAMPLES = Path(__file__).parents[2] / "vretrver_hf" / "assets" / "samples"
LICENSES = Path(__file__).parent / "LICENSES"

BUNDLED_ARTISTS = ("noto", "twemoji", "fluent-flat")
"""Under Apache-2.0, CC-BY-4.0 and MIT: nothing share-alike goes into the package."""
DRAWS = (
    ("text-to-image", "t2i", "test_combination"),
    ("image-to-image", "i2i", "test_concept"),
    ("image-to-text", "i2t", "test_combination"),
)
"""Name of the task for people, the recipe's own name, and the held-out split."""
SEED = 2026
"""Of the draw; the evaluation examples have another."""
SIDE = 224
"""Of a picture in pixels: more than an overview shows, so that a closer look has something to find."""


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
    chosen = choose(Art.load(data, BUNDLED_ARTISTS), concepts)
    rows = [_row(task, example, concepts) for task, example in chosen]
    (out / "samples.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    drawings = {artist: svgs(data / "art.zip", artist) for artist in BUNDLED_ARTISTS}
    for artist, code in sorted({picture for _, example in chosen for picture in _pictures(example)}):
        picture = Image.fromarray(render(drawings[artist][code], SIDE))
        picture.save(out / _file(artist, code), lossless=True, quality=100, method=6)
    (out / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
    (out / "LICENSES").mkdir()
    for name in sorted({SOURCES[artist].license for artist in BUNDLED_ARTISTS}):
        shutil.copyfile(LICENSES / f"{name}.txt", out / "LICENSES" / f"{name}.txt")


def choose(art: Art, concepts: dict[str, Concept]) -> list[tuple[str, Example]]:
    """
    One example a task and artist: the first of the draw that asks for something not asked for before.

    Args:
        art (`Art`): The pictures of the artists whose art may be bundled.
        concepts (`dict[str, Concept]`): All concepts.

    Returns:
        `list[tuple[str, Example]]`: Name of the task and the example.
    """
    chosen, asked = [], set()
    for name, task, split in DRAWS:
        examples = ExampleMaker(art, concepts, task, split).make(200, SEED)
        for artist in BUNDLED_ARTISTS:
            example = next(e for e in examples if _artist(e) == artist and _positive(e, concepts).base not in asked)
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
        f"**Changes.** Drawings are rendered from SVG to {SIDE} x {SIDE} pixels on a white background.",
        "",
        "**Choice.** Held out from the training of the bundled model: text-to-image and image-to-text ask for",
        "combinations of attributes that training did not show, image-to-image for things that it never showed.",
        "They are the first of a fixed draw, one a task and set, chosen before any model saw them.",
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
    def item(entry: Entry) -> dict[str, str]:
        if entry.image is None:
            return {"text": entry.text}
        return {"image": _file(*entry.image), "id": concepts[entry.code].name}

    return {
        "id": example.qid,
        "task": task,
        "query": item(example.query),
        "candidates": [item(candidate) for candidate in example.candidates],
        "positive": example.positive,
    }


def _pictures(example: Example) -> list[Drawing]:
    return [entry.image for entry in example.entries if entry.image is not None]


def _artist(example: Example) -> str:
    """Who drew the candidates, or the query where the candidates are texts."""
    return _pictures(example)[-1][0]


def _positive(example: Example, concepts: dict[str, Concept]) -> Concept:
    return concepts[example.candidates[example.positive].code]


def _file(artist: str, code: str) -> str:
    return f"{artist}-{code}.webp"


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _equal(one: Path, other: Path) -> bool:
    if one.suffix == ".webp":
        return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    typer.run(main)
