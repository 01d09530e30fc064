"""`Reranker.rank(query, candidates)`: windows, trajectories and repairs behind one call."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import is_offline_mode

from . import hub
from .agent import Event, num_ahead
from .engines.base import Engine, EngineError, Sampling
from .images import ItemError
from .items import Item, coerce_candidates, coerce_query
from .pictures import PictureLoader
from .protocol import Preset, get_preset
from .ranking import Ranking
from .ranking_loop import RankingJob, RankingLoop
from .tools import VisualTools
from .windows import WindowWalk


logger = logging.getLogger(__name__)

CONFIG_NAME = "reranker_config.json"
"""File beside a model that says how it is to be played."""

ENGINES = ("transformers", "vllm", "openai")
EngineName = Literal["transformers", "vllm", "openai"]

Prompt = list[dict[str, str]]
"""A data set's own prompt, `[{"role": …, "content": text with <image> marks}]`."""


@dataclasses.dataclass(frozen=True)
class RankRequest:
    """
    A query to be ranked among many.

    Args:
        query_id (`str`):
            Names the query; no two of a job share one. Sampling depends on it.
        query (`Item`, `str`, `Path`, `PIL.Image.Image` or `dict`):
            The query.
        candidates (iterable of the same):
            The candidates.
        prompt (`list[dict]` or callable, *optional*):
            A data set's own prompt for these candidates, or what makes one for the candidates of a window, given
            their 0-based indices in the window's order. The preset's `prompt_source` must be `"dataset"` then.
    """

    query_id: str
    query: Any
    candidates: Iterable[Any]
    prompt: Prompt | Callable[[Sequence[int]], Prompt] | None = None


_USUAL = {"preset": get_preset("release"), "window": 20, "stride": 10, "sampling": Sampling(), "tools": True}
"""How a model is played that has nothing saved beside it."""


class Reranker:
    """
    Ranks candidates (text, image or both) for a query with a vision-language model that can look closer.

    Args:
        engine (`Engine`):
            Runs the model.
        preset (`str` or `Preset`, *optional*, defaults to `"release"`):
            The protocol that the model was trained on.
        window (`int`, *optional*, defaults to 20):
            Candidates that the model compares at a time.
        stride (`int`, *optional*, defaults to 10):
            Step from a window to the next.
        sampling (`Sampling`, *optional*):
            How tokens are drawn; greedily by default.
        tools (`bool`, *optional*, defaults to `True`):
            Whether the model may call tools.
        passes (`int`, *optional*, defaults to 1):
            How often the windows are walked through.

    Example:

    ```python
    >>> from vretrver_hf import Item, Reranker

    >>> reranker = Reranker.from_pretrained()  # the bundled tiny model
    >>> ranking = reranker.rank("a red apple", [Item(text="a green apple"), Item(text="red apple", id="x")])
    >>> sorted(ranking.order)
    [0, 1]

    ```
    """

    def __init__(
        self,
        engine: Engine,
        preset: str | Preset = "release",
        window: int = 20,
        stride: int = 10,
        sampling: Sampling | None = None,
        tools: bool = True,
        passes: int = 1,
    ):
        self.engine = engine
        self.preset = get_preset(preset)
        self.window = window
        self.stride = stride
        self.sampling = sampling or Sampling()
        self.tools = tools
        self.passes = passes
        # Settings that cannot work are refused here, before any query.
        WindowWalk(0, window, stride, passes)
        VisualTools(None, [], preset=self.preset, factor=engine.encoder.factor)
        if self.sampling.max_turn_tokens >= engine.max_length:
            raise ValueError(
                f"max_turn_tokens is {self.sampling.max_turn_tokens} but the model reads at most {engine.max_length} "
                "tokens, prompt included"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        engine: EngineName = "transformers",
        preset: str | Preset | None = None,
        window: int | None = None,
        stride: int | None = None,
        sampling: Sampling | None = None,
        tools: bool | None = None,
        passes: int = 1,
        revision: str | None = None,
        subfolder: str = "",
        adapter: str | Path | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **engine_kwargs: Any,
    ) -> Reranker:
        """
        Loads a model with the protocol it was trained on.

        Args:
            name (`str` or `Path`, *optional*):
                Hub id or folder; the bundled tiny model by default. With engine `"openai"` the model's name at the
                endpoint, which must be given; where it is a hub id or a folder, the protocol saved there is played.
            engine (`str`, *optional*, defaults to `"transformers"`):
                What runs it: `"transformers"` or `"vllm"` in this process, or `"openai"`, any OpenAI-compatible
                endpoint at `base_url`.
            preset (`str` or `Preset`, *optional*):
                Replaces the preset saved beside the model. A model without one is played as `"release"`, with a
                warning.
            window (`int`, *optional*), stride (`int`, *optional*), sampling (`Sampling`, *optional*):
                Replace what is saved beside the model. A window without a stride moves by half its size.
            tools (`bool`, *optional*):
                Whether the model may call tools; as saved beside the model, and else it may.
            passes (`int`, *optional*, defaults to 1):
                How often the windows are walked through.
            revision (`str`, *optional*):
                Branch, tag or commit on the hub.
            subfolder (`str`, *optional*, defaults to `""`):
                Folder inside the repository.
            adapter (`str` or `Path`, *optional*):
                Hub id or folder of LoRA weights, which are merged into the model. The protocol saved beside them goes
                before that of the model. If `name` is an adapter itself, it brings its base model.
            adapter_kwargs (`dict`, *optional*):
                `revision` and `subfolder` of the adapter.
            engine_kwargs:
                Passed to the engine: `dtype`, `device`, `attn_implementation`, `max_sessions`, … to
                [`~engines.transformers.TransformersEngine`]; `tensor_parallel_size`, `lora`, … to
                [`~engines.vllm.VLLMEngine`]; `base_url`, `deadline`, … to [`~engines.openai.OpenAIEngine`].

        Raises:
            `HubError`: if there is no such model on the hub, it is gated, or the hub cannot be asked.
            `ValueError`: for an unknown engine, a model family without a chat template, or settings beside the model
                that this version does not know.
        """
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}: choose one of {', '.join(map(repr, ENGINES))}")
        if adapter is not None and engine != "transformers":
            raise ValueError(f"engine {engine!r} takes no adapter here; vLLM takes `lora`, an endpoint what it serves")
        source = _Source(_default_model(engine) if name is None else name, revision, subfolder)
        lora = None if adapter is None else _Source(adapter, **(adapter_kwargs or {}))
        if engine == "transformers" and lora is None:
            source, lora = source.parts()
        config = (lora and lora.config()) or source.config(required=engine != "openai")
        name = source.name
        if lora is not None:
            engine_kwargs |= {"adapter": lora.name, "adapter_kwargs": lora.place}
        loaded = _load_engine(engine, name, source.revision, source.subfolder, engine_kwargs)
        if preset is None and not config:
            logger.warning("%s has no %s: playing it as preset 'release'", name, CONFIG_NAME)
        saved = {**_USUAL, **config}
        if stride is None:
            stride = saved["stride"] if window is None else max(1, window // 2)
        return cls(
            loaded,
            preset=preset or saved["preset"],
            window=saved["window"] if window is None else window,
            stride=stride,
            sampling=sampling or saved["sampling"],
            tools=saved["tools"] if tools is None else tools,
            passes=passes,
        )

    def rank(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        top_k: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        query_id: str = "0",
        prompt: Prompt | None = None,
    ) -> Ranking:
        """
        Ranks the candidates for one query.

        Args:
            query (`Item`, `str`, `Path`, `PIL.Image.Image` or `dict`):
                The query. A string that names a picture file is the picture.
            candidates (iterable of the same):
                The candidates.
            top_k (`int`, *optional*):
                How many of the best `ranking.items` and `ranking.ids` list.
            on_event (`Callable[[Event], None]`, *optional*):
                Called with each thought, call, observation, answer and window as it happens.
            query_id (`str`, *optional*, defaults to `"0"`):
                Names the query in trajectories; sampling depends on it.
            prompt (`list[dict]`, *optional*):
                A data set's own prompt for these candidates, to be replayed; the preset's `prompt_source` must be
                `"dataset"` then.

        Raises:
            `ItemError`: before the model runs, naming the query or candidate that cannot be used and why.
            `EngineError`: if the engine fails, naming it and the query.
            `ValueError`: if a data set's prompt is to be replayed and is missing, does not fit the pictures, or there
                are more candidates than the window holds; or if one is given that would not be replayed.
        """
        options = {"top_k": top_k, "on_event": on_event, "query_id": query_id, "prompt": prompt}
        *_, ranking = self.rank_stream(query, candidates, **options)
        return ranking

    def rank_stream(
        self,
        query: Any,
        candidates: Iterable[Any],
        *,
        top_k: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        query_id: str = "0",
        prompt: Prompt | None = None,
    ) -> Iterator[Event | Ranking]:
        """
        Like [`Reranker.rank`], but yields each [`Event`] as it happens and the [`Ranking`] last. Closing the iterator
        stops the model.
        """
        job = self._job(query_id, coerce_query(query), coerce_candidates(candidates), top_k, prompt)
        if prompt is not None and self.preset.prompt_source != "dataset":
            raise ValueError(
                "a prompt was given but this preset writes its own; load the reranker with a preset whose "
                "prompt_source is 'dataset', or leave the prompt out"
            )
        if prompt is not None and len(job.candidates) > self.window:
            raise ValueError(
                f"the prompt shows {len(job.candidates)} candidates at once but the window holds {self.window}; "
                "load the reranker with a larger window"
            )
        events: list[Event] = []

        def tell(event: Event) -> None:
            events.append(event)
            if on_event is not None:
                on_event(event)

        loop = RankingLoop(self, tell)
        job.begin_check(loop.pictures, self.preset)
        job.end_check()
        for ranking in self._drive([job], loop):
            yield from events
            events.clear()
            if ranking is not None:
                _raise_engine_failure(ranking)
                yield ranking

    def rank_batch(
        self,
        pairs: Iterable[tuple[Any, Iterable[Any]]],
        *,
        top_k: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_error: Literal["raise", "record"] = "raise",
        show_progress_bar: bool = False,
    ) -> list[Ranking]:
        """
        Ranks many queries at once; windows of all of them share the model's batch, and each query advances on its own.

        Args:
            pairs (iterable of `tuple`):
                Queries with their candidates, each as in [`Reranker.rank`]. Query ids are `"0"`, `"1"`, … in this
                order.
            top_k (`int`, *optional*):
                As in [`Reranker.rank`].
            on_event (`Callable[[Event], None]`, *optional*):
                Called with each event of any query; `event.query_id` says whose.
            on_error (`str`, *optional*, defaults to `"raise"`):
                What an unusable item does when its query's turn comes, or an engine that fails it. `"raise"` ends the
                batch; `"record"` gives the query a ranking whose `error` says why, and goes on.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Shows a bar that counts queries.

        Returns:
            `list[Ranking]`: one a query, in their order.
        """
        from tqdm.auto import tqdm

        requests = (RankRequest(str(index), *pair) for index, pair in enumerate(pairs))
        rankings: dict[str, Ranking] = {}
        total = len(pairs) if isinstance(pairs, Sequence) else None
        with tqdm(total=total, unit="query", disable=not show_progress_bar) as bar:
            for ranking in self.rank_iter(requests, top_k=top_k, on_event=on_event, on_error=on_error):
                rankings[ranking.query_id] = ranking
                bar.update()
        return [rankings[str(index)] for index in range(len(rankings))]

    def rank_iter(
        self,
        requests: Iterable[RankRequest],
        *,
        top_k: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_error: Literal["raise", "record"] = "raise",
    ) -> Iterator[Ranking]:
        """
        Like [`Reranker.rank_batch`] for any number of queries: each ranking is handed over as it ends, not in order.

        Only few more requests are taken than the engine has room for, so they may be endless or large.

        Args:
            requests (iterable of `RankRequest`):
                The queries.
            top_k (`int`, *optional*), on_event (`Callable[[Event], None]`, *optional*), on_error (`str`, *optional*):
                As in [`Reranker.rank_batch`].
        """
        if on_error not in ("raise", "record"):
            raise ValueError(f"unknown on_error {on_error!r}: choose 'raise' or 'record'")
        loop = RankingLoop(self, on_event)
        for ranking in self._drive(self._jobs(requests, top_k, on_error, loop.pictures), loop):
            if ranking is not None:
                if on_error == "raise":
                    _raise_engine_failure(ranking)
                yield ranking

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves model, processor and the protocol's settings; [`Reranker.from_pretrained`] plays them as here."""
        model = getattr(self.engine, "model", None)
        if model is None:
            raise ValueError(f"{type(self.engine).__name__} holds no model that could be saved")
        folder = Path(folder)
        model.save_pretrained(folder)
        self.engine.encoder.processor.save_pretrained(folder)
        save_config(folder, self.preset, self.window, self.stride, self.sampling, self.tools)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool = True,
        revision: str = "main",
        overwrite: bool = False,
        message: str | None = None,
    ) -> str:
        """
        Uploads model, processor, protocol and a card to the hub; [`Reranker.from_pretrained`] plays them as here.

        Args:
            repo_id (`str`):
                `"owner/name"`.
            license (`str`, *optional*):
                Short name of the licence; that of the folder the model was loaded from by default.
            private (`bool`, *optional*, defaults to `True`):
                Whether a repository that is made for it is seen by its owner only.
            revision (`str`, *optional*, defaults to `"main"`):
                The branch; made where there is none.
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether what the revision holds may be replaced.
            message (`str`, *optional*):
                The commit's message.

        Returns:
            `str`: address of the commit.

        Raises:
            `HubError`: if the revision holds something else, the token is no good, or the hub cannot be reached.
            `ValueError`: if nothing says under which licence the model is.
        """
        options = {"private": private, "revision": revision, "overwrite": overwrite, "message": message}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.copy_documents(self.engine.model.name_or_path, folder)
            with hub.model_push(folder, repo_id, license=license, **options) as push:
                return push.upload()

    def _jobs(
        self,
        requests: Iterable[RankRequest],
        top_k: int | None,
        on_error: Literal["raise", "record"],
        pictures: PictureLoader,
    ) -> Iterator[RankingJob]:
        """A job for each request, its pictures checked; those of the next ones are being read meanwhile."""
        begun: collections.deque[Callable[[], RankingJob]] = collections.deque()
        for request in requests:
            begun.append(self._begin(request, top_k, on_error, pictures))
            if len(begun) > num_ahead(self.engine.max_sessions):
                yield begun.popleft()()
        while begun:
            yield begun.popleft()()

    def _begin(
        self, request: RankRequest, top_k: int | None, on_error: Literal["raise", "record"], pictures: PictureLoader
    ) -> Callable[[], RankingJob]:
        """Begins to check a request; returns what ends that and gives the job."""
        query_id, query, candidates = request.query_id, request.query, request.candidates
        if on_error == "record" and not isinstance(candidates, Sequence):
            candidates = list(candidates)

        def failed(error: ItemError) -> RankingJob:
            if on_error == "raise":
                raise ItemError(f"query {query_id}: {error}") from error
            job = self._job(query_id, _salvaged(query, None), _salvaged_list(candidates), top_k)
            job.error = str(error)
            return job

        def end() -> RankingJob:
            try:
                job.end_check()
            except ItemError as error:
                return failed(error)
            return job

        try:
            job = self._job(query_id, coerce_query(query), coerce_candidates(candidates), top_k, request.prompt)
        except ItemError as error:
            return partial(failed, error)
        job.begin_check(pictures, self.preset)
        return end

    def _job(
        self,
        query_id: str,
        query: Item,
        candidates: list[Item],
        top_k: int | None,
        prompt: Prompt | Callable[[Sequence[int]], Prompt] | None = None,
    ) -> RankingJob:
        return RankingJob(query_id, query, candidates, self.window, self.stride, top_k, prompt, self.passes)

    def _drive(self, jobs: Iterable[RankingJob], loop: RankingLoop) -> Iterator[Ranking | None]:
        """Walks every job through its windows; yields after each step of the loop, a ranking or `None`."""
        waiting = iter(jobs)
        exhausted = False
        try:
            while True:
                while not exhausted and loop.is_hungry:
                    job = next(waiting, None)
                    if job is None:
                        exhausted = True
                    elif (ranking := loop.submit(job)) is not None:
                        yield ranking
                if not loop.num_active:
                    return
                yield None
                yield from loop.step()
                yield None
        finally:
            loop.cancel()


def bundled_model() -> Path:
    """Folder of the tiny model that comes with the package."""
    folder = Path(str(resources.files(__package__))) / "assets" / "vretrver-tiny"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the bundled model is missing from {folder}; install the package again")
    return folder


def saved_settings(name: str | Path | None = None) -> dict[str, Any]:
    """
    How a model is to be played, without loading it: what [`Reranker.from_pretrained`] would play.

    Args:
        name (`str` or `Path`, *optional*):
            Hub id or folder of a model or an adapter; the bundled tiny model by default.

    Returns:
        `dict`: `preset`, `window`, `stride`, `sampling` and `tools`.
    """
    source, lora = _Source(bundled_model() if name is None else name).parts()
    return {**_USUAL, **((lora and lora.config()) or source.config())}


def _default_model(engine: str) -> Path:
    if engine == "openai":
        raise ValueError("engine 'openai' needs the name of the model at the endpoint")
    return bundled_model()


def _load_engine(
    engine: str, name: str | Path, revision: str | None, subfolder: str, settings: dict[str, Any]
) -> Engine:
    if engine == "openai":
        from .engines.openai import OpenAIEngine

        return OpenAIEngine(str(name), **settings)
    if engine == "vllm":
        from .engines.vllm import VLLMEngine as LocalEngine
    else:
        from .engines.transformers import TransformersEngine as LocalEngine
    return LocalEngine.from_pretrained(name, revision=revision, subfolder=subfolder, **settings)


def save_config(
    folder: str | Path, preset: Preset, window: int, stride: int, sampling: Sampling, tools: bool = True
) -> None:
    """Writes `reranker_config.json`, which says how the model in `folder` is to be played."""
    config = {
        "preset": preset.to_dict(),
        "window": window,
        "stride": stride,
        "sampling": dataclasses.asdict(sampling),
        "tools": tools,
    }
    Path(folder, CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a model or an adapter is."""

    name: str | Path
    revision: str | None = None
    subfolder: str = ""

    @property
    def place(self) -> dict[str, Any]:
        return {"revision": self.revision, "subfolder": self.subfolder}

    def parts(self) -> tuple[_Source, _Source | None]:
        """The model, and the adapter that stands here for it, if this is one."""
        base = self.base_model()
        return (self, None) if base is None else (_Source(base), self)

    def base_model(self) -> str | None:
        """The base of an adapter; `None` where this is a model."""
        try:
            hub.fetch(self.name, "config.json", **self.place)
            return None
        except OSError as error:
            # An adapter of the cache has no config.json either, and offline nobody can say so.
            if isinstance(error, hub.HubError) and not is_offline_mode():
                raise
            path = hub.find(self.name, "adapter_config.json", **self.place)
            if path is None:
                raise
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]

    def config(self, required: bool = True) -> dict[str, Any]:
        """
        What [`save_config`] wrote, its parts made; empty where there is no such file, or where no model is `required`
        and there is none of that name.
        """
        if not required and not Path(self.name).is_dir() and str(self.name).count("/") != 1:
            return {}  # no name that the hub could know
        try:
            path = hub.find(self.name, CONFIG_NAME, **self.place)
        except OSError:
            if required:
                raise
            path = None
        if path is None:
            return {}
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
            unknown = sorted(set(config) - {"preset", "window", "stride", "sampling", "tools"})
            if unknown:
                raise ValueError(f"unknown settings {unknown}")
            config["preset"] = Preset.from_dict(config["preset"])
            config["sampling"] = Sampling.from_dict(config.get("sampling", {}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{CONFIG_NAME} of {self.name} cannot be used: {error!r}") from error
        return config


def _salvaged(value: Any, item_id: str | None) -> Item:
    """The item, or one that stands for what could not be used, so that every candidate keeps its place."""
    try:
        item = Item.coerce(value)
    except ItemError:
        item = Item(text="(unusable)")
    return item if item_id is None else dataclasses.replace(item, id=item_id)


def _salvaged_list(values: Any) -> list[Item]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return []
    return [_salvaged(value, str(index)) for index, value in enumerate(values)]


def _raise_engine_failure(ranking: Ranking) -> None:
    for trajectory in ranking.trajectories:
        if trajectory.error is not None and trajectory.turns:  # without turns, it was a picture that vanished
            raise EngineError(trajectory.error)
