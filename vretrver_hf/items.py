"""What is searched and what is ranked: items of text, image or both, made from whatever the caller has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .images import DEFAULT_LIMITS, ImageLimits, ItemError, is_data_url, is_url, is_video_name, load_image


# Suffixes that make a bare string an image. Some of these formats are not decoded: loading them says so, which is
# better than ranking a file name as if it were text.
IMAGE_SUFFIXES = frozenset(
    [".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"]
    + [".svg"]
)

_TEXT_HINT = "if you meant text, use Item(text=...)"
_ITEM_KEYS = ("text", "image", "id")
_IMAGE_KEYS = ("bytes", "path")


@dataclass(frozen=True, repr=False)
class Item:
    """
    A query or a candidate: text, an image, or both.

    The image is kept as it was given and decoded on each [`Item.load_image`], so that a list of items costs no memory.

    Args:
        text (`str`, *optional*):
            The text; blank text counts as none.
        image (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`, *optional*):
            A file, its bytes, a base64 `data:` URL, or an image. An empty string counts as none.
        id (`str`, *optional*):
            The caller's name for the item.

    Raises:
        `ItemError`: if there is neither text nor image, or a value of another type.

    Example:

    ```python
    >>> from vretrver_hf import Item

    >>> Item(text="a red-haired scientist", id="q1")
    Item(text='a red-haired scientist', id='q1')
    >>> Item.coerce({"text": "a cat", "image": None}).text
    'a cat'

    ```
    """

    text: str | None = None
    image: str | os.PathLike[str] | bytes | Image.Image | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ItemError(f"an item's {name} must be a string, got {type(value).__name__}")
        if not isinstance(self.image, (str, os.PathLike, bytes, Image.Image, type(None))):
            raise ItemError(
                "an item's image must be a path, bytes, a data: URL or a PIL image, "
                f"got {type(self.image).__name__}; turn an array into an image with PIL.Image.fromarray"
            )
        # Half a surrogate pair, as from a broken file name, cannot be encoded: no tokenizer would take it.
        text = (self.text or "").encode("utf-8", "replace").decode("utf-8")
        object.__setattr__(self, "text", text if text.strip() else None)
        if isinstance(self.image, str) and not self.image.strip():
            object.__setattr__(self, "image", None)
        if self.text is None and self.image is None:
            raise ItemError("an item needs text, an image, or both")

    def __repr__(self) -> str:
        parts = [f"text={_shorten(self.text)}"] if self.text is not None else []
        parts += [f"image={_describe(self.image)}"] if self.image is not None else []
        parts += [f"id={_shorten(self.id)}"] if self.id is not None else []
        return f"Item({', '.join(parts)})"

    @classmethod
    def coerce(cls, value: Any, *, name: str = "item", allow_files: bool = True) -> Item:
        """
        Makes an item of whatever the caller has.

        A string is an image where it has an image's suffix (`"a.png"`) or is a `data:` URL of one; any other string is
        text.

        Args:
            value (`Item`, `str`, `os.PathLike`, `bytes`, `PIL.Image.Image` or mapping):
                The item. A mapping has the keys `text`, `image` and `id`; its image may also be
                `{"bytes": …, "path": …}`, as the datasets library stores it.
            name (`str`, *optional*, defaults to `"item"`):
                What error messages call the item, such as `"candidate 3"`.
            allow_files (`bool`, *optional*, defaults to `True`):
                Whether paths may be read. Without it any path is refused and the file system is not touched.

        Raises:
            `ItemError`: if no item can be made, with the reason.
        """
        try:
            item = _coerce(value, allow_files)
            _check_image(item.image, allow_files)
        except ItemError as error:
            raise ItemError(f"{name}: {error}") from error
        return item

    def load_image(self, limits: ImageLimits = DEFAULT_LIMITS, *, name: str | None = None) -> Image.Image:
        """
        Decodes the image to RGB; see [`~vretrver_hf.images.load_image`].

        Args:
            limits (`ImageLimits`, *optional*):
                Bounds that are checked before decoding.
            name (`str`, *optional*):
                What error messages call the item; its id where not given.

        Raises:
            `ItemError`: if the image cannot be used, or the item has none.
        """
        name = name or ("item" if self.id is None else f"item {_shorten(self.id)}")
        if self.image is None:
            raise ItemError(f"{name} has no image; check `item.image` first")
        return load_image(self.image, name=name, limits=limits)


def coerce_query(value: Any, *, allow_files: bool = True) -> Item:
    """
    Makes the query's item; see [`Item.coerce`]. Error messages call it "query".

    Raises:
        `ItemError`: if there is no query or no item can be made of it.
    """
    return Item.coerce(value, name="query", allow_files=allow_files)


def coerce_candidates(values: Iterable[Any], *, allow_files: bool = True) -> list[Item]:
    """
    Makes the candidates' items. Error messages number them from 1, as the model does.

    Args:
        values (iterable):
            The candidates, each as [`Item.coerce`] takes it.
        allow_files (`bool`, *optional*, defaults to `True`):
            Whether paths may be read.

    Returns:
        `list[Item]`: the items, each with an id: its own, or else its 0-based position as a string.

    Raises:
        `ItemError`: if `values` is a single item instead of a list, an item cannot be made, or two share an id.

    Example:

    ```python
    >>> from vretrver_hf.items import coerce_candidates

    >>> coerce_candidates(["a cat", {"text": "a dog", "id": "d"}])
    [Item(text='a cat', id='0'), Item(text='a dog', id='d')]

    ```
    """
    if isinstance(values, (str, bytes, os.PathLike, Mapping, Item, Image.Image)) or not isinstance(values, Iterable):
        raise ItemError(f"the candidates are a single {type(values).__name__}; pass a list of candidates")
    items: list[Item] = []
    taken: dict[str, int] = {}
    for number, value in enumerate(values, start=1):
        item = Item.coerce(value, name=f"candidate {number}", allow_files=allow_files)
        if item.id is None:
            item = Item(text=item.text, image=item.image, id=str(number - 1))
        if item.id in taken:
            raise ItemError(
                f"candidate {number}: its id {_shorten(item.id)} is also that of candidate {taken[item.id]}; "
                "give every candidate an id of its own"
            )
        taken[item.id] = number
        items.append(item)
    return items


def _coerce(value: Any, allow_files: bool) -> Item:
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return _from_string(value, allow_files)
    if isinstance(value, (os.PathLike, bytes, Image.Image)):
        return Item(image=value)
    if isinstance(value, Mapping):
        _check_keys(value, _ITEM_KEYS, "an item")
        return Item(text=value.get("text"), image=_image_field(value.get("image")), id=value.get("id"))
    if value is None:
        raise ItemError("there is none; pass text, an image, or both")
    raise ItemError(f"expected an Item, text, a path, a PIL image or a dict, got {type(value).__name__}")


def _from_string(text: str, allow_files: bool) -> Item:
    name = text.strip()
    if is_data_url(name):
        return Item(image=name)
    is_image = os.path.splitext(_without_query(name))[1].lower() in IMAGE_SUFFIXES
    # Nobody breaks a path over lines: such a string is prose that happens to end in a file name.
    if len(name.splitlines()) > 1 or not (is_image or _is_video_source(name)):
        return Item(text=text)
    _check_image(name, allow_files, hint=f"; {_TEXT_HINT}")
    if not os.path.exists(name):
        raise ItemError(f"{_shorten(name)} looks like an image file, but there is no such file; {_TEXT_HINT}")
    return Item(image=name)


def _check_image(image: Any, allow_files: bool, hint: str = "") -> None:
    """Refuses what can be refused by name, before anything is read."""
    if not isinstance(image, (str, os.PathLike)):
        return
    name = os.fspath(image)
    if _is_video_source(name):
        raise ItemError(
            f"{_shorten(name)} is a video, and only still images are read; extract a frame and pass that{hint}"
        )
    if is_url(name):
        raise ItemError(
            f"{_shorten(name)} is a URL, and this package does not fetch URLs; "
            f"download it first and pass the file{hint}"
        )
    if not allow_files and name[:5].lower() != "data:":
        raise ItemError(f"{_shorten(name)} is a path, and files are not read here; send a data: URL{hint}")


def _is_video_source(name: str) -> bool:
    return name[:11].lower() == "data:video/" or is_video_name(_without_query(name))


def _without_query(name: str) -> str:
    return name.split("?")[0].split("#")[0] if is_url(name) else name


def _image_field(image: Any) -> Any:
    if not isinstance(image, Mapping):
        return image
    _check_keys(image, _IMAGE_KEYS, "an image")
    data, path = image.get("bytes"), image.get("path")
    if data is None and not path:
        raise ItemError("its image holds neither bytes nor a path")
    return path if data is None else data


def _check_keys(mapping: Mapping[Any, Any], allowed: tuple[str, ...], what: str) -> None:
    unknown = [key for key in mapping if key not in allowed]
    if unknown:
        raise ItemError(f"unknown keys {', '.join(map(_shorten, unknown))}; {what} has the keys {', '.join(allowed)}")


def _shorten(value: Any, limit: int = 80) -> str:
    shown = repr(value[:limit] if isinstance(value, str) else value)
    return shown if len(shown) <= limit + 2 else f"{shown[:limit]}…{shown[-1]}"


def _describe(image: Any) -> str:
    if isinstance(image, bytes):
        return f"<{len(image)} bytes>"
    if isinstance(image, Image.Image):
        return f"<{image.mode} {image.width}x{image.height}>"
    return _shorten(image if isinstance(image, str) else os.fspath(image))
