"""Quick greedy play of many cases at once, to see how training goes; the package's reranker gives the real figures.

Each new token runs the whole conversation through the model again: no cache, so nothing to get wrong, and on an
accelerator fast enough for a model this small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from cases import Case
from model import embed, hidden_states
from preset import MAX_TURN_TOKENS, PRESET
from rows import Picture, Row
from stages import Source
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from vretrver_hf.parsing import parse_ranking, parse_turn
from vretrver_hf.protocol import last_word, malformed_observation


@dataclasses.dataclass
class Outcome:
    """How one case went: the order (0-based), the answer's status, the calls and how many of them were valid."""

    order: list[int]
    status: str
    calls: int = 0
    valid_calls: int = 0
    text: str = ""


class Player:
    """
    Plays cases with a model, greedily.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`):
            The model.
        table (`Tensor`):
            All stored pictures.
        source (`Source`):
            Makes the rows.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, table: Tensor, source: Source):
        self.model, self.table, self.source = model, table, source
        self.maker = source.rows

    @torch.no_grad()
    def choices(self, cases: Sequence[Case]) -> float:
        """Share of cases in which the first number is right, where the model has to answer at once."""
        opening = self.maker.encode("<answer>[")
        numbers = [self.maker.tokenizer.token_to_id(digit) for digit in "123456789"]
        digits = torch.tensor(numbers, device=self.table.device)
        rows, marks = [], []
        for case in cases:
            row = self.source.open_row(case, tools=False)
            ids = np.concatenate([row.ids, opening]).astype(np.int32)
            rows.append(Row(ids, np.zeros(len(ids), np.float32), row.pictures))
            marks.append([len(ids) - 1, case.order[0], len(case.candidates)])
        right = 0
        for part in self.source.parts(rows, marks):
            batch = part.to(self.table.device)
            with self._autocast():
                hidden = hidden_states(self.model, embed(self.model, batch, self.table), batch.positions)
                place, best, count = batch.marks.unbind(1)
                scores = self.model.lm_head(hidden[torch.arange(len(place), device=place.device), place])[
                    :, digits
                ].float()
            beyond = torch.arange(9, device=scores.device)[None] >= count[:, None]
            right += (scores.masked_fill(beyond, -math.inf).argmax(1) == best).sum().item()
        return right / len(cases)

    def play(self, cases: Sequence[Case]) -> list[Outcome]:
        """Plays whole conversations, tools included."""
        rows = [self.source.open_row(case, tools=True) for case in cases]
        tools = [case.tools() for case in cases]
        outcomes = [Outcome(list(range(len(case.candidates))), "fallback") for case in cases]
        left = [PRESET.max_calls] * len(cases)
        active = list(range(len(cases)))
        for _ in range(PRESET.max_calls + 2):
            turns = self._write([rows[i] for i in active])
            going_on = []
            for i, written in zip(active, turns, strict=True):
                text = self.maker.tokenizer.decode(written, skip_special_tokens=False).removesuffix("<|im_end|>")
                outcomes[i].text += text + "\n"
                parsed = parse_turn(text)
                if parsed.kind == "answer" or left[i] < 0:
                    ranking = parse_ranking(text, len(cases[i].candidates))
                    outcomes[i].order, outcomes[i].status = ranking.order, ranking.status
                    continue
                shown: list[Picture] = []
                if left[i] == 0:
                    reply = last_word(len(cases[i].candidates))
                elif parsed.call is None:
                    reply = malformed_observation(parsed.problem)
                else:
                    observation = tools[i].call(parsed.call.name, parsed.call.arguments)
                    reply = observation.text
                    shown = [cases[i].sides[ref.index].view.shown(ref) for ref in observation.refs]
                    outcomes[i].calls += 1
                    outcomes[i].valid_calls += observation.valid
                left[i] -= 1
                rows[i] = self.maker.extend(rows[i], written, reply, shown)
                going_on.append(i)
            active = going_on
            if not active:
                break
        return outcomes

    @torch.no_grad()
    def _write(self, rows: Sequence[Row]) -> list[list[int]]:
        """The model's next turn in each conversation."""
        written: list[list[int]] = [[] for _ in rows]
        lengths = [[place, len(row.ids)] for place, row in enumerate(rows)]
        for part in self.source.parts(rows, lengths):
            batch = part.to(self.table.device)
            with self._autocast():
                for place, tokens in zip(batch.marks[:, 0].tolist(), self._continue(batch), strict=True):
                    written[place] = tokens
        return written

    def _continue(self, batch) -> list[list[int]]:
        length = batch.marks[:, 1].clone()
        count, device = len(length), length.device
        every = torch.arange(count, device=device)
        room = (0, 0, 0, MAX_TURN_TOKENS)
        embeds = torch.nn.functional.pad(embed(self.model, batch, self.table), room)
        positions = torch.nn.functional.pad(batch.positions, room[2:])
        stops = torch.tensor(self.maker.stop_ids, device=device)
        tokens = torch.full((count, MAX_TURN_TOKENS), self.maker.end_of_turn, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        longest = int(length.max())
        for step in range(MAX_TURN_TOKENS):
            now = longest + step
            hidden = hidden_states(self.model, embeds[:, :now], positions[:, :, :now])
            logits = self.model.lm_head(hidden[every, length - 1])
            logits[:, self.maker.image_pad] = -math.inf
            new = logits.argmax(1)
            tokens[:, step] = torch.where(done, tokens[:, step], new)
            done |= torch.isin(new, stops)
            if done.all():
                break
            embeds[every, length] = self.model.get_input_embeddings()(new).to(embeds.dtype)
            positions[:, every, length] = positions[:, every, length - 1] + 1
            length += 1
        return [_until_stop(row, self.maker.stop_ids) for row in tokens.tolist()]

    def _autocast(self) -> torch.autocast:
        device = self.table.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return middle - half, middle + half


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens
