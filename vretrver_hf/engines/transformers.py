"""Runs a transformers model: rows join and leave the batch as they come and go, and each keeps its keys and values."""

from __future__ import annotations

import collections
import contextlib
import inspect
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .. import chat_templates, hub
from ..encoding import Encoded, Encoder
from ..vision import PictureFeatures, picture_grid, rope_index
from ._attention import without_cudnn_attention
from ._graphs import DecodeGraphs
from ._slot_cache import SlotCache
from .base import Engine, Sampling, Session, TurnResult


_WRITERS_PER_READER = 16
"""A pass over a few new turns takes about as long as one over many, and all who write wait for it: of 512 rows, with
turns of thirty tokens, some end theirs at every token."""
_BLOCK_TOKENS = 4
"""Tokens that rows write on an accelerator until the host looks at them. Waiting for each costs more than the few that
are written in vain behind the end of a turn."""


class TransformersEngine(Engine):
    """
    Engine for Qwen2.5-VL and Qwen3-VL models in transformers.

    Every conversation owns one row of the key-value cache from its first turn to its last; a later turn prefills only
    what is new. Rows of different lengths decode together. A row that ends makes room for one that waits.

    Args:
        model (`PreTrainedModel`):
            The model, on its device and in its data type.
        processor (`ProcessorMixin`):
            Its processor.
        max_sessions (`int`, *optional*, defaults to 16):
            Most conversations in the batch; others wait. Memory for keys and values grows with it.
        prefill_tokens (`int`, *optional*, defaults to 8192):
            Most tokens, padding included, of one prefill batch. A longer single conversation is prefilled alone.
        feature_bytes (`int`, *optional*, defaults to 1 GiB):
            Most memory for what the vision tower made of pictures; see [`~vision.PictureFeatures`]. A picture that
            returns in a later turn, window or query does not pass the tower again. Where the weights change, make a
            new engine.

    Example:

    ```python
    >>> from vretrver_hf.engines.transformers import TransformersEngine

    >>> name = "V-Retrver/V-Retrver-7B"
    >>> engine = TransformersEngine.from_pretrained(name, dtype="bfloat16", device="cuda")  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        max_sessions: int = 16,
        prefill_tokens: int = 8192,
        feature_bytes: int = 2**30,
    ):
        if max_sessions < 1:
            raise ValueError(f"max_sessions must be positive, got {max_sessions}")
        self.model = model.eval()
        self.encoder = Encoder(processor, model.config.model_type)
        self.max_sessions = max_sessions
        self.prefill_tokens = prefill_tokens
        self.place = str(model.device)
        self.features = PictureFeatures(model.model.visual, self.encoder.processor.image_processor, feature_bytes)
        self.max_length = model.config.get_text_config().max_position_embeddings
        self._cache = SlotCache(model.config.get_text_config().num_hidden_layers, model.device)
        # The argument's name in newer releases of transformers than the one that vLLM asks for.
        known = inspect.signature(model.model.forward).parameters
        self._kept = {"cache" if "cache" in known else "past_key_values": self._cache, "use_cache": True}
        self._rows: list[_Session] = []  # row i of the cache belongs to _rows[i]
        self._waiting: collections.deque[_Session] = collections.deque()
        self._done: dict[Session, TurnResult] = {}
        self._block_tokens = 1 if model.device.type == "cpu" else _BLOCK_TOKENS
        sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
        self._pass = self._one_token_a_row
        if model.device.type == "cuda" and sdpa:
            self._pass = DecodeGraphs(self._one_token_a_row, self._cache, max_sessions)
        self._flash = "flash" in (model.config.get_text_config()._attn_implementation or "")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str = "sdpa",
        adapter: str | Path | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TransformersEngine:
        """
        Loads model and processor from the hub or a folder.

        Args:
            name (`str` or `Path`):
                Hub id or folder.
            revision (`str`, *optional*):
                Branch, tag or commit on the hub.
            subfolder (`str`, *optional*, defaults to `""`):
                Folder inside the repository.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                `"bfloat16"`, `"float32"`, …; `"auto"` takes the checkpoint's, and float32 on a CPU.
            device (`str` or `torch.device`, *optional*):
                Where to run; a GPU where there is one.
            attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
                `"sdpa"`, `"eager"` or `"flash_attention_2"`.
            adapter (`str` or `Path`, *optional*):
                Hub id or folder of LoRA weights, which are merged into the model. Needs peft.
            adapter_kwargs (`dict`, *optional*):
                `revision` and `subfolder` of the adapter.
            kwargs:
                Settings of the engine, see the class.

        Raises:
            `ValueError`: for a model family that has no chat template here.
        """
        source: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "trust_remote_code": False}
        model_type = AutoConfig.from_pretrained(name, **source).model_type
        if model_type not in chat_templates.families():
            raise ValueError(f"{name} is a {model_type!r} model; supported are {chat_templates.families()}")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"
        # The image processor resizes nothing here, so the quick torchvision one gives the same pixels as any other.
        processor = AutoProcessor.from_pretrained(name, **source)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True, **source
        )
        if adapter is not None:
            model = _merged(model, adapter, adapter_kwargs or {})
        return cls(model.to(device), processor, **kwargs)

    def open(self, query_id: str = "", sample: int = 0) -> _Session:
        return _Session(query_id, sample)

    def submit(self, session: _Session, encoded: Encoded, sampling: Sampling) -> None:
        if session.pending is not None or session.decoding:
            raise RuntimeError("this conversation already waits for a turn")
        if session.num_tokens + len(encoded.token_ids) + 1 > self.max_length:
            raise ValueError(
                f"the conversation would have {session.num_tokens + len(encoded.token_ids)} tokens but the model "
                f"reads at most {self.max_length}; show fewer candidates or lower the pixel budgets"
            )
        session.pending = encoded
        session.sampling = sampling
        session.started = time.perf_counter()
        session.random = session.generator(sampling.seed)
        session.turn += 1
        session.sampled, session.logprobs = [], []
        self._waiting.append(session)

    @torch.no_grad()
    def poll(self, sessions: Collection[Session]) -> list[TurnResult]:
        while True:
            asked = [session for session in sessions if session in self._done]
            if asked:
                return [self._done.pop(session) for session in asked]
            if self.on_token is not None:
                self.on_token()
            with self._running():
                results = self._prefill() if self._prefill_is_due() else []
                if not results:
                    if not any(session.decoding for session in self._rows):
                        return []
                    results = self._decode()
            self._done |= {result.session: result for result in results}

    def close(self, session: _Session) -> None:
        if session in self._waiting:
            self._waiting.remove(session)
        self._done.pop(session, None)
        session.pending = None
        session.decoding = False
        if session.row is None:
            return
        # The last row moves into the gap, so that the rows in use stay together and a decode step needs no gather.
        last = self._rows.pop()
        gap, session.row = session.row, None
        if last is not session:
            self._rows[gap] = last
            source, last.row = last.row, gap
        # A device that has failed fails at everything from then on, and what failed first is what people must see.
        with contextlib.suppress(torch.AcceleratorError):
            if last is not session:
                self._cache.move(source, gap)
            self._cache.clear(len(self._rows))

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """What the model runs in; where memory runs out, the error also says what to lower."""
        try:
            with without_cudnn_attention(self.model):
                yield
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"lower max_sessions ({self.max_sessions} now; keys and values of as many conversations) or "
                f"prefill_tokens ({self.prefill_tokens} now; tokens read at a time)"
            )
            raise

    def _prefill_is_due(self) -> bool:
        """Whether so many turns wait that those who write should. One may wait for ever only while others write."""
        room = self.max_sessions - len(self._rows)
        fresh = sum(session.row is None for session in self._waiting)
        ready = len(self._waiting) - max(fresh - room, 0)
        return ready * _WRITERS_PER_READER >= sum(session.decoding for session in self._rows)

    def _prefill(self) -> list[TurnResult]:
        """Brings in waiting turns, as many at a time as fit, and samples each one's first token."""
        results: list[TurnResult] = []
        self._cache.reserve(*self._room())
        while batch := self._next_batch():
            logits = self._forward_prefill(batch)
            for session in batch:
                session.decoding = True
            tokens, logprobs = self._draw(batch, 1)(logits, 0)
            results += self._note(batch, tokens[:, None], logprobs[:, None])
        return results

    def _room(self) -> tuple[int, int]:
        """Rows and columns of the cache that are in use once all waiting turns are in, as far as rows are free."""
        fresh = sum(session.row is None for session in self._waiting)
        lengths = [session.num_tokens + len(session.pending.token_ids) for session in self._waiting]
        rows, columns = min(len(self._rows) + fresh, self.max_sessions), max(lengths, default=0)
        # Recorded passes fill up both, and would let the memory grow a second time.
        return self._pass.size(rows, columns) if isinstance(self._pass, DecodeGraphs) else (rows, columns)

    def _next_batch(self) -> list[_Session]:
        batch: list[_Session] = []
        longest = 0
        for session in list(self._waiting):
            if session.row is None and len(self._rows) == self.max_sessions:
                continue
            longest = max(longest, len(session.pending.token_ids) + len(session.unread))
            full = longest * (len(batch) + 1) > self.prefill_tokens
            if batch and (full or self._flash or (session.num_tokens > 0) != (batch[0].num_tokens > 0)):
                break
            if session.row is None:
                session.row = len(self._rows)
                self._rows.append(session)
            self._waiting.remove(session)
            batch.append(session)
        return batch

    def _forward_prefill(self, batch: list[_Session]) -> torch.Tensor:
        """Logits (rows × vocabulary) behind each row's last new token."""
        device = self.model.device
        ids = [session.unread + session.pending.token_ids for session in batch]
        past = [session.num_tokens - len(session.unread) for session in batch]
        width = max(map(len, ids))
        input_ids = torch.full((len(batch), width), self.encoder.end_of_turn)
        position_ids = torch.zeros(3, len(batch), width, dtype=torch.long)
        images = [image for session in batch for image in session.pending.images]
        for i, session in enumerate(batch):
            count = len(ids[i])
            input_ids[i, :count] = torch.tensor(ids[i])
            positions = self._rope_positions(input_ids[i : i + 1, :count], session.pending.images)
            positions += session.next_position
            position_ids[:, i, :count] = positions
            session.next_position = int(positions.max()) + 1
            session.num_tokens = past[i] + count
            session.unread, session.pending = [], None
        starts = torch.tensor(past, device=device)
        columns = starts[:, None] + torch.arange(width, device=device)
        rows = torch.tensor([session.row for session in batch], device=device)
        length = max(past) + width
        fresh = max(past) == 0
        self._cache.plan(rows, columns, length, fresh=fresh)
        mask = None if fresh or self._flash else self._mask(columns, length)
        with self.features.shown(images) as vision:
            hidden = self.model.model(
                input_ids=input_ids.to(device),
                mm_token_type_ids=(input_ids == self.encoder.image_pad).int().to(device),
                position_ids=position_ids.to(device),
                attention_mask=mask,
                **self._kept,
                **{name: value.to(device) for name, value in vision.items()},
            ).last_hidden_state
        ends = torch.tensor([len(row) - 1 for row in ids], device=device)
        return self.model.lm_head(hidden[torch.arange(len(batch), device=device), ends])

    def _decode(self) -> list[TurnResult]:
        """
        Some tokens for every row that is writing; the others in the batch carry tokens that are never read.

        On an accelerator the host looks only at the end of a block what was written. What a row wrote behind its end
        is left out; it stands in columns that the next turn overwrites.
        """
        writing = [session for session in self._rows if session.decoding]
        steps = self._block(writing)
        tokens, logprobs = self._write(writing, steps)
        return self._note(writing, tokens, logprobs)

    def _block(self, writing: list[_Session]) -> int:
        """Tokens until the host looks again: no more than anybody may still write or the context holds."""
        may_write = max(session.sampling.max_turn_tokens - len(session.sampled) for session in writing)
        room = min(self.max_length - session.num_tokens - 1 for session in writing)
        return max(1, min(self._block_tokens, may_write, room))

    def _write(self, writing: list[_Session], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities (writers × steps), without waiting for the device in between."""
        device = self.model.device
        tokens = torch.tensor([s.sampled[-1] if s.decoding else 0 for s in self._rows], device=device)
        columns = torch.tensor([session.num_tokens for session in self._rows], device=device)
        positions = torch.tensor([session.next_position for session in self._rows], device=device)
        moves = torch.tensor([int(session.decoding) for session in self._rows], device=device)
        rows = torch.tensor([session.row for session in writing], device=device)
        length = max(session.num_tokens for session in self._rows)
        draw = self._draw(writing, steps)
        written = []
        for step in range(steps):
            hidden = self._pass(tokens, columns, positions, length + 1 + step)
            written.append(draw(self.model.lm_head(hidden[rows]), step))
            tokens = tokens.index_copy(0, rows, written[-1][0])
            columns, positions = columns + moves, positions + moves
        chosen, logprobs = zip(*written, strict=True)
        return torch.stack(chosen, 1), torch.stack(logprobs, 1)

    def _one_token_a_row(
        self, tokens: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor, length: int
    ) -> torch.Tensor:
        """What the model makes of one token a row (rows × width)."""
        columns = columns[:, None]
        self._cache.plan(None, columns, length)
        return self.model.model(
            input_ids=tokens[:, None],
            position_ids=positions[None, :, None].expand(3, -1, 1),
            attention_mask=self._mask(columns, length),
            **self._kept,
        ).last_hidden_state[:, -1]

    def _draw(self, sessions: list[_Session], steps: int) -> _Draw:
        """Who draws the next tokens of these conversations."""
        return _Draw(sessions, steps, self.encoder.suppressed_ids, self.model.device)

    def _note(self, sessions: list[_Session], tokens: torch.Tensor, logprobs: torch.Tensor) -> list[TurnResult]:
        """Writes down what each row wrote, up to where its turn ended, and returns the turns that did."""
        results = []
        for session, row, values in zip(sessions, tokens.tolist(), logprobs.tolist(), strict=True):
            for token, logprob in zip(row, values, strict=True):
                if session.sampled:  # the one before has been read
                    session.num_tokens += 1
                    session.next_position += 1
                session.sampled.append(token)
                session.logprobs.append(logprob)
                if (result := self._finished(session)) is not None:
                    results.append(result)
                    break
            session.unread = [session.sampled[-1]]
        return results

    def _finished(self, session: _Session) -> TurnResult | None:
        token = session.sampled[-1]
        full = session.num_tokens + 2 > self.max_length
        if token == self.encoder.end_of_call:
            stop = "call"
        elif token in self.encoder.stop_ids:
            stop = "end"
        elif len(session.sampled) >= session.sampling.max_turn_tokens or full:
            stop = "length"
        else:
            return None
        session.decoding = False
        # The last token has been sampled but not read: the next turn's prefill reads it first.
        session.num_tokens += 1
        return TurnResult(session, session.sampled, session.logprobs, stop, time.perf_counter() - session.started)

    def _rope_positions(self, input_ids: torch.Tensor, images: list[Any]) -> torch.Tensor:
        """Rotary positions (3 × tokens) of a piece of conversation, from 0; they add up, so pieces concatenate."""
        grid = picture_grid(images, self.encoder.processor.image_processor) if images else None
        merge_size = self.model.config.vision_config.spatial_merge_size
        return rope_index(input_ids == self.encoder.image_pad, grid, merge_size)[0][:, 0]

    def _mask(self, columns: torch.Tensor, length: int) -> torch.Tensor:
        """What each new token may attend to: everything of its own row up to itself."""
        allowed = torch.arange(length, device=columns.device) <= columns[..., None]
        if self._flash:
            return allowed[:, -1].int()
        if self.model.config.get_text_config()._attn_implementation == "eager":
            blocked = torch.finfo(self.model.dtype).min
            return torch.where(allowed, 0.0, blocked).to(self.model.dtype)[:, None]
        return allowed[:, None]


def _merged(model: PreTrainedModel, adapter: str | Path, place: dict[str, Any]) -> PreTrainedModel:
    from peft import PeftModel

    # From the cache's folder: by a hub id, peft would also take pickled weights, and offline not find a subfolder's.
    hub.fetch(adapter, "adapter_config.json", **place)
    folder = hub.fetch(adapter, "adapter_model.safetensors", **place).parent
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


class _Session(Session):
    def __init__(self, query_id: str, sample: int):
        super().__init__(query_id, sample)
        self.row: int | None = None
        self.next_position = 0
        self.pending: Encoded | None = None
        self.unread: list[int] = []
        self.decoding = False
        self.sampling = Sampling()
        self.random = Random()
        self.started = 0.0
        self.sampled: list[int] = []
        self.logprobs: list[float] = []


class _Draw:
    """
    Draws the tokens of a block: each row from its own source, by inverting the cumulated distribution.

    Args:
        sessions (`list[_Session]`):
            Whose tokens they are.
        steps (`int`):
            Tokens of each.
        suppressed (`list[int]`):
            Tokens that are never drawn.
        device (`torch.device`):
            Where the logits are.
    """

    def __init__(self, sessions: list[_Session], steps: int, suppressed: list[int], device: torch.device):
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        groups: dict[Sampling, list[int]] = collections.defaultdict(list)
        for i, session in enumerate(sessions):
            groups[session.sampling].append(i)
        self._groups = []
        for sampling, members in groups.items():
            rows, chances = torch.tensor(members, device=device), None
            if sampling.temperature:
                # A source is the turn's own, so that what is drawn behind the turn's end is missed by nobody.
                drawn = [[sessions[i].random.random() for _ in range(steps)] for i in members]
                chances = torch.tensor(drawn, dtype=torch.double, device=device)
            self._groups.append((sampling, rows, chances))

    def __call__(self, logits: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probabilities, one a row, given logits (rows × vocabulary)."""
        logits = logits.float().index_fill_(1, self._suppressed, -torch.inf)
        if len(self._groups) == 1:
            ((sampling, _, chances),) = self._groups
            return _choose(logits, sampling, chances, step)
        chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        logprobs = torch.empty(len(logits), device=logits.device)
        for sampling, rows, chances in self._groups:
            chosen[rows], logprobs[rows] = _choose(logits[rows], sampling, chances, step)
        return chosen, logprobs


def _choose(
    logits: torch.Tensor, sampling: Sampling, chances: torch.Tensor | None, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if chances is None:
        chosen = logits.argmax(-1)
        return chosen, _logprob(logits, chosen)
    scaled = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    cumulated = warpers(None, scaled.clone()).double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulated, chances[:, step : step + 1] * cumulated[:, -1:], right=True)[:, 0]
    chosen = chosen.clamp(max=logits.shape[-1] - 1)
    return chosen, _logprob(scaled, chosen)


def _logprob(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


__all__ = ["TransformersEngine"]
