from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vretrver_hf.data.trec import Hit, RunFile, read_qrels, read_run, write_qrels, write_run
from vretrver_hf.evaluation.metrics import per_query


def test_a_run_has_trecs_columns(tmp_path):
    write_run(tmp_path / "run.txt", [("q1", ["b", "a"]), ("q2", [Hit("c", 0.5)])], name="mine")
    assert (tmp_path / "run.txt").read_text().splitlines() == [
        "q1 Q0 b 1 2 mine",
        "q1 Q0 a 2 1 mine",
        "q2 Q0 c 1 0.5 mine",
    ]


def test_mbeirs_seventh_column(tmp_path):
    write_run(tmp_path / "run.txt", [("9:1", ["9:5"])], task_id=7)
    assert (tmp_path / "run.txt").read_text() == "9:1 Q0 9:5 1 1 vretrver 7\n"
    assert read_run(tmp_path / "run.txt") == {"9:1": [Hit("9:5", 1.0)]}


def test_reading_sorts_as_trec_eval_does(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("q Q0 a 1 0.5 r\nq Q0 b 2 0.9 r\n\nq Q0 c 3 0.5 r\n")
    assert [hit.id for hit in read_run(path)["q"]] == ["b", "c", "a"]  # the greater id first where scores are equal


def test_a_query_may_come_in_pieces(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text("q Q0 a 1 1 r\np Q0 a 1 1 r\nq Q0 b 1 2 r\nq Q0 b 1 2 r\n")
    run = RunFile(path)
    assert list(run) == ["q", "p"] and run["p"] == [Hit("a", 1)] and "x" not in run
    with pytest.raises(ValueError, match="line 4: query q gets b a second time"):
        run["q"]


def test_qrels_of_four_and_five_columns(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("9:1 0 9:5 1 7\n9:1 0 9:6 0 7\n9:2 0 9:7 2\n")
    assert read_qrels(path) == {"9:1": {"9:5": 1, "9:6": 0}, "9:2": {"9:7": 2}}
    write_qrels(path, [("q", {"b", "a"})])
    assert path.read_text() == "q 0 a 1\nq 0 b 1\n"


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        (read_run, "q Q0 a 1 0.5\n", "line 1: 5 columns"),
        (read_run, "q Q0 a 1 0.5 r 7 8\n", "line 1: 8 columns"),
        (read_run, "q Q0 a 1 0.5 r\nq Q0 b 2 best r\n", "line 2: score must be a number, got 'best'"),
        (read_run, "q Q0 a 1 0.5 r\nq Q0 a 2 0.4 r\n", "line 2: query q gets a a second time"),
        (read_qrels, "q 0 a\n", "line 1: 3 columns"),
        (read_qrels, "q 0 a yes\n", "line 1: rel must be a number, got 'yes'"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, read, text, reason):
    path = tmp_path / "file.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("query_id", "item"), [("q 1", "a"), ("q", "a b"), ("q", ""), ("q", "a\u2003b"), ("", "a")])
def test_ids_that_would_break_the_columns(tmp_path, query_id, item):
    with pytest.raises(ValueError, match="breaks columns"):
        write_run(tmp_path / "run.txt", [(query_id, [item])])
    assert not (tmp_path / "run.txt").exists()


ids = st.text("abc:1é", min_size=1, max_size=4)
runs = st.dictionaries(ids, st.lists(ids, min_size=1, max_size=8, unique=True), min_size=1, max_size=4)


@settings(deadline=None)
@given(runs)
def test_what_is_written_is_what_trec_eval_will_rank(tmp_path_factory, run):
    path = tmp_path_factory.mktemp("run") / "run.txt"
    write_run(path, run.items())
    again = {query_id: [hit.id for hit in hits] for query_id, hits in read_run(path).items()}
    assert again == run
    qrels = {query_id: {ranked[-1]} for query_id, ranked in run.items()}
    assert per_query(again, qrels)["mrr"].tolist() == [1 / len(ranked) for ranked in run.values()]
