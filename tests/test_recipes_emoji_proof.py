"""Trained models side by side: figures by hand, who may be compared, and the launch lines that make it all."""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from records import make_example as make_doors
from records import make_records
from tiny_models import make_processor


RECIPE = Path(__file__).parents[1] / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

pytest.importorskip("datasets")

import build_data  # noqa: E402
import cold_start  # noqa: E402
import gallery  # noqa: E402
import proof  # noqa: E402
import proof_runs  # noqa: E402
import searching  # noqa: E402
import train_tiny  # noqa: E402
from export import write_parquet  # noqa: E402
from proof_runs import (  # noqa: E402
    CURVES,
    NotComparable,
    find_runs,
    model_and_seed,
    query_facts,
    share,
    summarize,
    training_minutes,
)

from vretrver_hf import Item  # noqa: E402
from vretrver_hf.data.conversations import write_records  # noqa: E402
from vretrver_hf.data.examples import RerankExample, to_row  # noqa: E402
from vretrver_hf.encoding import Encoder  # noqa: E402
from vretrver_hf.evaluation.job import QueryResult, Window  # noqa: E402
from vretrver_hf.evaluation.results import write_results  # noqa: E402
from vretrver_hf.evaluation.statistics import bootstrap_interval  # noqa: E402
from vretrver_hf.journal import Journal  # noqa: E402


KINDS = ("detail/clock/blob", "detail/face/place", "overview/any", "describe/person")
SETTINGS = {"depth": 50, "preset": {"max_calls": 4}, "tools": True, "weights": "w"}
ON, BESIDE = [0, 0, 50, 50], [60, 60, 90, 90]
TARGET = [10, 10, 40, 40]


def write_set(path: Path, kinds=KINDS, positives=(0, 1, 2, 0), name: str = "test", image: bytes | None = None) -> Path:
    """A file of queries, each with three candidates, one of them right."""
    rows = []
    for number, (kind, positive) in enumerate(zip(kinds, positives, strict=True)):
        candidates = [Item(text=f"candidate {place}", image=image) for place in range(3)]
        task = kind.split("/")[0] if "/" in kind and kind.split("/")[0] in ("detail", "overview") else "t2i"
        query = Item(text="a clock")
        row = to_row(RerankExample(f"{name}-{number}", query, candidates, [positive], f"emoji/{task}"))
        row["extra_info"] |= {"images": [], "target_boxes": [TARGET if task != "t2i" else []] * 3}
        rows.append(row | {"ability": kind, "reward_model": {"style": "rule", "ground_truth": positive + 1}})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, rows)
    return path


def crop(index: int, box: list[int]) -> dict:
    """An observation as a journal keeps it, as far as it is read."""
    return {"role": "observation", "images": [{"index": index, "width": 56, "height": 56, "box": box}]}


def evaluated(folder: Path, data: Path, firsts, calls=(0, 0, 0, 0), crops=(), fail=(), positives=(0, 1, 2, 0), **more):
    """What `vretrver evaluate` writes of a model that puts these candidates first; each second call is refused."""
    settings = {**SETTINGS, "model": str(folder.parent.parent.parent / folder.parent.name), "data": str(data), **more}
    name = data.stem if data.parent.name != "other" else "other"
    keys = [f"{name}-{number}" for number in range(len(firsts))]
    with Journal(folder / "journal", settings) as journal:
        for number, (key, first) in enumerate(zip(keys, firsts, strict=True)):
            if number in fail:
                journal.fail(key, "broken")
                continue
            made = calls[number]
            window = Window("ok", "answer", made, (made + 1) // 2, 0, 100 + 10 * made, 20, 1.0)
            turns = [{"turns": [crop(*each[1:]) for each in crops if each[0] == number]}]
            order = [first, *(place for place in range(3) if place != first)]
            right = {str(positives[number]): 1}
            result = QueryResult(["0", "1", "2"], order, right, "ok", [window], turns)
            journal.append(key, result.to_dict())
        write_results(folder, folder.parent.name, settings, keys, ["emoji"] * len(keys), journal)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two models, the second with two seeds, on four queries; of the second also the unseen artist."""
    data = write_set(tmp_path / "test.parquet")
    artist = write_set(tmp_path / "test_artist.parquet", KINDS[:2], (1, 1), "test_artist")
    root = tmp_path / "evaluations"
    evaluated(root / "rsft-0" / "test", data, (0, 0, 0, 0), calls=(1, 0, 0, 0))
    seen = [(0, 1, ON), (0, 2, BESIDE), (2, 1, ON), (3, 1, BESIDE)]  # the last is of no scene
    evaluated(root / "full-0" / "test", data, (0, 1, 2, 0), calls=(2, 2, 1, 0), crops=seen)
    evaluated(root / "full-1" / "test", data, (0, 1, 1, 2), calls=(4, 1, 0, 0))
    evaluated(root / "full-0" / "test_artist", artist, (1, 0), positives=(1, 1))
    evaluated(root / "full-1" / "test_artist", artist, (0, 1), positives=(1, 1))
    return root


@pytest.mark.parametrize("module", [proof, proof_runs, searching], ids=lambda module: module.__name__)
def test_what_docstrings_show(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


class TestFigures:
    def test_means_over_queries_and_seeds(self, root):
        rsft, full = summarize(root)["models"]
        assert (rsft["name"], rsft["seeds"], full["name"], full["seeds"]) == ("rsft", [0], "full", [0, 1])
        whole = full["sets"]["test"]["all"]
        # Right: all four, and two of four; each query's value is its mean over the seeds.
        assert whole["n"] == 4 and whole["hit@1"][0] == 0.75 and whole["by_seed"]["hit@1"] == [1.0, 0.5]
        assert whole["hit@1"][1:] == pytest.approx(bootstrap_interval([1, 1, 0.5, 0.5]), abs=1e-4)
        # Candidate 2, where 1 was put first, comes third; where candidate 2 was, candidate 0 comes second.
        assert whole["mrr"][0] == pytest.approx((1 + 1 + (1 + 1 / 3) / 2 + (1 + 1 / 2) / 2) / 4, abs=1e-4)
        assert whole["calls"][0] == (2 + 2 + 1 + 4 + 1) / 8 and whole["by_seed"]["calls"] == [1.25, 1.25]
        assert whole["tokens"][0] == 112.5 and whole["ok"] == [1, 0.5101, 1]  # Wilson's, where all succeed
        assert whole["valid_calls"][0] == (1 + 1 + 1 + 2 + 1) / 10
        assert whole["on_target"][0] == pytest.approx(2 / 3, abs=1e-4)  # of the crops of scenes

        assert whole["first_on_target"][0] == 1.0  # of the two scenes that were looked into
        assert whole["right_in_view"][0] == 1.0 and whole["right_in_view"][1:] == [1.0, 1.0]  # of the first one alone

    @pytest.mark.parametrize(
        ("crops", "first", "expected"),
        [
            ([], 0, (0, 0, False, False, 0, 0, False, False)),
            ([(1, BESIDE), (1, ON)], 0, (2, 1, True, False, 1, 1, True, True)),
            ([(1, BESIDE), (1, BESIDE), (2, BESIDE), (2, ON)], 2, (4, 1, True, False, 3, 1, False, False)),
            ([(1, ON), (2, BESIDE)], 1, (2, 1, True, True, 0, 0, True, False)),  # seen, and passed over
            ([(2, ON)], 0, (1, 1, True, True, 0, 0, False, False)),  # right without having seen it
        ],
        ids=["no look", "beside, then on it", "beside for long", "passed over", "another one"],
    )
    def test_what_came_of_looks(self, crops, first, expected):
        order = [first, *(place for place in range(3) if place != first)]
        turns = [{"turns": [crop(index, box) for index, box in crops]}]
        facts = query_facts(QueryResult(["0", "1", "2"], order, {"0": 1}, "ok", [], turns), [TARGET] * 3)
        shares = ("looked", "first_on_target", "after_miss", "found_after_miss", "in_view", "right_in_view")
        names = ("crops", "on_target", *shares)
        assert tuple(facts[name] for name in names) == expected

    def test_looks_of_another_window_do_not_follow(self):
        windows = [{"turns": [crop(1, BESIDE)]}, {"turns": [crop(1, ON)]}]
        facts = query_facts(QueryResult(["0", "1"], [0, 1], {"0": 1}, "ok", [], windows), [TARGET] * 2)
        assert (facts["crops"], facts["on_target"], facts["after_miss"]) == (2, 1, 0)

    def test_groups_are_tasks_and_kinds_of_scenes(self, root):
        groups = summarize(root)["models"][1]["sets"]["test"]
        expected = ["all", "detail", "overview", "t2i", "detail/clock/blob", "detail/face/place", "overview/any"]
        assert list(groups) == expected
        assert groups["detail"]["n"] == 2 and groups["detail"]["hit@1"][0] == 1.0
        assert groups["overview"]["hit@1"] == [0.5, 0.5, 0.5]  # of one query no interval can be told
        assert groups["t2i"]["valid_calls"] is None

    def test_a_share_is_of_all_there_is(self):
        mean, low, high = share(np.array([1.0, 0.0, 3.0, 0.0]), np.array([1.0, 0.0, 4.0, 3.0]))
        assert mean == 0.5 and 0 <= low < 0.5 < high <= 1
        assert share(np.zeros(3), np.zeros(3)) is None
        assert share(np.array([1.0, 0.0]), np.array([2.0, 0.0])) == [0.5, 0.5, 0.5]

    def test_differences_are_taken_query_by_query(self, root):
        found = {(row["set"], row["group"], row["metric"]): row for row in summarize(root)["differences"]}
        row = found["test", "all", "hit@1"]
        assert (row["first"], row["second"]) == ("rsft", "full")
        # rsft is right on the first and the last; per query full gains 0, 1, 0.5 and -0.5.
        assert row["difference"][0] == 0.25 and (row["better"], row["worse"]) == (2, 1)
        assert row["difference"][1:] == pytest.approx(bootstrap_interval([0, 1, 0.5, -0.5]), abs=1e-4)
        assert found["test", "detail", "calls"]["difference"][0] == pytest.approx((3 - 1 + 1.5) / 2)
        assert not [key for key in found if key[0] == "test_artist"]  # which rsft was not asked

    def test_sets_say_what_was_asked(self, root):
        sets = summarize(root)["sets"]
        assert sets["test"] == {"n": 4, "mix": {"detail": 2, "overview": 1, "t2i": 1}}
        assert sets["test_artist"] == {"n": 2, "mix": {"detail": 2}}


class TestPairing:
    def add(self, root, firsts=(0, 1, 2, 0), **more):
        evaluated(root / "grpo-0" / "test", root.parent / "test.parquet", firsts, **more)

    def test_other_queries(self, root):
        self.add(root, firsts=(0, 1, 2))
        with pytest.raises(
            NotComparable, match="rsft-0 and grpo-0 were .* 1 are in one only, such as test-3 in rsft-0"
        ):
            summarize(root)

    def test_another_file(self, root):
        other = write_set(root.parent / "other" / "test.parquet", name="other")
        evaluated(root / "sft-0" / "test", other, (0, 1, 2, 0))
        with pytest.raises(NotComparable, match="rsft-0/test asked test-0, which other models were not"):
            summarize(root)

    def test_a_file_that_was_built_anew(self, root):
        self.add(root, positives=(0, 1, 1, 0))
        with pytest.raises(NotComparable, match="test-2 has another right answer"):
            summarize(root)

    def test_other_options(self, root):
        self.add(root, depth=20)
        with pytest.raises(NotComparable, match="on test with different depth"):
            summarize(root)

    def test_without_tools_is_comparable(self, root):
        self.add(root, tools=False, weights="other")
        assert [model["name"] for model in summarize(root)["models"]] == ["rsft", "grpo", "full"]

    def test_failed_queries(self, root):
        self.add(root, fail=[1])
        with pytest.raises(NotComparable, match="grpo-0/test: 1 queries failed, such as test-1"):
            summarize(root)

    def test_an_evaluation_that_goes_on(self, root):
        (root / "full-1" / "test" / "metrics.json").unlink()
        with pytest.raises(NotComparable, match="full-1/test is not finished"):
            summarize(root)

    def test_names(self, root):
        assert model_and_seed("full-need-12") == ("full-need", 12)
        with pytest.raises(NotComparable, match="'full' is no name of a run"):
            model_and_seed("full")
        with pytest.raises(NotComparable, match="holds no evaluations"):
            find_runs(root / "rsft-0")

    def test_mistakes_are_told_by_the_command(self, root, tmp_path):
        with pytest.raises(typer.BadParameter, match="holds no evaluations"):
            proof.measure(tmp_path / "nothing", tmp_path / "proof.json")


def state(folder: Path, step: int, history: list[dict]) -> None:
    path = folder / f"checkpoint-{step}" / "trainer_state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"log_history": history}))


@pytest.fixture
def trained(root) -> Path:
    """What the trainings of `full` left behind."""
    logged = [{"step": n + 1, **dict.fromkeys(CURVES.values(), 0.1 * n), "loss": 0.1} for n in range(12)]
    logged[3].pop("evidence/calls")
    for seed in (0, 1):
        folder = root.parent / f"full-{seed}"
        state(folder, 9, logged[:9])
        state(folder, 12, [*logged, {"step": 12, "train_runtime": 1.0}])
        accepted = folder / "accepted"
        accepted.mkdir()
        sft = {"stage": "sft", "seconds": 15.0, "processes": 4, "datasets": ["nowhere"], "before": None}
        rsft = {"stage": "rsft", "seconds": 30.0, "processes": 1, "datasets": [str(accepted)], "before": sft}
        record = {"stage": "grpo", "seconds": 300.0, "processes": 1, "datasets": ["x"], "before": rsft}
        record |= {"device": "a GPU", "memory_gb": 9.5}
        (folder / "training.json").write_text(json.dumps(record))
    return root


class TestTraining:
    def test_curves_are_those_of_the_last_checkpoint(self, trained):
        evaluated(trained / "full-tools-off-0" / "test", trained.parent / "test.parquet", (0, 0, 0, 0), tools=False)
        again = json.loads((trained / "full-tools-off-0" / "test" / "metrics.json").read_text())
        again["settings"]["model"] = str(trained.parent / "full-0")
        (trained / "full-tools-off-0" / "test" / "metrics.json").write_text(json.dumps(again))
        curves = summarize(trained)["curves"]
        assert list(curves) == ["full-0", "full-1"]  # a model is not trained again to be played otherwise
        assert curves["full-0"]["step"] == list(range(1, 13))
        assert curves["full-0"]["reward"][2] == 0.2 and curves["full-0"]["calls"][3] is None

    def test_minutes_are_those_of_all_stages(self, trained):
        folder = trained.parent / "full-0"
        told = {"stages": ["sft", "rsft", "grpo"], "training": 6.5, "sampling": None, "memory": 9.5, "device": "a GPU"}
        assert training_minutes(folder) == told
        assert proof._minutes([told]) == "6.5 + sampling"
        (folder / "accepted" / "seconds.txt").write_text("90\n")
        assert training_minutes(folder)["sampling"] == 1.5
        assert proof._minutes([training_minutes(folder)]) == "8.0"
        # The record of a training that was interrupted knows its last part only, its logs know all steps.
        state(folder, 20, [{"step": step, "reward": 0, "step_time": 60.0} for step in (1, 2, 4, 20)])
        assert training_minutes(folder)["training"] == 1.5 + 20
        unknown = [training_minutes(trained)]
        assert unknown[0]["stages"] == [] and proof._minutes(unknown) == proof._memory(unknown) == "–"

    def test_memory_is_that_of_the_seed_that_held_most(self):
        assert proof._memory([{"memory": 9.5}, {"memory": 12.0}, {"memory": None}, {}]) == "12.0"


class TestReport:
    def test_tables(self, trained, tmp_path, capsys):
        proof.measure(trained, tmp_path / "proof.json")
        told = capsys.readouterr().out
        rows = [" ".join(line.split()) for line in told.splitlines()]
        (full,) = (row for row in rows if row.startswith("| SFT, RSFT, GRPO | 4 | 75.0 ["))
        assert "] | 100.0, 50.0 | 0.8" in full and "| 50.0 [50.0, 50.0] |" in full
        assert full.endswith("| 1.25 | 60.0 | 112 | 100.0 | 6.5 + sampling | 9.5 |")
        (difference,) = (row for row in rows if row.startswith("| SFT, RSFT, GRPO | SFT, RSFT | +25.0 ["))
        assert "| – |" in difference  # the artist, whom one was not asked
        assert "| detail | artist | 2 | – | 50.0 [50.0, 50.0] |" in rows
        assert any(row.startswith("| detail/clock/blob | combination | 1 |") for row in rows)
        assert "`test`, 4 queries: 2 detail, 1 overview, 1 t2i" in told and "guessing gives 20%" in told

    def test_the_file_is_all_that_tables_and_plot_need(self, trained, tmp_path, capsys):
        proof.measure(trained, tmp_path / "proof.json")
        measured = capsys.readouterr().out
        for suffix in ("svg", "png"):
            proof.show(tmp_path / "proof.json", tmp_path / "proof.md", tmp_path / f"plot.{suffix}")
        shown = capsys.readouterr().out
        assert (tmp_path / "proof.md").read_text() in measured and (tmp_path / "proof.md").read_text() in shown
        assert "<svg" in (tmp_path / "plot.svg").read_text()
        assert np.asarray(Image.open(tmp_path / "plot.png").convert("L")).std() > 5
        rerun = (tmp_path / "proof.json").read_bytes()
        proof.measure(trained, tmp_path / "proof.json")
        assert (tmp_path / "proof.json").read_bytes() == rerun

    def test_a_running_mean_of_few_steps(self):
        assert proof.running_mean(np.array([1.0, np.nan, 3.0])).tolist() == [2.0, 2.0, 2.0]

    def test_without_curves_there_is_an_empty_plot(self, root, tmp_path):
        proof.draw_curves(summarize(root), tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").is_file()


# --- the launch lines ------------------------------------------------------------------------------------------------


STUBS = r"""
say() { printf '%s\x1f' "$@"; printf '\x1e'; }
pip() { :; }
for name in accelerate python vretrver; do eval "$name() { say $name \"\$@\"; }"; done
mkdir -p outputs/emoji/proof/accepted
"""
SCRIPTS = {"build_data.py": build_data, "cold_start.py": cold_start, "proof.py": proof, "gallery.py": gallery}


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[list[str]]:
    """Every command that the README's section runs, loops and variables resolved by the shell."""
    text = (RECIPE / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## The proof\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    where = tmp_path_factory.mktemp("launched")
    command = ["bash", "-euc", STUBS + lines]
    out = subprocess.run(
        command, cwd=where, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    return [line.split("\x1f")[:-1] for line in out.stdout.split("\x1e")[:-1]]


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


STUB = r"""#!{python}
import os, sys
from pathlib import Path

words = sys.argv[1:]
with open(os.environ["SAID"], "a") as said:
    said.write("\x1f".join(["python", *words, os.environ.get("CUDA_VISIBLE_DEVICES", "")]) + "\x1e")
options = dict(zip(words, words[1:]))
data = Path("recipes/emoji/data")
needed = [options[name] for name in ("--model", "--model_name_or_path", "--dataset_name", "--data") if name in options]
made = [options[name] for name in ("--output_dir", "--out") if name in options]
for line, needs, makes in (
    ("render", [], ["images"]),
    ("lessons", ["images"], ["export/rsft.parquet", "export/grpo.parquet"]),
    ("held-out", ["images"], ["export/test.parquet", "export/test_artist.parquet"]),
    ("recipes/emoji/cold_start.py", ["images"], ["cold_start"]),
    ("recipes/emoji/train_tiny.py", ["images"], [Path("outputs/tiny/stage0").absolute()]),
    ("vretrver_hf.training.sft", ["cold_start", Path("outputs/tiny/stage0").absolute()], []),
    ("vretrver_hf.training.grpo", ["export/grpo.parquet"], []),
):
    if line in words:
        needed += [data / name for name in needs]
        made += [data / name for name in makes]
assert all(map(os.path.exists, needed)), needed
assert os.environ["BREAKS"] not in words
for path in made:
    Path(path).mkdir(parents=True, exist_ok=True)
"""


def made(
    where: Path, breaks: str = "nothing", jobs: int = 1, cards: str | None = None, **variables: str
) -> tuple[list[list[str]], int]:
    """What `proof.mk` runs, in order, each with the GPUs it sees in the end; and how make ended."""
    (where / "bin").mkdir(exist_ok=True)
    (where / "bin/python").write_text(STUB.replace("{python}", sys.executable))
    (where / "bin/python").chmod(0o755)
    (where / "recipes/emoji").mkdir(parents=True, exist_ok=True)
    shutil.copy(RECIPE / "proof.mk", where / "recipes/emoji")
    (where / "said").write_text("")
    environment = {"PATH": f"{where / 'bin'}:{os.environ['PATH']}", "SAID": str(where / "said"), "BREAKS": breaks}
    if cards is not None:
        environment["CUDA_VISIBLE_DEVICES"] = cards
    command = ["make", "-k", f"-j{jobs}", "-f", "recipes/emoji/proof.mk"]
    command += [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    return [line.split("\x1f") for line in (where / "said").read_text().split("\x1e")[:-1]], done.returncode


def gist(words: list[str]) -> tuple[str | None, ...]:
    """What a line makes of what, however many GPUs it uses."""
    steps = [word for word in words if word.endswith(".py") or word.startswith("vretrver_hf") or word == "sample"]
    names = ("--model_name_or_path", "--dataset_name", "--seed", "--tools", "--reward", "--output_dir")
    names += ("--model", "--data", "--out")
    what = steps[-1].rpartition("/")[2]
    return what, *(option(words, name) for name in names), "--no-tools" in words


@pytest.mark.parametrize("jobs", [1, 12])
def test_the_makefile_runs_the_same_lines(launched, tmp_path, jobs):
    """And each of them only once what it reads is there, of which the stand-in makes sure."""
    lines, code = made(tmp_path, jobs=jobs)
    told = {gist(words) for words in launched if Path(words[1]).name not in ("proof.py", "gallery.py")}
    assert code == 0 and {gist(words) for words in lines} == told
    # The data are made in one line there and in three here.
    assert sum(words[1].endswith("build_data.py") for words in lines) == 3
    for name in ("--config", "--batch-size", "--num-samples", "--minutes", "--base"):
        assert {option(words, name) for words in lines} == {option(words, name) for words in launched}
    assert (tmp_path / "outputs/emoji/proof/accepted/seconds.txt").read_text().strip().isdigit()
    assert {words[-1] for words in lines if "vretrver_hf.training.grpo" in words} == {"0"}
    again, _ = made(tmp_path, jobs=jobs)
    assert again == []


@pytest.mark.parametrize(("cards", "names"), [(None, "0123"), ("4,5,6,7,8", "4567")], ids=["all", "some"])
def test_the_makefile_uses_all_gpus(tmp_path, cards, names):
    lines, _ = made(tmp_path, GPUS="4", cards=cards)
    grpo = sorted(words[-1] for words in lines if "vretrver_hf.training.grpo" in words)
    assert grpo == sorted(names + names[1:3])
    (sft,) = [words for words in lines if "vretrver_hf.training.sft" in words]
    assert option(sft, "--num_processes") == "4" and option(sft, "--per_device_train_batch_size") == "32"
    assert option(sft, "--gradient_accumulation_steps") == "1" and sft[-1] == ",".join(names)
    (stage0,) = [words for words in lines if "recipes/emoji/train_tiny.py" in words]
    assert option(stage0, "--nproc-per-node") == "4" and stage0[-1] == ",".join(names)


@pytest.mark.parametrize(
    ("gpus", "cards"), [("3", None), ("2", "5")], ids=["that share no batch of 128", "that are not there"]
)
def test_the_makefile_refuses_gpus(tmp_path, gpus, cards):
    lines, code = made(tmp_path, GPUS=gpus, cards=cards)
    assert code != 0 and lines == []


def test_the_makefile_uses_a_stage_0_that_is_there(tmp_path):
    (tmp_path / "outputs/tiny/stage0").mkdir(parents=True)
    (tmp_path / "outputs/tiny/stage0/reranker_config.json").touch()
    lines, code = made(tmp_path)
    assert code == 0 and not any("recipes/emoji/train_tiny.py" in words for words in lines)


def test_the_makefile_stops_where_stage_0_failed(tmp_path):
    lines, code = made(tmp_path, breaks="stage0")
    assert code != 0 and not any("vretrver_hf.training.sft" in words for words in lines)
    again, code = made(tmp_path)
    assert code == 0 and "recipes/emoji/train_tiny.py" in again[0]


def test_the_makefile_goes_on_where_a_line_failed(tmp_path):
    lines, code = made(tmp_path, breaks="sample")
    names = {option(words, "--output_dir") for words in lines}
    assert code != 0 and "outputs/emoji/proof/grpo-0" in names and "outputs/emoji/proof/rsft-0" not in names
    again, code = made(tmp_path)
    assert code == 0 and "sample" in again[0] and len({gist(words) for words in again}) == len(again)
    assert not {gist(words) for words in again[1:]} & {gist(words) for words in lines}


def test_trainings_parse(launched, tmp_path):
    from test_recipes import CLASSES

    from vretrver_hf.training._common import parse

    encoder = Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl")
    write_records(tmp_path, make_records(encoder, [make_doors(0)]))
    trainings = [words for words in launched if words[0] == "accelerate"]
    made, stages = {"outputs/tiny/stage0"}, []
    for words in trainings:
        place = next(n for n, word in enumerate(words) if word.startswith("vretrver_hf.training."))
        stage, argv = words[place].rpartition(".")[2], words[place + 1 :]
        argv[1] = str(RECIPE / Path(argv[1]).name)
        more = ["--bf16", "false", "--use_cpu", "true"] + ["--dataset_name", str(tmp_path)] * (stage == "rsft")
        script, training, model = parse(CLASSES[stage], argv + more)
        assert model.model_name_or_path in made  # each begins with what an earlier line made
        assert training.output_dir not in made
        made.add(training.output_dir)
        name, seed = model_and_seed(Path(training.output_dir).name)
        assert training.seed == seed or stage != "grpo"
        assert script.tools == (name != "grpo-no-tools")
        assert getattr(script, "reward", "paper") == ("need" if name == "full-need" else "paper")
        stages.append(stage)
    assert stages[:2] == ["sft", "rsft"] and set(stages[2:]) == {"grpo"}


def test_all_else_parses(launched):
    import typer.main

    from vretrver_hf.cli import app

    trained = {option(words, "--output_dir") for words in launched if words[0] == "accelerate"}
    runs = []
    for words in (words for words in launched if words[0] != "accelerate"):
        if words[:2] == ["python", "-m"]:
            name = {"vretrver_hf.evaluation": "evaluate"}[words[2]]
            command, rest = typer.main.get_command(app).commands[name], words[3:]
            assert option(words, "--model") in trained
            runs.append((Path(option(words, "--out")).parent.name, Path(option(words, "--out")).name))
        elif words[1] == "recipes/emoji/train_tiny.py":
            group, place = typer.main.get_command(train_tiny.app), words.index("stage0")
            group.make_context("train_tiny", words[2 : place + 1])
            command, rest = group.commands["stage0"], words[place + 1 :]
        elif words[0] == "vretrver":
            command, rest = typer.main.get_command(app).commands[words[1]], words[2:]
        else:
            module = SCRIPTS[Path(words[1]).name]
            command, rest = command_of(module), words[2:]
            if hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(command.name or "script", list(rest))  # an unknown option raises
    names = {model_and_seed(run)[0] for run, _ in runs}
    assert names == set(proof.MODELS) and {name for _, name in runs} == {"test", "test_artist"}
    assert len(set(runs)) == len(runs)


def command_of(module):
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    return typer.main.get_command(app)
