from __future__ import annotations

import xml.dom.minidom

import numpy as np
import pytest

from vretrver_hf.evaluation import report
from vretrver_hf.evaluation.benchmarks import PAPER
from vretrver_hf.evaluation.report import Run, comparison_text, paired_tests, write_comparison, write_report
from vretrver_hf.evaluation.results import STATUSES, Results, Scores


COST = {"windows": 4, "calls": 1.5, "valid_calls": 0.9, "malformed_turns": 0.1, "tokens": 1000, "sampled_tokens": 90}
COST |= {"statuses": dict.fromkeys(STATUSES, 0.5), "window_statuses": dict.fromkeys(STATUSES, 0.5), "seconds": 2.0}


def figures(mean: float, n: int = 4) -> dict:
    metrics = ("hit@1", "hit@5", "hit@10")
    score = {metric: {"mean": mean, "interval": [mean - 0.1, mean + 0.1]} for metric in metrics}
    gain = {"mean": 0.25, "interval": [0.1, 0.4], "p_value": 0.0004, "wins": 2, "losses": 1, "ties": 1}
    return {
        "n": n,
        "failed": 0,
        "reranked": score,
        "coarse": {metric: {"mean": 0.2, "interval": None} for metric in metrics},
        "gain": dict.fromkeys(metrics, gain),
        "cost": COST,
    }


def make_results(name: str, groups: dict[str, float], macro=None, errors=None) -> Results:
    rows = {group: figures(mean) for group, mean in groups.items()}
    return Results(name, {"model": name}, rows, figures(0.5), macro, errors or {})


def make_run(name: str, groups: dict[str, float], hits: list[float] | None = None) -> Run:
    keys = [f"{group}/{n}" for group in groups for n in range(4)]
    values = {m: np.array(hits or [1.0] * len(keys)) for m in ("hit@1", "hit@5", "hit@10", "mrr")}
    scores = Scores(keys, [key.split("/")[0] for key in keys], values, values)
    return Run(name, make_results(name, groups), scores)


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_one_evaluation(tmp_path):
    results = make_results("mine", {"cirr_task7": 0.75, "mine": 0.5}, errors={"q9": "broken |\npicture"})
    write_report(tmp_path, results, make_run("mine", {"cirr_task7": 0.75}).scores)
    text = lines((tmp_path / "README.md").read_text())
    cells = "hit@5 | 4 | 75.0 [65.0, 85.0] | 20.0 | +25.0 [+10.0, +40.0] | < 0.001 | 73.5"
    assert f"| CIRR (i,t) → i | {cells} |" in text
    assert any(line.startswith("| mine | hit@1 | 4 | 50.0 [40.0, 60.0] |") and line.endswith("| – |") for line in text)
    assert "| q9 | broken \\| picture |" in text
    assert any("a mean over those is over 1 fewer." in line for line in text)
    assert any(line.startswith("| all queries | 4.00 | 1.50 | 90.0% | 0.10 |") for line in text)
    assert any(line.endswith("| tokens | written | seconds (latency) |") for line in text)
    assert any("Seconds are the latency of a query: the sum of its turns' times" in line for line in text)
    latex = (tmp_path / "tables.tex").read_text()
    assert r"CIRR (i,t) $\to$ i & hit@5 & 4 & 75.0 [65.0, 85.0]" in latex and latex.count(r"\begin{table}") == 3
    for name in ("metrics.svg", "ranks.svg"):
        assert f"]({name})" in (tmp_path / "README.md").read_text()
        xml.dom.minidom.parse(str(tmp_path / name))


def test_the_macro_mean_stands_beside_the_papers(tmp_path):
    groups = {group: score / 100 for group, score in list(PAPER["V-Retrver-7B"].items())[:16]}
    results = make_results("ours", groups, macro={"reranked": 0.6967, "coarse": 0.2})
    write_report(tmp_path, results)
    text = lines((tmp_path / "README.md").read_text())
    assert "| macro mean | | 16 tasks | 69.7 | 20.0 | | | 69.7 |" in text


def test_without_matplotlib_there_are_no_plots(tmp_path, monkeypatch):
    from vretrver_hf.evaluation import plots

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    write_report(tmp_path, make_results("mine", {"mine": 0.5}))
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "tables.tex"}


class TestComparison:
    first = make_run("tools", {"cirr_task7": 0.75, "mine": 0.5}, [1, 1, 1, 1, 1, 0, 0, 1])
    second = make_run("no tools", {"cirr_task7": 0.5}, [1, 0, 0, 0])

    def test_side_by_side_with_the_paper(self):
        text = lines(comparison_text([self.first, self.second]))
        assert "| CIRR (i,t) → i | hit@5 | 75.0 [65.0, 85.0] | 50.0 [40.0, 60.0] | 73.5 |" in text
        assert "| mine | hit@1 | 50.0 [40.0, 60.0] | – | – |" in text
        assert "| macro mean of 16 | | – | – | 69.7 |" in text
        assert "| macro mean of LamRA-7B | | – | – | 63.7 |" in text
        assert any(line.startswith("| CIRR (i,t) → i | hit@5 | no tools | 4 | -75.0 |") for line in text)

    def test_paired_on_the_queries_that_both_have(self):
        ((group, metric, count, difference),) = paired_tests(self.first, self.second)
        assert (group, metric, count) == ("cirr_task7", "hit@5", 4)
        assert (difference.mean, difference.wins, difference.losses, difference.ties) == (-0.75, 0, 3, 1)
        assert difference.p_value == pytest.approx(2 / 8)

    def test_in_another_order_and_in_part(self):
        scores = self.first.scores
        reverse = Scores(
            scores.keys[6:0:-1], scores.groups[6:0:-1], {"hit@5": scores.reranked["hit@5"][6:0:-1]}, scores.coarse
        )
        tests = paired_tests(self.first, Run("again", self.first.results, reverse))
        assert [(group, count, test.mean, test.ties) for group, _, count, test in tests] == [("cirr_task7", 3, 0, 3)]

    def test_without_scores_there_is_no_test(self):
        assert paired_tests(self.first, Run("x", self.second.results, None)) == []

    def test_data_that_the_paper_does_not_have(self):
        text = comparison_text([make_run("a", {"mine": 0.5})])
        assert "paper" not in text and "macro" not in text and "Paired" not in text

    def test_files(self, tmp_path):
        write_comparison(tmp_path / "report", [self.first, self.second])
        names = {path.name for path in (tmp_path / "report").iterdir()}
        assert names == {"README.md", "tables.tex", "comparison.svg"}

    def test_loading(self, tmp_path):
        self.first.results.save(tmp_path / "metrics.json")
        self.first.scores.save(tmp_path / "scores.json")
        for path in (tmp_path, tmp_path / "metrics.json"):
            run = Run.load(path)
            assert run.results == self.first.results and run.scores.keys == self.first.scores.keys
        (tmp_path / "scores.json").unlink()
        assert Run.load(tmp_path).scores is None


@pytest.mark.parametrize(("value", "shown"), [(0.0004, "< 0.001"), (0.001, "0.001"), (1.0, "1.000")])
def test_p_values(value, shown):
    assert report._p(value) == shown
