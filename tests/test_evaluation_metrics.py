"""Metrics against numbers worked out by hand, and against trec_eval's definitions on random runs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vretrver_hf.evaluation.metrics import (
    average_precision_at_k,
    check_metrics,
    hit_at_k,
    ndcg_at_k,
    per_query,
    reciprocal_rank,
)


RUN = {"q1": ["a", "b", "c", "d"], "q2": ["x", "y"], "q3": []}
QRELS = {"q1": {"b", "d", "e"}, "q2": {"x"}, "q3": {"z"}, "q4": {"w"}}  # q4 is not in the run at all


class TestByHand:
    def test_hit_is_one_where_any_relevant_id_is_in_the_top(self):
        assert hit_at_k(RUN, QRELS, 1) == 1 / 4  # q2
        assert hit_at_k(RUN, QRELS, 2) == 2 / 4  # and q1, whose second is relevant
        assert hit_at_k(RUN, QRELS, 100) == 2 / 4

    def test_average_precision_divides_by_the_smaller_of_k_and_relevant(self):
        # q1 has 3 relevant ids. At 1: nothing. At 2: (1/2) / 2. At 4: (1/2 + 2/4) / 3.
        assert average_precision_at_k({"q1": RUN["q1"]}, {"q1": QRELS["q1"]}, 1) == 0
        assert average_precision_at_k({"q1": RUN["q1"]}, {"q1": QRELS["q1"]}, 2) == pytest.approx(1 / 4)
        assert average_precision_at_k({"q1": RUN["q1"]}, {"q1": QRELS["q1"]}, 4) == pytest.approx(1 / 3)
        assert average_precision_at_k(RUN, QRELS, 4) == pytest.approx((1 / 3 + 1 + 0 + 0) / 4)

    def test_a_perfect_top_k_has_average_precision_one_however_many_are_relevant(self):
        assert average_precision_at_k({"q": list("abcde")}, {"q": set("abcdefgh")}, 5) == pytest.approx(1)

    def test_reciprocal_rank(self):
        assert reciprocal_rank(RUN, QRELS) == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)

    def test_ndcg_with_grades(self):
        # gains 0, 2, 1 at ranks 1 to 3 against the ideal 2, 1
        gained = 2 / math.log2(3) + 1 / math.log2(4)
        ideal = 2 / math.log2(2) + 1 / math.log2(3)
        run, qrels = {"q": ["n", "two", "one"]}, {"q": {"two": 2, "one": 1, "n": 0}}
        assert ndcg_at_k(run, qrels, 10) == pytest.approx(gained / ideal)
        assert ndcg_at_k(run, qrels, 1) == 0

    def test_per_query_keeps_the_order_of_the_qrels(self):
        values = per_query(RUN, QRELS, ["hit@2", "mrr"])
        assert list(values) == ["hit@2", "mrr"]
        assert values["hit@2"].tolist() == [1, 1, 0, 0] and values["mrr"].tolist() == [0.5, 1, 0, 0]

    def test_a_query_with_nothing_relevant_counts_zero(self):
        assert per_query({"q": ["a"]}, {"q": set()})["mrr"].tolist() == [0]
        assert per_query({"q": ["a"]}, {"q": {"a": 0}})["map@5"].tolist() == [0]

    def test_an_id_that_looks_like_a_number_is_still_an_id(self):
        assert hit_at_k({"q": ["1", "0"]}, {"q": {"0"}}, 1) == 0

    def test_queries_of_the_run_alone_do_not_count(self):
        assert hit_at_k({"q": ["a"], "other": ["b"]}, {"q": {"a"}}, 1) == 1


class TestMistakes:
    @pytest.mark.parametrize("name", ["hit", "hit@0", "recall@5", "mrr@10", "map@-1", ""])
    def test_unknown_metrics(self, name):
        with pytest.raises(ValueError, match="unknown metric"):
            check_metrics(["hit@5", name])

    def test_an_id_twice(self):
        with pytest.raises(ValueError, match="query q7: the run names 'a' more than once"):
            hit_at_k({"q7": ["a", "b", "a"]}, {"q7": {"b"}}, 1)

    def test_no_queries(self):
        with pytest.raises(ValueError, match="no queries"):
            hit_at_k(RUN, {}, 1)


ids = st.sampled_from("abcdefghij")
runs = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), st.lists(ids, unique=True))
judgements = st.dictionaries(st.sampled_from(["q1", "q2", "q3"]), st.dictionaries(ids, st.integers(0, 3)), min_size=1)


def trec_eval(ranked: list[str], grades: dict[str, int], name: str, k: int) -> float:
    """trec_eval's own definitions: success, map_cut, recip_rank and ndcg_cut, with linear gains."""
    gains = [grades.get(item, 0) for item in ranked]
    relevant = [gain > 0 for gain in gains]
    total = sum(grade > 0 for grade in grades.values())
    if name == "success":
        return float(any(relevant[:k]))
    if name == "recip_rank":
        return next((1 / rank for rank, found in enumerate(relevant, 1) if found), 0.0)
    if name == "map_cut":
        precisions = [sum(relevant[:rank]) / rank for rank in range(1, len(ranked[:k]) + 1) if relevant[rank - 1]]
        return sum(precisions) / total if total else 0.0
    ideal = sorted(grades.values(), reverse=True)
    dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(values[:k])) for values in (gains, ideal))
    return dcg / best if best else 0.0


@settings(deadline=None, max_examples=60)
@given(runs, judgements, st.integers(1, 12))
def test_agrees_with_trec_eval(run, qrels, k):
    values = per_query(run, qrels, [f"hit@{k}", f"map@{k}", "mrr", f"ndcg@{k}"])
    for place, (query_id, grades) in enumerate(qrels.items()):
        ranked = run.get(query_id, [])
        relevant = sum(grade > 0 for grade in grades.values())
        expected = {
            f"hit@{k}": trec_eval(ranked, grades, "success", k),
            # CIRCO's divisor instead of trec_eval's; the two agree where no more than k are relevant
            f"map@{k}": trec_eval(ranked, grades, "map_cut", k) * relevant / max(1, min(k, relevant)),
            "mrr": trec_eval(ranked, grades, "recip_rank", k),
            f"ndcg@{k}": trec_eval(ranked, grades, "ndcg_cut", k),
        }
        assert {name: values[name][place] for name in values} == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(runs, judgements, st.integers(1, 12))
def test_bounds_and_growth(run, qrels, k):
    values = per_query(run, qrels, [f"hit@{k}", f"hit@{k + 1}", f"map@{k}", f"ndcg@{k}", "mrr"])
    assert all(((0 <= v) & (v <= 1 + 1e-12)).all() for v in values.values())
    assert (values[f"hit@{k}"] <= values[f"hit@{k + 1}"]).all()
    assert ((values[f"map@{k}"] > 0) == (values[f"hit@{k}"] > 0)).all()


def test_importing_costs_nothing_heavy():
    code = "import sys, vretrver_hf.evaluation.metrics\n"
    code += "assert not {'ranx', 'numba', 'numpy', 'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_queries_are_quick_enough():
    source = np.random.default_rng(0)
    run = {str(q): [str(i) for i in source.permutation(50)] for q in range(2_000)}
    values = per_query(run, {query: {"0"} for query in run}, ["hit@10"])
    assert values["hit@10"].mean() == pytest.approx(0.2, abs=0.03)
