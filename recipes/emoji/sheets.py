"""Contact sheets: a page of examples as a person would judge them, right candidates framed in green."""

from __future__ import annotations

import textwrap
import unicodedata
from pathlib import Path

from art import Art
from examples import Drawing, Entry, Example
from PIL import Image, ImageDraw, ImageFont


CELL = 112
QUERY_WIDTH = 220
TEXT_WIDTH = 150
LINE = 15
GREEN, GREY, BLACK = (24, 150, 60), (205, 205, 205), (30, 30, 30)


def draw_sheet(art: Art, examples: list[Example], path: str | Path) -> None:
    """
    Draw one row an example: the query at the left, then its candidates with their relevance.

    Args:
        art (`Art`): The pictures.
        examples (`list[Example]`): Examples of one task.
        path (`str` or `Path`): The PNG file to write.
    """
    width = TEXT_WIDTH if examples[0].task == "i2t" else CELL
    row_height = CELL + LINE + 10
    size = (QUERY_WIDTH + len(examples[0].candidates) * (width + 8) + 8, len(examples) * row_height + 8)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, example in enumerate(examples):
        top = 8 + number * row_height
        _draw_query(sheet, draw, art, example, top)
        for position, candidate in enumerate(example.candidates):
            left = QUERY_WIDTH + position * (width + 8)
            _draw_candidate(sheet, draw, art, candidate, (left, top, width))
            right = position == example.positive
            draw.rectangle(
                (left - 2, top - 2, left + width + 1, top + CELL + 1),
                outline=GREEN if right else GREY,
                width=3 if right else 1,
            )
            draw.text((left, top + CELL + 3), f"relevance {example.relevance[position]}", BLACK, font=_font(11))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _draw_query(sheet: Image.Image, draw: ImageDraw.ImageDraw, art: Art, example: Example, top: int) -> None:
    query = example.query
    if query.image:
        sheet.paste(_cell(art, query.image), (8, top))
        draw.text((8 + CELL + 6, top + 40), query.image.artist, BLACK, font=_font(12))
    if query.text:
        _draw_text(draw, query.text, (8, top + 8), 28)
        draw.text((8, top + CELL + 3), example.candidates[0].image.artist, GREEN, font=_font(11))


def _draw_candidate(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    art: Art,
    candidate: Entry,
    place: tuple[int, int, int],
) -> None:
    left, top, _ = place
    if candidate.image is None:
        _draw_text(draw, candidate.text, (left + 6, top + 8), 20)
    else:
        sheet.paste(_cell(art, candidate.image), (left, top))


def _cell(art: Art, picture: Drawing) -> Image.Image:
    return Image.fromarray(art.image(*picture)).resize((CELL, CELL), Image.Resampling.LANCZOS)


def _draw_text(draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], columns: int) -> None:
    # Pillow's own font has no accented letters.
    text = "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))
    for number, line in enumerate(textwrap.wrap(text, columns)):
        draw.text((place[0], place[1] + number * LINE), line, BLACK, font=_font(13))


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)
