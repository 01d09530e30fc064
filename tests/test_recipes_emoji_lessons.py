"""What the later stages ask: nothing twice, in the order of the lesson, and of each task its share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import emoji_data  # makes the recipe importable
import pytest
import yaml
from art import Art
from concepts import load_concepts


pytest.importorskip("datasets")

import build_data  # noqa: E402
import lessons  # noqa: E402
from lessons import (  # noqa: E402
    GRPO_TASKS,
    PLACED_FIRST,
    RSFT_TASKS,
    cold_start_queries,
    draw_lesson,
    identity,
)
from stages import Source  # noqa: E402
from tasks import make_maker  # noqa: E402

from vretrver_hf.data.examples import load_examples  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return emoji_data.build_small(tmp_path_factory.mktemp("lessons"))


@pytest.fixture(scope="module")
def makers(data) -> dict:
    art, concepts = Art.load(data), load_concepts(data)
    return {task: make_maker(art, concepts, task, "train") for task in GRPO_TASKS}


@pytest.fixture(scope="module")
def asked(makers) -> tuple[list, list]:
    """Both lessons, the second knowing the first."""
    taken = set()
    first = draw_lesson(makers, "rsft", RSFT_TASKS, 150, 1, taken)
    return first, draw_lesson(makers, "grpo", GRPO_TASKS, 300, 1, taken, PLACED_FIRST)


@pytest.mark.parametrize("shares", [RSFT_TASKS, GRPO_TASKS])
def test_shares_are_all_there_is(shares):
    assert sum(shares.values()) == pytest.approx(1)


def test_no_query_comes_twice(asked):
    first, second = asked
    assert len({identity(example) for example in first + second}) == len(first + second) == 450
    plain = [example.query for example in first + second if not example.kind.startswith(("detail", "overview"))]
    assert len(set(plain)) == len(plain)
    assert [example.qid for example in second] == [f"grpo-{number:05d}" for number in range(300)]
    assert {example.split for example in first + second} == {"train"}


def test_what_was_asked_before_is_not_asked_again(makers, asked):
    """Without knowing of it, the same draw would ask some of it again."""
    _, second = asked
    alone = draw_lesson(makers, "rsft", RSFT_TASKS, 150, 1, set())
    assert [identity(example) for example in alone] == [identity(example) for example in asked[0]]
    unaware = draw_lesson(makers, "grpo", GRPO_TASKS, 300, 1, set(), PLACED_FIRST)
    assert {identity(e) for e in unaware} & {identity(e) for e in alone}
    assert not {identity(e) for e in second} & {identity(e) for e in alone}


def test_details_with_a_place_come_first(asked):
    kinds = [example.kind.split("/") for example in asked[1]]
    first, later = kinds[: int(PLACED_FIRST * 300)], kinds[int(PLACED_FIRST * 300) :]
    assert {kind[-1] for kind in first if kind[0] == "detail"} == {"place"}
    assert {kind[-1] for kind in later if kind[0] == "detail"} == {"place", "blob"}
    assert {kind[0] for kind in first} > {"detail", "overview"}


def test_tasks_have_their_shares(asked):
    for examples, shares in zip(asked, (RSFT_TASKS, GRPO_TASKS), strict=True):
        names = [e.kind.split("/")[0] for e in examples]
        tasks = Counter(n if n in ("detail", "overview") else e.task for n, e in zip(names, examples, strict=True))
        assert tasks.keys() == shares.keys()
        for task, share in shares.items():
            assert tasks[task] / len(examples) == pytest.approx(share, abs=0.08)


def test_the_same_seed_draws_the_same(makers, asked):
    assert draw_lesson(makers, "rsft", RSFT_TASKS, 150, 1, set()) == asked[0]
    assert draw_lesson(makers, "rsft", RSFT_TASKS, 150, 2, set()) != asked[0]


def test_a_task_that_has_no_more_to_ask_is_named(makers):
    with pytest.raises(ValueError, match="i2i has too few queries"):
        draw_lesson(makers, "rsft", {"i2i": 1.0}, 5000, 1, set())


@pytest.fixture
def short_cold_start(monkeypatch):
    """The small data have too few queries for a whole one."""
    monkeypatch.setattr(lessons, "COLD_START", 40)


def test_the_cold_start_counts_as_asked(data, short_cold_start):
    source = Source(data, data / "processor", 3)
    taken = cold_start_queries(data, 3)
    assert taken == {identity(source.cold_start_example(number)[0]) for number in range(40)}


def test_files_keep_the_order_of_the_lesson(data, makers, short_cold_start):
    build_data.write_lessons(data, 1, 30, 60)
    taken = cold_start_queries(data, 1)
    before = set(taken)
    for name, shares, count, placed in (("rsft", RSFT_TASKS, 30, 0.0), ("grpo", GRPO_TASKS, 60, PLACED_FIRST)):
        drawn = draw_lesson(makers, name, shares, count, 1, taken, placed)
        assert not {identity(example) for example in drawn} & before
        read = load_examples(data / "export" / f"{name}.parquet")
        assert [(one.query_id, one.query.text) for one in read] == [(one.qid, one.query.text) for one in drawn]
        assert [one.positives for one in read] == [[one.positive] for one in drawn]


def test_training_reads_the_lesson_in_its_order():
    settings = yaml.safe_load((emoji_data.RECIPE / "grpo.yaml").read_text())
    assert settings["dataset_name"].endswith("export/grpo.parquet")
    assert settings["shuffle_dataset"] is False
