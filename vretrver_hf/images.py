"""Pixels in: safe decoding to RGB as a person sees it, the sizes that a model sees, and pictures by reference."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
import os
import re
import stat
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


MAX_ASPECT = 200
"""Longest side over shortest side beyond which a vision-language model's processor refuses an image."""

MIN_IMAGE_TOKENS = 4
MAX_IMAGE_TOKENS = 5120
"""The released limits of one picture, in image tokens."""

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"]
)

# Only these decoders run: Pillow knows more, among them some that start other programs (EPS).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"

# Brands of the ISO container ("ftyp") that hold still pictures or picture sequences; the others hold films.
_PICTURE_BRANDS = {b"avif", b"avis", b"mif1", b"msf1", b"miaf", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_VIDEO_MAGIC = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # WMV
    b"FLV\x01",
    b"OggS",
)

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Two letters at least, so that a Windows drive ("C:") is no scheme.
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(image|video)/", re.IGNORECASE)


class ItemError(ValueError):
    """An item that cannot be used. The message names the item, what is wrong or which limit it passes, and the fix."""


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """
    What an image may weigh before it is decoded.

    Args:
        max_bytes (`int`, *optional*, defaults to 50 MiB):
            Most bytes of the file as it is stored.
        max_pixels (`int`, *optional*, defaults to 64,000,000):
            Most pixels that the file declares; checked before any pixel is decoded, so that a small file cannot unpack
            into gigabytes. Pillow's own `Image.MAX_IMAGE_PIXELS` applies as well.
        max_aspect (`float`, *optional*, defaults to 200):
            Most times that the longer side may be as long as the shorter one.
    """

    max_bytes: int = 50 * 2**20
    max_pixels: int = 64_000_000
    max_aspect: float = MAX_ASPECT


DEFAULT_LIMITS = ImageLimits()


def load_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    name: str = "image",
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Image.Image:
    """
    Decodes an image to RGB as a person would see it.

    The orientation that a camera noted is applied; palettes, CMYK, 16-bit, float and 1-bit pixels become 8-bit RGB;
    transparency shows white; of an animation the first frame is kept.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`):
            A file, its bytes, a base64 `data:` URL, or an image that is already open (its current frame counts).
        name (`str`, *optional*, defaults to `"image"`):
            What error messages call the image, such as `"candidate 3"`.
        limits (`ImageLimits`, *optional*):
            Bounds that are checked before decoding.

    Returns:
        `PIL.Image.Image`: an RGB image that shares nothing with `source`.

    Raises:
        `ItemError`: if the image is missing, no regular file, a video, a URL, unreadable, truncated, too large,
            without pixels or too elongated.

    Example:

    ```python
    >>> from PIL import Image
    >>> from vretrver_hf.images import load_image

    >>> load_image(Image.new("RGBA", (4, 2), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)

    ```
    """
    label = _label(source, name)
    image = source if isinstance(source, Image.Image) else _open(_read(source, label, limits), label, limits)
    _check_size(image.size, label, limits)
    try:
        # First of all: reading a TIFF applies its orientation and removes the tag.
        image.load()
        rgb = to_rgb(_upright(image))
    except Exception as error:  # a broken file leads decoders to almost any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ItemError(
            f"{label} cannot be decoded, it is truncated or damaged ({reason}); save it again as PNG or JPEG"
        ) from error
    # A copy drops the open file; metadata goes too, else a later reader would apply the orientation a second time.
    result = rgb.copy() if rgb is image else rgb
    result.info = {}
    return result


def to_rgb(image: Image.Image) -> Image.Image:
    """
    The same picture in 8-bit RGB, transparency on white; `image` itself where it is RGB already.

    16-bit pixels are scaled to 8 bits. Integer and float pixels, whose range no file format fixes, are taken as
    `0..1` (float only), `0..255` or `0..65535`, whichever is the first to hold them all, and are stretched otherwise.

    Raises:
        `ValueError`: if float pixels have no finite range.
    """
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_size(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """
    The size at which a Qwen-VL model sees an image.

    Both sides become multiples of `factor`, the area lies within the budget, and the shape stays as close as that
    allows. The numbers are those of the models' own processors. One departure: where rounding would take a very long
    image beyond 200:1, which those processors refuse, the longer side is cut back to it. As there, a very long image
    may exceed a small budget, since no side is shorter than `factor`.

    Args:
        width (`int`):
            Width in pixels.
        height (`int`):
            Height in pixels.
        factor (`int`):
            Patch size times merge size of the vision tower: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        min_pixels (`int`):
            Least area of the result in pixels.
        max_pixels (`int`):
            Largest area of the result in pixels.

    Returns:
        `tuple[int, int]`: width and height.

    Raises:
        `ValueError`: if a side is not positive, the budget is empty, or the sides differ by more than 200:1.

    Example:

    ```python
    >>> from vretrver_hf.images import fit_size

    >>> fit_size(640, 480, factor=28, min_pixels=4 * 28**2, max_pixels=5120 * 28**2)
    (644, 476)

    ```
    """
    if min(width, height, factor) < 1 or not 1 <= min_pixels <= max_pixels:
        raise ValueError(
            "sides and factor must be positive and 1 <= min_pixels <= max_pixels, got "
            f"{width}x{height}, factor {factor}, {min_pixels}..{max_pixels} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"the sides of an image may differ by {MAX_ASPECT}:1 at most, got {width}x{height}")
    fitted_width, fitted_height = round(width / factor) * factor, round(height / factor) * factor
    if fitted_width * fitted_height > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif fitted_width * fitted_height < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_width = math.ceil(width * grow / factor) * factor
        fitted_height = math.ceil(height * grow / factor) * factor
    return min(fitted_width, MAX_ASPECT * fitted_height), min(fitted_height, MAX_ASPECT * fitted_width)


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """
    A picture by reference: which image, which region of it, and the size at which the model sees it.

    Args:
        index (`int`):
            Number of the image in its query's set: 0 is the query's, `i` candidate i's.
        width (`int`):
            Width in pixels as the model sees it.
        height (`int`):
            Height in pixels as the model sees it.
        box (`tuple[int, int, int, int]`, *optional*):
            Region `(x1, y1, x2, y2)` in pixels of the original image; `None` is the whole image.

    Example:

    ```python
    >>> from PIL import Image
    >>> from vretrver_hf.images import ImageRef

    >>> ref = ImageRef(2, 56, 56, box=(10, 10, 30, 30))
    >>> ref.render(Image.new("RGB", (100, 100))).size
    (56, 56)
    >>> ImageRef.from_dict(ref.to_dict()) == ref
    True

    ```
    """

    index: int
    width: int
    height: int
    box: tuple[int, int, int, int] | None = None

    def render(self, image: Image.Image) -> Image.Image:
        """The picture itself; `image` is the original that `index` stands for."""
        region = image if self.box is None else image.crop(self.box)
        return region.resize((self.width, self.height), Image.Resampling.BICUBIC)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        box = None if self.box is None else list(self.box)
        return {"index": self.index, "width": self.width, "height": self.height, "box": box}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageRef:
        """The reference that [`ImageRef.to_dict`] wrote."""
        box = values.get("box")
        return cls(values["index"], values["width"], values["height"], None if box is None else tuple(box))


def picture_id(image: Image.Image) -> str:
    """A name made of the pixels: the same for equal pictures, wherever they come from."""
    head = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.blake2b(head + image.tobytes(), digest_size=16).hexdigest()


def is_url(text: str) -> bool:
    """Whether `text` begins like a URL that would have to be fetched (`https://…`, `file://…`, `s3://…`)."""
    return _URL.match(text) is not None


def is_data_url(text: str) -> bool:
    """Whether `text` begins like a `data:` URL of an image or a video."""
    return _DATA_URL.match(text) is not None


def is_video_name(name: str) -> bool:
    """Whether a file of that name is a video, going by its suffix."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _label(source: Any, name: str) -> str:
    if isinstance(source, os.PathLike) or (isinstance(source, str) and source[:5].lower() != "data:"):
        shown = os.fspath(source)
        return f"{name} ({shown!r})" if len(shown) <= 300 else f"{name} ({shown[:300]!r}…)"
    return name


def _read(source: Any, label: str, limits: ImageLimits) -> bytes:
    if isinstance(source, bytes):
        data = source
        _check_bytes(len(data), label, limits)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _read_data_url(source, label, limits)
    elif isinstance(source, str) and is_url(source):
        raise ItemError(f"{label} is a URL, and this package does not fetch URLs; download it first and pass the file")
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(Path(source), label, limits)
    else:
        raise ItemError(
            f"{label} must be a path, bytes, a data: URL or a PIL image, got {type(source).__name__}; "
            "turn an array into an image with PIL.Image.fromarray"
        )
    if not data:
        raise ItemError(f"{label} is empty (0 bytes); check how it was saved or downloaded")
    if _is_video(data):
        raise _video_error(label)
    return data


def _read_file(path: Path, label: str, limits: ImageLimits) -> bytes:
    if is_video_name(path.name):
        raise _video_error(label)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ItemError(f"{label} is a directory; pass the image files in it")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could block for ever
            raise ItemError(f"{label} is not a regular file; pass an image file")
        _check_bytes(status.st_size, label, limits)
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except ItemError:
        raise
    except FileNotFoundError as error:
        raise ItemError(f"{label} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise ItemError(f"{label} cannot be read ({reason}); check the path and its permissions") from error
    _check_bytes(len(data), label, limits)  # the file may have grown since
    return data


def _read_data_url(url: str, label: str, limits: ImageLimits) -> bytes:
    header, _, payload = url.partition(",")
    if header[5:].lower().startswith("video/"):
        raise _video_error(label)
    if not (header[5:].lower().startswith("image/") and header.lower().endswith(";base64")):
        raise ItemError(f"{label} is a data: URL of another kind; write it as data:image/png;base64,…")
    _check_bytes(len(payload) * 3 // 4 - 2, label, limits)  # before it is decoded; up to 2 bytes are padding
    try:
        data = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ItemError(f"{label} is a data: URL whose base64 is invalid ({error}); encode it again") from error
    _check_bytes(len(data), label, limits)
    return data


def _open(data: bytes, label: str, limits: ImageLimits) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ItemError(
            f"{label} is no readable image: it is damaged or not {_FORMAT_NAMES}; convert it to PNG or JPEG"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("", label, min(limits.max_pixels, 2 * Image.MAX_IMAGE_PIXELS)) from error
    except Exception as error:  # a broken header leads decoders to almost any exception
        raise ItemError(f"{label} has a damaged header ({error}); save it again as PNG or JPEG") from error


def _check_bytes(size: int, label: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ItemError(
            f"{label} is larger than the limit of {limits.max_bytes:,} bytes "
            f"({limits.max_bytes / 2**20:g} MiB); make the image smaller"
        )


def _check_size(size: tuple[int, int], label: str, limits: ImageLimits) -> None:
    width, height = size
    if min(width, height) < 1:
        raise ItemError(f"{label} has no pixels ({width}x{height}); each side must be at least 1 pixel")
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f" ({width}x{height})", label, limits.max_pixels)
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ItemError(
            f"{label} is too elongated ({width}x{height}): its sides may differ by {limits.max_aspect:g}:1 at most; "
            "crop it first"
        )


def _too_many_pixels(size: str, label: str, limit: int) -> ItemError:
    return ItemError(f"{label} declares more pixels{size} than the limit of {limit:,}; make the image smaller")


def _video_error(label: str) -> ItemError:
    return ItemError(f"{label} is a video, and only still images are read; extract a frame and pass that")


def _is_video(data: bytes) -> bool:
    if data[4:8] == b"ftyp":
        return data[8:12] not in _PICTURE_BRANDS
    if data[:4] == b"RIFF":
        return data[8:12] == b"AVI "
    return data.startswith(_VIDEO_MAGIC)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata is no reason to lose the picture: viewers show it as it lies
        return image
    return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image, low, high = image.convert("I"), 0, 65535
    else:
        low, high = image.getextrema()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("it holds NaN or infinite pixels")
        ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        top = next((top for top in ranges if low >= 0 and high <= top), None)
        low, high = (low, high) if top is None else (0, top)
    scale = 255 / (high - low or 1)
    # Half a level more, since the conversion to 8 bits cuts fractions off.
    grey = image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
    if isinstance(key := image.info.get("transparency"), int):  # the grey level that stands for "nothing here"
        grey.info["transparency"] = min(max(int((key - low) * scale + 0.5), 0), 255)
    return grey
