from __future__ import annotations

import collections

import pytest

from vretrver_hf.evaluation.benchmarks import BENCHMARKS, PAPER, find_benchmark, macro_mean
from vretrver_hf.evaluation.metrics import check_metrics


def test_the_macro_mean_of_the_paper_comes_out_of_its_rows():
    assert round(macro_mean(PAPER["V-Retrver-7B"]), 1) == 69.7


def test_no_macro_mean_of_a_part():
    rows = dict(PAPER["V-Retrver-7B"])
    del rows["nights_task4"]
    assert macro_mean(rows) is None
    assert macro_mean({"circo": 48.2}) is None


def test_sixteen_tasks_of_eight_kinds_and_five_unseen_sets():
    groups = collections.Counter(benchmark.group for benchmark in BENCHMARKS.values())
    assert groups == {"mbeir": 16, "unseen": 5}
    mbeir = [benchmark for benchmark in BENCHMARKS.values() if benchmark.group == "mbeir"]
    assert {benchmark.task_id for benchmark in mbeir} == {0, 1, 2, 3, 4, 6, 7, 8}
    assert all(benchmark.name.endswith(f"_task{benchmark.task_id}") for benchmark in mbeir)
    assert set(PAPER["V-Retrver-7B"]) == set(BENCHMARKS)


def test_metrics_are_the_fields():
    for benchmark in BENCHMARKS.values():
        check_metrics(benchmark.metrics)
        assert {"hit@1", "hit@5", "hit@10", "map@5", "mrr", "ndcg@10", benchmark.metric} <= set(benchmark.metrics)
        fashion = benchmark.name.startswith("fashion")
        assert (benchmark.metric == "hit@10") == fashion == ("hit@50" in benchmark.metrics)
    assert BENCHMARKS["circo"].metric == "map@5"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cirr_task7", "cirr_task7"),
        ("mbeir_cirr_task7_test", "cirr_task7"),
        ("MBEIR/CIRR-task7", "cirr_task7"),
        ("mbeir_oven_task8_union_pool_test", "oven_task8"),
        ("CIRCO", "circo"),
        ("MT-FIQ", "mt_fiq"),
        ("cirr", None),  # the task is not named, and one data set may have several
        ("emoji/t2i", None),
        ("", None),
    ],
)
def test_names(name, found):
    benchmark = find_benchmark(name)
    assert (benchmark.name if benchmark else None) == found
