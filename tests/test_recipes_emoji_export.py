"""Exported rows are the examples, for whoever reads the released schema."""

from __future__ import annotations

import io
from collections import Counter

import emoji_data  # noqa: F401 (makes the recipe importable)
import numpy as np
import pytest
from art import Art
from concepts import load_concepts
from examples import Drawing, Entry, Example, Placed, Scene
from PIL import Image
from preset import PRESET
from scenes import draw_scene


pytest.importorskip("datasets")

from export import Exporter, training_examples, write_parquet  # noqa: E402
from tasks import TASKS, make_examples, make_maker, splits_of  # noqa: E402

from vretrver_hf.data.examples import example_from_row, load_examples  # noqa: E402
from vretrver_hf.protocol import build_messages  # noqa: E402


pytest_plugins = ["emoji_data"]


@pytest.fixture(scope="module")
def art(small_data) -> Art:
    return Art.load(small_data)


@pytest.fixture(scope="module")
def concepts(small_data) -> dict:
    return load_concepts(small_data)


@pytest.fixture(scope="module")
def exporter(art) -> Exporter:
    return Exporter(art)


def _pixels(item) -> np.ndarray:
    return np.asarray(item.load_image())


@pytest.mark.parametrize("task", TASKS)
def test_a_row_reads_back_as_the_example(exporter, art, concepts, task):
    for split in splits_of(task):
        for example in make_examples(art, concepts, task, split, 10, 3):
            row = exporter.row(example)
            read = example_from_row(row)
            assert (read.query_id, read.positives) == (example.qid, [example.positive])
            assert read.data_source == f"emoji/{task}" and row["ability"] == example.kind
            for entry, item in zip(example.entries, [read.query, *read.candidates], strict=True):
                assert item.text == entry.text and (item.image is None) == (entry.image is None)
                if entry.image is not None:
                    assert (_pixels(item) == art.image(*entry.image)).all()
            info = row["extra_info"]
            assert info["target_boxes"] == [[]] * len(example.candidates)
            assert info["ground_truth_position"] == [row["reward_model"]["ground_truth"]] == [example.positive + 1]
            assert (
                len(info["images"]) == len(row["images"]) == sum(entry.image is not None for entry in example.entries)
            )


def test_the_prompt_is_the_preset_s_own_with_a_mark_for_each_picture(exporter, art, concepts):
    (example,) = make_examples(art, concepts, "it2i", "train", 1, 3)
    row = exporter.row(example)
    system, user = row["prompt"]
    assert system["role"] == "system" and user["role"] == "user"
    assert user["content"].startswith(f"Query: <image>{example.query.text}\nCandidates:\n(1) <image>\n(2) <image>\n")
    assert user["content"].count("<image>") == len(row["images"]) == 6
    read = example_from_row(row)
    messages = build_messages(read.query, read.candidates, PRESET)
    assert user["content"].replace("<image>", "") == "".join(b.get("text", "") for b in messages[1]["content"])


def test_scenes_are_drawn(exporter, art):
    placed = (Placed(Drawing("noto", "1f414"), 30, 60, 48), Placed(Drawing("noto", "1f416"), 200, 90, 48))
    scenes = [Scene(placed, 0, 336), Scene(placed[::-1], 1, 336)]
    candidates = [Entry(None, scene, "1f414") for scene in scenes]
    example = Example("q", "t2i", "train", Entry("a dog"), candidates, 1, [0, 3], "detail/clock/blob")
    row = exporter.row(example)
    assert row["data_source"] == "emoji/detail"  # a task of its own, though text to image too
    assert row["extra_info"]["target_boxes"] == [[30, 60, 78, 108]] * 2
    for item, scene in zip(example_from_row(row).candidates, scenes, strict=True):
        pixels = _pixels(item).astype(int)
        assert pixels.shape == (336, 336, 3)
        assert abs(pixels - draw_scene(art, scene)).mean() < 4  # they are not stored without loss


def test_parquet_keeps_rows_and_stores_a_picture_once(exporter, art, concepts, tmp_path):
    examples = make_maker(art, concepts, "i2i", "train").make(300, 5)
    path = tmp_path / "i2i.parquet"
    write_parquet(path, map(exporter.row, examples))
    read = load_examples(path)
    assert [one.query_id for one in read] == [example.qid for example in examples]
    for example, one in zip(examples[::60], read[::60], strict=True):
        assert (_pixels(one.candidates[0]) == art.image(*example.candidates[0].image)).all()
    shown = {entry.image for example in examples for entry in example.entries}
    total = sum(len(exporter._item(Entry(None, picture)).image) for picture in shown)
    assert path.stat().st_size < 2.5 * total  # 1,800 pictures would be several times that
    assert list(tmp_path.iterdir()) == [path]


def test_the_training_set_mixes_all_tasks(art, concepts):
    examples = training_examples(art, concepts, 400, 1)
    assert training_examples(art, concepts, 400, 1) == examples
    assert {example.split for example in examples} == {"train"} and len({e.qid for e in examples}) == 400
    tasks = Counter(example.task for example in examples)
    assert tasks.keys() == set(TASKS) and min(tasks.values()) >= 8
    assert {"overview", "detail"} <= {example.kind.partition("/")[0] for example in examples}
    assert examples[:100] != sorted(examples[:100], key=lambda example: example.task)


def test_pictures_are_webp(exporter, art, concepts):
    (example,) = make_examples(art, concepts, "t2i", "train", 1, 1)
    for image in exporter.row(example)["images"]:
        assert Image.open(io.BytesIO(image["image"]["bytes"])).format == "WEBP"
