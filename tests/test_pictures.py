import gc
import io
import threading

import pytest
from PIL import Image

from vretrver_hf.images import ImageRef, ItemError
from vretrver_hf.items import Item
from vretrver_hf.pictures import THREADS, PictureLoader, named
from vretrver_hf.protocol import get_preset


PRESET = get_preset("foveated", overview_pixels=56 * 56)


@pytest.fixture
def reads(monkeypatch):
    """Names of the items that were read, in order."""
    names, load = [], Item.load_image

    def load_image(self, *args, name=None, **kwargs):
        names.append(name)
        return load(self, *args, name=name, **kwargs)

    monkeypatch.setattr(Item, "load_image", load_image)
    return names


def item(colour="red", size=(300, 200)):
    return Item(image=Image.new("RGB", size, colour))


def png(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_a_picture_comes_in_its_own_size_and_in_that_of_the_prompt():
    picture = PictureLoader(28).load(item(), PRESET, "query")
    assert picture.original.size == (300, 200)
    assert picture.overview.size == (56, 28)  # at most 56 x 56 pixels, in multiples of 28
    assert picture.overview.tobytes() == ImageRef(0, *picture.overview.size).render(picture.original).tobytes()


def test_an_item_is_read_once_for_all_who_hold_its_picture(reads):
    loader, shown = PictureLoader(28), item()
    first = loader.load(shown, PRESET, "candidate 1")
    assert loader.load(shown, PRESET, "candidate 1") is first
    assert first.original is loader.load(shown, PRESET, "candidate 1").original
    # Another item, though equal, and another size in the prompt.
    others = loader.load(item(), PRESET, "twin"), loader.load(shown, get_preset("foveated"), "larger")
    assert all(other.original is not first.original for other in others)
    assert sorted(reads) == ["candidate 1", "larger", "twin"]


def test_what_nobody_holds_is_not_kept(reads):
    loader, shown = PictureLoader(28), item()
    loader.load(shown, PRESET, "first").original  # noqa: B018
    gc.collect()
    assert not len(loader._pictures)
    loader.load(shown, PRESET, "again").original  # noqa: B018
    assert reads == ["first", "again"]


def test_pictures_are_read_together_and_elsewhere(monkeypatch):
    # Each reader waits for the others, so one thread would never end.
    barrier, load = threading.Barrier(THREADS, timeout=20), Item.load_image
    monkeypatch.setattr(Item, "load_image", lambda self, **kwargs: barrier.wait() is None or load(self, **kwargs))
    loader = PictureLoader(28)
    # As files: of pictures that are open already, one thread at a time reads.
    pictures = [loader.load(Item(image=png((56 + n, 56))), PRESET, str(n)) for n in range(THREADS)]
    assert [picture.original.width for picture in pictures] == [56 + n for n in range(THREADS)]


def test_a_bad_picture_is_told_by_name_to_everyone_who_asks():
    loader, broken = PictureLoader(28), Item(image=b"no picture")
    picture = loader.load(broken, PRESET, "candidate 2")
    for _ in range(2):
        with pytest.raises(ItemError, match="^candidate 2"):
            picture.original  # noqa: B018
    with pytest.raises(ItemError, match="^query"):
        loader.check(broken, "query").wait()
    assert loader.check(item(), "query").wait() is None


def test_an_open_file_in_several_items_is_read_by_one_thread_at_a_time(tmp_path):
    pixels = Image.effect_noise((400, 300), 50).convert("RGB")
    pixels.save(tmp_path / "a.png")
    for _ in range(10):
        opened = Image.open(tmp_path / "a.png")  # nothing is decoded yet
        loader, items = PictureLoader(28), [Item(image=opened) for _ in range(8)]
        pictures = [loader.load(shown, PRESET, str(n)) for n, shown in enumerate(items)]
        checks = [loader.check(shown, str(n)) for n, shown in enumerate(items)]
        assert all(picture.original.tobytes() == pixels.tobytes() for picture in pictures)
        assert [check.wait() for check in checks] == [None] * 8


def test_an_item_is_named_as_each_who_shows_it_names_it():
    loader, broken = PictureLoader(28), Item(image=b"no picture")
    first, second = (loader.load(broken, PRESET, f"candidate {n}") for n in (1, 2))
    for picture, name in ((first, "candidate 1"), (second, "candidate 2")):
        with pytest.raises(ItemError, match=f"^{name}"):
            picture.original  # noqa: B018


def test_a_failure_is_not_remembered_and_holds_nobody(tmp_path):
    loader, late = PictureLoader(28), Item(image=tmp_path / "late.png")
    gc.disable()
    try:
        picture = loader.load(late, PRESET, "query")
        with pytest.raises(ItemError):
            picture.original  # noqa: B018
        del picture
        assert not len(loader._pictures)
    finally:
        gc.enable()
    Image.new("RGB", (60, 60)).save(tmp_path / "late.png")
    assert loader.load(late, PRESET, "query").original.size == (60, 60)


def test_what_nobody_waits_for_is_not_read(reads, monkeypatch):
    loader, gate, load = PictureLoader(28), threading.Event(), Item.load_image
    monkeypatch.setattr(Item, "load_image", lambda self, **kwargs: gate.wait(20) and load(self, **kwargs))
    kept = [loader.load(item(), PRESET, f"kept {n}") for n in range(THREADS)]  # all threads are busy
    left = [loader.load(item(), PRESET, f"left {n}") for n in range(20)]
    left += [loader.check(item(), f"left {n}") for n in range(20)]
    del left
    gate.set()
    for picture in kept:
        picture.wait()
    for pool in (loader._readers, loader._checkers):
        pool.shutdown()
    # Checks that had begun are ended; no more.
    assert sum(name.startswith("left") for name in reads) <= THREADS // 2


def test_calls_do_not_wait_behind_what_is_read_ahead(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Item, "load_image", lambda self, **kwargs: gate.wait(20))
    loader = PictureLoader(28)
    ahead = [loader.check(item(), str(n)) for n in range(100)]
    assert list(loader.map(str, [1, 2, 3])) == ["1", "2", "3"]
    gate.set()
    del ahead


def test_map_keeps_the_order_and_raises_what_the_function_raises():
    loader = PictureLoader(28)
    assert list(loader.map(lambda value: value * 2, range(50))) == list(range(0, 100, 2))
    with pytest.raises(ZeroDivisionError):
        list(loader.map(lambda value: 1 / value, [1, 0]))
    assert list(loader.map(lambda value: threading.get_ident(), [1])) == [threading.get_ident()]


def test_names_count_candidates_from_one():
    assert [name for name, _ in named([1, 2, 3])] == ["query", "candidate 1", "candidate 2"]


def test_threads_end_with_the_loader():
    before = set(threading.enumerate())
    loader = PictureLoader(28)
    loader.load(item(), PRESET, "query").original  # noqa: B018
    threads = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("pictures")]
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
