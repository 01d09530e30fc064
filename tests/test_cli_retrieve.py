from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mbeir_files import write_mbeir
from safetensors.numpy import save_file
from test_cli_sample import run
from test_retrieval import CHAT, unit
from tiny_models import make_model, make_processor

from vretrver_hf.cli.jobs import weights_digest
from vretrver_hf.cli.retrieve import _weights
from vretrver_hf.data.mbeir import MBEIR
from vretrver_hf.data.trec import read_run
from vretrver_hf.evaluation.queries import mbeir_digests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mbeir(tmp_path_factory.mktemp("mbeir"), {7: "cirr"}, queries=3)


def arguments(folder, out, *more) -> list:
    return ["retrieve", "--mbeir", folder, "--task", "cirr_task7", "--out", out, *more]


def save_lamra(folder: Path, scale: float = 1.0) -> Path:
    """A random LamRA checkpoint; another scale makes other weights."""
    processor = make_processor("qwen2_5_vl")
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    model = make_model("qwen2_5_vl", processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_embeds_searches_and_goes_on(capsys, folder, tmp_path):
    lamra = save_lamra(tmp_path / "lamra")
    args = arguments(folder, tmp_path / "out", "--embedder", lamra, "--device", "cpu", "--k", 7)
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert out == f"{tmp_path / 'out' / 'run.trec'}\n" and "embedding candidates: 100%" in err
    found = read_run(tmp_path / "out" / "run.trec")
    assert list(found) == ["7:0", "7:1", "7:2"] and all(len(hits) == 7 for hits in found.values())
    assert (tmp_path / "out" / "run.trec").read_text().splitlines()[0].endswith(" coarse 7")
    (tmp_path / "out" / "run.trec").unlink()
    assert run(capsys, *args)[0] == 0 and read_run(tmp_path / "out" / "run.trec") == found


def test_what_a_run_was_made_with_stands_beside_it(capsys, folder, tmp_path):
    lamra = save_lamra(tmp_path / "lamra")
    code, _, err = run(capsys, *arguments(folder, tmp_path / "out", "--embedder", lamra, "--limit", 2, "--k", 3))
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "retrieve.json").read_text())
    digests = {**mbeir_digests(MBEIR(folder), "cirr_task7")}
    assert record == {
        "task": "cirr_task7",
        "pool": "local",
        "instruction": "first",
        "digests": digests,
        "embedder": str(lamra),
        "weights": weights_digest(str(lamra)),
        "dtype": "auto",
        "k": 3,
        "factory": "Flat",
        "queries": 2,
        "query_vectors": None,
        "pool_vectors": None,
    }
    pool = ["--pool-vectors", tmp_path / "out" / "pool", "--instruction", "none"]
    code, _, err = run(capsys, *arguments(folder, tmp_path / "more", "--embedder", lamra, *pool))
    assert code == 0, err
    record = json.loads((tmp_path / "more" / "retrieve.json").read_text())
    assert record["instruction"] == "none" and record["query_vectors"] is None
    assert record["pool_vectors"]["path"] == str(tmp_path / "out" / "pool")
    assert record["pool_vectors"]["settings"]["digests"] == digests  # what the journal there says of them


class TestOtherVectors:
    """The folder holds vectors of another job, and a run of them would look like one of this job."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return write_mbeir(tmp_path / "mbeir", {7: "cirr", 4: "nights"}, queries=3)

    @pytest.fixture
    def made(self, capsys, folder, tmp_path) -> Path:
        lamra = save_lamra(tmp_path / "lamra")
        code, _, err = run(capsys, *arguments(folder, tmp_path / "out", "--embedder", lamra))
        assert code == 0, err
        return tmp_path / "out"

    def again(self, capsys, folder, made, *more) -> str:
        before = (made / "run.trec").read_bytes(), (made / "retrieve.json").read_bytes()
        code, told, err = run(capsys, *arguments(folder, made, "--embedder", made.parent / "lamra", *more))
        err = err.splitlines()[-1]  # behind the bars
        assert (code, told) == (2, "") and err.startswith("vretrver: "), err
        assert ((made / "run.trec").read_bytes(), (made / "retrieve.json").read_bytes()) == before
        assert "choose another output" in err and f"--pool-vectors {made / 'pool'}" in err
        return err

    @pytest.mark.parametrize(
        ("more", "named"),
        [
            (["--instruction", "none"], 'instruction was "first" and is now "none"'),
            (["--instruction", "1"], 'instruction was "first" and is now "seed 1"'),
            (["--task", "nights_task4"], 'task was "cirr_task7" and is now "nights_task4"'),
            (["--pool", "global"], 'pool was "local" and is now "global"'),
            (["--dtype", "bfloat16"], 'dtype was "auto" and is now "bfloat16"'),
        ],
    )
    def test_options(self, capsys, folder, made, more, named):
        assert named in self.again(capsys, folder, made, *more)

    def test_queries_alone(self, capsys, folder, made, tmp_path):
        """With the pool's vectors given, the queries' journal is what tells."""
        err = self.again(capsys, folder, made, "--pool-vectors", made / "pool", "--instruction", "none")
        assert f"{made / 'queries' / 'journal'} was begun with other settings: instruction was" in err

    def test_weights(self, capsys, folder, made, tmp_path):
        save_lamra(tmp_path / "lamra", scale=1.5)
        assert "weights was " in self.again(capsys, folder, made)

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("queries", "query/test/mbeir_cirr_task7_test.jsonl"),
            ("pool", "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"),
            ("instructions", "instructions/query_instructions.tsv"),
        ],
    )
    def test_files(self, capsys, folder, made, name, file):
        path = folder / file
        path.write_text(path.read_text().replace("Find it.", "Find one.").replace("query 1", "query 9") + "\n")
        assert f"digests.{name} was " in self.again(capsys, folder, made)

    def test_more_results_of_the_same_vectors(self, capsys, folder, made):
        args = arguments(folder, made, "--embedder", made.parent / "lamra", "--k", 2)
        assert run(capsys, *args)[0] == 0
        assert all(len(hits) == 2 for hits in read_run(made / "run.trec").values())
        assert json.loads((made / "retrieve.json").read_text())["k"] == 2


def test_the_weights_of_sentence_transformers_are_those_of_its_modules(tmp_path):
    """They lie in folders of their own, and the model's folder has neither weights nor configuration."""
    modules = [{"idx": 0, "name": "0", "path": "0_Model", "type": "x"}, {"idx": 1, "name": "1", "path": "1_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    seen = set()
    for weight, place in enumerate(["0_Model", "1_Dense"] * 2):
        (tmp_path / place).mkdir(exist_ok=True)
        save_file({"weight": np.full(1, weight)}, tmp_path / place / "model.safetensors")
        seen.add(_weights(str(tmp_path)))
    assert len(seen) == 4


def test_vectors_made_before(capsys, folder, tmp_path):
    pool = unit(30)
    np.save(tmp_path / "pool.npy", pool)
    np.save(tmp_path / "queries.npy", pool[[4, 0, 29]])
    vectors = ["--query-vectors", tmp_path / "queries.npy", "--pool-vectors", tmp_path / "pool.npy"]
    code, _, err = run(capsys, *arguments(folder, tmp_path / "out", *vectors, "--k", 2))
    assert code == 0, err
    found = read_run(tmp_path / "out" / "run.trec")
    assert [hits[0].id for hits in found.values()] == ["7:1000004", "7:1000000", "7:1000029"]
    np.save(tmp_path / "queries.npy", pool[:2])
    code, _, err = run(capsys, *arguments(folder, tmp_path / "out", *vectors))
    assert code == 2 and "2 vectors for 3 queries" in err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "say whose vectors: --embedder, or --query-vectors and --pool-vectors"),
        (["--pool-vectors", "p.npy"], "say whose vectors"),
        (["--embedder", "absent/model"], "--embedder absent/model: "),
        (["--embedder", "x", "--instruction", "best"], "unknown instruction 'best'"),
        (["--query-vectors", "q.npy", "--pool-vectors", "p.npy"], "p.npy holds no vectors"),
    ],
)
def test_mistakes(capsys, folder, tmp_path, args, named):
    code, out, err = run(capsys, *arguments(folder, tmp_path / "out", *args))
    assert (code, out) == (2, "") and err.count("\n") == 1 and named in err, err
