import gc
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


def test_a_picture_comes_in_its_own_size_and_in_that_of_the_prompt():
    picture = PictureLoader(28).load(item(), PRESET, "query")
    assert picture.original.size == (300, 200)
    # 56 x 56 pixels at most, in multiples of 28.
    assert picture.overview.size == (56, 28) or picture.overview.size == (56, 56)
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
    pictures = [loader.load(item(size=(56 + n, 56)), PRESET, str(n)) for n in range(THREADS)]
    assert [picture.original.width for picture in pictures] == [56 + n for n in range(THREADS)]


def test_a_bad_picture_is_told_by_name_to_everyone_who_asks():
    loader, broken = PictureLoader(28), Item(image=b"no picture")
    picture = loader.load(broken, PRESET, "candidate 2")
    for _ in range(2):
        with pytest.raises(ItemError, match="^candidate 2"):
            picture.original  # noqa: B018
    with pytest.raises(ItemError, match="^query"):
        loader.check(broken, "query").result()
    assert loader.check(item(), "query").result() is None


def test_map_keeps_the_order_and_raises_what_the_function_raises():
    loader = PictureLoader(28)
    assert list(loader.map(lambda value: value * 2, range(50))) == list(range(0, 100, 2))
    with pytest.raises(ZeroDivisionError):
        list(loader.map(lambda value: 1 / value, [1, 0]))


def test_names_count_candidates_from_one():
    assert [name for name, _ in named([1, 2, 3])] == ["query", "candidate 1", "candidate 2"]


def test_threads_end_with_the_loader():
    loader = PictureLoader(28)
    loader.load(item(), PRESET, "query").original  # noqa: B018
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
