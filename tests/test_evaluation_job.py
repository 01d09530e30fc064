"""Jobs on a scripted engine, whose figures can be worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evaluation_files import PRESET, BestFirst, released_row, write_rows

from vretrver_hf import Item, Reranker
from vretrver_hf.data.trec import read_qrels, read_run
from vretrver_hf.evaluation.job import QueryResult, evaluate_queries
from vretrver_hf.evaluation.metrics import hit_at_k
from vretrver_hf.evaluation.queries import EvaluationQuery, EvaluationSet, ReleasedSet
from vretrver_hf.evaluation.results import METRICS, Results, Scores, write_results
from vretrver_hf.journal import Journal, Shard
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset


def evaluate(folder, queries, engine, shard=None, preset=PRESET, on_query=None, **options):
    reranker = Reranker(engine, preset, **{key: options.pop(key) for key in ("window", "stride") if key in options})
    with Journal(folder / "journal", {}, (shard or Shard()).index) as journal:
        evaluate_queries(queries, journal, reranker, shard=shard, on_query=on_query, **options)


def results(folder, queries) -> Results:
    with Journal(folder / "journal", {}) as journal:
        return write_results(folder, "run", {"model": "m"}, queries.keys, queries.groups, journal)


@pytest.fixture
def queries(tmp_path) -> ReleasedSet:
    """Six queries: the right one is last of 50; third of 7; missed; last of 20; first; in another data set."""
    rows = [
        released_row(0),
        released_row(1, hits=7, positive=2),
        released_row(2, hits=9, positive=30),
        released_row(3, hits=20),
        released_row(4, hits=21, positive=0),
        released_row(5, source="mine"),
    ]
    return ReleasedSet.open(str(write_rows(tmp_path / "rows.parquet", rows)))


def test_figures_by_hand(tmp_path, queries, encoder):
    evaluate(tmp_path, queries, BestFirst(encoder))
    outcome = results(tmp_path, queries)
    cirr = outcome.groups["cirr_task7"]
    # The best comes first: q0 and q3 at rank 1, q1's right one is fifth of seven, q2's nowhere. q4's falls to
    # the end of the window before the last, and the worst of the other 20 stays behind it.
    assert cirr["n"] == 5 and cirr["failed"] == 0
    assert cirr["reranked"]["hit@1"]["mean"] == pytest.approx(2 / 5)
    assert cirr["reranked"]["hit@5"]["mean"] == pytest.approx(3 / 5)
    assert cirr["reranked"]["mrr"]["mean"] == pytest.approx((1 + 1 / 5 + 0 + 1 + 1 / 20) / 5)
    assert cirr["coarse"]["mrr"]["mean"] == pytest.approx((1 / 50 + 1 / 3 + 0 + 1 / 20 + 1) / 5)
    assert (cirr["gain"]["hit@1"]["wins"], cirr["gain"]["hit@1"]["losses"]) == (2, 1)
    # 50 candidates take 4 windows, 21 take 2, fewer take 1.
    assert cirr["cost"]["windows"] == (4 + 1 + 1 + 1 + 2) / 5 and outcome.total["n"] == 6
    assert cirr["cost"]["statuses"] == {"ok": 1, "repaired": 0, "fallback": 0}
    assert cirr["cost"]["calls"] == 0 and cirr["cost"]["valid_calls"] is None
    assert set(cirr["reranked"]) == {"hit@1", "hit@5", "hit@10", "map@5", "mrr", "ndcg@10"}
    assert outcome.groups["mine"]["reranked"]["hit@1"] == {"mean": 1, "interval": None}
    assert Results.load(tmp_path) == Results.load(tmp_path / METRICS)


def test_files_for_other_tools(tmp_path, queries, encoder):
    evaluate(tmp_path, queries, BestFirst(encoder))
    outcome = results(tmp_path, queries)
    qrels = {key: {i for i, grade in row.items() if grade} for key, row in read_qrels(tmp_path / "qrels.txt").items()}
    for side, name in (("reranked", "run.trec"), ("coarse", "coarse.trec")):
        run = {key: [hit.id for hit in hits] for key, hits in read_run(tmp_path / name).items()}
        assert [len(ids) for ids in run.values()] == [50, 7, 9, 20, 21, 50]
        assert hit_at_k(run, qrels, 5) == pytest.approx(outcome.total[side]["hit@5"]["mean"])
    scores = Scores.load(tmp_path / "scores.json")
    assert scores.keys == queries.keys and scores.reranked["hit@1"].tolist() == [1, 0, 0, 1, 0, 1]


def test_depth_leaves_the_rest_as_it_was(tmp_path, queries, encoder):
    evaluate(tmp_path, queries, BestFirst(encoder), depth=10)
    with Journal(tmp_path / "journal", {}) as journal:
        result = QueryResult.from_dict(journal["q0"])
    assert result.order == [*range(9, -1, -1), *range(10, 50)] and len(result.windows) == 1


def test_a_data_sets_own_prompt_window_by_window(tmp_path, queries, encoder):
    engine, preset = BestFirst(encoder), get_preset(PRESET, prompt_source="dataset")
    evaluate(tmp_path, queries, engine, preset=preset)
    assert len(engine.read["q0"]) == 4
    for text in engine.read["q0"]:
        assert "Query: Candidates: q0\nCandidates:\n(1) " in text and text.count("worth") == 20
        assert "\n\nGuidelines: rank." in text
    assert results(tmp_path, queries).groups["cirr_task7"]["reranked"]["hit@1"]["mean"] == pytest.approx(2 / 5)


def test_a_prompt_that_does_not_fit_fails_its_query_alone(tmp_path, encoder):
    wrong = released_row(1)
    wrong["prompt"] = [{"role": "user", "content": "rank (1) something else"}]
    queries = ReleasedSet.open(str(write_rows(tmp_path / "rows.parquet", [released_row(0), wrong])))
    evaluate(tmp_path, queries, BestFirst(encoder), preset=get_preset(PRESET, prompt_source="dataset"))
    assert results(tmp_path, queries).errors == {"q1": "prompt does not show the row's 20 candidates as (1), (2), …"}


class Listed(EvaluationSet):
    def __init__(self, entries, groups=None):
        self._entries = entries
        self.keys = [f"q{number}" for number in range(len(entries))]
        self.groups = groups or ["all"] * len(entries)

    def __getitem__(self, index):
        entry = self._entries[index]
        if isinstance(entry, Exception):
            raise entry
        return entry


def entry(number: int, *candidates: Item, relevant="0") -> EvaluationQuery:
    return EvaluationQuery(f"q{number}", Item(text="q"), list(candidates), {relevant: 1})


def test_queries_that_fail_count_zero_and_are_tried_again(tmp_path, encoder, picture):
    good = [Item(text="worth 1", id="0"), Item(text="worth 0", id="1")]
    path = tmp_path / "late.png"
    entries = [entry(0, *good), ValueError("rows, row 1: no qid"), entry(2, Item(image=path, id="0"), good[1])]
    queries, told = Listed(entries), []
    evaluate(tmp_path, queries, BestFirst(encoder), on_query=lambda key, result: told.append((key, result is None)))
    outcome = results(tmp_path, queries)
    assert sorted(told) == [("q0", False), ("q1", True), ("q2", True)]
    assert outcome.errors["q1"] == "rows, row 1: no qid" and "candidate 1" in outcome.errors["q2"]
    assert outcome.total["failed"] == 2 and outcome.total["reranked"]["hit@1"]["mean"] == pytest.approx(1 / 3)
    picture().save(path)
    evaluate(tmp_path, queries, BestFirst(encoder))
    assert list(results(tmp_path, queries).errors) == ["q1"]


def test_no_candidates_and_one(tmp_path, encoder):
    queries = Listed([entry(0), entry(1, Item(text="a", id="0"))])
    evaluate(tmp_path, queries, BestFirst(encoder))
    outcome = results(tmp_path, queries)
    assert outcome.total["reranked"]["hit@1"]["mean"] == 0.5 and outcome.total["cost"]["windows"] == 0


def test_status_and_calls_of_each_window(tmp_path, encoder):
    call = format_turn("look", format_call("select_images", {"target_images": [9]}))  # there is no such picture
    said = {0: call, 1: format_turn("a", "<answer>[2]</answer>")}

    class Engine(BestFirst):
        def answer(self, query_id, turn):
            return said[turn] if query_id == "q0" else format_turn("b", format_answer([1, 0]))

    pair = [Item(text="a", id="0"), Item(text="b", id="1")]
    queries = Listed([entry(0, *pair), entry(1, *pair)])
    evaluate(tmp_path, queries, Engine(encoder), keep_trajectories=True)
    with Journal(tmp_path / "journal", {}) as journal:
        result = QueryResult.from_dict(journal["q0"])
    assert (result.status, result.order) == ("repaired", [1, 0]) and len(result.trajectories) == 1
    (window,) = result.windows
    assert (window.status, window.calls, window.valid_calls, window.finish) == ("repaired", 1, 0, "answer")
    cost = results(tmp_path, queries).total["cost"]
    assert cost["calls"] == 0.5 and cost["valid_calls"] == 0 and cost["window_statuses"]["repaired"] == 0.5


def without_time(folder) -> dict:
    values = json.loads((folder / METRICS).read_text())
    for row in (*values["groups"].values(), values["total"]):
        row["cost"].pop("seconds")
    return values


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_going_on_gives_what_an_uninterrupted_run_gives(tmp_path, queries, encoder, stop_after):
    evaluate(tmp_path / "whole", queries, BestFirst(encoder, max_sessions=1))
    results(tmp_path / "whole", queries)

    class Stop(Exception):
        pass

    done = []

    def stop(key, result):
        done.append(key)
        if len(done) > stop_after:
            raise Stop

    with pytest.raises(Stop):
        evaluate(tmp_path / "parts", queries, BestFirst(encoder, max_sessions=1), on_query=stop)
    again = []
    evaluate(
        tmp_path / "parts", queries, BestFirst(encoder, max_sessions=1), on_query=lambda key, result: again.append(key)
    )
    assert done + again == queries.keys  # none twice, none missing
    results(tmp_path / "parts", queries)
    assert without_time(tmp_path / "parts") == without_time(tmp_path / "whole")
    for name in ("run.trec", "coarse.trec", "qrels.txt", "scores.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_any_number_of_processes_gives_the_same(tmp_path, queries, encoder):
    for count in (1, 3):
        for index in range(count):
            evaluate(tmp_path / str(count), queries, BestFirst(encoder), shard=Shard(index, count))
        results(tmp_path / str(count), queries)
    assert without_time(tmp_path / "1") == without_time(tmp_path / "3")
    assert (tmp_path / "1" / "run.trec").read_bytes() == (tmp_path / "3" / "run.trec").read_bytes()


def test_windows_of_many_queries_share_the_batch(tmp_path, queries, encoder):
    engine = BestFirst(encoder, max_sessions=4)
    evaluate(tmp_path, queries, engine)
    assert engine.most_open == 4


def test_macro_means_need_all_sixteen(tmp_path, encoder):
    from vretrver_hf.evaluation.benchmarks import BENCHMARKS

    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.group == "mbeir"]
    good = [Item(text="worth 0", id="1"), Item(text="worth 1", id="0")]
    bad = [good[1], good[0]]
    half = [entry(n, *(good if n % 2 else bad), relevant="0" if n % 4 < 2 else "x") for n in range(16)]
    queries = Listed(half, names)
    evaluate(tmp_path, queries, BestFirst(encoder))
    outcome = results(tmp_path, queries)
    assert outcome.macro == {"reranked": 0.5, "coarse": 0.5}
    assert {"hit@20", "hit@50"} <= set(outcome.total["reranked"])  # the fashion sets are there
    assert np.mean([row["reranked"]["hit@1"]["mean"] for row in outcome.groups.values()]) == 0.5


@pytest.mark.parametrize("text", ["", "{}", '{"name": "x", "other": 1}', "[]"])
def test_files_that_are_no_results(tmp_path, text):
    (tmp_path / METRICS).write_text(text)
    with pytest.raises(ValueError, match="holds no results"):
        Results.load(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        Results.load(tmp_path / "absent.json")
