"""The worked example's figures: played by the real reranker, kept when a run is cut off, made into tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

import cold_start
import evaluate
import tables
from emoji_toy import data, model, processor, source, table
from evaluate import Result, chosen, figures
from preset import PRESET
from train_tiny import save_model

from vretrver_hf.data.conversations import load_conversations, read_records
from vretrver_hf.encoding import Encoder


ROWS = "t2i/test_combination,detail/test_combination"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data, model):
    folder = tmp_path_factory.mktemp("saved")
    save_model(model, data / "processor", folder)
    config = json.loads((folder / "reranker_config.json").read_text())
    config["sampling"]["max_turn_tokens"] = 4  # an untrained model rambles
    (folder / "reranker_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def measured(saved, data, tmp_path_factory):
    """Rows with tools, without, and with another overview, as three runs write them."""
    folder = tmp_path_factory.mktemp("results")
    run = {"model": str(saved), "data": data, "count": 3, "only": ROWS, "sessions": 4, "device": "cpu"}
    options = {"dtype": "auto", "overview_pixels": None, "tools": True}
    evaluate.main(**run, **options, out=folder / "tools.json")
    evaluate.main(**run, **options | {"tools": False}, out=folder / "no-tools.json")
    evaluate.main(**run, **options | {"overview_pixels": 57 * 57}, out=folder / "small.json")
    return folder


def test_rows_say_what_was_played(measured):
    rows = json.loads((measured / "tools.json").read_text())
    assert [(row["task"], row["split"]) for row in rows] == [tuple(name.split("/")) for name in ROWS.split(",")]
    for row in rows:
        assert row["n"] == 3 and row["tools"] and row["overview_pixels"] == PRESET.overview_pixels
        assert sum(kind["n"] for kind in row["kinds"].values()) == 3
        assert row["statuses"] == {"ok": 0, "repaired": 0, "fallback": 1}  # four tokens are no answer
    small = json.loads((measured / "small.json").read_text())
    assert all(one["tokens"] < other["tokens"] for one, other in zip(small, rows, strict=True))


def test_finished_rows_are_kept(measured, saved, data, capsys):
    before = (measured / "tools.json").read_bytes()
    options = {"count": 3, "only": ROWS, "sessions": 4, "device": "cpu", "dtype": "auto", "overview_pixels": None}
    evaluate.main(model=str(saved), data=data, tools=True, out=measured / "tools.json", **options)
    assert (measured / "tools.json").read_bytes() == before and "R@1" not in capsys.readouterr().out


def test_rows_at_the_same_time_are_the_same(measured, saved, data, tmp_path):
    options = {"count": 3, "only": ROWS, "sessions": 4, "device": "cpu", "dtype": "auto", "overview_pixels": None}
    evaluate.main(model=str(saved), data=data, tools=True, out=tmp_path / "two.json", jobs=2, **options)
    found, expected = (json.loads(path.read_text()) for path in (tmp_path / "two.json", measured / "tools.json"))
    for row in (*found, *expected):
        del row["seconds"]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_figures_by_hand():
    results = [
        Result("a/x", True, 2, 1, 100, "ok"),
        Result("a/x", False, 0, 0, 50, "ok"),
        Result("a/y", True, 2, 2, 150, "repaired"),
    ]
    row = figures(results)
    assert row["r1"] == pytest.approx(2 / 3) and row["calls"] == pytest.approx(4 / 3)
    assert row["valid_calls"] == 0.75 and row["tokens"] == 100
    assert row["statuses"] == {"ok": pytest.approx(2 / 3), "repaired": pytest.approx(1 / 3), "fallback": 0}
    assert row["kinds"]["a/x"]["r1"] == 0.5 and row["kinds"]["a/y"]["n"] == 1


def test_a_row_that_there_is_not_is_refused():
    with pytest.raises(typer.BadParameter, match="there is no row 't2i/test_luck'"):
        list(chosen("t2i/test_luck"))
    assert list(chosen("")) == list(evaluate.SETS)


def test_tables_set_tools_beside_no_tools(measured, tmp_path, capsys):
    tables.main(sorted(measured.glob("*.json")), plot=tmp_path / "plot.svg")
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if line.startswith("| detail | combination | 3 |"))
    assert line.count("[") == 2  # two intervals: with tools and without
    assert "| t2i | combination |" in told and "detail/clock/" in told
    plot = (tmp_path / "plot.svg").read_text()
    assert "<svg" in plot and plot.count("PathCollection") + plot.count("LineCollection") >= 2


def test_the_cold_start_is_played_by_the_real_loop(source, processor, tmp_path):
    encoder = Encoder(processor, "qwen2_5_vl")
    records = list(cold_start.trajectories(source, encoder, 40, max_turn_tokens=1000))
    cold_start.write_records(tmp_path, records)
    kept = read_records(tmp_path)
    assert [record.trajectory.to_dict() for record in kept] == [record.trajectory.to_dict() for record in records]
    # The rows that train_tiny.py learns from hold the same tokens, and teach the same of them.
    conversations = load_conversations(tmp_path, encoder, PRESET)
    for number, conversation in enumerate(conversations):
        row = source.cold_start(number)
        assert conversation.token_ids == row.ids.tolist()[: len(conversation.token_ids)]
        learned = (row.weights > 0).tolist()[: len(conversation.mask)]
        assert [bool(bit) for bit in conversation.mask] == learned
    assert {record.trajectory.num_calls > 0 for record in records} == {True, False}
