"""`vretrver evaluate` and `vretrver report`, as processes that are killed and go on, and as several at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from evaluation_files import released_row, write_rows
from mbeir_files import write_mbeir
from teacher import ScriptedTeacher
from test_cli_sample import finish, kill_after, run, start

from vretrver_hf import Item
from vretrver_hf.data.examples import RerankExample, write_examples
from vretrver_hf.data.trec import Hit, read_run, write_run
from vretrver_hf.engines.openai import OpenAIEngine
from vretrver_hf.evaluation.job import QueryResult
from vretrver_hf.protocol import format_answer, format_turn
from vretrver_hf.trajectory import Trajectory


COLOURS = ["red", "green", "blue", "yellow", "black", "white", "brown"]
FILES = ["README.md", "coarse.trec", "journal", "metrics.json", "qrels.txt", "run.trec", "scores.json", "tables.tex"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Queries of text, which are quick, with more candidates than one window of two or three holds."""
    path = tmp_path_factory.mktemp("data") / "colours.parquet"
    candidates = [Item(text=f"{colour} circle") for colour in COLOURS[:4]]
    examples = [
        RerankExample(f"q{n}", Item(text=f"a {colour} circle"), candidates, [n % 4], "colours")
        for n, colour in enumerate(COLOURS)
    ]
    write_examples(path, examples)
    return path


def arguments(data: Path, out: Path, *more) -> list:
    return ["evaluate", "--data", data, "--out", out, "--window", 3, "--stride", 1, "--dtype", "float32", *more]


def without_time(folder: Path) -> dict:
    values = json.loads((folder / "metrics.json").read_text())
    for row in (*values["groups"].values(), values["total"]):
        row["cost"].pop("seconds")
    return values


def journal(folder: Path) -> dict[str, QueryResult]:
    lines = [line for path in folder.glob("journal/*.jsonl") for line in path.read_text().splitlines()]
    entries = [json.loads(line) for line in lines]
    assert len({entry["key"] for entry in entries}) == len(entries)  # no query twice
    return {entry["key"]: QueryResult.from_dict(entry["value"]) for entry in entries}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """What a run makes that nobody interrupts, one row a batch."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, out, err = finish(start(*arguments(data, folder, "--batch-size", 1, "--trajectories")))
    assert code == 0, err
    assert out.splitlines()[-1] == str(folder) and re.search(r"\| colours +\| hit@1 +\| 7 \|", out), out
    assert "evaluating: 100%" in err and "hit@1" in err
    return folder


def test_what_is_written(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {*FILES, "metrics.svg", "ranks.svg"}
    results = journal(whole)
    assert set(results) == {f"q{n}" for n in range(7)}
    assert all(sorted(result.order) == [0, 1, 2, 3] and len(result.windows) == 2 for result in results.values())
    assert {key: [hit.id for hit in hits] for key, hits in read_run(whole / "run.trec").items()} == {
        key: result.reranked for key, result in results.items()
    }
    settings = json.loads((whole / "metrics.json").read_text())["settings"]
    assert settings["window"] == 3 and settings["preset"]["prompt_source"] == "preset" and settings["depth"] == 50


def test_the_engine_is_ended(data, tmp_path, monkeypatch, capsys):
    """What it holds beyond this process, such as vLLM's own processes, must not outlive the job."""
    ended = []
    shutdown = OpenAIEngine.shutdown
    monkeypatch.setattr(OpenAIEngine, "shutdown", lambda engine: (ended.append(engine), shutdown(engine)))
    with ScriptedTeacher(lambda body, before: format_turn("so", format_answer([0, 1, 2]))) as server:
        args = arguments(data, tmp_path / "out", "--model", "m", "--base-url", server.url, "--limit", 1)
        code, _, err = run(capsys, *args)
    assert code == 0, err
    assert len(ended) == 1


def test_killed_and_started_again(data, whole, tmp_path):
    args = arguments(data, tmp_path / "out", "--batch-size", 1, "--trajectories")
    kill_after(start(*args), tmp_path / "out" / "journal", lines=3)
    assert not (tmp_path / "out" / "metrics.json").exists()
    code, _, err = finish(start(*args))
    assert code == 0, err
    assert set(journal(tmp_path / "out")) == set(journal(whole))  # none missing, none twice
    assert without_time(tmp_path / "out") == without_time(whole)
    for name in ("run.trec", "coarse.trec", "qrels.txt", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_agree_with_one(data, whole, tmp_path):
    """Orders are the same, but for what a batch of other rows decides by less than 1e-4."""
    args = arguments(data, tmp_path / "out", "--batch-size", 4, "--trajectories")
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    )
    child = start(*args[1:], launcher=(*launcher, "-m"), module="vretrver_hf.evaluation", ACCELERATE_USE_CPU="true")
    code, out, err = finish(child)
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "out") and out.count("data set") == 2  # one process tells
    assert len(list((tmp_path / "out" / "journal").glob("*.jsonl"))) == 2
    ours, theirs = journal(whole), journal(tmp_path / "out")
    assert set(ours) == set(theirs)
    for key, result in ours.items():
        if result.order != theirs[key].order:
            assert first_gap(result, theirs[key]) < 1e-4, key


def first_gap(one: QueryResult, other: QueryResult) -> float:
    """Difference in log-probability of the first tokens in which two runs part."""
    for pair in zip(one.trajectories, other.trajectories, strict=True):
        first, second = (list(zip(t.token_ids, t.logprobs, strict=True)) for t in map(Trajectory.from_dict, pair))
        for (token, score), (another, its_score) in zip(first, second, strict=False):
            if token != another:
                return abs(score - its_score)
    raise AssertionError("the orders differ and no token does")


def test_first_gap_sees_a_difference():
    def result(token, logprob):
        turn = {"role": "assistant", "token_ids": [1, token], "text": "", "num_sampled": 2, "images": []}
        turn["logprobs"] = [-0.1, logprob]
        values = {"query_id": "q", "num_candidates": 1, "candidate_indices": [0], "preset": {}, "turns": [turn]}
        return QueryResult([], [], {}, "ok", [], [values])

    assert first_gap(result(2, -0.5), result(3, -0.9)) == pytest.approx(0.4)


class TestFinished:
    """What takes no model turn, since everything is in the journal."""

    def test_again(self, capsys, data, whole):
        code, out, err = run(capsys, *arguments(data, whole, "--batch-size", 1, "--trajectories"))
        assert code == 0 and "100%" in err and out.splitlines()[-1] == str(whole)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (["--no-tools"], "tools was true and is now false"),
            (["--depth", "3"], "depth was 50 and is now 3"),
            (["--passes", "2"], "passes was 1 and is now 2"),
            (["--mode", "top20"], 'mode was "sliding" and is now "top20"'),
        ],
    )
    def test_other_settings_are_refused(self, capsys, data, whole, change, named):
        code, out, err = run(capsys, *arguments(data, whole, *change))
        assert (code, out) == (2, "") and named in err.splitlines()[-1]

    def test_report(self, capsys, whole, tmp_path):
        code, out, _ = run(capsys, "report", whole, whole / "metrics.json", "--out", tmp_path / "report")
        assert code == 0 and "Paired tests" in out and out.splitlines()[-1] == str(tmp_path / "report")
        assert {path.name for path in (tmp_path / "report").iterdir()} == {"README.md", "tables.tex", "comparison.svg"}
        code, out, _ = run(capsys, "report", whole, whole, "--names", "with tools, again", "--latex")
        assert code == 0 and r"& with tools & again \\" in out

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            ([], "RUN"),
            (["absent"], "absent cannot be read"),
            (["WHOLE", "--names", "a,b"], "--names gives 2 names for 1 runs"),
            (["DATA"], "holds no results of vretrver evaluate"),
        ],
    )
    def test_mistakes_of_report(self, capsys, data, whole, args, named):
        args = [{"WHOLE": whole, "DATA": data}.get(arg, arg) for arg in args]
        code, out, err = run(capsys, "report", *args)
        assert (code, out) == (2, "") and err.startswith("vretrver: ") and named in err


def last_number_first(body: dict, before: int) -> str:
    """Answers with the candidates in reverse, whatever they are."""
    count = len(re.findall(r"^\(\d+\) ", json.dumps(body["messages"]).replace("\\n", "\n"), re.MULTILINE))
    return format_turn("so", format_answer(range(count - 1, -1, -1)))


def test_two_passes(capsys, data, tmp_path):
    """Windows of two that are turned round: a pass brings the last to the front, and a second pass the next."""
    with ScriptedTeacher(last_number_first) as server:
        endpoint = ["--model", "m", "--base-url", server.url, "--limit", 2, "--window", 2]
        for passes in (1, 2):
            args = arguments(data, tmp_path / str(passes), *endpoint, "--passes", passes)
            code, _, err = run(capsys, *args)
            assert code == 0, err
    once, twice = journal(tmp_path / "1"), journal(tmp_path / "2")
    assert [(result.order, len(result.windows)) for result in once.values()] == [([3, 0, 1, 2], 3)] * 2
    assert [(result.order, len(result.windows)) for result in twice.values()] == [([2, 3, 0, 1], 6)] * 2


@pytest.fixture
def late(tmp_path) -> Path:
    """Rows whose relevant candidate is the last of 50 coarse results, and shown by the prompt, as it always is."""
    rows = [released_row(number, source="mbeir_fashioniq_task7_test") for number in range(2)]
    return write_rows(tmp_path / "late.parquet", rows)


class TestTop20:
    def evaluate(self, capsys, late, out, *more) -> dict:
        with ScriptedTeacher(last_number_first) as server:
            args = ["--data", late, "--out", out, "--model", "m", "--base-url", server.url, "--mode", "top20", *more]
            code, _, err = run(capsys, "evaluate", *args)
        assert code == 0, err
        return json.loads((out / "metrics.json").read_text())

    @pytest.mark.parametrize("prompt", ["preset", "dataset"])
    def test_is_the_first_20_of_the_coarse_results(self, capsys, late, tmp_path, prompt):
        """What the prompt shows holds the relevant one; ranking that would make hit@20 1 whatever the model does."""
        metrics = self.evaluate(capsys, late, tmp_path / "out", "--prompt", prompt)
        means = {name: score["mean"] for name, score in metrics["total"]["reranked"].items()}
        assert (means["hit@1"], means["hit@10"], means["hit@20"]) == (0, 0, 0)
        assert means["hit@50"] == 1 and means["mrr"] == pytest.approx(1 / 50)  # what is not reranked keeps its place
        assert metrics["settings"]["candidates"] == "hits" and metrics["total"]["cost"]["windows"] == 1
        for result in journal(tmp_path / "out").values():
            assert result.order == [*range(19, -1, -1), *range(20, 50)]

    def test_rows_without_coarse_results_are_ranked_by_what_they_show_and_said_so(self, capsys, tmp_path):
        row = released_row(0)
        del row["hit"]
        path = write_rows(tmp_path / "shown.parquet", [row])
        metrics = self.evaluate(capsys, path, tmp_path / "out")
        assert metrics["settings"]["candidates"] == "shown"
        assert metrics["total"]["reranked"]["hit@1"]["mean"] == 1  # the relevant one is the last of those shown
        assert '"candidates": "shown"' in (tmp_path / "out" / "README.md").read_text()


def test_a_changed_source_does_not_go_on_with_the_journal(capsys, tmp_path):
    """The paths are the same; what lies there is not."""
    folder = write_mbeir(tmp_path / "mbeir", {1: "webqa"}, queries=2)

    def retrieve(last):
        hits = [(f"1:{q}", [Hit(f"1:{10**6 + c}", -c) for c in (0, 1, last)]) for q in range(2)]
        write_run(tmp_path / "run.txt", hits)

    with ScriptedTeacher(last_number_first) as server:
        endpoint = ["--model", "m", "--base-url", server.url]
        mbeir = ["--mbeir", folder, "--task", "webqa_task1", "--run", tmp_path / "run.txt", *endpoint]
        released = ["--data", tmp_path / "rows.parquet", *endpoint]

        def evaluate(*args, out):
            return run(capsys, "evaluate", *args, "--out", tmp_path / out, "--mode", "top20")

        asked = 3  # two queries of one, one of the other, a window each
        for _ in range(2):  # the same again, though written anew: that goes on
            retrieve(2)
            write_rows(tmp_path / "rows.parquet", [released_row(0, hits=3)])
            assert evaluate(*mbeir, out="mbeir")[0] == 0 and evaluate(*released, out="released")[0] == 0
            assert len(server.requests) == asked
        retrieve(3)
        write_rows(tmp_path / "rows.parquet", [released_row(0, hits=4)])
        for args, out, name in ((mbeir, "mbeir", "run"), (released, "released", "data")):
            code, told, err = evaluate(*args, out=out)
            assert (code, told) == (2, "")
            assert re.search(
                rf"begun with other settings: digests.{name} was \S+ bytes, \w+. and is now .* choose another", err
            ), err
        assert len(server.requests) == asked


def test_mbeir(capsys, tmp_path):
    folder = write_mbeir(tmp_path / "mbeir", {1: "webqa"}, queries=2)
    write_run(tmp_path / "run.txt", [(f"1:{q}", [Hit(f"1:{10**6 + c}", -c) for c in range(3)]) for q in range(2)])
    args = ["--mbeir", folder, "--task", "webqa_task1", "--run", tmp_path / "run.txt", "--out", tmp_path / "out"]
    code, out, err = run(capsys, "evaluate", *args, "--mode", "top20", "--instruction", "1", "--max-turn-tokens", 32)
    assert code == 0, err
    assert re.search(r"\| WebQA t → t \| hit@5 +\| 2 \| 100.0 .* 96.9 \|", out), out
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert settings["instruction"] == "seed 1" and settings["pool"] == "local" and settings["window"] == 20
    assert (tmp_path / "out" / "run.trec").read_text().splitlines()[0].endswith(" vretrver-tiny 1")


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "named"),
        [
            ([], "say what to evaluate on: --data, or --mbeir with --task and --run"),
            (["--data", "DATA", "--mbeir", "x"], "say what to evaluate on"),
            (["--mbeir", "x"], "--mbeir needs --task, such as cirr_task7, and --run"),
            (["--data", "DATA", "--run", "r.txt"], "--task and --run belong to --mbeir"),
            (["--data", "absent.parquet"], "--data absent.parquet: absent.parquet does not exist"),
            (["--mbeir", "x", "--task", "t", "--run", "r"], "--mbeir x: x holds no M-BEIR"),
            (["--data", "DATA", "--prompt", "dataset"], "--prompt dataset: the data bring no prompts of their own"),
            (["--data", "DATA", "--window", "2", "--stride", "3"], "stride 3 exceeds size 2"),
            (["--data", "DATA", "--engine", "abacus"], "'abacus' is not one of 'transformers', 'vllm', 'openai'"),
            (["--data", "DATA", "--mode", "sideways"], "--mode"),
            (["--data", "DATA", "--depth", "0"], "--depth"),
        ],
    )
    def test_are_told_in_one_line(self, capsys, data, tmp_path, args, named):
        args = [data if arg == "DATA" else arg for arg in args]
        code, out, err = run(capsys, "evaluate", *args, "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert err.startswith("vretrver: ") and err.count("\n") == 1 and named in err, err


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_help_answers_at_once(command):
    import subprocess
    import sys

    code = f"from vretrver_hf.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'ranx', 'scipy', 'matplotlib'}"
    code += f"import sys\nassert not {heavy} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Example: vretrver {command}" in done.stdout
