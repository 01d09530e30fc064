"""Evaluation sets in the released schema, with the rows that break hasty readers, and a ranker that reads prompts."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
from scripted import ScriptedEngine

from vretrver_hf.protocol import format_answer, format_turn, get_preset


PRESET = get_preset("foveated", overview_pixels=64 * 64, inspect_pixels=64 * 64)


def released_row(
    number: int, hits: int = 50, positive: int | None = None, source: str = "mbeir_cirr_task7_test"
) -> dict:
    """
    Query `q<number>` with text candidates that say how good they are, the best last.

    The prompt shows the first 20 at most, among them a text with the prompt's own words. The relevant one is the
    best of the hits, or the one at `positive`; beyond the hits it is not among them.
    """
    texts = [f"Candidates:(1) <image> worth {place}" for place in range(hits)]
    right = hits - 1 if positive is None else positive
    shown = texts[:19] + [texts[right] if right < hits else "elsewhere"]
    listed = "".join(f"({place}) {text}\n" for place, text in enumerate(shown, 1))
    return {
        "data_source": source,
        "prompt": [
            {"role": "user", "content": f"Query: Candidates: q{number}\nCandidates:\n{listed}\nGuidelines: rank."}
        ],
        "images": [],
        "ability": "rerank",
        "reward_model": {"style": "rule", "ground_truth": str(len(shown))},
        "extra_info": {
            "qid": f"q{number}",
            "ground_truth_position": len(shown),
            "num_candidates": len(shown),
            "query_image": "",
            "query_text": f"Candidates: q{number}",
            "candidate_images": [""] * len(shown),
            "candidate_texts": shown,
        },
        "hit": [{"candidate_images": "", "candidate_texts": text} for text in texts],
    }


def write_rows(path: Path, rows: list[dict]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


class BestFirst(ScriptedEngine):
    """Reads what each candidate is worth and answers with the best first; keeps the prompts it has read."""

    def __init__(self, encoder, **kwargs):
        super().__init__(encoder, self.answer, **kwargs)
        self.read: dict[str, list[str]] = {}

    def submit(self, session, encoded, sampling):
        self.read.setdefault(session.query_id, []).append(encoded.text)
        super().submit(session, encoded, sampling)

    def answer(self, query_id: str, turn: int) -> str:
        worth = [
            int(value) for value in re.findall(r"^\(\d+\) .*?worth (\d+)$", self.read[query_id][-1], re.MULTILINE)
        ]
        return format_turn("by worth", format_answer(sorted(range(len(worth)), key=lambda i: -worth[i])))
