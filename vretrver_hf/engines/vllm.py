"""Runs a model in vLLM, in this process: tokens in and out, prefixes and pictures cached by vLLM."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import chat_templates
from ..encoding import Encoded, Encoder, collapse_pads
from ..images import picture_id
from .base import Engine, EngineError, Sampling, Session, TurnResult


if TYPE_CHECKING:
    from PIL import Image

_SUPPRESSED = -100.0
"""The least bias that vLLM takes."""


class VLLMEngine(Engine):
    """
    Engine for Qwen2.5-VL and Qwen3-VL models in vLLM.

    Each turn sends the whole conversation as token ids. vLLM keeps the keys and values of what it has read (prefix
    caching) and what it made of each picture (told apart by its pixels), so a later turn computes only what is new,
    and a picture that returns in another turn, window or query costs nothing. Conversations join and leave vLLM's
    batch token by token.

    Args:
        llm (`vllm.LLM`):
            vLLM with the model. Its processor must not resize pictures: `mm_processor_kwargs={"do_resize": False}`.
        processor (`ProcessorMixin`):
            The model's processor.
        family (`str`):
            `config.model_type` of the model.
        max_sessions (`int`, *optional*, defaults to 64):
            Most conversations at the same time.
        lora (`vllm.lora.request.LoRARequest`, *optional*):
            Adapter to run the model with.

    Example:

    ```python
    >>> from vretrver_hf import Reranker

    >>> name = "V-Retrver/V-Retrver-7B"
    >>> reranker = Reranker.from_pretrained(name, engine="vllm", tensor_parallel_size=2)  # doctest: +SKIP
    ```
    """

    def __init__(
        self, llm: Any, processor: Any, family: chat_templates.Family, max_sessions: int = 64, lora: Any = None
    ):
        if max_sessions < 1:
            raise ValueError(f"max_sessions must be positive, got {max_sessions}")
        self.llm = llm
        self.encoder = Encoder(processor, family)
        self.max_sessions = max_sessions
        self.max_length = llm.llm_engine.model_config.max_model_len
        self.place = f"vllm, {llm.llm_engine.vllm_config.device_config.device_type}"
        self._lora = lora
        self._requests: dict[str, _Session] = {}
        self._numbers = itertools.count()
        self._done: dict[Session, TurnResult] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        dtype: str = "auto",
        max_sessions: int = 64,
        max_images: int = 64,
        lora: str | Path | None = None,
        **kwargs: Any,
    ) -> VLLMEngine:
        """
        Loads a model from the hub or a folder.

        Args:
            name (`str` or `Path`):
                Hub id or folder.
            revision (`str`, *optional*):
                Branch, tag or commit on the hub.
            subfolder (`str`, *optional*, defaults to `""`):
                Must be empty: vLLM reads models from the top of a repository.
            dtype (`str`, *optional*, defaults to `"auto"`):
                `"bfloat16"`, `"float32"`, …; `"auto"` takes the checkpoint's, and half precision for a float32 one.
            max_sessions (`int`, *optional*, defaults to 64):
                Most conversations at the same time.
            max_images (`int`, *optional*, defaults to 64):
                Most pictures of one conversation.
            lora (`str` or `Path`, *optional*):
                Folder of a LoRA adapter to run the model with. Adapters of a higher rank than vLLM's default need
                `max_lora_rank`.
            kwargs:
                Passed to `vllm.LLM`: `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`,
                `quantization`, … These go before what the engine sets itself. More replicas than one are for
                `vllm serve --data-parallel-size`, and for engine `"openai"` to ask.

        Raises:
            `ValueError`: for a model family that has no chat template here, a subfolder, or several replicas.
        """
        if subfolder:
            raise ValueError(f"vLLM cannot load the subfolder {subfolder!r}; give the folder itself as the model")
        _check_replicas(name, kwargs)
        import vllm
        from transformers import AutoConfig, AutoProcessor

        source: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        family = AutoConfig.from_pretrained(name, **source).model_type
        if family not in chat_templates.families():
            raise ValueError(f"{name} is a {family!r} model; supported are {chat_templates.families()}")
        settings = {
            "max_num_seqs": max_sessions,
            "limit_mm_per_prompt": {"image": max_images, "video": 0},
            # Sizes were fitted to the budget before, so resizing could only disagree with the pads.
            "mm_processor_kwargs": {"do_resize": False},
            # Log-probabilities under the sampling temperature, control tokens left out, as the other engine's.
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "enable_lora": lora is not None,
        }
        llm = vllm.LLM(model=str(name), dtype=dtype, **source, **{**settings, **kwargs})
        processor = AutoProcessor.from_pretrained(name, **source)
        return cls(llm, processor, family, max_sessions, None if lora is None else _adapter(lora))

    def open(self, query_id: str = "", sample: int = 0) -> _Session:
        return _Session(query_id, sample)

    def submit(self, session: _Session, encoded: Encoded, sampling: Sampling) -> None:
        if session.request is not None:
            raise RuntimeError("this conversation already waits for a turn")
        if len(session.token_ids) + len(encoded.token_ids) + 1 > self.max_length:
            raise ValueError(
                f"the conversation would have {len(session.token_ids) + len(encoded.token_ids)} tokens but the model "
                f"reads at most {self.max_length}; show fewer candidates or lower the pixel budgets"
            )
        session.token_ids += encoded.token_ids
        session.images += encoded.images
        session.image_ids += [picture_id(image) for image in encoded.images]
        params = self._params(session, sampling)
        session.turn += 1
        session.started = time.perf_counter()
        session.request = str(next(self._numbers))
        try:
            self.llm.llm_engine.add_request(session.request, self._prompt(session), params, lora_request=self._lora)
        except Exception as error:  # what vLLM will not read costs this conversation, not the others
            session.request = None
            if self.is_lost(error):
                raise EngineError(self._complaint(session, error)) from error
            self._done[session] = TurnResult(session, [], None, "error", 0.0, error=self._complaint(session, error))
        else:
            self._requests[session.request] = session

    def poll(self, sessions: Collection[Session]) -> list[TurnResult]:
        while True:
            asked = [session for session in sessions if session in self._done]
            if asked:
                return [self._done.pop(session) for session in asked]
            if not self._requests:
                return []
            if self.on_token is not None:
                self.on_token()
            for output in self._step():
                if output.finished and output.request_id in self._requests:
                    result = self._finish(self._requests.pop(output.request_id), output)
                    self._done[result.session] = result

    def close(self, session: _Session) -> None:
        self._done.pop(session, None)
        if session.request is not None:
            self._requests.pop(session.request, None)
            self.llm.llm_engine.abort_request([session.request])
            session.request = None

    def is_lost(self, error: Exception) -> bool:
        from vllm.v1.engine.exceptions import EngineDeadError

        return super().is_lost(error) or isinstance(error.__cause__ or error, EngineDeadError)

    def shutdown(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def _step(self) -> list[Any]:
        try:
            return self.llm.llm_engine.step()
        except Exception as error:
            queries = ", ".join(sorted({session.query_id for session in self._requests.values()}))
            raise EngineError(f"engine 'vllm' failed with queries {queries} under way: {error}") from error

    def _complaint(self, session: _Session, error: Exception) -> str:
        return f"engine 'vllm' failed for query {session.query_id!r}: {error}"

    def _prompt(self, session: _Session) -> dict[str, Any]:
        # vLLM expands each picture's pad itself: pads that are expanded already would be expanded again, in silence.
        prompt: dict[str, Any] = {"prompt_token_ids": collapse_pads(session.token_ids, self.encoder.image_pad)}
        if session.images:
            prompt["multi_modal_data"] = {"image": list(session.images)}
            prompt["multi_modal_uuids"] = {"image": list(session.image_ids)}
        return prompt

    def _params(self, session: _Session, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=session.generator(sampling.seed).getrandbits(63) if sampling.temperature > 0 else None,
            max_tokens=min(sampling.max_turn_tokens, self.max_length - len(session.token_ids)),
            stop_token_ids=self.encoder.stop_ids,
            logit_bias=dict.fromkeys(self.encoder.suppressed_ids, _SUPPRESSED),
            # Of a truncated distribution vLLM tells other log-probabilities than those before the truncation.
            logprobs=None if truncated else 0,
            detokenize=False,
            output_kind=_final_only(),
        )

    def _finish(self, session: _Session, output: Any) -> TurnResult:
        if list(output.prompt_token_ids) != session.token_ids:
            raise RuntimeError("vLLM read other tokens than the conversation has; its processor resizes pictures")
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        logprobs = None
        if completion.logprobs is not None:
            logprobs = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        session.token_ids += ids
        session.request = None
        stop = "length"
        if ids and ids[-1] in self.encoder.stop_ids:
            stop = "call" if ids[-1] == self.encoder.end_of_call else "end"
        return TurnResult(session, ids, logprobs, stop, time.perf_counter() - session.started)


class _Session(Session):
    def __init__(self, query_id: str, sample: int):
        super().__init__(query_id, sample)
        self.token_ids: list[int] = []
        self.images: list[Image.Image] = []
        self.image_ids: list[str] = []
        self.request: str | None = None
        self.started = 0.0


def _check_replicas(name: str | Path, settings: dict[str, Any]) -> None:
    """vLLM itself says so only after the model's configuration was fetched, and not where to turn."""
    count = int(settings.get("data_parallel_size", 1))
    if count > 1 and settings.get("distributed_executor_backend") != "external_launcher":
        raise ValueError(
            f"vLLM cannot run data_parallel_size={count} replicas in this process; start "
            f"`vllm serve {name} --data-parallel-size {count}` and ask it with engine='openai' and base_url "
            "(--base-url on the command line)"
        )


def _adapter(folder: str | Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(folder))


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


__all__ = ["VLLMEngine"]
