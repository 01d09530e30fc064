"""`vretrver sample` and `vretrver synthesize`, as processes that are killed and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bundled import one_sample_a_task
from PIL import Image
from teacher import QUICK, Reply, ScriptedTeacher, query_of, slowly, turn_of

from vretrver_hf import Item
from vretrver_hf.cli import main
from vretrver_hf.data.conversations import read_records
from vretrver_hf.data.examples import RerankExample, write_examples
from vretrver_hf.journal import finished_entries
from vretrver_hf.protocol import format_answer, format_call, format_turn


HELP = {
    "sample": [
        "--num-samples",
        "--keep",
        "--max-per-query",
        "--tool-share",
        "--temperature",
        "--batch-size",
        "--model",
    ],
    "synthesize": ["--teacher", "--teacher-model", "--keep", "--reveal", "--preset", "--concurrency", "--api-key-env"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RECORDS = ("trajectories.jsonl", "examples.parquet", "README.md")


def run(capsys, *args) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def start(*args, launcher=("-m",), module="vretrver_hf", **environment) -> subprocess.Popen:
    command = [sys.executable, *launcher, module, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**ENVIRONMENT, **environment}, **pipes)


def finish(child: subprocess.Popen) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=300)
    return child.returncode, out, err


def kill_after(child: subprocess.Popen, journal: Path, lines: int) -> None:
    """Kills the process without a warning as soon as the journal has so many lines."""
    while sum(path.read_bytes().count(b"\n") for path in journal.glob("*.jsonl")) < lines:
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert finish(child)[0] == -signal.SIGKILL


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


class TestHelp:
    @pytest.mark.parametrize("command", HELP)
    def test_has_every_option_and_an_example(self, capsys, command):
        code, out, err = run(capsys, command, "--help")
        assert code == 0 and err == ""
        assert f"Example: vretrver {command}" in out and "journal" in out
        assert all(option in out for option in [*HELP[command], "--data", "--out", "--seed", "--limit"])

    @pytest.mark.parametrize("command", HELP)
    def test_answers_at_once(self, command):
        code = f"from vretrver_hf.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
        heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'openai', 'accelerate'}"
        code += f"import sys\nassert not {heavy} & set(sys.modules), 'imported'"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Three text queries in a working folder with files that cannot be used."""
    monkeypatch.chdir(tmp_path)
    candidates = [Item(text="a"), Item(text="b")]
    write_examples("data.parquet", [RerankExample(f"q{n}", Item(text=f"q{n}"), candidates, [0]) for n in range(3)])
    write_examples("none.parquet", [])
    write_examples("twice.parquet", [RerankExample("q", Item(text="q"), candidates, [0])] * 2)
    Path("broken.parquet").write_bytes(b"no parquet")
    Path("other.jsonl").write_text('{"text": "no query"}\n')
    Path("notes.txt").write_text("hello")
    Path("empty").mkdir()
    return Path("data.parquet")


class TestMistakes:
    """Each is told in one line that names it."""

    TEACHER = ["--teacher", "http://127.0.0.1:9/v1", "--teacher-model", "m"]

    def check(self, capsys, args, named):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "")
        assert err.startswith("vretrver: ") and err.count("\n") == 1 and named in err, err

    @pytest.mark.parametrize("command", [["sample"], ["synthesize", *TEACHER]])
    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--out", "o"], "--data"),  # missing
            (["--data", "data.parquet"], "--out"),  # missing
            (["--data", "absent.parquet", "--out", "o"], "--data absent.parquet: absent.parquet does not exist"),
            (["--data", "broken.parquet", "--out", "o"], "--data broken.parquet: "),
            (["--data", "none.parquet", "--out", "o"], "corresponds to no data"),
            (["--data", "twice.parquet", "--out", "o"], "rows 0 and 1 have the same query id 'q'"),
            (["--data", "other.jsonl", "--out", "o"], "--data other.jsonl: "),
            (["--data", "notes.txt", "--out", "o"], "--data notes.txt: "),
            (["--data", "empty", "--out", "o"], "--data empty: "),
            (["--data", "data.parquet", "--out", "notes.txt"], "--out notes.txt: the folder cannot be made"),
            (["--data", "data.parquet", "--out", "o", "--keep", "best"], "--keep: unknown rule 'best'"),
            (["--data", "data.parquet", "--out", "o", "--limit", "0"], "--limit"),
        ],
    )
    def test_both(self, capsys, data, command, args, named):
        self.check(capsys, [*command, *args], named)

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--temperature", "0"], "--temperature 0 makes all trajectories of a query the same"),
            (["--temperature", "-1"], "--temperature"),
            (["--num-samples", "0"], "--num-samples"),
            (["--max-per-query", "0"], "--max-per-query"),
            (["--tool-share", "2"], "--tool-share"),
            (["--top-p", "0"], "top_p must lie in (0, 1]"),
            (["--model", "empty"], "model empty: the folder has no config.json"),
            (["--device", "abacus"], "--device abacus"),
        ],
    )
    def test_sample(self, capsys, data, args, named):
        self.check(capsys, ["sample", "--data", data, "--out", "o", *args], named)

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--preset", "other"], "--preset"),
            (["--preset-overrides", "{"], "--preset-overrides {: "),
            (["--preset-overrides", '{"pixels": 3}'], "unknown preset settings ['pixels']"),
            (["--preset-overrides", '{"inspect_pixels": 30}'], "inspect_pixels must be at least 3136"),
            (["--preset-overrides", "[1]"], "--preset-overrides [1]: "),
            (["--concurrency", "0"], "--concurrency"),
        ],
    )
    def test_synthesize(self, capsys, data, args, named):
        self.check(capsys, ["synthesize", "--data", data, "--out", "o", *self.TEACHER, *args], named)

    def test_a_teacher_that_is_not_there(self, capsys, data):
        write_examples(data, [RerankExample(f"q{n}", Item(text="q"), [Item(text="a")], [0]) for n in range(12)])
        code, out, err = run(capsys, "synthesize", "--data", data, "--out", "o", *self.TEACHER, "--retries", "0")
        assert (code, out) == (2, "") and "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert "--teacher http://127.0.0.1:9/v1: the teacher failed 10 queries in a row; the last: " in last
        assert "Connection error" in last and "run again to go on" in last

    def test_without_openai(self, capsys, data, monkeypatch):
        monkeypatch.setitem(sys.modules, "openai", None)
        self.check(capsys, ["synthesize", "--data", data, "--out", "o", *self.TEACHER], "pip install openai")


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Three of the samples that come with the package, one of each task of single pictures, as a data set."""
    path = tmp_path_factory.mktemp("data") / "samples.parquet"
    of_task = one_sample_a_task()
    chosen = [of_task[task] for task in ("text-to-image", "image-to-image", "image-to-text")]
    write_examples(path, [RerankExample(s.id, s.query, s.candidates, [s.positive], s.task) for s in chosen])
    return path


@pytest.fixture(scope="module")
def sampled(samples, tmp_path_factory) -> Path:
    """What a run of `vretrver sample` on the bundled model makes that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    code, out, err = finish(start(*sample_args(samples, folder)))
    assert code == 0, err
    assert out.splitlines()[-1] == str(folder)
    assert re.search(r"\| all +\| +3 \| .* \| +6 \| ", out), out
    return folder


def sample_args(samples: Path, out: Path) -> list:
    return ["sample", "--data", samples, "--out", out, "--num-samples", 2, "--batch-size", 1, "--seed", 4]


class TestSample:
    def test_records_and_card(self, sampled):
        records = read_records(sampled)
        assert records and {record.trajectory.status for record in records} == {"ok"}
        assert all(record.trajectory.order[0] in record.example.positives for record in records)
        assert {record.trajectory.seed for record in records} == {4}
        card = (sampled / "README.md").read_text()
        assert '"temperature": 1.0' in card and '"keep": "first"' in card and "| text-to-image " in card

    def test_killed_and_resumed_it_ends_where_an_uninterrupted_run_does(self, samples, sampled, tmp_path):
        kill_after(start(*sample_args(samples, tmp_path)), tmp_path / "journal", 1)
        assert not (tmp_path / "README.md").exists()
        with open(next((tmp_path / "journal").glob("*.jsonl")), "ab") as file:
            file.write(b'{"key": "cut off in the mid')
        code, _, err = finish(start(*sample_args(samples, tmp_path)))
        assert code == 0, err
        assert contents(tmp_path, *RECORDS) == contents(sampled, *RECORDS)

    def test_two_processes_sample_the_same(self, samples, sampled, tmp_path):
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--mixed_precision",
            "no",
        ]
        launcher += ["--main_process_port", "0", "-m"]
        child = start(*sample_args(samples, tmp_path), launcher=launcher, ACCELERATE_USE_CPU="true")
        code, out, err = finish(child)
        assert code == 0, err
        assert sorted(path.name for path in (tmp_path / "journal").glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
        assert out.count("| all ") == 1  # only one of them tells
        assert contents(tmp_path, *RECORDS) == contents(sampled, *RECORDS)

    @pytest.mark.nightly
    def test_two_machines_sample_the_same(self, samples, sampled, tmp_path):
        """Each has a launcher of its own; they meet at the first one's address and write into one folder."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        machines = []
        for rank in range(2):
            launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no"]
            launcher += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
            launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "-m"]
            machines.append(start(*sample_args(samples, tmp_path), launcher=launcher, ACCELERATE_USE_CPU="true"))
        try:
            (code, out, err), (other_code, other_out, other_err) = map(finish, machines)
        finally:
            for machine in machines:  # where one has failed, the other waits for it
                machine.terminate()
                machine.wait(60)
        assert (code, other_code) == (0, 0), err + other_err
        assert sorted(path.name for path in (tmp_path / "journal").glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
        shares = [(tmp_path / "journal" / name).read_bytes().count(b"\n") for name in ("00000.jsonl", "00001.jsonl")]
        assert shares == [2, 1]
        assert out.count("| all ") == 1 and "| all " not in other_out  # only the first tells
        assert contents(tmp_path, *RECORDS) == contents(sampled, *RECORDS)

    def test_another_choice_needs_no_model_turn(self, capsys, samples, sampled):
        before = contents(sampled, *RECORDS, "journal/00000.jsonl")
        assert run(capsys, *sample_args(samples, sampled), "--keep", "any", "--max-per-query", 1)[0] == 0
        assert len(read_records(sampled)) == 3
        assert run(capsys, *sample_args(samples, sampled))[0] == 0
        assert contents(sampled, *RECORDS, "journal/00000.jsonl") == before

    @pytest.mark.parametrize(
        ("args", "told"),
        [
            (["--seed", 5], "sampling.seed was 4 and is now 5"),
            (["--num-samples", 3], "num_samples was 2 and is now 3"),
            (["--no-tools"], "tools was true and is now false"),
        ],
    )
    def test_other_settings_are_refused(self, capsys, samples, sampled, args, told):
        code, out, err = run(capsys, *sample_args(samples, sampled), *args)
        assert (code, out) == (2, "") and told in err and "to start afresh" in err

    def test_a_share_of_tools_that_is_out_of_reach(self, capsys, samples, tmp_path):
        args = ["sample", "--data", samples, "--out", tmp_path, "--num-samples", 1, "--temperature", 0, "--limit", 1]
        code, out, err = run(capsys, *args, "--keep", "any", "--tool-share", 0.5)  # the one there is has a call
        assert (code, out) == (2, "") and "tool_share 0.5 cannot be reached" in err
        assert run(capsys, *args, "--keep", "any")[0] == 0  # what was sampled is still there

    def test_broken_pictures(self, capsys, tmp_path):
        """One query fails and is told; if all do, there is nothing to train on."""
        Path(tmp_path, "broken.png").write_bytes(b"no picture")
        Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
        rows = []
        for number, image in enumerate(["broken.png", "red.png"]):
            info = {"qid": f"q{number}", "query_text": "red", "num_candidates": 2, "ground_truth_position": 1}
            info |= {"candidate_images": [image, ""], "candidate_texts": ["", "blue"]}
            rows.append(json.dumps({"data_source": "made up", "extra_info": info}))
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(rows))
        args = ["sample", "--data", data, "--num-samples", 1, "--temperature", 0, "--keep", "any"]
        code, out, err = run(capsys, *args, "--out", tmp_path / "a")
        assert code == 0 and "1 query failed, first q0: candidate 1 " in err and "is no readable image" in err
        assert "| q0 " in (tmp_path / "a" / "README.md").read_text()
        code, out, err = run(capsys, *args, "--out", tmp_path / "b", "--limit", 1)
        assert code == 2 and "vretrver: nothing was accepted" in err.splitlines()[-1]


def look_then_answer(body, before):
    """Looks at the first candidate, then ranks the right one first; `q1` is a contradiction, `q3` fails at first."""
    if query_of(body) == "q3" and turn_of(body) == 1 and before == 0:
        return Reply(500, b"oops", QUICK)
    first = 2 if query_of(body) == "q1" else 1
    answer = format_turn(f"1 is red.\nBest first: {first}", format_answer([0, 1]))
    return [format_turn("Is it red?", format_call("select_images", {"target_images": [1]})), answer][turn_of(body)]


@pytest.fixture
def red_or_blue(tmp_path) -> Path:
    """Six queries, each with a picture and a text."""
    candidates = [Item(image=Image.new("RGB", (60, 60), "red")), Item(text="blue")]
    examples = [RerankExample(f"q{n}", Item(text=f"q{n}"), candidates, [0], "made up") for n in range(6)]
    write_examples(tmp_path / "data.parquet", examples)
    return tmp_path / "data.parquet"


class TestSynthesize:
    @pytest.fixture
    def data(self, red_or_blue) -> Path:
        return red_or_blue

    def args(self, data, server, out, *more) -> list:
        args = ["synthesize", "--data", data, "--out", out, "--teacher", server.url, "--teacher-model", "wise"]
        return [*args, "--concurrency", 1, *more]

    def test_a_whole_run(self, capsys, data, tmp_path, monkeypatch):
        monkeypatch.setenv("MY_KEY", "secret-key")
        with ScriptedTeacher(look_then_answer) as server:
            out = tmp_path / "out"
            code, printed, err = run(capsys, *self.args(data, server, out, "--api-key-env", "MY_KEY"))
            assert code == 0, err
            assert {headers["authorization"] for headers in server.headers} == {"Bearer secret-key"}
            asked = len(server.requests)
            again = run(capsys, *self.args(data, server, out, "--keep", "any"))
            assert again[0] == 0 and len(server.requests) == asked  # nobody is asked for another choice
        assert printed.splitlines()[-1] == str(out)
        assert re.search(r"\| made up +\| +6 \| +83.3 % ", printed) and re.search(r"\| contradiction +\| +1 ", printed)
        rows = json.loads((out / "conversations.json").read_text())
        assert [row["id"] for row in rows] == ["q0", "q2", "q3", "q4", "q5"]
        assert "`wise`" in (out / "README.md").read_text()
        written = [path for path in out.rglob("*") if path.is_file()]
        assert len(written) >= 5 and not any(b"secret-key" in path.read_bytes() for path in written)
        assert "secret-key" not in printed + err

    def test_killed_and_resumed_it_ends_where_an_uninterrupted_run_does(self, data, tmp_path):
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        with ScriptedTeacher(look_then_answer) as server:
            assert finish(start(*self.args(data, server, whole)))[0] == 0
        with ScriptedTeacher(slowly(look_then_answer, 0.15)) as server:
            for lines in (1, 4):
                kill_after(start(*self.args(data, server, stopped)), stopped / "journal", lines)
        with ScriptedTeacher(look_then_answer) as server:  # at another address
            code, _, err = finish(start(*self.args(data, server, stopped)))
            assert code == 0, err
            assert {query_of(request) for request in server.requests} <= {"q4", "q5"}
        names = ["conversations.json", "README.md"]
        assert contents(stopped, *names) == contents(whole, *names)
        assert contents(stopped / "images", *os.listdir(whole / "images")) == contents(
            whole / "images", *os.listdir(stopped / "images")
        )

    def test_another_teacher_is_refused(self, capsys, data, tmp_path):
        with ScriptedTeacher(look_then_answer) as server:
            args = self.args(data, server, tmp_path / "out", "--limit", 1)
            assert run(capsys, *args)[0] == 0
            code, _, err = run(capsys, *args, "--teacher-model", "wiser")
        assert code == 2 and 'teacher was "wise" and is now "wiser"' in err

    def test_nothing_accepted(self, capsys, data, tmp_path):
        with ScriptedTeacher(lambda body, before: "?") as server:
            code, _, err = run(capsys, *self.args(data, server, tmp_path / "out"))
        assert code == 2 and "nothing was accepted" in err
        assert "malformed turn" in (tmp_path / "out" / "README.md").read_text()


class TestSampleAtAnEndpoint:
    def test_what_failed_is_named_and_the_next_run_asks_for_that_only(self, capsys, data):
        answer = format_turn("so", format_answer([0, 1]))
        down = {"q1"}

        def script(body, before):
            query = query_of(body)
            return Reply(400, {"error": {"message": "not now"}}) if query in down else answer

        with ScriptedTeacher(script) as server:
            args = ["sample", "--data", data, "--out", "out", "--num-samples", "2", "--keep", "any"]
            args += ["--model", "m", "--base-url", server.url, "--batch-size", "4"]
            before = set(threading.enumerate())
            run(capsys, *args)
            assert not any(thread.name == "openai-engine" for thread in set(threading.enumerate()) - before)
            card = Path("out/README.md").read_text()
            assert "q1" in card and "engine 'openai' at" in card and "not now" in card
            asked = len(server.requests)
            down.clear()
            code, _, err = run(capsys, *args)
            assert code == 0, err
        assert len(server.requests) == asked + 2
        records = read_records("out")
        assert {record.trajectory.query_id for record in records} == {"q0", "q1", "q2"}
        assert not any(record.trajectory.exact_tokens for record in records)

    def test_killed_and_resumed_it_ends_where_an_uninterrupted_run_does(self, capsys, red_or_blue, tmp_path):
        """What the endpoint says depends on the seed of each turn, and a sample in three is wrong."""

        def script(body, before):
            seed = body["seed"] % 1000
            if turn_of(body) == 0:
                return format_turn(f"Is it red? {seed}", format_call("select_images", {"target_images": [1]}))
            return format_turn(f"So {seed}.", format_answer([0, 1] if seed % 3 else [1, 0]))

        def args(server, out):
            args = ["sample", "--data", red_or_blue, "--out", out, "--num-samples", 3, "--max-per-query", 3]
            return [*args, "--model", "m", "--base-url", server.url, "--batch-size", 3]

        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        with ScriptedTeacher(script) as server:
            code, _, err = run(capsys, *args(server, whole))
            assert code == 0, err
            assert len(server.requests) == 6 * 3 * 2
        with ScriptedTeacher(slowly(script, 0.2)) as server:
            kill_after(start(*args(server, stopped)), stopped / "journal", 2)
        finished = {key for key, _ in finished_entries(stopped / "journal")}
        assert 2 <= len(finished) < 6 and not (stopped / "README.md").exists()
        with ScriptedTeacher(script) as server:  # at another address
            code, _, err = run(capsys, *args(server, stopped))
            assert code == 0, err
            asked = [query_of(request) for request in server.requests]
        assert set(asked) == {f"q{n}" for n in range(6)} - finished and len(asked) == 2 * 3 * (6 - len(finished))
        assert 0 < len(read_records(whole)) < 18
        assert contents(stopped, *RECORDS) == contents(whole, *RECORDS)
