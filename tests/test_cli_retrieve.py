from __future__ import annotations

import numpy as np
import pytest
from mbeir_files import write_mbeir
from test_cli_sample import run
from test_retrieval import CHAT, unit
from tiny_models import make_model, make_processor

from vretrver_hf.data.trec import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mbeir(tmp_path_factory.mktemp("mbeir"), {7: "cirr"}, queries=3)


def arguments(folder, out, *more) -> list:
    return ["retrieve", "--mbeir", folder, "--task", "cirr_task7", "--out", out, *more]


def test_embeds_searches_and_goes_on(capsys, folder, tmp_path):
    processor = make_processor("qwen2_5_vl")
    processor.chat_template = processor.tokenizer.chat_template = CHAT
    make_model("qwen2_5_vl", processor).save_pretrained(tmp_path / "lamra")
    processor.save_pretrained(tmp_path / "lamra")
    args = arguments(folder, tmp_path / "out", "--embedder", tmp_path / "lamra", "--device", "cpu", "--k", 7)
    code, out, err = run(capsys, *args)
    assert code == 0, err
    assert out == f"{tmp_path / 'out' / 'run.trec'}\n" and "embedding candidates: 100%" in err
    found = read_run(tmp_path / "out" / "run.trec")
    assert list(found) == ["7:0", "7:1", "7:2"] and all(len(hits) == 7 for hits in found.values())
    assert (tmp_path / "out" / "run.trec").read_text().splitlines()[0].endswith(" coarse 7")
    (tmp_path / "out" / "run.trec").unlink()
    assert run(capsys, *args)[0] == 0 and read_run(tmp_path / "out" / "run.trec") == found


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
