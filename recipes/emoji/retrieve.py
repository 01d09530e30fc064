"""The coarse stage of the worked example: a pool of drawings, an embedder, and runs of the top 50, as M-BEIR's files.

    python recipes/emoji/retrieve.py --out outputs/emoji-retrieval
    vretrver evaluate --mbeir outputs/emoji-retrieval --task emoji_task0 --instruction none \\
        --run outputs/emoji-retrieval/emoji_task0.trec --out outputs/emoji-retrieval/t2i

The pool is everything that one artist drew. Queries are held-out combinations of attributes: their names
(`emoji_task0`, text to image), and the same thing by another artist (`emoji_task4`, image to image).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import embedder
import typer
from art import Art
from concepts import Concept, contradicts, load_concepts
from PIL import Image
from splits import split_codes

from vretrver_hf.data.mbeir import MBEIR
from vretrver_hf.data.trec import write_run
from vretrver_hf.retrieval import Index, embed


POOL_ARTIST, QUERY_ARTIST = "noto", "twemoji"
TASKS = {"emoji_task0": ("text", 0), "emoji_task4": ("image", 4)}
"""Name of a task to what its queries are and M-BEIR's number."""
DATASET = 99
SEED = 1
MOST_RELEVANT = 5
"""A query that is right for more of the pool says too little to be asked."""


def main(
    data: Annotated[Path, typer.Option(help="Folder that build_data.py filled.")] = Path("recipes/emoji/data"),
    out: Annotated[Path, typer.Option(help="Where M-BEIR's files and the runs go.")] = Path("outputs/emoji-retrieval"),
    count: Annotated[int, typer.Option(help="Most queries of a task.")] = 500,
    k: Annotated[int, typer.Option(help="Coarse results of a query.")] = 50,
    steps: Annotated[int, typer.Option(help="Batches that the embedder is trained on.")] = 400,
) -> None:
    """Write the pool, its queries and judgements, train the embedder, and retrieve."""
    art, concepts = Art.load(data), load_concepts(data)
    write_files(out, art, concepts, count)
    model = embedder.train(art, concepts, steps)
    mbeir = MBEIR(out)
    for task, (_, number) in TASKS.items():
        pool, queries = mbeir.pool(task), mbeir.queries(task)
        vectors = embed(out / "vectors" / f"pool-{steps}", model, pool.slice, len(pool), "candidate")
        asked = model.encode([query.item for query in queries], "query")
        hits = Index(list(pool.ids()), vectors).search(asked, k)
        write_run(out / f"{task}.trec", zip(queries.query_ids, hits, strict=True), "coarse", number)
        typer.echo(f"{out / f'{task}.trec'}: {len(queries)} queries, {len(pool)} candidates")


def write_files(out: Path, art: Art, concepts: dict[str, Concept], count: int) -> None:
    """Everything that one artist drew as a pool, and held-out combinations as queries, in M-BEIR's files."""
    drawn = [code for code in art.codes[POOL_ARTIST] if code in concepts]
    dids = {code: f"{DATASET}:{row}" for row, code in enumerate(drawn)}
    pool = [
        {"did": dids[c], "txt": None, "img_path": _picture(out, art, POOL_ARTIST, c), "modality": "image"}
        for c in drawn
    ]
    wanted = sorted(split_codes(concepts, "test_combination").intersection(drawn))
    random.Random(SEED).shuffle(wanted)
    right = {code: relevant(art, concepts, code, drawn) for code in wanted}
    wanted = [code for code in wanted if len(right[code]) <= MOST_RELEVANT]
    for task, (modality, number) in TASKS.items():
        codes = [c for c in wanted if modality == "text" or art.has(QUERY_ARTIST, c)][:count]
        rows, lines = [], []
        for code in codes:
            qid = f"{DATASET}:{number}{len(rows):05d}"
            image = None if modality == "text" else _picture(out, art, QUERY_ARTIST, code)
            text = concepts[code].name if modality == "text" else None
            rows.append({"qid": qid, "query_txt": text, "query_img_path": image, "query_modality": modality})
            lines += [f"{qid} 0 {dids[other]} 1 {number}\n" for other in right[code]]
        _write_rows(out / f"query/test/mbeir_{task}_test.jsonl", rows)
        _write_rows(out / f"cand_pool/local/mbeir_{task}_cand_pool.jsonl", pool)
        path = out / f"qrels/test/mbeir_{task}_test_qrels.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")


def relevant(art: Art, concepts: dict[str, Concept], code: str, drawn: Iterable[str]) -> list[str]:
    """What is right for a concept: its own picture, its twins, and variants that do not contradict it."""
    concept, twins = concepts[code], art.twins(POOL_ARTIST, code)

    def fits(other: str) -> bool:
        return concepts[other].base == concept.base and not contradicts(concept, concepts[other])

    return [other for other in drawn if other == code or other in twins or fits(other)]


def _picture(out: Path, art: Art, artist: str, code: str) -> str:
    name = f"images/{artist}/{code}.webp"
    if not (out / name).exists():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(art.image(artist, code)).save(out / name, lossless=True, method=1)
    return name


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
