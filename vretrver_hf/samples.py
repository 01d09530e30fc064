"""A few held-out queries that come with the package, for the demo and for a first try."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .items import Item, coerce_candidates, coerce_query


@dataclass(frozen=True)
class Sample:
    """
    A query whose right candidate is known.

    Args:
        id (`str`):
            Unique name.
        task (`str`):
            What the query and the candidates are, such as `"text-to-image"`.
        query (`Item`):
            The query.
        candidates (`list[Item]`):
            The candidates. The id of a picture says what it shows; the model does not read ids.
        positive (`int`):
            0-based index of the right candidate.
    """

    id: str
    task: str
    query: Item
    candidates: list[Item]
    positive: int


def load_samples() -> list[Sample]:
    """
    The samples that come with the package.

    What they ask for was held out from the training of the bundled model. `assets/samples/ATTRIBUTION.md` says whose
    pictures they are and how they were chosen.

    Example:

    ```python
    >>> from vretrver_hf.samples import load_samples

    >>> sample = load_samples()[0]
    >>> sample.task, len(sample.candidates)
    ('text-to-image', 5)

    ```
    """
    folder = Path(str(resources.files(__package__))) / "assets" / "samples"
    return [_sample(row, folder) for row in json.loads((folder / "samples.json").read_text(encoding="utf-8"))]


def _sample(row: dict, folder: Path) -> Sample:
    return Sample(
        id=row["id"],
        task=row["task"],
        query=coerce_query(_located(row["query"], folder)),
        candidates=coerce_candidates([_located(item, folder) for item in row["candidates"]]),
        positive=row["positive"],
    )


def _located(item: dict, folder: Path) -> dict:
    return {**item, "image": folder / item["image"]} if "image" in item else item
