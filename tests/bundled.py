"""What tests take of the bundled samples."""

from __future__ import annotations

from vretrver_hf.samples import Sample, load_samples


def one_sample_a_task() -> dict[str, Sample]:
    """The last of each task's, by task."""
    return {sample.task: sample for sample in load_samples()}
