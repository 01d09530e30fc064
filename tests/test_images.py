from __future__ import annotations

import base64
import os
import random
import stat
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vretrver_hf.images import ImageLimits, ImageRef, ItemError, fit_size, load_image, to_rgb


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
LOSSY_FORMATS = ("JPEG", "WEBP", "AVIF")


def encode(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    """A picture that compresses badly, so that cutting a file short always cuts pixels off."""
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(width * height * 3))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, bits: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand: any declared size and depth, whatever the pixels say."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + png_chunk(b"IEND", b"")


def quadrants() -> Image.Image:
    """40 x 20 pixels: red and green above, blue and white below."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(GREEN, (20, 0, 40, 10))
    image.paste(BLUE, (0, 10, 20, 20))
    image.paste(WHITE, (20, 10, 40, 20))
    return image


def near(pixel: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 6) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(pixel, expected, strict=True))


# What a person would see.


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_formats_from_bytes_path_string_and_data_url(fmt, tmp_path):
    data = encode(Image.new("RGB", (16, 8), RED), fmt)
    path = tmp_path / "picture.bin"  # the contents decide, not the suffix
    path.write_bytes(data)
    url = f"data:image/{fmt.lower()};base64,{base64.b64encode(data).decode()}"
    for source in (data, path, str(path), url):
        image = load_image(source)
        assert type(image) is Image.Image and image.mode == "RGB" and image.size == (16, 8)
        assert near(image.getpixel((8, 4)), RED)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "size", "top_left", "top_right"),
    [
        (1, (40, 20), RED, GREEN),
        (2, (40, 20), GREEN, RED),  # mirrored
        (3, (40, 20), WHITE, BLUE),  # upside down
        (4, (40, 20), BLUE, WHITE),  # flipped
        (5, (20, 40), RED, BLUE),  # mirrored along the main diagonal
        (6, (20, 40), BLUE, RED),  # camera held with its left side down
        (7, (20, 40), WHITE, GREEN),  # mirrored along the other diagonal
        (8, (20, 40), GREEN, WHITE),  # camera held with its right side down
    ],
)
def test_exif_orientation_is_applied_once(fmt, orientation, size, top_left, top_right):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if fmt in LOSSY_FORMATS else {}
    image = load_image(encode(quadrants(), fmt, exif=exif, **options))
    assert image.size == size
    assert near(image.getpixel((4, 4)), top_left, 24)
    assert near(image.getpixel((size[0] - 5, 4)), top_right, 24)
    assert not image.info and 0x0112 not in image.getexif()
    assert load_image(image).size == size  # a second reading does not turn it again


def test_an_unknown_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert load_image(encode(quadrants(), exif=exif)).size == (40, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_keeps_the_picture():
    assert load_image(encode(quadrants(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")).size == (40, 20)


def test_transparency_shows_white():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))  # nothing there, though its colour is black
    image.putpixel((2, 0), (255, 0, 0, 102))  # two fifths of red
    assert load_image(encode(image)).get_flattened_data() == (RED, WHITE, (255, 153, 153))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_with_alpha_shows_white_where_transparent(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    steps = {"LA": ["LA"], "La": ["LA", "La"], "PA": ["PA"], "RGBA": [], "RGBa": ["RGBa"]}[mode]
    for step in steps:
        image = image.convert(step)
    assert image.mode == mode
    assert load_image(image).get_flattened_data() == (WHITE, BLACK)


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    assert load_image(encode(image)).get_flattened_data() == (BLUE, RED)
    assert load_image(encode(image, transparency=0)).get_flattened_data() == (WHITE, RED)
    # One alpha for each palette entry: 204 of 255 red, and blue left out.
    assert load_image(encode(image, transparency=b"\x00\xcc")).get_flattened_data() == (WHITE, (255, 51, 51))


@pytest.mark.parametrize(
    ("bits", "color", "row", "key", "expected"),
    [
        (8, 2, [0, 0, 255, 255, 0, 0], [0, 0, 0, 0, 0, 255], (WHITE, RED)),  # RGB, blue is transparent
        (8, 0, [7, 0], [0, 7], (WHITE, BLACK)),  # grey, 7 is transparent
        (1, 0, [0b01000000], [0, 0], (WHITE, WHITE)),  # 1 bit, black is transparent and white is white
        (16, 0, [3, 232, 0, 0], [3, 232], (WHITE, BLACK)),  # 16-bit grey, 1000 is transparent
    ],
)
def test_a_transparent_colour_shows_white(bits, color, row, key, expected):
    png = raw_png(2, 1, bits, color, bytes([0, *row]), png_chunk(b"tRNS", bytes(key)))
    assert load_image(png).get_flattened_data() == expected


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink make red
    assert near(load_image(encode(image, "JPEG", quality=95)).getpixel((8, 8)), RED)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(fmt):
    image = Image.new("I;16", (4, 1))
    for x, value in enumerate([0, 257 * 10, 32768, 65535]):
        image.putpixel((x, 0), value)
    # 32768 / 257 = 127.5, rounded up
    assert load_image(encode(image, fmt)).get_flattened_data() == (BLACK, (10,) * 3, (128,) * 3, WHITE)


def test_big_endian_16_bit_tiff():
    image = Image.new("I;16B", (2, 1))
    image.putpixel((1, 0), 257 * 99)
    assert load_image(encode(image, "TIFF")).get_flattened_data() == (BLACK, (99,) * 3)


@pytest.mark.parametrize(("color", "expected"), [(2, RED), (6, (255, 127, 127))], ids=["rgb", "rgba"])
def test_16_bit_colour_png(color, expected):
    samples = [65535, 0, 0] + ([32768] if color == 6 else [])
    png = raw_png(1, 1, 16, color, b"\0" + struct.pack(f">{len(samples)}H", *samples))
    assert near(load_image(png).getpixel((0, 0)), expected, 1)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("F", [0.0, 0.5, 1.0], [0, 128, 255]),  # unit range
        ("F", [0.0, 100.0, 200.0], [0, 100, 200]),  # 8-bit range
        ("F", [-1.0, 0.0, 1.0], [0, 128, 255]),  # neither: stretched
        ("F", [-2.0, -2.0, -2.0], [0, 0, 0]),  # no contrast to stretch
        ("I", [0, 100, 200], [0, 100, 200]),  # 8-bit range
        ("I", [0, 2570, 65535], [0, 10, 255]),  # 16-bit range
        ("I", [0, 100_000, 200_000], [0, 128, 255]),  # neither: stretched
    ],
)
def test_integer_and_float_pixels(mode, values, expected):
    image = Image.new(mode, (3, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    assert [pixel[0] for pixel in load_image(image).get_flattened_data()] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_without_a_finite_range_are_an_error(value):
    with pytest.raises(ItemError, match="NaN or infinite"):
        load_image(Image.new("F", (2, 2), value))


@pytest.mark.parametrize("mode", ["1", "L", "HSV", "YCbCr", "RGBX", "CMYK", "P", "I;16L", "LAB"])
def test_other_modes_become_rgb(mode):
    image = to_rgb(Image.new(mode, (5, 4)))
    assert image.mode == "RGB" and image.size == (5, 4)


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP"])
def test_an_animation_shows_its_first_frame(fmt):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(BytesIO(data)).n_frames == 2
    assert load_image(data).getpixel((8, 8)) == RED


def test_an_open_image_is_copied_and_left_as_it_was():
    image = Image.new("RGB", (4, 4), RED)
    image.info["note"] = "mine"
    loaded = load_image(image)
    loaded.putpixel((0, 0), BLUE)
    assert image.getpixel((0, 0)) == RED and image.info == {"note": "mine"} and loaded.info == {}


def test_an_image_that_pillow_opened_but_did_not_read_yet(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants().save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert load_image(image).size == (20, 40)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_an_open_image_whose_file_is_truncated_or_closed(tmp_path):
    data = encode(noise())
    with pytest.raises(ItemError, match="candidate 2 cannot be decoded, it is truncated"):
        load_image(Image.open(BytesIO(data[: len(data) // 2])), name="candidate 2")
    noise().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ItemError, match="cannot be decoded"):
        load_image(image)


# What is refused. Each message names the item, what is wrong and what helps.


def bad_bytes() -> dict[str, tuple[bytes, str]]:
    bomb = raw_png(60_000, 60_000, 8, 2, b"")  # 10.8 GB of pixels in 57 bytes
    png = encode(noise())
    cases = {
        "zero bytes": (b"", "is empty"),
        "text that is called an image": (b"hello, I am a text", "no readable image: it is damaged or not PNG"),
        "a web page saved as an image": (b"<!DOCTYPE html><html></html>", "no readable image"),
        "EPS, whose decoder would be another program": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "no readable image",
        ),
        "an iPhone's HEIC, which Pillow does not read": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no readable image"),
        "a signature and nothing else": (b"\x89PNG\r\n\x1a\n", "no readable image"),
        "a bomb": (bomb, "more pixels than the limit of 64,000,000"),
        "just over the limit of pixels": (raw_png(8001, 8000, 8, 0, b""), r"more pixels \(8001x8000\) than the limit"),
        "zero width": (raw_png(0, 5, 8, 2, b""), "cannot be decoded|no readable image|no pixels|damaged header"),
        "more than 200:1, lying": (encode(Image.new("L", (603, 3))), r"too elongated \(603x3\).*200:1"),
        "more than 200:1, standing": (encode(Image.new("L", (1, 300))), r"too elongated \(1x300\).*200:1"),
        "a checksum that does not fit": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "truncated or damaged"),
        "mp4": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "is a video"),
        "QuickTime": (b"\0\0\0\x14ftypqt  \0\0\0\0", "is a video"),
        "WebM": (b"\x1a\x45\xdf\xa3" + b"\0" * 30, "is a video"),
        "AVI": (b"RIFF\x24\0\0\0AVI LIST", "is a video"),
        "MPEG": (b"\0\0\1\xba" + b"\0" * 30, "is a video"),
        "WMV": (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + b"\0" * 30, "is a video"),
    }
    for fmt in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        data = encode(noise(), fmt)
        for share in (0.3, 0.6, 0.9):
            truncated = data[: int(len(data) * share)]
            cases[f"{fmt} cut to {share:.0%}"] = (truncated, "truncated or damaged|no readable image|damaged header")
    return cases


BAD_BYTES = bad_bytes()


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_files(case, tmp_path):
    data, message = BAD_BYTES[case]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for source in (path, str(path), data, url):
        with pytest.raises(ItemError, match=message) as error:
            load_image(source, name="candidate 3")
        text = str(error.value)
        assert text.startswith("candidate 3") and len(text.splitlines()) == 1
        assert ("a.png" in text) == (source in (path, str(path)))


def test_exactly_200_to_1_is_accepted():
    assert load_image(encode(Image.new("L", (200, 1)))).size == (200, 1)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_where_warnings_are_errors():
    with pytest.raises(ItemError, match="limit of 64,000,000"):
        load_image(raw_png(10_000, 10_000, 8, 0, b""))


def test_a_declared_size_is_refused_before_any_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ItemError, match="more pixels"):
        load_image(raw_png(9000, 9000, 8, 0, b""))


def test_limits_are_configurable():
    data = encode(quadrants())
    load_image(data, limits=ImageLimits(max_bytes=len(data), max_pixels=800, max_aspect=2))
    with pytest.raises(ItemError, match=f"limit of {len(data) - 1:,} bytes"):
        load_image(data, limits=ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ItemError, match=r"\(40x20\) than the limit of 799"):
        load_image(data, limits=ImageLimits(max_pixels=799))
    with pytest.raises(ItemError, match="1.5:1"):
        load_image(data, limits=ImageLimits(max_aspect=1.5))


def test_max_bytes_holds_for_every_source(tmp_path):
    data = encode(noise())
    (tmp_path / "a.png").write_bytes(data)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for source in (data, tmp_path / "a.png", url):
        with pytest.raises(ItemError, match="larger than the limit of 1,000 bytes"):
            load_image(source, limits=ImageLimits(max_bytes=1000))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_open_image_without_pixels(size):
    with pytest.raises(ItemError, match="query has no pixels"):
        load_image(Image.new("RGB", size), name="query")


def test_bad_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file.png").write_bytes(encode(quadrants()))
    (tmp_path / "folder.png").mkdir()
    for path, message in [
        (tmp_path / "missing.png", "does not exist; check the path"),
        (tmp_path / "folder.png", "is a directory"),
        (tmp_path / "pipe.png", "is not a regular file"),  # reading it would wait for ever
        (tmp_path / "file.png" / "a.png", "cannot be read"),  # a file is no folder
        (tmp_path / ("a" * 300 + ".png"), "cannot be read"),  # longer than a file name may be
        ("null\0character.png", "cannot be read"),
        ("", "is a directory"),  # the current one
        (tmp_path / "clip.MP4", "is a video"),  # by its name: it need not even exist
        ("clip.webm", "is a video"),
    ]:
        with pytest.raises(ItemError, match=message) as error:
            load_image(path, name="query")
        assert str(error.value).startswith("query (")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(quadrants()))
    path.chmod(stat.S_IWUSR)
    with pytest.raises(ItemError, match="cannot be read .*permissions"):
        load_image(path)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "HTTP://example.org/", "file:///a.png", "s3://bucket/a.png"]
)
def test_urls_are_not_fetched(url):
    with pytest.raises(ItemError, match="does not fetch URLs; download it first"):
        load_image(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,###", "base64 is invalid"),
        ("data:image/png;base64,äöü", "base64 is invalid"),  # not ASCII
        ("data:image/png;base64,abc", "base64 is invalid"),  # padding is missing
        ("data:image/svg+xml,<svg/>", "of another kind"),  # percent-encoded text, not base64
        ("data:text/plain;base64,aGVsbG8=", "of another kind"),
        ("data:image/png;base64", "is empty"),  # no comma
        ("data:video/mp4;base64,AAAA", "is a video"),
    ],
)
def test_bad_data_urls(url, message):
    with pytest.raises(ItemError, match=message):
        load_image(url)


def test_a_data_url_may_be_wrapped_and_in_capitals():
    lines = base64.encodebytes(encode(noise())).decode()
    assert "\n" in lines.strip()
    assert load_image(f"DATA:IMAGE/PNG;BASE64,{lines}").size == (64, 48)


@pytest.mark.parametrize("source", [None, 3, [], bytearray(b"x"), object()])
def test_other_types(source):
    with pytest.raises(ItemError, match=f"got {type(source).__name__}; .*fromarray"):
        load_image(source)


@pytest.mark.filterwarnings("ignore")  # what Pillow remarks on damaged headers
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_picture_or_an_item_error(data):
    fmt = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    content = bytearray(SAMPLES[fmt])
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(content), limits=ImageLimits(max_pixels=100_000))
    except ItemError:
        return
    assert image.mode == "RGB" and min(image.size) >= 1


SAMPLES = {fmt: encode(noise(12, 10), fmt) for fmt in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}


# Sizes.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (644, 476)),  # 22.86 and 17.14 multiples of 28: 23 and 17
        ((56, 56), (56, 56)),
        ((1, 1), (56, 56)),  # four tokens at least
        ((100, 10), (196, 28)),  # 4 x 0 multiples; grown by sqrt(3136 / 1000) = 1.771: 177.1 and 17.7, rounded up
        ((10000, 10000), (1988, 1988)),  # shrunk by sqrt(1e8 / 5120 / 784) to 2003.5: 71 multiples
        ((70, 70), (56, 56)),  # 2.5 multiples: half to even
        ((98, 98), (112, 112)),  # 3.5 multiples: half to even
    ],
)
def test_fit_size_by_hand(size, expected):
    assert fit_size(*size, factor=28, min_pixels=4 * 28**2, max_pixels=5120 * 28**2) == expected


def test_fit_size_of_a_long_strip_stays_within_200_to_1():
    # 40 pixels round to 28, 8000 to 8008: 286:1, which a processor would refuse
    assert fit_size(8000, 40, factor=28, min_pixels=3136, max_pixels=4_014_080) == (5600, 28)
    assert fit_size(40, 8000, factor=28, min_pixels=3136, max_pixels=4_014_080) == (28, 5600)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 12_000),
    height=st.integers(1, 12_000),
    factor=st.sampled_from([14, 28, 32]),
    least=st.integers(1, 64),
    most=st.integers(64, 20_000),
)
def test_fit_size_gives_the_numbers_of_transformers(width, height, factor, least, most):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    budget = {"factor": factor, "min_pixels": least * factor**2, "max_pixels": most * factor**2}
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="200:1"):
            fit_size(width, height, **budget)
        return
    fitted = fit_size(width, height, **budget)
    assert all(side >= factor and side % factor == 0 for side in fitted)
    assert max(fitted) <= 200 * min(fitted)
    reference_height, reference_width = smart_resize(height, width, **budget)
    if max(reference_height, reference_width) <= 200 * min(reference_height, reference_width):
        assert fitted == (reference_width, reference_height)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0},
        {"height": -3},
        {"factor": 0},
        {"min_pixels": 0},  # would allow a side of 0
        {"min_pixels": 9000},  # more than max_pixels
    ],
)
def test_fit_size_misuse(change):
    arguments = {"width": 30, "height": 30, "factor": 28, "min_pixels": 784, "max_pixels": 8000} | change
    with pytest.raises(ValueError, match="must be positive"):
        fit_size(**arguments)


# References.


@pytest.mark.parametrize("box", [None, (1, 2, 30, 20)])
def test_image_ref_round_trip(box):
    ref = ImageRef(3, 56, 84, box)
    values = ref.to_dict()
    assert values == {"index": 3, "width": 56, "height": 84, "box": box and list(box)}
    assert ImageRef.from_dict(values) == ref


def test_image_ref_renders_the_region_and_nothing_around_it():
    image = Image.new("RGB", (100, 100), BLUE)
    image.paste(RED, (20, 30, 60, 50))
    rendered = ImageRef(1, 112, 56, (20, 30, 60, 50)).render(image)
    assert rendered.size == (112, 56)
    assert rendered.getcolors() == [(112 * 56, RED)]  # bicubic: no blue bleeds in from outside
    assert ImageRef(1, 28, 28).render(image).size == (28, 28)


def test_images_items_and_tools_import_no_torch():
    code = "import sys, vretrver_hf.images, vretrver_hf.items, vretrver_hf.tools; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
