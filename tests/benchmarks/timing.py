"""What the benchmarks share: things to compare are timed in alternation, so that a busy machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def alternate(actions: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each action, by default after one run of each that does not count."""
    for action in actions.values() if warm_up else ():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(timed(action))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(action: Callable[[], object]) -> float:
    """Seconds of one run, the accelerator's work included."""
    _synchronize()
    started = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - started


def tell(medians: dict[str, float], unit: float = 1.0, name: str = "s") -> None:
    """Prints each median and its ratio to the first."""
    first = next(iter(medians.values()))
    for label, seconds in medians.items():
        print(f"{label:<46}{seconds / unit:10.3f} {name}  ratio {seconds / first:7.3f}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
