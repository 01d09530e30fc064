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

    def _sample(self, sessions, logits):
        forced = torch.zeros_like(logits)
        for row, session in enumerate(sessions):
            ids = turn_ids(self.encoder, self.script(session.query_id, session.turn - 1))
            forced[row, ids[len(session.sampled)]] = 1e4
        real = logits.float().log_softmax(-1)
        results = super()._sample(sessions, forced)
        for row, session in enumerate(sessions):
            session.logprobs[-1] = real[row, session.sampled[-1]].item()
        return results
