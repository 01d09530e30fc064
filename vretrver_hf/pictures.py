"""The pictures of items on their way to the model: read in threads, ahead of their turn, once for all showing them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from .encoding import overview_size
from .images import ImageRef


if TYPE_CHECKING:
    from PIL import Image

    from .items import Item
    from .protocol import Preset


THREADS = 8
"""Decoding and resizing leave the interpreter to others, so as many pictures are worked on at a time."""

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


class Picture:
    """
    An item's picture, which may still be being read.

    Args:
        item (`Item`):
            The item; it lives as long as this does.
        future (`Future`):
            Gives the picture in its original size and at that of the prompt.
    """

    def __init__(self, item: Item, future: Future[tuple[Image.Image, Image.Image]]):
        self.item = item
        self._future = future

    @property
    def original(self) -> Image.Image:
        """
        The picture in its own size; waits for it.

        Raises:
            `ItemError`: if it cannot be read.
        """
        return self._future.result()[0]

    @property
    def overview(self) -> Image.Image:
        """The same at the size that the prompt shows."""
        return self._future.result()[1]


class PictureLoader:
    """
    Reads pictures in threads, and each once for all who hold the [`Picture`] of the same item at the same time.

    Args:
        factor (`int`):
            Sides of what a prompt shows are multiples of so many pixels.
    """

    def __init__(self, factor: int):
        self._factor = factor
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
        self._pictures: weakref.WeakValueDictionary[tuple[int, Preset], Picture] = weakref.WeakValueDictionary()

    def load(self, item: Item, preset: Preset, name: str) -> Picture:
        """
        Begins to read an item's picture.

        Args:
            item (`Item`):
                The item.
            preset (`Preset`):
                Says how many pixels a picture in the prompt may have.
            name (`str`):
                What errors call the item.
        """
        key = id(item), preset  # no other item has that id as long as the picture, which holds this one, is there
        picture = self._pictures.get(key)
        if picture is None:
            picture = Picture(item, self._threads.submit(_read, item, preset, self._factor, name))
            self._pictures[key] = picture
        return picture

    def check(self, item: Item, name: str) -> Future[None]:
        """Begins to find out whether an item's picture can be read. Its pixels are not kept."""
        return self._threads.submit(_try, item, name)

    def map(self, function: Callable[[_Value], _Result], values: Iterable[_Value]) -> Iterator[_Result]:
        """What the function makes of each value, in order; the threads work on many at a time."""
        return self._threads.map(function, values)


def _read(item: Item, preset: Preset, factor: int, name: str) -> tuple[Image.Image, Image.Image]:
    original = item.load_image(name=name)
    return original, ImageRef(0, *overview_size(original.size, preset, factor)).render(original)


def _try(item: Item, name: str) -> None:
    item.load_image(name=name)


def named(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """
    A query and its candidates, each with what errors call it.

    >>> list(named("abc"))
    [('query', 'a'), ('candidate 1', 'b'), ('candidate 2', 'c')]
    """
    for number, item in enumerate(items):
        yield f"candidate {number}" if number else "query", item
