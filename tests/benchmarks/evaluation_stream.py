"""Fifty thousand queries through the whole evaluation with a scripted model: does memory grow?

    OMP_NUM_THREADS=1 python tests/benchmarks/evaluation_stream.py --queries 50000

Everything but the model's words is real: M-BEIR files, a run, windows, prompts, the journal, metrics, files, tables.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from mbeir_files import write_jsonl
from tiny_models import make_processor

from vretrver_hf import Reranker
from vretrver_hf.data.trec import Hit, write_run
from vretrver_hf.encoding import Encoder
from vretrver_hf.engines.scripted import ScriptedEngine
from vretrver_hf.evaluation.job import evaluate_queries
from vretrver_hf.evaluation.queries import MBEIRSet
from vretrver_hf.evaluation.report import write_report
from vretrver_hf.evaluation.results import write_results
from vretrver_hf.journal import Journal
from vretrver_hf.protocol import format_answer, format_turn


TASK = "webqa_task1"


def write_data(folder: Path, queries: int, candidates: int, hits: int) -> None:
    """Text queries and a pool, each query with a run of hits."""
    source = random.Random(0)
    pool = [{"did": f"1:{n}", "txt": f"answer {n}", "img_path": None, "modality": "text"} for n in range(candidates)]
    write_jsonl(folder / f"cand_pool/local/mbeir_{TASK}_cand_pool.jsonl", pool)
    rows = [
        {"qid": f"1:{q}", "query_txt": f"question {q}", "query_img_path": None, "query_modality": "text"}
        for q in range(queries)
    ]
    write_jsonl(folder / f"query/test/mbeir_{TASK}_test.jsonl", rows)
    (folder / "qrels/test").mkdir(parents=True)
    with open(folder / f"qrels/test/mbeir_{TASK}_test_qrels.txt", "w") as file:
        file.writelines(f"1:{q} 0 1:{source.randrange(candidates)} 1 1\n" for q in range(queries))
    picked = ((f"1:{q}", source.sample(range(candidates), hits)) for q in range(queries))
    write_run(folder / "run.txt", ((key, [Hit(f"1:{n}", -p) for p, n in enumerate(ns)]) for key, ns in picked))


def memory() -> float:
    """What the process holds now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--hits", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), options.out or Path(name) / "out"
        write_data(folder, options.queries, 10_000, options.hits)
        queries = MBEIRSet.open(folder, TASK, folder / "run.txt", instruction="none")
        answer = format_turn("as it is", format_answer(list(range(min(20, options.hits)))))
        engine = ScriptedEngine(
            Encoder(make_processor("qwen2_5_vl"), "qwen2_5_vl"), lambda *_: answer, max_sessions=32
        )
        reranker, seen, started, marks = Reranker(engine, "foveated"), 0, time.perf_counter(), []

        def count(key, result) -> None:
            nonlocal seen
            seen += 1
            if seen % (options.queries // 10) == 0:
                marks.append(memory())
                print(f"{seen:7d} queries  {time.perf_counter() - started:7.1f} s  {marks[-1]:7.1f} MB", flush=True)

        with Journal(out / "journal", {}) as journal:
            evaluate_queries(queries, journal, reranker, on_query=count)
            done = time.perf_counter()
            results = write_results(out, "scripted", {}, queries.keys, queries.groups, journal)
        write_report(out, results)
        print(f"metrics, files and tables in {time.perf_counter() - done:.1f} s, {memory():.1f} MB")
        figures = {"queries": len(queries), "growth MB": marks[-1] - marks[0], "bytes a query": 0}
        figures["bytes a query"] = round(2**20 * figures["growth MB"] / (0.9 * len(queries)))
        print(json.dumps(figures), json.dumps(results.total["reranked"]["hit@10"]))


if __name__ == "__main__":
    main()
