from __future__ import annotations

import collections
import re
from importlib import resources
from pathlib import Path

import pytest

from vretrver_hf.samples import load_samples


FOLDER = Path(str(resources.files("vretrver_hf"))) / "assets" / "samples"
PICTURES = sorted(FOLDER.glob("*.webp"))


def test_three_of_each_task_of_single_pictures():
    counts = collections.Counter(sample.task for sample in load_samples())
    assert {counts[task] for task in ("text-to-image", "image-to-image", "image-to-text")} == {3}
    assert counts.total() <= 14  # a demo takes a minute at most


@pytest.mark.parametrize("sample", load_samples(), ids=lambda sample: sample.id)
def test_samples_are_whole(sample):
    query, kind = sample.task.split("-to-")
    assert (sample.query.image is not None, sample.query.text is not None) == ("image" in query, "text" in query)
    assert all((item.image is not None) == (kind != "text") for item in sample.candidates)
    assert len(sample.candidates) == 5 and sample.positive in range(5)
    assert len({item.id for item in sample.candidates}) == 5
    for item in [sample.query, *sample.candidates]:
        if item.image is not None:
            assert item.load_image().size == ((1008, 1008) if kind in ("scene", "detail") else (224, 224))


def test_the_right_candidate_is_not_given_away_by_its_place():
    assert len({sample.positive for sample in load_samples()}) > 2


def test_ids_are_unique():
    ids = [sample.id for sample in load_samples()]
    assert len(ids) == len(set(ids))


def test_every_picture_is_used_and_none_is_missing():
    used = {item.image for sample in load_samples() for item in [sample.query, *sample.candidates] if item.image}
    assert used == set(PICTURES)


def test_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2**20


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_each_picture_is_credited_under_a_licence_that_lies_beside_it(path):
    """Share-alike art would bind whoever ships the package."""
    rows = [
        line for line in (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines() if "-*.webp`" in line
    ]
    (row,) = [row for row in rows if re.fullmatch(re.search(r"`(.+?)-\*\.webp`", row)[1] + "-[0-9a-z-]+", path.stem)]
    license = re.search(r"\]\((LICENSES/.+?\.txt)\)", row)[1]
    assert license in ("LICENSES/Apache-2.0.txt", "LICENSES/CC-BY-4.0.txt", "LICENSES/MIT.txt")
    assert (FOLDER / license).is_file()
