from __future__ import annotations

import subprocess
import sys

import pytest
from records import make_example, make_records
from tiny_models import make_processor

from vretrver_hf.data.conversations import write_records
from vretrver_hf.encoding import Encoder
from vretrver_hf.protocol import format_answer, format_turn
from vretrver_hf.viewer import INVALID, MOST_CALLS, NO_ANSWER, WRONG, Traces


WRONG_ANSWER = [format_turn("1 fits", format_answer([0, 1, 2]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five trajectories: a crop, an answer at once, an invalid call, a malformed turn, and a wrong answer."""
    folder = tmp_path_factory.mktemp("records")
    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    records = make_records(encoder, [make_example(number) for number in range(4)])
    records += make_records(encoder, [make_example(4, pictures=False)], [WRONG_ANSWER])
    write_records(folder, records)
    return folder


def test_filters(folder):
    traces = Traces(folder)
    assert [entry.index for entry in traces.select(kind=WRONG)] == [4]
    assert [entry.index for entry in traces.select(kind=INVALID)] == [2]
    assert traces.select(kind=NO_ANSWER) == []
    assert [entry.calls for entry in traces.select(order=MOST_CALLS)] == [2, 1, 1, 0, 0]
    assert "doors: text → text" in traces.tasks
    assert [entry.index for entry in traces.select(task="doors: text → text")] == [4]


def test_each_is_shown_with_its_pictures(folder):
    traces = Traces(folder / "trajectories.jsonl")
    assert "Looks at a region of candidate 1" in traces.html(0) and "data:image/webp" in traces.html(0)
    assert "Wrong: candidate 2" in traces.html(4)


def test_a_file_of_its_own_has_no_pictures(folder, tmp_path):
    (tmp_path / "mine.jsonl").write_bytes((folder / "trajectories.jsonl").read_bytes())
    traces = Traces(tmp_path / "mine.jsonl")
    assert len(traces.entries) == 5 and traces.entries[0].right is None
    assert "is it 1?" in traces.html(0) and "not in this file" in traces.html(0)


@pytest.mark.parametrize("name", ["absent.jsonl", "empty.jsonl", "broken.jsonl"])
def test_mistakes(tmp_path, name):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    command = [sys.executable, "-m", "vretrver_hf", "view", str(tmp_path / name), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("vretrver: ") and name in done.stderr
