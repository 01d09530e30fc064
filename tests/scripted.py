"""A real model that says what a test wrote down; everything around the words is real."""

from __future__ import annotations

import torch

from vretrver_hf.engines import scripted
from vretrver_hf.engines.scripted import Script, turn_ids
from vretrver_hf.engines.transformers import TransformersEngine


class ScriptedEngine(scripted.ScriptedEngine):
    """Counts how many conversations were open at the same time."""

    most_open = 0

    def open(self, query_id="", sample=0):
        session = super().open(query_id, sample)
        self.most_open = max(self.most_open, len(self._open))
        return session


class ForcedEngine(TransformersEngine):
    """Runs a real model and makes it say the script, so its cache and log-probabilities are those of real turns."""

    def __init__(self, model, processor, script: Script, **kwargs):
        super().__init__(model, processor, **kwargs)
        self.script = script
        self._said: dict[tuple[type, str], list[int]] = {}

    def _draw(self, sessions, steps):
        said = torch.full((len(sessions), steps), self.encoder.end_of_turn)
        for row, session in zip(said, sessions, strict=True):
            ids = self._ids(self.script(session.query_id, session.turn - 1))[len(session.sampled) :][:steps]
            row[: len(ids)] = torch.tensor(ids)  # a block may be longer than what is left
        said = said.to(self.model.device)

        def draw(logits, step):
            chosen = said[:, step]
            return chosen, logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]

        return draw

    def _ids(self, text: str) -> list[int]:
        key = type(text), text  # a turn that was cut off equals one that was not
        if key not in self._said:
            self._said[key] = turn_ids(self.encoder, text)
        return self._said[key]
