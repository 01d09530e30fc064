"""The hub's real client against a local server that speaks its API; each client is a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from records import PRESET, make_example, make_records
from tiny_models import make_model, make_processor

from vretrver_hf import Reranker
from vretrver_hf.chat_templates import apply_to
from vretrver_hf.data.conversations import write_records
from vretrver_hf.data.examples import write_examples
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines import Sampling
from vretrver_hf.engines.transformers import TransformersEngine
from vretrver_hf.hub import _hide_places, space_push
from vretrver_hf.reranker import bundled_model


@pytest.fixture
def hub():
    with FakeHub().serve() as server:
        yield server
    assert server.unknown == []


@pytest.fixture
def client(hub, tmp_path):
    """Runs a client's process: the command line, or a piece of Python that is given as `code`."""

    def run(*args, code: str = "", fails: bool = False, **environment) -> str:
        command = ["-c", code] if code else ["-m", "vretrver_hf"]
        known = {**os.environ, **hub.environment(tmp_path / "home"), **environment}
        done = subprocess.run(
            [sys.executable, *command, *map(str, args)], capture_output=True, text=True, timeout=120, env=known
        )
        assert (done.returncode != 0) == fails, done.stderr
        if fails and not code:
            assert done.returncode == 2 and "Traceback" not in done.stderr
            assert done.stderr.splitlines()[-1].startswith("vretrver: ")  # the client tells its retries before
        assert TOKEN not in done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture(scope="module")
def parts():
    processor = make_processor("qwen2_5_vl")
    apply_to(processor, "qwen2_5_vl")
    return make_model("qwen2_5_vl", processor), processor


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory) -> Path:
    """A model that was saved, with much beside it that is nobody's business."""
    folder = tmp_path_factory.mktemp("saved")
    Reranker(TransformersEngine(*parts), PRESET, 6, 3, Sampling(max_turn_tokens=8)).save_pretrained(folder)
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-5/model.safetensors", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    return folder


@pytest.fixture(scope="module")
def records(parts):
    encoder = Encoder(parts[1], "qwen2_5_vl")
    return make_records(encoder, [make_example(number) for number in range(4)])


class TestPushModel:
    def test_arrives_byte_for_byte_and_private(self, hub, client):
        address = client("push", "model", "bundled", "someone/tiny").splitlines()[-1]
        repo = hub.repos["model", "someone/tiny"]
        assert repo.private and address.startswith(f"{hub.endpoint}/someone/tiny/commit/")
        files = repo.files()
        assert {"model-00001-of-00002.safetensors", "reranker_config.json", "README.md", "ATTRIBUTION.md"} <= set(
            files
        )
        for path, data in files.items():
            if path not in (".gitattributes", "README.md"):
                assert data == (bundled_model() / path).read_bytes(), path

    def test_loads_from_there_with_its_protocol(self, hub, client, saved):
        client("push", "model", saved, "someone/random", "--license", "apache-2.0")
        code = """
from vretrver_hf import Reranker
reranker = Reranker.from_pretrained("someone/random", revision="main")
print(reranker.window, reranker.stride, reranker.sampling.max_turn_tokens, reranker.preset.overview_pixels)
print(sorted(reranker.rank("q", ["a", "b", "c"]).order))
"""
        assert client(code=code).splitlines() == [f"6 3 8 {PRESET.overview_pixels}", "[0, 1, 2]"]
        offline = client(code=code, HF_HUB_OFFLINE="1").splitlines()
        assert offline[1] == "[0, 1, 2]"

    def test_only_what_belongs_to_the_model(self, hub, client, saved):
        client("push", "model", saved, "someone/random", "--license", "apache-2.0")
        names = set(hub.repos["model", "someone/random"].files())
        assert not [name for name in names if name.endswith((".bin", ".pt", ".env")) or "checkpoint" in name]

    def test_records_do_not_say_where_things_are(self, tmp_path):
        original, staged = tmp_path / "training.json", tmp_path / "staged.json"
        record = {"base_model": "/home/somebody/sft", "before": {"datasets": ["~/data", "someone/set"]}, "steps": 5}
        original.write_text(json.dumps(record))
        staged.symlink_to(original)
        _hide_places(staged)
        told = json.loads(staged.read_text())
        assert told == {"base_model": "sft", "before": {"datasets": ["data", "someone/set"]}, "steps": 5}
        assert json.loads(original.read_text()) == record

    def test_a_dry_run_changes_nothing(self, hub, client):
        told = client("push", "model", "bundled", "someone/tiny", "--dry-run")
        assert "someone/tiny at main (private" in told and "the repository would be made" in told
        assert "13.7 MB  model-00001-of-00002.safetensors" in told and "# vretrver-tiny" in told
        assert hub.repos == {} and not [line for line in hub.requests if line.startswith(("POST", "PUT"))]

    def test_a_dry_run_needs_no_hub(self, client):
        told = client("push", "model", "bundled", "someone/tiny", "--dry-run", HF_HUB_OFFLINE="1", HF_TOKEN="")
        assert "was not asked" in told and "# vretrver-tiny" in told

    def test_a_cut_upload_goes_on_where_it_stopped(self, hub, client):
        """The client gives up after five more tries; what had arrived is not sent again."""
        first, second = map(_digest, sorted(bundled_model().glob("*.safetensors")))
        hub.cuts[second] = 100
        assert "broke off" in client("push", "model", "bundled", "someone/tiny", fails=True)
        assert set(hub.repos["model", "someone/tiny"].files()) == {".gitattributes"} and first in hub.large
        hub.cuts.clear()
        hub.requests.clear()
        client("push", "model", "bundled", "someone/tiny")
        uploads = [line for line in hub.requests if line.startswith("PUT")]
        assert f"PUT /large/{second}" in uploads and f"PUT /large/{first}" not in uploads
        assert "model.safetensors.index.json" in hub.repos["model", "someone/tiny"].files()

    def test_a_short_interruption_is_got_over(self, hub, client):
        (digest, *_) = map(_digest, bundled_model().glob("*.safetensors"))
        hub.cuts[digest] = 1
        client("push", "model", "bundled", "someone/tiny")
        assert digest in hub.large

    def test_the_same_again_does_nothing(self, hub, client):
        client("push", "model", "bundled", "someone/tiny")
        commits = len(hub.repos["model", "someone/tiny"].commits)
        assert client("push", "model", "bundled", "someone/tiny").splitlines()[-1] == f"{hub.endpoint}/someone/tiny"
        assert len(hub.repos["model", "someone/tiny"].commits) == commits

    def test_what_is_there_is_not_overwritten_unless_told(self, hub, client):
        repo = hub.add("someone/tiny", {"README.md": b"mine", "old.safetensors": b"old"})
        told = client("push", "model", "bundled", "someone/tiny", fails=True)
        assert "holds something else at revision main (README.md, old.safetensors)" in told
        assert repo.files()["README.md"] == b"mine" and len(repo.commits) == 1
        client("push", "model", "bundled", "someone/tiny", "--overwrite")
        assert repo.files()["README.md"] != b"mine" and "old.safetensors" not in repo.files()
        assert not repo.private  # as it was

    def test_another_revision_is_made(self, hub, client):
        repo = hub.add("someone/tiny", {"README.md": b"mine"})
        client("push", "model", "bundled", "someone/tiny", "--revision", "v2")
        assert repo.files()["README.md"] == b"mine"
        assert "config.json" in repo.files("v2")

    @pytest.mark.parametrize(
        ("args", "environment", "named"),
        [
            (["bundled", "someone/tiny"], {"HF_TOKEN": "hf_wrong"}, "the hub does not know the token"),
            (["bundled", "someone/tiny"], {"HF_TOKEN": ""}, "there is no token for the hub; log in"),
            (["bundled", "other/tiny"], {}, "the token may not do this to other/tiny"),
            (["bundled", "tiny"], {}, "'tiny' is no name on the hub; write it as owner/name"),
            (["bundled", "someone/tiny"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
            (["absent", "someone/tiny"], {}, "absent is no folder"),
        ],
    )
    def test_mistakes(self, client, args, environment, named):
        assert named in client("push", "model", *args, fails=True, **environment)

    @pytest.mark.parametrize(
        ("lacking", "named"),
        [
            ("config.json", "neither config.json nor adapter_config.json"),
            ("model.safetensors", "no weights as safetensors"),
        ],
    )
    def test_what_is_no_model(self, client, saved, tmp_path, lacking, named):
        for path in saved.iterdir():
            if path.is_file() and path.name != lacking:
                (tmp_path / path.name).write_bytes(path.read_bytes())
        assert named in client("push", "model", tmp_path, "someone/x", "--license", "mit", fails=True)

    def test_a_model_without_a_licence(self, client, saved):
        assert "nothing says under which licence" in client("push", "model", saved, "someone/x", fails=True)

    def test_from_python(self, hub, client):
        code = """
from vretrver_hf import Reranker
print(Reranker.from_pretrained().push_to_hub("someone/mine"))
again = Reranker.from_pretrained("someone/mine")
print(again.preset.overview_pixels, again.window)
"""
        client(code=code)
        files = hub.repos["model", "someone/mine"].files()
        assert {"ATTRIBUTION.md", "LICENSES/MIT.txt"} <= set(files) and b"# vretrver-tiny" in files["README.md"]


class TestLoad:
    def test_answers(self, hub, client):
        hub.add("someone/gated", {"config.json": b"{}"}, gated=True)
        hub.add("someone/secret", {"config.json": b"{}"}, private=True)
        hub.add("someone/empty", {})
        code = """
import os
from vretrver_hf import Reranker
for name, revision, token in [("absent", None, None), ("gated", None, None), ("empty", None, None),
                              ("empty", "v9", None), ("secret", None, ""), ("secret", None, "hf_wrong")]:
    os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"] if token is None else token
    try:
        Reranker.from_pretrained(f"someone/{name}", revision=revision)
    except OSError as error:
        print(error)
"""
        absent, gated, empty, revision, hidden, wrong = client(code=code).splitlines()
        assert "the hub shows no model someone/absent" in absent
        assert "someone/gated is gated: ask for access on" in gated
        assert empty == "someone/empty has no config.json"
        assert "someone/empty has no revision 'v9'" in revision
        assert "the hub shows no model someone/secret; if it is private, log in" in hidden
        assert "the hub does not know the token" in wrong

    def test_offline(self, client):
        told = client("rank", "--model", "someone/x", "--query", "q", "a", "b", fails=True, HF_HUB_OFFLINE="1")
        assert told.startswith("vretrver: model someone/x: ")
        assert "not in the hub's cache while HF_HUB_OFFLINE is set" in told

    @pytest.mark.nightly
    def test_a_hub_that_cannot_be_reached(self, client):
        """The client tries for 23 seconds, and says so."""
        code = "from vretrver_hf import hub\nhub.fetch('someone/x', 'config.json')"
        told = client(code=code, fails=True, HF_ENDPOINT="http://127.0.0.1:9")
        assert "not in the hub's cache while http://127.0.0.1:9 cannot be reached" in told.splitlines()[-1]

    def test_an_adapter_goes_where_it_belongs(self, hub, client, saved, tmp_path):
        """An adapter's own protocol goes before the base's, and its weights change what the model says."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText

        from vretrver_hf.reranker import save_config

        base = AutoModelForImageTextToText.from_pretrained(saved)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*visual.*"))
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        adapted.peft_config["default"].base_model_name_or_path = "someone/base"
        adapted.save_pretrained(tmp_path / "adapter")
        save_config(tmp_path / "adapter", PRESET, 4, 2, Sampling(max_turn_tokens=5))
        client("push", "model", saved, "someone/base", "--license", "mit")
        client("push", "model", tmp_path / "adapter", "someone/lora", "--license", "mit")
        card = hub.repos["model", "someone/lora"].files()["README.md"].decode()
        assert "base_model: someone/base" in card and "LoRA adapter of rank 2" in card
        code = """
import sys
from vretrver_hf import Reranker
alone = Reranker.from_pretrained("someone/base")
for reranker in [Reranker.from_pretrained("someone/base", adapter="someone/lora"), Reranker.from_pretrained(
    "someone/lora"
)]:
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    change = reranker.engine.model.state_dict()[weight] - alone.engine.model.state_dict()[weight]
    print(reranker.window, reranker.sampling.max_turn_tokens, f"{change.norm().item():.4f}")
"""
        together = client(code=code)
        # Both once more in folders of one repository, on a branch; the second time from the cache.
        files = {f"sub/{path.name}": path.read_bytes() for path in saved.iterdir() if path.is_file()}
        files |= {f"lora/{path.name}": path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
        hub.add("someone/both", {}).commit("v2", files)
        code = (
            code[: code.index("for reranker")]
            + """
whole = dict(revision="v2", subfolder="sub")
lora = dict(adapter="someone/both", adapter_kwargs={"revision": "v2", "subfolder": "lora"})
for reranker in [Reranker.from_pretrained("someone/both", **whole), Reranker.from_pretrained(
    "someone/both", **whole, **lora
)]:
"""
            + code[code.index("    weight =") :]
        )
        folders = [client(code=code), client(code=code, HF_HUB_OFFLINE="1")]
        weights = adapted.merge_and_unload().state_dict()
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        change = weights[name] - AutoModelForImageTextToText.from_pretrained(saved).state_dict()[name]
        assert together.splitlines() == [f"4 5 {change.norm().item():.4f}"] * 2
        assert [told.splitlines() for told in folders] == [["6 8 0.0000", f"4 5 {change.norm().item():.4f}"]] * 2


class TestPushData:
    def test_examples_come_back(self, hub, client, tmp_path):
        examples = [make_example(number) for number in range(3)]
        write_examples(tmp_path / "train.parquet", examples)
        (tmp_path / "whose.md").write_text("mine")
        arguments = ["--license", "cc-by-4.0", "--attribution", tmp_path / "whose.md"]
        client("push", "data", tmp_path / "train.parquet", "someone/doors", *arguments)
        files = hub.repos["dataset", "someone/doors"].files()
        assert files["ATTRIBUTION.md"] == b"mine" and b"| doors |" in files["README.md"]
        code = """
from vretrver_hf.data.examples import load_examples
examples = load_examples("someone/doors")
print(len(examples), [example.positives for example in examples], examples[1].query.load_image().size)
"""
        assert client(code=code) == f"3 [[1], [1], [1]] {examples[1].query.load_image().size}\n"

    def test_paths_of_pictures_stay_here(self, hub, client, tmp_path):
        (tmp_path / "pictures").mkdir()
        make_example(1).query.image.save(tmp_path / "pictures" / "a.png")
        info = {"qid": "q", "query_text": "x", "candidate_images": ["pictures/a.png", "pictures/a.png"]}
        row = {"extra_info": {**info, "num_candidates": 2, "ground_truth_position": 1}}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        client("push", "data", tmp_path / "rows.jsonl", "someone/paths", "--license", "mit")
        data = hub.repos["dataset", "someone/paths"].files()["data/train-00000.parquet"]
        assert b"pictures" not in data and (tmp_path / "pictures/a.png").read_bytes() in data


class TestPushTrajectories:
    def test_they_come_back_from_load_dataset(self, hub, client, records, tmp_path):
        write_records(tmp_path / "records", records)
        (tmp_path / "records" / "README.md").write_text("---\ntags: []\n---\n\n# Title\n\nSampled by hand.\n")
        client("push", "trajectories", tmp_path / "records", "someone/traces", "--license", "mit")
        card = hub.repos["dataset", "someone/traces"].files()["README.md"].decode()
        assert "4 conversations" in card and "Sampled by hand." in card and "# Title" not in card
        code = """
import json
from datasets import load_dataset
from vretrver_hf.data.published import from_row
rows = load_dataset("someone/traces", split="train")
print(type(rows.features["query_image"]).__name__, len(rows), rows[0]["seen"][0].size, rows[0]["right"])
print(json.dumps([from_row(row).trajectory.to_dict() for row in rows]))
print(from_row(rows[1]).item(0).load_image().size)
"""
        lines = client(code=code).splitlines()
        (ref,) = records[0].trajectory.turns[2].images
        assert lines[0] == f"Image 4 ({ref.width}, {ref.height}) True"
        assert json.loads(lines[1]) == json.loads(json.dumps([record.trajectory.to_dict() for record in records]))
        assert lines[2] == str(records[1].item(0).load_image().size)

    def test_a_folder_without_records(self, client, tmp_path):
        told = client("push", "trajectories", tmp_path, "someone/traces", "--license", "mit", fails=True)
        assert "has no trajectories.jsonl" in told


class TestPushSpace:
    def test_everything_that_runs_there_goes_along(self, hub, client):
        client("push", "space", "someone/rerank", "--public")
        repo = hub.repos["space", "someone/rerank"]
        assert repo.sdk == "gradio" and not repo.private
        wanted = {"app.py", "runs.py", "README.md", "requirements.txt", "vretrver_hf/__init__.py"}
        wanted |= {"vretrver_hf/assets/vretrver-tiny/config.json", "vretrver_hf/assets/trace.css"}
        assert wanted <= set(repo.files())
        assert not [path for path in repo.files() if path.endswith(".pyc")]

    def test_hidden_files_stay_here(self, tmp_path):
        folder = shutil.copytree(Path(__file__).parents[1] / "spaces" / "rerank", tmp_path / "app")
        (folder / ".env").write_text("private")
        with space_push("someone/rerank", folder=folder) as push:
            names = {path.name for path in push.folder.rglob("*")}
        assert "app.py" in names and ".env" not in names

    def test_it_installs_what_the_package_needs(self):
        """The Space has the package itself, so its requirements must name what the package depends on."""
        root = Path(__file__).parents[1]
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needed = [*project["dependencies"], *project["optional-dependencies"]["space"]]
        assert (root / "spaces/rerank/requirements.txt").read_text(encoding="utf-8").split() == needed


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
