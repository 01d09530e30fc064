"""Exact search among a million vectors: this package's index against numpy and against plain FAISS.

OMP_NUM_THREADS=2 python tests/benchmarks/retrieval.py --count 1000000 --dimensions 256 --queries 256
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from vretrver_hf.retrieval import Index, load_vectors, normalised


K = 50
BLOCK = 50_000


def write_pool(folder: Path, count: int, dimensions: int) -> None:
    source = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        rows = source.standard_normal((min(BLOCK, count - start), dimensions), np.float32)
        np.save(folder / f"{start:010d}.npy", normalised(rows))


def search(index: Index, queries: np.ndarray) -> list[list[str]]:
    return [[hit.id for hit in hits] for hits in index.search(queries, K)]


def with_numpy(pool: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Block by block, since all scores at once would take a gigabyte."""
    found = []
    for start in range(0, len(queries), 32):
        scores = queries[start : start + 32] @ pool.T
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        found.append(np.take_along_axis(best, order, 1))
    return np.concatenate(found)


def with_faiss(pool: np.ndarray, queries: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool)
    return index.search(queries, K)[1]


def timed(name: str, run, *arguments):
    started = time.perf_counter()
    result = run(*arguments)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:36s} {seconds:7.2f} s   memory so far {memory:.1f} GB", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--queries", type=int, default=256)
    options = parser.parse_args()
    queries = normalised(np.random.default_rng(1).standard_normal((options.queries, options.dimensions)))
    with tempfile.TemporaryDirectory() as name:
        write_pool(Path(name), options.count, options.dimensions)
        vectors = load_vectors(name)
        ids = [f"c{number}" for number in range(options.count)]
        index = timed("index, from the disk", Index, ids, vectors)
        ours = timed("search", search, index, queries)
        index = None  # its copy of the vectors is no longer needed
        pool = vectors[:]
        plain = timed("plain FAISS, index and search", with_faiss, pool, queries)
        exact = timed("numpy", with_numpy, pool, queries)
    for label, other in (("plain FAISS", plain), ("numpy", exact)):
        same = np.mean([len({f"c{p}" for p in row} & set(mine)) / K for row, mine in zip(other, ours, strict=True)])
        print(f"shared with {label}: {same:.2%} of the top {K}")


if __name__ == "__main__":
    main()
