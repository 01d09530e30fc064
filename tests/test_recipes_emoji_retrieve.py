"""The worked example's coarse stage on a toy set of drawings, through the files that evaluation reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "emoji"))

import embedder
import retrieve
from art import TRAIN_ARTISTS, Art
from concepts import load_concepts
from emoji_toy import data
from splits import split_codes

from vretrver_hf import Item
from vretrver_hf.data.mbeir import MBEIR
from vretrver_hf.data.trec import read_run
from vretrver_hf.evaluation.metrics import hit_at_k
from vretrver_hf.evaluation.queries import MBEIRSet


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("retrieval")
    retrieve.main(data=data, out=out, count=2, k=20, steps=25)
    return out


def test_the_files_are_mbeirs(folder, data):
    mbeir, concepts = MBEIR(folder), load_concepts(data)
    held_out = split_codes(concepts, "test_combination")
    assert mbeir.tasks() == ["emoji_task0", "emoji_task4"]
    for task, modality in (("emoji_task0", "text"), ("emoji_task4", "image")):
        pool, queries = mbeir.pool(task), mbeir.queries(task)
        assert len(pool) == len(concepts) and len(queries) == 2
        for query in queries:
            assert query.modality == modality and query.relevant and all(did in pool for did in query.relevant)
        if modality == "text":
            assert {query.item.text for query in queries} <= {concepts[code].name for code in held_out}
    assert pool["99:0"].load_image().size == (168, 168)


@pytest.mark.parametrize("task", retrieve.TASKS)
def test_runs_are_what_evaluation_reranks(folder, task):
    queries = MBEIRSet.open(folder, task, folder / f"{task}.trec", instruction="none")
    assert all(len(query.candidates) == 20 and query.candidates[0].image is not None for query in queries)
    run = {key: [hit.id for hit in hits] for key, hits in read_run(folder / f"{task}.trec").items()}
    assert 0 <= hit_at_k(run, {query.query_id: set(query.relevant) for query in queries}, 20) <= 1


def test_right_is_what_does_not_contradict(data):
    art, concepts = Art.load(data), load_concepts(data)
    names = {concept.name: code for code, concept in concepts.items()}
    found = retrieve.relevant(art, concepts, names["man cook: tone 1"], list(concepts))
    told = {concepts[code].name for code in found}
    assert "man cook: tone 1" in told and not told & {"woman cook: tone 1", "man cook: tone 2", "man judge: tone 1"}


def test_training_sees_nothing_held_out(data):
    art, concepts = Art.load(data), load_concepts(data)
    known = {concepts[code].name for code in split_codes(concepts, "train")}
    for names, first, second in embedder.batches(art, concepts, 3, 8, seed=0):
        assert set(names) <= known and first.shape == second.shape == (8, 28, 28, 3)
    assert "openmoji" not in TRAIN_ARTISTS


def test_training_learns_names_and_repeats(data):
    art, concepts = Art.load(data), load_concepts(data)
    models = [embedder.train(art, concepts, steps=30, batch=16) for _ in range(2)]
    code = sorted(split_codes(concepts, "train"))[0]
    items = [Item(text=concepts[code].name), Item(text="x", image=_png(art, code)), Item(image=_png(art, code))]
    vectors = [model.encode(items, "query") for model in models]
    assert np.allclose(*vectors) and np.allclose(np.linalg.norm(vectors[0], axis=1), 1, atol=1e-5)
    fresh = embedder.TinyEmbedder()
    with torch.no_grad():
        fresh_score = fresh.encode(items, "query")[0] @ fresh.encode(items, "query")[2]
    assert vectors[0][0] @ vectors[0][2] > fresh_score + 0.2


def _png(art, code):
    from PIL import Image

    return Image.fromarray(art.image("noto", code))
