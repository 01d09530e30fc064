"""How often a model's first choice is right when it has to answer at once: a look between the stages of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from cases import Case
from model import embed, hidden_states
from rows import Row
from stages import Source
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration


@torch.no_grad()
def choice_share(
    model: Qwen2_5_VLForConditionalGeneration, table: Tensor, source: Source, cases: Sequence[Case]
) -> float:
    """
    Share of cases in which the most probable first number of the answer is the best candidate's.

    Args:
        model (`Qwen2_5_VLForConditionalGeneration`):
            The model.
        table (`Tensor`):
            All stored pictures.
        source (`Source`):
            Makes the rows.
        cases (sequence of `Case`):
            At most nine candidates each, so that every number is one token.
    """
    opening = source.rows.encode("<answer>[")
    digits = torch.tensor([source.rows.tokenizer.token_to_id(str(n)) for n in range(1, 10)], device=table.device)
    rows, marks = [], []
    for case in cases:
        row = source.open_row(case, tools=False)
        ids = np.concatenate([row.ids, opening]).astype(np.int32)
        rows.append(Row(ids, np.zeros(len(ids), np.float32), row.pictures))
        marks.append([len(ids) - 1, case.order[0], len(case.candidates)])
    right = 0
    for part in source.parts(rows, marks):
        batch = part.to(table.device)
        with torch.autocast(table.device.type, dtype=torch.bfloat16, enabled=table.is_cuda):
            hidden = hidden_states(model, embed(model, batch, table), batch.positions)
            place, best, count = batch.marks.unbind(1)
            scores = model.lm_head(hidden[torch.arange(len(place)), place])[:, digits].float()
        beyond = torch.arange(9, device=scores.device)[None] >= count[:, None]
        right += (scores.masked_fill(beyond, -math.inf).argmax(1) == best).sum().item()
    return right / len(cases)
