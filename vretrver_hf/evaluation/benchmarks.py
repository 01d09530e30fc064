"""The tasks of M-BEIR and the unseen data sets, the metric of each, and what the paper reports, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from .metrics import DEFAULT_METRICS


MARKS = {"t → i": 0, "t → t": 1, "t → (i,t)": 2, "i → t": 3, "i → i": 4, "(i,t) → t": 6, "(i,t) → i": 7}
MARKS["(i,t) → (i,t)"] = 8
"""What query and candidates are, to M-BEIR's number of such tasks."""

_NAME = re.compile(r"(?:mbeir_)?(\w+?)(?:_test|_val|_union_pool|_single_pool)*")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """
    A data set in one direction.

    Args:
        name (`str`):
            Such as `"cirr_task7"`, as in M-BEIR's file names.
        title (`str`):
            For tables.
        kind (`str`):
            What query and candidates are, such as `"(i,t) → i"`.
        metric (`str`):
            The metric that it is reported in.
        group (`str`, *optional*, defaults to `"mbeir"`):
            `"mbeir"`, whose sixteen tasks make a macro mean, or `"unseen"`.
    """

    name: str
    title: str
    kind: str
    metric: str
    group: Literal["mbeir", "unseen"] = "mbeir"

    @property
    def task_id(self) -> int | None:
        """M-BEIR's number of the kind of task."""
        return MARKS.get(self.kind)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Everything that is computed for it: the fashion sets are looked at deeper."""
        deeper = ("hit@20", "hit@50") if self.name.startswith("fashion") else ()
        return tuple(dict.fromkeys((self.metric, *DEFAULT_METRICS, *deeper)))


def _benchmarks(group: Literal["mbeir", "unseen"], rows: Mapping[str, tuple[str, str, str]]) -> dict[str, Benchmark]:
    return {name: Benchmark(name, *row, group=group) for name, row in rows.items()}


BENCHMARKS: dict[str, Benchmark] = {
    **_benchmarks(
        "mbeir",
        {
            "visualnews_task0": ("VisualNews", "t → i", "hit@5"),
            "mscoco_task0": ("MSCOCO", "t → i", "hit@5"),
            "fashion200k_task0": ("Fashion200K", "t → i", "hit@10"),
            "webqa_task1": ("WebQA", "t → t", "hit@5"),
            "edis_task2": ("EDIS", "t → (i,t)", "hit@5"),
            "webqa_task2": ("WebQA", "t → (i,t)", "hit@5"),
            "visualnews_task3": ("VisualNews", "i → t", "hit@5"),
            "mscoco_task3": ("MSCOCO", "i → t", "hit@5"),
            "fashion200k_task3": ("Fashion200K", "i → t", "hit@10"),
            "nights_task4": ("NIGHTS", "i → i", "hit@5"),
            "oven_task6": ("OVEN", "(i,t) → t", "hit@5"),
            "infoseek_task6": ("InfoSeek", "(i,t) → t", "hit@5"),
            "fashioniq_task7": ("FashionIQ", "(i,t) → i", "hit@10"),
            "cirr_task7": ("CIRR", "(i,t) → i", "hit@5"),
            "oven_task8": ("OVEN", "(i,t) → (i,t)", "hit@5"),
            "infoseek_task8": ("InfoSeek", "(i,t) → (i,t)", "hit@5"),
        },
    ),
    **_benchmarks(
        "unseen",
        {
            "circo": ("CIRCO", "(i,t) → i", "map@5"),
            "genecis": ("GeneCIS", "(i,t) → i", "hit@1"),
            "visdial": ("VisDial", "t → i", "hit@1"),
            "vist": ("VIST", "(i,t) → i", "hit@1"),
            "mt_fiq": ("MT-FIQ", "(i,t) → i", "hit@5"),
        },
    ),
}

PAPER: dict[str, dict[str, float]] = {
    "V-Retrver-7B": {
        "visualnews_task0": 51.8,
        "mscoco_task0": 87.5,
        "fashion200k_task0": 40.3,
        "webqa_task1": 96.9,
        "edis_task2": 82.9,
        "webqa_task2": 90.2,
        "visualnews_task3": 52.2,
        "mscoco_task3": 94.8,
        "fashion200k_task3": 37.8,
        "nights_task4": 39.8,
        "oven_task6": 69.8,
        "infoseek_task6": 73.2,
        "fashioniq_task7": 51.2,
        "cirr_task7": 73.5,
        "oven_task8": 87.8,
        "infoseek_task8": 85.0,
        "circo": 48.2,
        "genecis": 30.7,
        "visdial": 75.1,
        "vist": 31.2,
        "mt_fiq": 68.3,
    },
}
"""Model to benchmark to score in percent, as the paper prints them (arXiv 2602.06034)."""

PAPER_MEANS = {"U-MARVEL-7B": 64.8, "LamRA-7B": 63.7, "Qwen2.5-VL-7B": 46.7}
"""Macro means over M-BEIR's sixteen tasks that the paper prints for others; their rows are not copied here."""


def find_benchmark(name: str) -> Benchmark | None:
    """
    The benchmark that a data set's name stands for, if any.

    Args:
        name (`str`):
            Such as `"mbeir_cirr_task7_test"`, `"CIRR_task7"` or `"CIRCO"`.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.benchmarks import find_benchmark

    >>> find_benchmark("mbeir_mscoco_task0_test").title
    'MSCOCO'

    ```
    """
    match = _NAME.fullmatch(re.sub(r"[\s/.-]+", "_", name.strip().lower()))
    return BENCHMARKS.get(match[1]) if match else None


def macro_mean(scores: Mapping[str, float]) -> float | None:
    """
    The plain mean over M-BEIR's sixteen tasks, each counting the same; `None` unless all are there.

    Args:
        scores (mapping):
            Benchmark to score, in the metric of each.

    Example:

    ```python
    >>> from vretrver_hf.evaluation.benchmarks import PAPER, macro_mean

    >>> round(macro_mean(PAPER["V-Retrver-7B"]), 1)
    69.7

    ```
    """
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.group == "mbeir"]
    if any(name not in scores for name in names):
        return None
    return sum(scores[name] for name in names) / len(names)
