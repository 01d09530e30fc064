from __future__ import annotations

import base64
import os
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vretrver_hf.images import ImageLimits
from vretrver_hf.items import Item, ItemError, coerce_candidates, coerce_query


def png(width: int = 6, height: int = 4) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


DATA_URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a picture."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "UPPER.JPG").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestItem:
    def test_text_and_image_and_id(self):
        item = Item(text="a cat", image=png(), id="x")
        assert (item.text, item.id) == ("a cat", "x")
        assert item.load_image().size == (6, 4)
        assert item == Item(text="a cat", image=png(), id="x")

    @pytest.mark.parametrize("blank", ["", " ", "\n\t", None])
    def test_blank_text_counts_as_none(self, blank):
        assert Item(text=blank, image=png()).text is None
        with pytest.raises(ItemError, match="needs text, an image, or both"):
            Item(text=blank)

    def test_a_blank_image_counts_as_none(self):
        # as released data sets write a candidate without an image
        assert Item(text="a cat", image="").image is None

    def test_text_is_kept_as_it_is(self):
        assert Item(text=" a  cat\n").text == " a  cat\n"

    def test_half_a_surrogate_pair_is_replaced(self):
        # a broken file name on the command line; no tokenizer encodes it
        assert Item(text="caf\udce9").text == "caf?"
        assert Item(text="smile 😀").text == "smile 😀"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs text, an image, or both"),
            ({"text": 3}, "text must be a string, got int"),
            ({"text": b"a cat"}, "text must be a string, got bytes"),
            ({"text": "a cat", "id": 3}, "id must be a string, got int"),  # 3 and "3" would be two ids
            ({"image": [[0, 0]]}, "got list; turn an array into an image with PIL.Image.fromarray"),
            ({"image": {"bytes": b"", "path": ""}}, "got dict"),  # only Item.coerce takes the storage form
        ],
    )
    def test_misuse(self, arguments, message):
        with pytest.raises(ItemError, match=message):
            Item(**arguments)

    def test_load_image_names_the_item(self):
        with pytest.raises(ItemError, match="^item is empty"):
            Item(image=b"").load_image()
        with pytest.raises(ItemError, match="^item 'x' is empty"):
            Item(image=b"", id="x").load_image()
        with pytest.raises(ItemError, match="^candidate 3 is empty"):
            Item(image=b"", id="x").load_image(name="candidate 3")
        with pytest.raises(ItemError, match="^item 'x' has no image"):
            Item(text="a cat", id="x").load_image()

    def test_load_image_takes_limits(self):
        with pytest.raises(ItemError, match=r"\(6x4\) than the limit of 23"):
            Item(image=png()).load_image(ImageLimits(max_pixels=23))

    def test_nothing_is_decoded_before_it_is_needed_and_nothing_is_kept(self, tmp_path):
        path = tmp_path / "a.png"
        item = Item(image=path)
        path.write_bytes(png())
        assert item.load_image() is not item.load_image()
        path.write_bytes(png(8, 8))
        assert item.load_image().size == (8, 8)

    def test_repr_is_short(self):
        assert (
            repr(Item(text="a cat", image=png(), id="x")) == f"Item(text='a cat', image=<{len(png())} bytes>, id='x')"
        )
        assert repr(Item(image=Image.new("L", (3, 2)))) == "Item(image=<L 3x2>)"
        assert repr(Item(image=Path("a.png"))) == "Item(image='a.png')"
        assert len(repr(Item(text="x" * 10_000, image="data:image/png;base64," + "A" * 10_000))) < 250


class TestCoerce:
    def test_an_item_is_itself(self):
        item = Item(text="a cat")
        assert Item.coerce(item) is item

    @pytest.mark.parametrize(
        "text",
        [
            "a woman with red hair",
            "3.5",
            "wait...",
            ".png",  # a suffix alone names no file
            "png",
            "notes.txt",
            "https://example.org/",  # a page, not a picture
            "https://example.org/picture?name=a.png.html",
            "data: the new oil",
            "data:text/plain,hello",
            "The sign says:\nsee a.png",  # prose over two lines that ends in a file name
            "a.png is red",
            "😀",
        ],
    )
    def test_other_strings_are_text(self, text, folder):
        assert Item.coerce(text) == Item.coerce(text, allow_files=False) == Item(text=text)

    def test_a_string_with_the_suffix_of_an_image_is_an_image(self, folder):
        for name in ("a.png", "UPPER.JPG", str(folder / "a.png"), " a.png\n"):  # the last as a list of files is read
            item = Item.coerce(name)
            assert item.text is None and item.image == name.strip()
            assert item.load_image().size == (6, 4)

    def test_paths_bytes_images_and_data_urls(self, folder):
        for value in (
            folder / "a.png",
            png(),
            Image.new("RGB", (6, 4)),
            DATA_URL,
            f"\n{DATA_URL.replace('data', 'DATA')}",
        ):
            item = Item.coerce(value)
            assert item.text is None and item.load_image().size == (6, 4)

    @pytest.mark.parametrize(
        "suffix", ["jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "svg", "PNG"]
    )
    def test_an_image_that_is_no_file(self, suffix, folder):
        message = (
            f"^candidate 3: 'missing.{suffix}' looks like .* no such file; if you meant text, use Item\\(text=...\\)"
        )
        with pytest.raises(ItemError, match=message):
            Item.coerce(f"missing.{suffix}", name="candidate 3")
        assert Item.coerce(Item(text=f"missing.{suffix}")).text == f"missing.{suffix}"

    def test_a_folder_with_the_suffix_of_an_image(self, folder):
        (folder / "b.png").mkdir()
        with pytest.raises(ItemError, match="is a directory"):
            Item.coerce("b.png").load_image()

    @pytest.mark.parametrize(
        "value",
        [
            "clip.mp4",  # whether the file exists or not
            "clip.MOV",
            Path("clip.webm"),
            "https://example.org/clip.mp4?t=3",
            "data:video/mp4;base64,AAAA",
            {"image": "clip.avi"},
            {"image": {"bytes": None, "path": "clip.mkv"}},
            Item(image="clip.mp4"),
        ],
    )
    def test_a_video_is_refused_by_name(self, value):
        with pytest.raises(ItemError, match="^query: .* is a video, and only still images are read"):
            Item.coerce(value, name="query")

    def test_a_video_in_disguise_is_refused_when_it_is_read(self, folder):
        (folder / "b.png").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41")
        with pytest.raises(ItemError, match="is a video"):
            Item.coerce("b.png").load_image()

    @pytest.mark.parametrize(
        "value",
        [
            "https://example.org/a.png",
            "http://example.org/a.JPG?width=300#top",
            "s3://bucket/a.webp",
            "file:///etc/a.png",
            {"image": "https://example.org/no-suffix"},
            Item(image="https://example.org/a.png"),
        ],
    )
    @pytest.mark.parametrize("allow_files", [True, False])
    def test_urls_are_not_fetched(self, value, allow_files):
        with pytest.raises(ItemError, match="does not fetch URLs; download it first"):
            Item.coerce(value, allow_files=allow_files)

    def test_mappings(self, folder):
        item = Item.coerce({"text": "a cat", "image": "a.png", "id": "x"})
        assert (item.text, item.image, item.id) == ("a cat", "a.png", "x")
        assert Item.coerce({"text": "b.png"}).text == "b.png"  # said to be text
        assert Item.coerce({"image": "a.png", "text": ""}).text is None
        for image in (folder / "a.png", png(), Image.new("RGB", (6, 4)), DATA_URL):
            assert Item.coerce({"image": image}).load_image().size == (6, 4)
        assert Item.coerce({"text": "a cat", "image": None}) == Item(text="a cat")

    def test_images_as_the_datasets_library_stores_them(self, folder):
        for image in (
            {"bytes": png(), "path": None},
            {"bytes": png(), "path": "gone.png"},  # the name it had where it came from
            {"bytes": None, "path": "a.png"},
            {"path": "a.png"},
        ):
            assert Item.coerce({"image": image}).load_image().size == (6, 4)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "there is none"),
            ("", "needs text, an image, or both"),
            ({}, "needs text, an image, or both"),
            ({"text": None, "image": ""}, "needs text, an image, or both"),
            ({"txt": "a cat"}, "unknown keys 'txt'; an item has the keys text, image, id"),
            ({"text": "a cat", 3: 4}, "unknown keys 3"),
            ({"text": "a cat", "url": "x", "score": 1}, "unknown keys 'url', 'score'"),
            ({"image": {"bytes": None, "path": None}}, "holds neither bytes nor a path"),
            ({"image": {}}, "holds neither bytes nor a path"),
            ({"image": {"data": b""}}, "unknown keys 'data'; an image has the keys bytes, path"),
            ({"image": 3}, "got int"),
            ({"text": ["a", "cat"]}, "text must be a string, got list"),
            (3, "expected an Item, text, a path, a PIL image or a dict, got int"),
            (["a cat"], "got list"),
            (object(), "got object"),
        ],
    )
    def test_misuse_names_the_item(self, value, message):
        with pytest.raises(ItemError, match=f"^candidate 7: .*{message}"):
            Item.coerce(value, name="candidate 7")

    @pytest.mark.parametrize(
        "value",
        [
            "a.png",
            "/etc/passwd.png",
            "missing.png",
            Path("a.png"),
            {"image": "a.png"},
            {"image": "/etc/passwd"},
            {"image": {"bytes": None, "path": "a.png"}},
            Item(image="a.png"),
        ],
    )
    def test_files_can_be_forbidden(self, value, folder, monkeypatch):
        # nor does an answer tell whether a file exists
        monkeypatch.setattr(os.path, "exists", lambda path: pytest.fail("looked at the disk"))
        with pytest.raises(ItemError, match="is a path, and files are not read here; send a data: URL"):
            Item.coerce(value, allow_files=False)

    def test_what_needs_no_files_is_still_allowed(self):
        for value in (DATA_URL, png(), {"image": DATA_URL}, {"image": {"bytes": png(), "path": "a.png"}}):
            assert Item.coerce(value, allow_files=False).load_image().size == (6, 4)

    @given(st.text())
    def test_any_string_is_an_item_or_an_item_error(self, text):
        try:
            item = Item.coerce(text)
        except ItemError:
            return
        assert item.text is not None or item.image is not None
        (item.text or "").encode("utf-8")


def test_the_query():
    assert coerce_query("a cat") == Item(text="a cat")
    with pytest.raises(ItemError, match="^query: there is none"):
        coerce_query(None)
    with pytest.raises(ItemError, match="^query: .*files are not read"):
        coerce_query("a.png", allow_files=False)


class TestCandidates:
    def test_ids(self):
        items = coerce_candidates(["a", {"text": "b", "id": "x"}, Item(text="c", image=png()), "a"])
        assert [item.id for item in items] == ["0", "x", "2", "3"]
        assert [item.text for item in items] == ["a", "b", "c", "a"]  # equal candidates stay two
        assert items[2].image == png()

    def test_any_iterable(self):
        assert coerce_candidates([]) == []
        assert [item.text for item in coerce_candidates(text for text in "ab")] == ["a", "b"]
        assert [item.text for item in coerce_candidates(("a", "b"))] == ["a", "b"]

    @pytest.mark.parametrize(
        "values",
        ["a cat", b"a cat", {"text": "a cat"}, Item(text="a cat"), Path("a.png"), Image.new("L", (1, 1)), None, 3],
    )
    def test_a_single_item_is_no_list(self, values):
        # a string would be taken letter by letter
        with pytest.raises(ItemError, match=f"a single {type(values).__name__}; pass a list"):
            coerce_candidates(values)

    def test_errors_number_the_candidates_from_1(self):
        with pytest.raises(ItemError, match="^candidate 2: "):
            coerce_candidates(["a", ""])
        with pytest.raises(ItemError, match="^candidate 1: .*files are not read"):
            coerce_candidates(["a.png"], allow_files=False)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([Item(text="a", id="x"), Item(text="b", id="x")], "candidate 2: its id 'x' is also that of candidate 1"),
            ([Item(text="a", id="1"), "b"], "candidate 2: its id '1' is also that of candidate 1"),  # by position
            (["a", Item(text="b", id="0")], "candidate 2: its id '0' is also that of candidate 1"),
        ],
    )
    def test_ids_must_differ(self, values, message):
        with pytest.raises(ItemError, match=message):
            coerce_candidates(values)
