"""The pictures of items on their way to the model: read in threads, ahead of their turn, once for all showing them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from .encoding import overview_size
from .images import ImageRef, ItemError


if TYPE_CHECKING:
    from .items import Item
    from .protocol import Preset


THREADS = 8
"""Decoding and resizing leave the interpreter to others, so as many pictures are worked on at a time."""

_OPENED = threading.Lock()
"""Pillow reads a picture that is open at its first use, which two threads must not do at once."""

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


class Reading:
    """
    An item's picture that is being read. Where nobody holds this any more, what has not begun is left.

    Args:
        item (`Item`):
            The item; it lives as long as this does.
        future (`Future`):
            Ends when the picture is read.
    """

    def __init__(self, item: Item, future: Future[Any]):
        self.item = item
        self._future = future

    def __del__(self) -> None:
        self._future.cancel()

    def wait(self) -> Any:
        """
        What was read; waits for it.

        Raises:
            `ItemError`: if it cannot be read.
        """
        error = self._future.exception()
        if isinstance(error, ItemError):
            # Another one for each who asks: an error that is kept and raised would hold all who ever asked.
            raise ItemError(str(error)) from None
        return self._future.result()


class Picture(Reading):
    """A picture for the model, in two sizes."""

    @property
    def original(self) -> Image.Image:
        """The picture in its own size; see [`Reading.wait`]."""
        return self.wait()[0]

    @property
    def overview(self) -> Image.Image:
        """The same at the size that the prompt shows."""
        return self.wait()[1]


class PictureLoader:
    """
    Reads pictures in threads, and each once for all who hold the [`Picture`] of the same item at the same time.

    Args:
        factor (`int`):
            Sides of what a prompt shows are multiples of so many pixels.
    """

    def __init__(self, factor: int):
        self._factor = factor
        # Threads of their own, so that nobody waits behind what is only to be read some time.
        self._readers, self._checkers, self._workers = (
            ThreadPoolExecutor(count, thread_name_prefix="pictures") for count in (THREADS, THREADS // 2, THREADS)
        )
        self._pictures: weakref.WeakValueDictionary[tuple[int, Preset, str], Picture] = weakref.WeakValueDictionary()

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
        # The picture holds its item, so that no other has that id as long as it is there.
        key = id(item), preset, name
        picture = self._pictures.get(key)
        if picture is None:
            picture = Picture(item, self._readers.submit(_read, item, preset, self._factor, name))
            self._pictures[key] = picture
        return picture

    def check(self, item: Item, name: str) -> Reading:
        """Begins to find out whether an item's picture can be read. Its pixels are not kept."""
        return Reading(item, self._checkers.submit(_try, item, name))

    def map(self, function: Callable[[_Value], _Result], values: Sequence[_Value]) -> Iterator[_Result]:
        """What the function makes of each value, in order; threads work on many at a time, on a single one none."""
        return map(function, values) if len(values) == 1 else self._workers.map(function, values)


def _read(item: Item, preset: Preset, factor: int, name: str) -> tuple[Image.Image, Image.Image]:
    original = _original(item, name)
    return original, ImageRef(0, *overview_size(original.size, preset, factor)).render(original)


def _try(item: Item, name: str) -> None:
    _original(item, name)


def _original(item: Item, name: str) -> Image.Image:
    with _OPENED if isinstance(item.image, Image.Image) else contextlib.nullcontext():
        return item.load_image(name=name)


def named(items: Iterable[Any], places: Sequence[int] | None = None) -> Iterator[tuple[str, Any]]:
    """
    A query and its candidates, each with what errors call it.

    Args:
        items (iterable):
            The query, and after it the candidates.
        places (`Sequence[int]`, *optional*):
            Where the candidates stand in the query's full list, from 0; in their own order by default.

    >>> list(named("abc")), list(named("ab", [7]))
    ([('query', 'a'), ('candidate 1', 'b'), ('candidate 2', 'c')], [('query', 'a'), ('candidate 8', 'b')])
    """
    query, *candidates = items
    yield "query", query
    for place, candidate in zip(places or range(len(candidates)), candidates, strict=True):
        yield f"candidate {place + 1}", candidate
