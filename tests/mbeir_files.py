"""A small M-BEIR on the disk, with all eight kinds of tasks and the rows that break hasty readers."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


KINDS = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
"""Number of a task to what its query and its candidates are."""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_mbeir(folder: Path, names: dict[int, str] | None = None, queries: int = 4, candidates: int = 30) -> Path:
    """
    Query q of a task has the candidate q as its relevant one, and the last candidate too where q is 0. Words that
    prompts use stand inside texts.
    """
    names = names or {number: f"set{number}" for number in KINDS}
    tsv = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3"]
    for number, name in names.items():
        task, (asked, given) = f"{name}_task{number}", KINDS[number]
        tsv.append(f"{asked}\t{given}\t{name}\t{number}\tFind it.\tSearch for {name}.\t")
        pool = [_candidate(folder, number, place, given) for place in range(candidates)]
        suffix = "_test" if name == "mscoco" else ""
        write_jsonl(folder / f"cand_pool/local/mbeir_{task}{suffix}_cand_pool.jsonl", pool)
        rows = [_query(folder, number, place, asked) for place in range(queries)]
        write_jsonl(folder / f"query/test/mbeir_{task}_test.jsonl", rows)
        lines = [f"{number}:{q} 0 {number}:{10**6 + q} 1 {number}\n" for q in range(queries)]
        lines.append(f"{number}:0 0 {number}:{10**6 + candidates - 1} 1 {number}\n")
        lines.append(f"{number}:0 0 {number}:{10**6 + 1} 0 {number}\n")  # judged, and not relevant
        path = folder / f"qrels/test/mbeir_{task}_test_qrels.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    (folder / "instructions").mkdir(exist_ok=True)
    (folder / "instructions" / "query_instructions.tsv").write_text("\n".join(tsv) + "\n")
    union = [json.loads(line) for path in sorted(folder.glob("cand_pool/local/*.jsonl")) for line in path.open()]
    write_jsonl(folder / "cand_pool/global/mbeir_union_test_cand_pool.jsonl", union)
    return folder


def _candidate(folder: Path, number: int, place: int, modality: str) -> dict:
    return {
        "did": f"{number}:{10**6 + place}",
        "txt": f"Candidates: {place} of {number}" if "text" in modality else None,
        "img_path": _picture(folder, number, place) if "image" in modality else None,
        "modality": modality,
        "src_content": None,
    }


def _query(folder: Path, number: int, place: int, modality: str) -> dict:
    return {
        "qid": f"{number}:{place}",
        "query_txt": f"query {place}" if "text" in modality else None,
        "query_img_path": _picture(folder, number, place) if "image" in modality else None,
        "query_modality": modality,
        "query_src_content": None,
        "pos_cand_list": [f"{number}:{10**6 + place}"],
        "neg_cand_list": [],
        "task_id": number,
    }


def _picture(folder: Path, number: int, place: int) -> str:
    name = f"mbeir_images/{number}/{place}.png"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (8 * place, 30 * number % 256, 99)).save(path)
    return name
