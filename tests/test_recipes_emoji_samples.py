"""The bundled samples are what the worked example makes, twice the same."""

from __future__ import annotations

import collections
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from emoji_data import build_small, keys_and_faces
from PIL import Image


pytest.importorskip("resvg_py")

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

from make_samples import BUNDLED_ARTISTS, DRAWS, SAMPLES, SCENE_COLOURS, attribution, compare, make_samples


REAL_DATA = Path(os.environ.get("EMOJI_DATA", RECIPE / "data"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The small data, with all that scenes ask for."""
    return build_small(tmp_path_factory.mktemp("emoji"), keys_and_faces())


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "one"
    make_samples(data, folder)
    return folder


@pytest.fixture(scope="module")
def rows(made) -> list[dict]:
    return json.loads((made / "samples.json").read_text(encoding="utf-8"))


def test_one_sample_of_each_sort(rows):
    counts = collections.Counter(row["task"] for row in rows)
    assert counts == {draw.name: len(draw.sorts) for draw in DRAWS} and counts.total() == 14
    kinds = [
        row["candidates"][0]["image"].split("-")[-2]
        for row in rows
        if row["task"] in ("text-to-scene", "text-to-detail")
    ]
    assert kinds == ["overview", "clock", "face", "keycap"]


def test_all_is_held_out(rows):
    splits = {row["task"]: row["id"].split("-")[1] for row in rows}
    assert splits.pop("image-to-image") == "test_concept"
    assert set(splits.values()) == {"test_combination"}


def test_an_edit_shows_a_picture_and_says_the_change(rows):
    (edit,) = [row for row in rows if row["task"] == "image-and-text-to-image"]
    assert edit["query"].keys() == {"text", "image", "id"}
    assert all(item.keys() == {"image", "id"} for item in edit["candidates"])


def test_pictures_of_scenes_are_whole_and_small(made, rows):
    scenes = [item["image"] for row in rows for item in row["candidates"] if row["task"].endswith(("scene", "detail"))]
    assert len(set(scenes)) == 20
    for name in scenes:
        image = Image.open(made / name)
        assert (image.size, image.mode) == ((1008, 1008), "RGB")
        assert len(image.getcolors(SCENE_COLOURS)) > 2  # None for more


def test_every_picture_is_used_and_says_who_drew_it(made, rows):
    used = {item["image"] for row in rows for item in [row["query"], *row["candidates"]] if "image" in item}
    assert used == {path.name for path in made.glob("*.webp")}
    assert all(name.startswith(BUNDLED_ARTISTS) for name in used)


def test_ids_say_what_the_place_in_question_shows(rows):
    for row in rows:
        assert row["positive"] in range(5)
        ids = [item.get("id") or item["text"] for item in row["candidates"]]
        assert len(set(ids)) == 5
        if row["task"] == "text-to-detail" and "clock showing" in row["query"]["text"]:
            time = ids[row["positive"]]
            assert time in row["query"]["text"]


def test_twice_is_the_same(made, data, tmp_path):
    make_samples(data, tmp_path / "two")
    assert compare(made, tmp_path / "two") == []


def test_differences_are_named(made, tmp_path):
    kept = shutil.copytree(made, tmp_path / "kept")
    first, second, *_ = sorted(kept.glob("*.webp"))
    shutil.copyfile(second, first)
    second.rename(kept / "stray.webp")
    (kept / "ATTRIBUTION.md").write_text("nobody")
    assert compare(made, kept) == [
        f"{second.name} is missing",
        "stray.webp is not made by this recipe",
        "ATTRIBUTION.md differs",
        f"{first.name} differs",
    ]


def test_the_bundled_attribution_is_current():
    assert (SAMPLES / "ATTRIBUTION.md").read_text(encoding="utf-8") == attribution()


def test_the_bundled_licences_are_current():
    for path in (SAMPLES / "LICENSES").iterdir():
        assert path.read_bytes() == (RECIPE / "LICENSES" / path.name).read_bytes()


def test_the_bundled_samples_are_current(tmp_path):
    if not (REAL_DATA / "art.zip").exists():
        pytest.skip("the real data are not built: run recipes/emoji/build_data.py")
    make_samples(REAL_DATA, tmp_path / "samples")
    assert compare(tmp_path / "samples", SAMPLES) == []
