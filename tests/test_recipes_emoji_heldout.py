"""What models are compared on: so many queries of each task, none twice, none that training asks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import emoji_data  # makes the recipe importable
import pytest
from art import TEST_ARTIST, Art
from concepts import load_concepts


pytest.importorskip("datasets")

import build_data  # noqa: E402
import heldout  # noqa: E402
from evaluate import ARTIST_TASKS  # noqa: E402
from examples import Scene  # noqa: E402
from export import task_name  # noqa: E402
from heldout import HELD_OUT, HeldOut, draw_held_out  # noqa: E402
from lessons import GRPO_TASKS, draw_lesson, identity  # noqa: E402
from tasks import KINDS, TASKS, make_maker  # noqa: E402

from vretrver_hf.evaluation.queries import ReleasedSet  # noqa: E402


COUNTS = {"detail": 12, "overview": 6, "t2i": 4, "t2t": 3, "t2it": 3, "it2i": 3, "it2t": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return emoji_data.build_small(tmp_path_factory.mktemp("heldout"))


@pytest.fixture(scope="module")
def makers(data):
    art, concepts = Art.load(data), load_concepts(data)
    return lambda split, tasks: {task: make_maker(art, concepts, task, split) for task in tasks}


@pytest.fixture(scope="module")
def drawn(makers) -> list:
    return draw_held_out(makers("test_combination", COUNTS), "test", COUNTS, 0)


def test_the_mix_is_what_the_readme_says():
    split, counts = HELD_OUT["test"]
    assert (split, sum(counts.values())) == ("test_combination", 2400)
    assert counts == {"detail": 800, "overview": 400, **dict.fromkeys(TASKS, 150)}
    split, counts = HELD_OUT["test_artist"]
    assert (split, sum(counts.values())) == ("test_artist", 600) and set(counts) == set(ARTIST_TASKS)


def test_each_task_has_its_number_in_a_random_order(drawn):
    names = [task_name(example) for example in drawn]
    assert Counter(names) == COUNTS
    assert [example.qid for example in drawn] == [f"test-{number:05d}" for number in range(34)]
    assert names != sorted(names) and len(set(names[:12])) > 2
    assert len({identity(example) for example in drawn}) == 34


def test_the_same_seed_draws_the_same(drawn, makers):
    fresh = makers("test_combination", COUNTS)
    assert draw_held_out(fresh, "test", COUNTS, 0) == drawn != draw_held_out(fresh, "test", COUNTS, 1)


def test_training_asks_none_of_it(drawn, makers):
    lesson = draw_lesson(makers("train", GRPO_TASKS), "grpo", GRPO_TASKS, 200, 0, set())
    assert not {example.query for example in lesson} & {example.query for example in drawn}
    assert {example.split for example in drawn} == {"test_combination"}


def test_a_task_with_too_few_queries_is_named(makers):
    with pytest.raises(ValueError, match="t2i has too few queries"):
        draw_held_out(makers("test_combination", ["t2i"]), "test", {"t2i": 3000}, 0)


def test_files_are_read_by_the_evaluation(data, monkeypatch):
    sets = {
        "test": HeldOut("test_combination", COUNTS),
        "test_artist": HeldOut("test_artist", {"t2i": 3, "detail": 2}),
    }
    monkeypatch.setattr(heldout, "HELD_OUT", sets)
    build_data.write_held_out(data, 0)
    queries = ReleasedSet.open(str(data / "export" / "test.parquet"))
    assert Counter(queries.groups) == {f"emoji/{task}": count for task, count in COUNTS.items()}
    assert all(len(query.candidates) == 5 and len(query.relevant) == 1 for query in queries)
    artist = ReleasedSet.open(str(data / "export" / "test_artist.parquet"))
    assert artist.keys == [f"test_artist-{number:05d}" for number in range(5)]


def test_the_artist_is_the_unseen_one(makers):
    examples = draw_held_out(makers("test_artist", KINDS), "test_artist", dict.fromkeys(KINDS, 4), 0)
    shown = [entry.image for example in examples for entry in example.candidates]
    assert all(isinstance(scene, Scene) for scene in shown)
    assert {thing.drawing.artist for scene in shown for thing in scene.objects} == {TEST_ARTIST}
