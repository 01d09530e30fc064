"""`vretrver retrieve`: the coarse stage on M-BEIR, as a job that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import DeviceOption, DtypeOption, Mistake
from .jobs import ImageRootOption, LimitOption, OutOption, check_folder, mistakes, weights_digest


RECORD = "retrieve.json"
"""Says beside a run what it was made with."""


def retrieve(
    mbeir: Annotated[Path, typer.Option(metavar="FOLDER", help="A copy of M-BEIR.")],
    task: Annotated[str, typer.Option(help="The task, such as cirr_task7.")],
    out: OutOption,
    embedder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Hub id or folder: a sentence-transformers model, or LamRA-Ret.")
    ] = None,
    query_vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: the queries' vectors (.npy, or a folder of them).")
    ] = None,
    pool_vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The pool's vectors, made before, in the order of its file.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Results a query.")] = 50,
    pool: Annotated[Literal["local", "global"], typer.Option(help="Which pool is searched.")] = "local",
    instruction: Annotated[
        str, typer.Option(help="first, none, or a number, the seed that draws one for each query.")
    ] = "first",
    factory: Annotated[str, typer.Option(help="FAISS index; Flat is exact.")] = "Flat",
    image_root: ImageRootOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Items that are embedded at a time.")] = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """
    Retrieve coarse results for an M-BEIR task: embed pool and queries, keep the --k nearest by cosine.

    Run the same command again after an interruption and it goes on: vectors are in FOLDER/pool and FOLDER/queries.
    With another task, pool, instruction, --dtype, other weights or changed files it is refused: take another --out.
    Another task or instruction over the same pool may use its vectors there with --pool-vectors FOLDER/pool.

    Several GPUs: `accelerate launch --multi_gpu -m vretrver_hf retrieve …`; each process embeds its share.

    FOLDER/run.trec holds the results, for `vretrver evaluate --run`; FOLDER/retrieve.json what they were made with.

    Example: `vretrver retrieve --mbeir M-BEIR --task cirr_task7 --embedder code-kunkun/LamRA-Ret --out outputs/lamra`
    """
    if embedder is None and (query_vectors is None or pool_vectors is None):
        raise Mistake("say whose vectors: --embedder, or --query-vectors and --pool-vectors")
    check_folder(out, "--out")

    from ..data.mbeir import MBEIR
    from ..data.trec import write_run
    from ..evaluation.benchmarks import find_benchmark
    from ..evaluation.queries import choose_instructions, mbeir_digests
    from ..journal import JournalError, current_shard
    from ..retrieval import Index, load_embedder, load_vectors

    with mistakes():
        files = MBEIR(mbeir, image_root)
        instructions = choose_instructions(files, instruction)
        queries = files.queries(task, instructions)
        keys = queries.query_ids[:limit]
        candidates = files.pool(None if pool == "global" else task)
        shard = current_shard()
        settings: dict[str, Any] = {
            "task": task,
            "pool": pool,
            "instruction": "none" if instructions is None else instructions.name,
            "digests": mbeir_digests(files, task, pool == "global"),
        }
    model: Any = None
    if query_vectors is None or pool_vectors is None:
        try:
            model = load_embedder(embedder or "", batch_size, device or shard.device, dtype)
        except (OSError, ValueError, ImportError) as error:
            raise Mistake(f"--embedder {embedder}: {(str(error).strip().splitlines() or ['?'])[0]}") from error
        settings |= {"weights": _weights(embedder or ""), "dtype": dtype}

    def asked(start: int, stop: int) -> Iterable[Any]:
        return (query.instructed for query in queries[start:stop])

    with mistakes():
        try:
            if pool_vectors is None:
                _embed(out / "pool", model, candidates.slice, len(candidates), "candidate", shard, settings)
            if query_vectors is None:
                _embed(out / "queries", model, asked, len(keys), "query", shard, settings)
        except JournalError as error:
            hint = f"--pool-vectors {pool_vectors or out / 'pool'} with another output keeps the pool's vectors"
            raise Mistake(f"{error}; where pool and model are the same, {hint}") from error
        shard.leave()
        if not shard.is_main:
            return
        found = Index(list(candidates.ids()), load_vectors(pool_vectors or out / "pool"), factory)
        vectors = load_vectors(query_vectors or out / "queries")
        if len(vectors) < len(keys):
            raise Mistake(f"--query-vectors holds {len(vectors)} vectors for {len(keys)} queries")
        benchmark = find_benchmark(task)
        hits = zip(keys, found.search(vectors[: len(keys)], k), strict=True)
        write_run(out / "run.trec", hits, "coarse", benchmark.task_id if benchmark else None)
    made = {"embedder": None if model is None else model.name, "k": k, "factory": factory, "queries": len(keys)}
    given = {"query_vectors": _origin(query_vectors), "pool_vectors": _origin(pool_vectors)}
    record = json.dumps({**settings, **made, **given}, indent=2, sort_keys=True, ensure_ascii=False)
    (out / RECORD).write_text(record + "\n", encoding="utf-8")
    print((out / "run.trec").absolute())


def _weights(embedder: str) -> str:
    """Tells an embedder's weights from others; sentence-transformers keeps them in a folder for each module."""
    from ..hub import find

    listed = find(embedder, "modules.json")
    if listed is None:
        return weights_digest(embedder)
    modules = json.loads(listed.read_text(encoding="utf-8"))
    folders = dict.fromkeys(listed.parent / module["path"] for module in modules)
    return " ".join(weights_digest(str(folder)) for folder in folders if folder.is_dir())


def _origin(vectors: Path | None) -> dict[str, Any] | None:
    """Where vectors that were made before lie, and what they were made with, where that stands beside them."""
    if vectors is None:
        return None
    settings = vectors / "journal" / "settings.json"
    made = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    return {"path": str(vectors), "settings": made}


def _embed(
    folder: Path,
    model: Any,
    items: Any,
    count: int,
    side: Literal["query", "candidate"],
    shard: Any,
    settings: Mapping[str, Any],
) -> None:
    from tqdm import tqdm

    from ..retrieval import embed

    with tqdm(total=count, unit="item", desc=f"embedding {side}s", disable=not shard.is_main) as bar:
        embed(folder, model, items, count, side, shard, on_chunk=bar.update, settings=settings)
