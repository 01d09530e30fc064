from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import skimage
from PIL import Image
from scripted import ForcedEngine
from tiny_models import make_model, make_processor

from vretrver_hf import Reranker, __version__
from vretrver_hf.chat_templates import apply_to
from vretrver_hf.cli import demo, main, rank
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.protocol import format_answer, format_call, format_turn, get_preset
from vretrver_hf.samples import load_samples


PHOTOGRAPHS = [Path(skimage.data_dir, name) for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
PRESET = get_preset("foveated", overview_pixels=56 * 56, inspect_pixels=84 * 84)
HELP = {
    "demo": ["--json", "--out", "--limit", "--no-tools"],
    "rank": ["--query", "--query-image", "--top-k", "--html"],
}


def run(capsys, *args) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def process(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.fixture(scope="module")
def parts():
    processor = make_processor("qwen2_5_vl")
    return make_model("qwen2_5_vl", processor), processor


@pytest.fixture(scope="module")
def random_model(parts, tmp_path_factory) -> Path:
    """A saved model that writes eight tokens of nonsense a turn."""
    folder = tmp_path_factory.mktemp("random")
    apply_to(parts[1], "qwen2_5_vl")
    Reranker(TransformersEngine(*parts), PRESET, sampling=Sampling(max_turn_tokens=8)).save_pretrained(folder)
    return folder


@pytest.fixture
def scripted(parts, monkeypatch):
    """Makes the commands' model say what a script says; everything else is real."""

    def say(script) -> dict:
        asked = {}

        def load(model, device, dtype, engine="transformers", base_url=None, **settings):
            asked.update(model=model, device=device, dtype=dtype, **settings)
            settings = {name: value for name, value in settings.items() if value is not None}
            return Reranker(ForcedEngine(*parts, script), PRESET, **settings)

        monkeypatch.setattr(demo, "load_reranker", load)
        monkeypatch.setattr(rank, "load_reranker", load)
        return asked

    return say


def answer(*numbers: int, thought: str = "It fits.") -> str:
    return format_turn(thought, format_answer([number - 1 for number in numbers]))


def look(*numbers: int) -> str:
    return format_turn("Let me see.", format_call("select_images", {"target_images": list(numbers)}))


class TestEntryPoints:
    @pytest.mark.parametrize(
        "code",
        [
            "import vretrver_hf",
            "from vretrver_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
            "from vretrver_hf.cli import main\ntry: main(['rank', '--help'])\nexcept SystemExit: pass",
        ],
    )
    def test_heavy_libraries_wait_until_they_are_needed(self, code):
        heavy = "{'torch', 'transformers', 'torchvision', 'numpy', 'datasets'}"
        done = process("-c", f"{code}\nimport sys\nassert not {heavy} & set(sys.modules), 'imported'")
        assert done.returncode == 0, done.stderr

    def test_as_a_module(self):
        done = process("-m", "vretrver_hf", "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")

    def test_version(self, capsys):
        assert run(capsys, "--version") == (0, f"{__version__}\n", "")

    @pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
    def test_help(self, capsys, args):
        code, out, err = run(capsys, *args)
        assert code == 0 and err == ""
        assert "demo" in out and "rank" in out and "Exit codes" in out

    @pytest.mark.parametrize("command", HELP)
    def test_help_of_a_command_has_every_option_and_an_example(self, capsys, command):
        code, out, err = run(capsys, command, "--help")
        assert code == 0 and err == ""
        assert f"Example: vretrver {command}" in out
        assert all(option in out for option in [*HELP[command], "--model", "--device", "--dtype"])


class TestMistakes:
    """Each is told in one line that names it, before any model is loaded."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("broken.png").write_bytes(b"no picture")
        data = PHOTOGRAPHS[3].read_bytes()
        Path("truncated.jpg").write_bytes(data[: len(data) // 2])
        with open("huge.jpg", "wb") as file:
            file.truncate(51 * 2**20)
        Path("notes.txt").write_text("hello")
        Path("folder").mkdir()
        Path("film.mp4").touch()

    def check(self, capsys, args, named):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "")
        assert err.startswith("vretrver: ") and err.endswith("\n") and err.count("\n") == 1
        assert named in err

    @pytest.mark.parametrize(
        ("candidate", "named"),
        [
            ("missing.png", "candidate 2: 'missing.png' looks like an image file, but there is no such file"),
            ("broken.png", "candidate 2 ('broken.png') is no readable image"),
            ("truncated.jpg", "candidate 2 ('truncated.jpg') cannot be decoded, it is truncated"),
            ("huge.jpg", "candidate 2 ('huge.jpg') is larger than the limit of 52,428,800 bytes"),
            ("film.mp4", "candidate 2: 'film.mp4' is a video"),
            ("absent.mp4", "candidate 2: 'absent.mp4' is a video"),
            ("folder", "candidate 2 ('folder') is a directory"),
            ("notes.txt", "candidate 2 ('notes.txt') is no readable image"),  # a file is never ranked as if a text
            ("https://example.org/a.png", "this package does not fetch URLs"),
            ("", "candidate 2: an item needs text, an image, or both"),
        ],
    )
    def test_candidates(self, capsys, candidate, named):
        self.check(capsys, ["rank", "--query", "q", "a text", candidate], named)

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["a", "b"], "no query"),
            (["--query", " ", "a", "b"], "no query"),
            (["--query", "q"], "no candidates"),
            (["--query-image", "missing.png", "a", "b"], "query ('missing.png') does not exist"),
            (["--query-image", "film.mp4", "a", "b"], "query: 'film.mp4' is a video"),
            (["--query-image", "broken.png", "a", "b"], "query ('broken.png') is no readable image"),
            (["--query", "q", "--top-k", "0", "a", "b"], "--top-k"),
            (["--query", "q", "--window", "1", "a", "b"], "--window"),
            (["--query", "q", "--dtype", "int3", "a", "b"], "--dtype"),
            (["--query", "q", "--html", "folder", "a", "b"], "--html folder is a folder"),
            (["--query", "q", "--html", "notes.txt/page.html", "a", "b"], "--html notes.txt/page.html"),
            (["--query", "q", "--nonsense", "a", "b"], "--nonsense"),
            (["--query", "q", "--model", "folder", "a", "b"], "model folder: the folder has no config.json"),
            (["--query", "q", "--model", "./absent/model", "a", "b"], "model ./absent/model: no such folder"),
            (["--query", "q", "--model", "someone/absent", "a", "b"], "model someone/absent: no such folder"),
            (["--query", "q", "--device", "abacus", "a", "b"], "--device abacus"),
        ],
    )
    def test_rank(self, capsys, args, named):
        self.check(capsys, ["rank", *args], named)

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--limit", "0"], "--limit"),
            (["--out", "notes.txt"], "--out"),
            (["--model", "folder"], "model folder"),
            (["nonsense"], "nonsense"),
        ],
    )
    def test_demo(self, capsys, args, named):
        self.check(capsys, ["demo", *args], named)

    def test_unknown_command(self, capsys):
        self.check(capsys, ["rnak"], "No such command 'rnak'")

    def test_settings_that_do_not_go_together(self, capsys, random_model):
        args = ["rank", "--query", "q", "--model", random_model, "--window", "5", "--stride", "9", "a", "b"]
        self.check(capsys, args, "stride 9 exceeds size 5")

    def test_weights_that_are_cut_off(self, capsys, random_model):
        shutil.copytree(random_model, "cut")
        Path("cut", "model.safetensors").write_bytes(b"\0" * 4)
        self.check(capsys, ["rank", "--query", "q", "--model", "cut", "a", "b"], "model cut: ")


class TestRank:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, color in (("red.png", "red"), ("blue.png", "blue"), ("no-suffix", "green")):
            Image.new("RGB", (60, 40), color).save(name, "PNG")

    def test_trace_then_ranking(self, capsys, scripted):
        scripted(lambda query_id, turn: [look(1, 2), answer(2, 3, 1, thought="2 is blue.")][turn])
        code, out, err = run(capsys, "rank", "--query", "a blue field", "red.png", "blue.png", "some text")
        assert (code, err) == (0, "")
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert lines[1:10] == [
            "query a blue field",
            "1 [picture] red.png",
            "2 [picture] blue.png",
            "3 some text",
            "thinks Let me see.",
            'calls select_images {"target_images": [1, 2]}',
            "sees Images 1, 2: 84x56, 84x56",
            "thinks 2 is blue.",
            "answers 2, 3, 1",
        ]
        assert lines[11:14] == ["1. (2) [picture] blue.png", "2. (3) some text", "3. (1) [picture] red.png"]
        assert re.fullmatch(r"ok, 1 call, [\d,]+ tokens, [\d.]+ s", lines[15])

    def test_json(self, capsys, scripted):
        scripted(lambda query_id, turn: answer(2, 1))
        code, out, err = run(capsys, "rank", "--query", "q", "--json", "red.png", "a text")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["order"] == [1, 0] and found["status"] == "ok" and found["calls"] == 0
        assert len(found["trajectories"]) == 1

    def test_options_reach_the_model(self, capsys, scripted):
        asked = scripted(lambda query_id, turn: answer(2, 1))
        args = ["--model", "m", "--no-tools", "--window", "7", "--device", "cpu", "--dtype", "bfloat16", "--json"]
        run(capsys, "rank", "--query", "q", *args, "a", "b")
        assert asked == {
            "model": "m",
            "device": "cpu",
            "dtype": "bfloat16",
            "tools": False,
            "window": 7,
            "stride": 3,  # half the window
        }

    def test_top_k(self, capsys, scripted):
        scripted(lambda query_id, turn: answer(3, 1, 2))
        _, out, _ = run(capsys, "rank", "--query", "q", "--top-k", "1", "a", "b", "c")
        assert "(3) c" in out and "(1) a" not in out

    def test_what_lies_on_the_disk_is_a_picture_whatever_its_name(self, capsys, scripted):
        scripted(lambda query_id, turn: answer(1, 2))
        _, out, _ = run(capsys, "rank", "--query-image", "red.png", "no-suffix", "no-file")
        assert "query     [picture] red.png" in out
        assert "[picture] no-suffix" in out and "[picture] no-file" not in out

    def test_windows(self, capsys, scripted):
        """Windows of 2 over 3 texts: the last two, then the first with the winner."""
        scripted(lambda query_id, turn: answer(2, 1))
        _, out, _ = run(capsys, "rank", "--query", "q", "--window", "2", "a", "b", "c")
        assert "candidates 2, 3; the model numbers them from 1" in out
        assert "candidates 1, 3; the model numbers them from 1" in out
        assert out.index("(3) c") < out.index("(1) a") < out.index("(2) b")

    def test_a_page(self, capsys, scripted):
        scripted(lambda query_id, turn: answer(1, 2))
        _, out, _ = run(capsys, "rank", "--query", "q", "--html", "pages/page.html", "red.png", "b")
        assert out.splitlines()[-1] == str(Path("pages/page.html").absolute())
        assert "Final order" in Path("pages/page.html").read_text(encoding="utf-8")

    def test_a_turn_that_is_no_use_is_told(self, capsys, scripted):
        scripted(lambda query_id, turn: ["I like 2.", answer(2)][turn])
        _, out, _ = run(capsys, "rank", "--query", "q", "a", "b")
        assert "is told   Malformed turn: " in out
        assert "answers   2, 1 (repaired)" in out

    def test_nothing_reaches_the_terminal_but_printable_letters(self, capsys, scripted):
        scripted(lambda query_id, turn: answer(1, 2, thought="\x1b[2J\x07 over\nlines"))
        _, out, _ = run(capsys, "rank", "--query", "\x1b]0;title\x07", "a\x9b31m", "b\ud800")
        assert all(letter.isprintable() for letter in out.replace("\n", ""))
        assert "over lines" in out

    def test_one_candidate_needs_no_model_turn(self, capsys, scripted):
        scripted(lambda query_id, turn: pytest.fail("asked"))
        code, out, _ = run(capsys, "rank", "--query", "q", "only")
        assert code == 0 and "(1) only" in out

    def test_a_real_model_and_quiet_libraries(self, random_model):
        done = process("-m", "vretrver_hf", "rank", "--model", random_model, "--query", "q", "red.png", "b", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(json.loads(done.stdout)["order"]) == [0, 1]

    def test_interrupted(self, random_model, parts, tmp_path):
        slow = Reranker(TransformersEngine(*parts), PRESET, sampling=Sampling(max_turn_tokens=4000))
        slow.save_pretrained(tmp_path / "slow")
        command = [sys.executable, "-m", "vretrver_hf", "rank", "--model", tmp_path / "slow", "--query", "q", "a", "b"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

        def listen() -> None:  # a job that runs in the background may have been told to ignore interrupts
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with subprocess.Popen(command, **pipes, preexec_fn=listen) as child:
            while not child.stdout.readline().startswith("    2"):
                assert child.poll() is None
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (130, "")

    def test_a_reader_that_has_had_enough(self, random_model):
        command = f"{sys.executable} -m vretrver_hf rank --model {random_model} --query q a b"
        done = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True, timeout=240)
        assert done.stdout.startswith("model") and done.stderr == ""


class TestDemo:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.fixture
    def right_but_once(self, scripted):
        """Looks at a picture and is right, except for the first sample, which it takes in input order."""
        samples = {sample.id: sample for sample in load_samples()}

        def script(query_id, turn):
            sample = samples[query_id]
            first = next(iter(samples))
            if query_id == first:
                return answer(1, 2, 3, 4, 5)
            picture = 0 if sample.query.image else 1
            rest = [number for number in range(1, 6) if number != sample.positive + 1]
            return [look(picture), answer(sample.positive + 1, *rest)][turn]

        assert next(iter(samples.values())).positive != 0
        return scripted(script)

    def test_the_last_line_is_the_path_of_the_page(self, capsys, right_but_once):
        code, out, err = run(capsys, "demo", "--limit", "3")
        assert (code, err) == (0, "")
        page = Path(out.splitlines()[-1])
        assert page == Path("outputs/demo/index.html").absolute()
        text = page.read_text(encoding="utf-8")
        assert "2 of 3 right" in text and text.count("<article") == 3

    def test_right_and_wrong(self, capsys, right_but_once):
        first, second = load_samples()[:2]
        _, out, _ = run(capsys, "demo", "--limit", "2", "--out", "page")
        place = first.positive + 1
        assert f"wrong     candidate {place} fits but came at place {place} (ok, 0 calls" in out
        assert f"right     candidate {second.positive + 1} fits (ok, 1 call" in out
        assert "score     1 of 2 right (text-to-image 1 of 2); 1 call" in out
        assert Path("page/index.html").exists()

    def test_json_and_nothing_else(self, capsys, right_but_once):
        code, out, err = run(capsys, "demo", "--json", "--limit", "4")
        assert (code, err) == (0, "")
        rows = [json.loads(line) for line in out.splitlines()]
        for row, sample in zip(rows, load_samples()[:4], strict=True):
            assert (row["id"], row["task"], row["positive"]) == (sample.id, sample.task, sample.positive)
            assert sorted(row["order"]) == [0, 1, 2, 3, 4]
            assert row["status"] == "ok" and row["seconds"] >= 0
        assert [row["correct"] for row in rows] == [False, True, True, True]
        assert [row["calls"] for row in rows] == [0, 1, 1, 1]
        assert not any(Path().iterdir())

    def test_json_with_a_page(self, capsys, right_but_once):
        _, out, _ = run(capsys, "demo", "--json", "--limit", "1", "--out", "page")
        assert len(out.splitlines()) == 1
        assert Path("page/index.html").exists()

    def test_without_tools(self, capsys, right_but_once):
        run(capsys, "demo", "--json", "--limit", "1", "--no-tools")
        assert right_but_once["tools"] is False


@pytest.fixture(scope="module")
def rows():
    """What the demo says as JSON, from a process of its own."""
    done = process("-m", "vretrver_hf", "demo", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestBundledModel:
    """On the model that comes with the package."""

    def test_plays_every_sample(self, rows):
        assert [row["id"] for row in rows] == [sample.id for sample in load_samples()]
        assert all(sorted(row["order"]) == [0, 1, 2, 3, 4] for row in rows)

    def test_speaks_the_protocol(self, rows):
        assert all(row["status"] == "ok" for row in rows)

    def test_is_mostly_right(self, rows):
        """Guessing is right in 11 or more of 14 with a probability of four in a million."""
        assert len(rows) == 14
        assert sum(row["correct"] for row in rows) >= 11

    def test_finds_a_detail_and_crops_it(self, rows):
        details = [row for row in rows if row["task"] == "text-to-detail"]
        assert len(details) == 3
        assert any(row["correct"] and row["calls"] for row in details)

    def test_photographs(self, capsys):
        code, out, err = run(capsys, "rank", "--query", "a cat", "--json", *PHOTOGRAPHS)
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert sorted(found["order"]) == [0, 1, 2, 3]
        assert found["trajectories"][0]["turns"]
