"""From what a visitor gives to items: bounded, decoded once, and never by path or URL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from limits import Limits

from vretrver_hf import Item, ItemError


_SIDE = 2048  # longest side that is kept; no model here looks closer


def from_form(
    text: str | None,
    picture: str | None,
    pictures: Sequence[str],
    texts: str | None,
    paired: bool,
    limits: Limits,
) -> tuple[Item, list[Item]]:
    """
    The items of the page's form.

    Args:
        text (`str`, *optional*):
            The query's text.
        picture (`str`, *optional*):
            The file of the query's picture, uploaded.
        pictures (sequence of `str`):
            The files of the candidates' pictures, uploaded.
        texts (`str`, *optional*):
            The candidates' texts, one a line.
        paired (`bool`):
            Whether line i belongs to picture i.
        limits (`Limits`):
            What is allowed.

    Raises:
        `ItemError`: naming what cannot be used and why.
    """
    lines = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    if paired and len(lines) != len(pictures):
        raise ItemError(f"there are {len(lines)} lines of text for {len(pictures)} pictures; give each picture one")
    count = len(pictures) if paired else len(lines) + len(pictures)
    _check_count(count, limits)
    query = _item(text, None if picture is None else _read(picture, "query", limits), "query", limits)
    candidates = []
    for index in range(count):
        name = f"candidate {index + 1}"
        image = _read(pictures[index], name, limits) if index < len(pictures) else None
        line = lines[index] if paired else lines[index - len(pictures)] if image is None else None
        candidates.append(_item(line, image, name, limits))
    return query, _with_ids(candidates)


def from_texts(query: str, query_image: str, candidates: Sequence[str], limits: Limits) -> tuple[Item, list[Item]]:
    """
    The items of a call by a program, where pictures are base64 `data:` URLs.

    Raises:
        `ItemError`: naming what cannot be used and why; a path or a URL is not read.
    """
    _check_count(len(candidates), limits)
    image = None
    if query_image:
        image = Item.coerce(query_image, name="query_image", allow_files=False).image
        if image is None:
            raise ItemError("query_image: it is no base64 data: URL of a picture")
    checked = _item(query, image, "query", limits)
    items = []
    for number, value in enumerate(candidates, start=1):
        name = f"candidate {number}"
        given = Item.coerce(value, name=name, allow_files=False)
        items.append(_item(given.text, given.image, name, limits))
    return checked, _with_ids(items)


def _check_count(count: int, limits: Limits) -> None:
    if count < 2:
        raise ItemError("there is nothing to compare: give at least two candidates")
    if count > limits.max_candidates:
        raise ItemError(f"there are {count} candidates, and {limits.max_candidates} are allowed here")


def _item(text: str | None, image: bytes | str | None, name: str, limits: Limits) -> Item:
    if text and len(text) > limits.max_characters:
        raise ItemError(f"{name}: its text has {len(text):,} characters, and {limits.max_characters:,} are allowed")
    if not (text or "").strip() and image is None:
        raise ItemError(f"{name}: there is none; give text, a picture, or both")
    item = Item(text=text, image=image)
    if image is None:
        return item
    picture = item.load_image(limits.images, name=name)
    picture.thumbnail((_SIDE, _SIDE))
    return Item(text=text, image=picture)


def _read(path: str, name: str, limits: Limits) -> bytes:
    """The bytes of an uploaded file; without its path, which nobody needs to see in a message."""
    file = Path(path)
    try:
        if file.stat().st_size > limits.max_bytes:
            raise ItemError(f"{name} is larger than the limit of {limits.max_bytes:,} bytes")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ItemError(f"{name}: its upload was removed, as all are after a while; upload it again") from error


def _with_ids(items: list[Item]) -> list[Item]:
    return [dataclasses.replace(item, id=str(index)) for index, item in enumerate(items)]
