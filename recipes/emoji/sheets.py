"""Contact sheets: a page of examples as a person would judge them, right candidates framed in green."""

from __future__ import annotations

import textwrap
import unicodedata
from pathlib import Path

from art import Art
from examples import Drawing, Entry, Example, Scene
from PIL import Image, ImageDraw, ImageFont
from scenes import draw_scene


CELL, SCENE = 104, 252
"""Width and height of a drawing and of a scene."""
CLOSE_UP, AROUND = 84, 12
"""Width and height of what a scene asks about, drawn again beneath it, and how far from it its frame is."""
TEXT_WIDTH, QUERY_WIDTH = 150, 190
LINE, GAP = 14, 8
GREEN, RED, GREY, BLACK = (24, 150, 60), (220, 40, 40), (205, 205, 205), (30, 30, 30)


def draw_sheet(art: Art, examples: list[Example], path: str | Path) -> None:
    """
    Draw one row an example: the query at the left, then its candidates with their relevance.

    Args:
        art (`Art`): The pictures.
        examples (`list[Example]`): The examples.
        path (`str` or `Path`): The picture file to write; WebP is smallest.
    """
    rows = [_draw_row(art, example) for example in examples]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=82, method=6)


def _draw_row(art: Art, example: Example) -> Image.Image:
    query = _draw_entry(art, example.query, QUERY_WIDTH)
    cells = [_draw_entry(art, entry, _width(entry)) for entry in example.candidates]
    height = max(query.height, *(cell.height for cell in cells))
    row = Image.new("RGB", (QUERY_WIDTH + sum(cell.width + GAP for cell in cells) + 2 * GAP, height + 40), "white")
    draw = ImageDraw.Draw(row)
    draw_text(draw, example.kind, (GAP, 4), GREEN)
    row.paste(query, (GAP, 22))
    left = QUERY_WIDTH + 2 * GAP
    for place, cell in enumerate(cells):
        right = place == example.positive
        row.paste(cell, (left, 22))
        frame = (left - 2, 20, left + cell.width + 1, height + 23)
        draw.rectangle(frame, outline=GREEN if right else GREY, width=3 if right else 1)
        draw_text(draw, str(example.relevance[place]), (left, height + 24), GREEN if right else BLACK)
        left += cell.width + GAP
    return row


def _width(entry: Entry) -> int:
    if entry.image is None:
        return TEXT_WIDTH
    return SCENE if isinstance(entry.image, Scene) else CELL if entry.text is None else CELL + 16


def _draw_entry(art: Art, entry: Entry, width: int) -> Image.Image:
    pictures = [] if entry.image is None else _pictures(art, entry.image)
    lines = textwrap.wrap(plain(entry.text or ""), width // 7)
    cell = Image.new("RGB", (width, sum(picture.height + 4 for picture in pictures) + LINE * len(lines) + 4), "white")
    top = 2
    for picture in pictures:
        cell.paste(picture, (0, top))
        top += picture.height + 4
    for line in lines:
        draw_text(ImageDraw.Draw(cell), line, (2, top))
        top += LINE
    return cell


def _pictures(art: Art, image: Drawing | Scene) -> list[Image.Image]:
    """A drawing; or a scene and, where what it asks about is small, that in a red frame and again from near."""
    if isinstance(image, Drawing):
        return [Image.fromarray(art.image(*image)).resize((CELL, CELL), Image.Resampling.LANCZOS)]
    pixels = Image.fromarray(draw_scene(art, image))
    left, top, right, bottom = image.objects[image.target].box
    box = (left - AROUND, top - AROUND, right + AROUND, bottom + AROUND)
    whole, near = (
        pixels.resize((SCENE, SCENE), Image.Resampling.LANCZOS),
        pixels.crop(box).resize((CLOSE_UP, CLOSE_UP)),
    )
    ImageDraw.Draw(whole).rectangle([value * SCENE // image.side for value in box], outline=RED)
    return [whole, near]


def plain(text: str) -> str:
    """Pillow's own font has neither accented letters nor curly apostrophes."""
    text = unicodedata.normalize("NFD", text.replace("’", "'"))
    return "".join(letter for letter in text if not unicodedata.combining(letter))


def draw_text(
    draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], colour: tuple[int, int, int] = BLACK
) -> None:
    draw.text(place, text, colour, font=ImageFont.load_default(12))
