"""`vretrver retrieve`: the coarse stage on M-BEIR, as a job that goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import DeviceOption, DtypeOption, Mistake
from .jobs import ImageRootOption, LimitOption, OutOption, check_folder, mistakes


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
    Another task over the same pool may use them with --pool-vectors.

    Several GPUs: `accelerate launch --multi_gpu -m vretrver_hf retrieve …`; each process embeds its share.

    FOLDER/run.trec holds the results, for `vretrver evaluate --run`.

    Example: `vretrver retrieve --mbeir M-BEIR --task cirr_task7 --embedder code-kunkun/LamRA-Ret --out outputs/lamra`
    """
    if embedder is None and (query_vectors is None or pool_vectors is None):
        raise Mistake("say whose vectors: --embedder, or --query-vectors and --pool-vectors")
    check_folder(out, "--out")

    from ..data.mbeir import MBEIR
    from ..data.trec import write_run
    from ..evaluation.benchmarks import find_benchmark
    from ..evaluation.queries import choose_instructions
    from ..journal import current_shard
    from ..retrieval import Index, load_embedder, load_vectors

    with mistakes():
        files = MBEIR(mbeir, image_root)
        queries = files.queries(task, choose_instructions(files, instruction))
        keys = queries.query_ids[:limit]
        candidates = files.pool(None if pool == "global" else task)
        shard = current_shard()
    model: Any = None
    if query_vectors is None or pool_vectors is None:
        try:
            model = load_embedder(embedder or "", batch_size, device or shard.device, dtype)
        except (OSError, ValueError, ImportError) as error:
            raise Mistake(f"--embedder {embedder}: {(str(error).strip().splitlines() or ['?'])[0]}") from error

    def asked(start: int, stop: int) -> Iterable[Any]:
        return (query.instructed for query in queries[start:stop])

    with mistakes():
        if pool_vectors is None:
            _embed(out / "pool", model, candidates.slice, len(candidates), "candidate", shard)
        if query_vectors is None:
            _embed(out / "queries", model, asked, len(keys), "query", shard)
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
    print((out / "run.trec").absolute())


def _embed(folder: Path, model: Any, items: Any, count: int, side: Literal["query", "candidate"], shard: Any) -> None:
    from tqdm import tqdm

    from ..retrieval import embed

    with tqdm(total=count, unit="item", desc=f"embedding {side}s", disable=not shard.is_main) as bar:
        embed(folder, model, items, count, side, shard, on_chunk=bar.update)
