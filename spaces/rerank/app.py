"""The Space: a query, some candidates, and what a model makes of them, shown as it happens."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from bodies import BodyLimit
from failures import naming, told
from gradio_client.utils import is_http_url_like
from inputs import from_form, from_texts
from limits import Limits
from runs import Run, Runs, Stage
from starlette.middleware import Middleware

from vretrver_hf import Item, ItemError, Ranking, Reranker
from vretrver_hf.html import LiveTrace, items_fragment, ranking_fragment, ranking_html, trace_css
from vretrver_hf.reranker import saved_settings
from vretrver_hf.samples import Sample, load_samples


BUNDLED = "bundled"
SAMPLE, OWN = "A sample", "My own"
DESCRIPTION = """# Rerank with evidence
A vision-language model gets a query and some candidates, **thinks, looks closer, and ranks them**. Watch it."""


class Space:
    """
    What the page and its API do.

    Args:
        models (`list[str]`): The models to choose from; each is loaded when it is first asked for.
        limits (`Limits`): What a visitor may ask for.
    """

    def __init__(self, models: list[str], limits: Limits):
        self.models = models
        self.limits = limits
        self.runs = Runs(limits.deadline)
        self.samples = {sample.id: sample for sample in load_samples()}
        self._loading = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self.saved = saved_settings(_name(models[0]))
        """How the first model is to be played."""

    def stage(self, model: str, run: Run | None = None) -> Stage:
        """The stage of a model, loaded when it is first asked for; a run that waits for that can be cancelled."""
        if model not in self.models:
            raise ItemError(f"there is no model {model!r} here")
        wait = run.wait if run is not None else lambda: None
        while not self._loading.acquire(timeout=0.1):
            wait()
        try:
            if model not in self._stages:
                self._stages[model] = Stage(self._load(model))
        finally:
            self._loading.release()
        wait()
        return self._stages[model]

    def _load(self, model: str) -> Reranker:
        if self.models == [BUNDLED] and "OMP_NUM_THREADS" not in os.environ:
            import torch

            torch.set_num_threads(1)  # a model so small only waits for a second thread
        with naming(model):
            return Reranker.from_pretrained(_name(model))

    def run(
        self,
        source: str,
        sample_id: str,
        text: str,
        picture: list | None,
        pictures: list | None,
        texts: str,
        paired: bool,
        compare: bool,
        model: str,
        window: float,
        max_calls: float,
        overview_side: float,
        inspect_side: float,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Plays what the form says; yields the page's outputs as things happen."""
        running = gr.Button(interactive=False), gr.Button(interactive=True)
        waiting = gr.Button(interactive=True), gr.Button(interactive=False)
        none = gr.DownloadButton(visible=False)
        yield _message(""), _busy("Reading …"), gr.HTML("", visible=compare), none, none, *running
        plays: list[_Play] = []
        try:
            with self.runs.begin(str(request.session_hash)) as run:
                query, candidates = self._items(source, sample_id, text, picture, pictures, texts, paired)
                if model not in self._stages:
                    yield _message(""), _busy("Loading the model …"), "", none, none, *running
                stage = self.stage(model, run)
                settings = _settings(stage.reranker, window, max_calls, overview_side, inspect_side, temperature)
                modes = [True, False] if compare else [stage.reranker.tools]
                variants = [_variant(stage.reranker, settings, tools) for tools in modes]
                plays = [_Play(variant, query, candidates) for variant in variants]
                streams = [stage.play(run, play.reranker, query, candidates) for play in plays]
                for _ in _in_turns(plays, streams):
                    yield _message(""), *_traces(plays, "The model is at work …"), none, none, *running
            positive = self.samples[sample_id].positive if source == SAMPLE else None
            titles = ["With tools", "Without tools"] if compare else [""]
            pieces = [
                play.final(title, positive, f"{i}-") for i, (play, title) in enumerate(zip(plays, titles, strict=True))
            ]
            with tempfile.TemporaryDirectory() as folder:
                files = _files(plays[0].ranking, Path(folder))
                downloads = [gr.DownloadButton(value=str(file), visible=True) for file in files]
                yield _message(plays[0].summary()), pieces[0], "".join(pieces[1:]), *downloads, *waiting
        except Exception as error:  # whatever it is, the next run must be possible
            yield _message(told(error), failed=True), *_traces(plays), none, none, *waiting

    def rerank(
        self, query: str, candidates: list[str], query_image: str = "", tools: bool = True, request: gr.Request = None
    ) -> dict:
        """
        Rank candidates for a query, best first, with a vision-language model that thinks and may look closer.

        Args:
            query: What is looked for, in words; may be empty if query_image is given.
            candidates: Two or more texts, or pictures as "data:image/png;base64,...". Paths and URLs are refused.
            query_image: A picture of what is looked for, as a base64 data: URL; empty if there is none.
            tools: Whether the model may look closer at pictures before it answers.

        Returns:
            order: 0-based indices of the candidates, best first.
            status: "ok", "repaired", or "fallback" if there was no usable answer and the order is that of the input.
            trace: what the model thought and did, turn by turn.
            calls, tokens, seconds: what it cost.
        """
        try:
            items = from_texts(query, query_image, candidates, self.limits)
            # A program has no page that could be left: each call is a run of its own.
            with self.runs.begin(f"call-{id(items)}") as run:
                stage = self.stage(self.models[0], run)
                variant = _variant(stage.reranker, {"preset": stage.reranker.preset}, tools)
                *_, ranking = stage.play(run, variant, *items)
        except Exception as error:
            raise gr.Error(told(error), print_exception=False) from error
        facts = {key: value for key, value in ranking.to_dict().items() if key not in ("trajectories", "query_id")}
        turns = [turn for trajectory in ranking.trajectories for turn in trajectory.assistant_turns]
        trace = [{"thought": turn.thought, "call": turn.call, "carried_out": turn.valid} for turn in turns]
        return {**facts, "trace": trace}

    def saved_beside(self, model: str) -> tuple:
        """How a model is to be played, once it is chosen: a message, and what the page's settings become."""
        try:
            if model not in self.models:
                raise ItemError(f"there is no model {model!r} here")
            with naming(model):
                return "", *_shown(saved_settings(_name(model)), self.limits)
        except Exception as error:
            return _message(told(error), failed=True), *[gr.skip()] * len(_shown(self.saved, self.limits))

    def cancel(self, request: gr.Request) -> None:
        """Stops this visitor's run."""
        self.runs.cancel(str(request.session_hash))

    def asked_sample(self, request: gr.Request) -> Any:
        """The sample that the page's address asks for."""
        asked = dict(request.query_params).get("sample")
        return asked if asked in self.samples else gr.skip()

    def preview(self, sample_id: str) -> str:
        """A sample's query and candidates."""
        sample = self.samples[sample_id]
        return items_fragment(sample.query, sample.candidates)

    def _items(self, source: str, sample_id: str, text: str, picture, pictures, texts, paired) -> tuple:
        if source == SAMPLE:
            sample = self.samples[sample_id]
            return sample.query, sample.candidates
        chosen = [path for path, _ in picture or []]
        if len(chosen) > 1:
            raise ItemError("query: it may have one picture only")
        files = [path for path, _ in pictures or []]
        return from_form(text, chosen[0] if chosen else None, files, texts, paired, self.limits)


class _Play:
    """One ranking on its way to the page."""

    def __init__(self, reranker: Reranker, query: Item, candidates: list[Item]):
        self.reranker = reranker
        self.ranking: Ranking | None = None
        self._trace = LiveTrace(query, candidates, reranker.preset)

    def take(self, happened: Any) -> bool:
        if isinstance(happened, Ranking):
            self.ranking = happened
            return True
        return self._trace.add(happened)

    def html(self, note: str) -> str:
        return self._trace.html("" if self.ranking else note)

    def final(self, title: str, positive: int | None, key: str) -> str:
        return ranking_fragment(self.ranking, title=title, positive=positive, key=key)

    def summary(self) -> str:
        best = self.ranking.order[0] + 1
        return f"Done: candidate {best} comes first ({self.ranking.seconds:.1f} s, status {self.ranking.status})."


def _name(model: str) -> str | None:
    return None if model == BUNDLED else model


def _traces(plays: list[_Play], note: str = "") -> tuple[str, str]:
    """What happened so far, for the two columns of the page."""
    left, right, *_ = [*(play.html(note) for play in plays), "", ""]
    return left, right


def _in_turns(plays: list[_Play], streams: list[Iterator]) -> Iterator[None]:
    """Advances all plays, one step each in turn; yields where there is something new to be seen."""
    pairs = list(zip(plays, streams, strict=True))
    try:
        while pairs:
            for pair in list(pairs):
                happened = next(pair[1], None)
                if happened is None:
                    pairs.remove(pair)
                elif pair[0].take(happened):
                    yield
    finally:
        for stream in streams:
            stream.close()


def _shown(saved: dict[str, Any], limits: Limits) -> tuple[float, ...]:
    """What the page's settings say of what is saved beside a model, as far as their scales go."""
    preset = saved["preset"]
    return (
        min(saved["window"], limits.max_candidates),
        min(preset.max_calls, _MOST_CALLS),
        _side(preset.overview_pixels),
        _side(preset.inspect_pixels),
        saved["sampling"].temperature,
    )


def _settings(
    saved: Reranker, window: float, max_calls: float, overview_side: float, inspect_side: float, temperature: float
) -> dict[str, Any]:
    """What the page's settings mean; one that was left alone is what is saved, which its scale may only round."""
    sides = {"overview_pixels": overview_side, "inspect_pixels": inspect_side}
    changes = {
        name: int(side) ** 2 for name, side in sides.items() if side and side != _side(getattr(saved.preset, name))
    }
    return {
        "preset": dataclasses.replace(saved.preset, max_calls=int(max_calls), **changes),
        "window": int(window),
        "stride": saved.stride if window == saved.window else max(1, int(window) // 2),
        "sampling": dataclasses.replace(saved.sampling, temperature=float(temperature)),
    }


def _variant(saved: Reranker, settings: dict[str, Any], tools: bool) -> Reranker:
    usual = {"window": saved.window, "stride": saved.stride, "sampling": saved.sampling}
    return Reranker(saved.engine, **{**usual, **settings}, tools=tools)


def _files(ranking: Ranking, folder: Path) -> list[Path]:
    page, record = folder / "trace.html", folder / "trace.json"
    page.write_text(ranking_html(ranking), encoding="utf-8")
    record.write_text(json.dumps(ranking.to_dict()), encoding="utf-8")
    return [page, record]


def _gallery(**settings: Any) -> gr.Gallery:
    return gr.Gallery(type="filepath", interactive=True, sources=["upload"], height=220, columns=4, **settings)


def refuse_urls(block: Any) -> None:
    """Keeps an input from fetching what names a URL: Gradio does that for inputs of any kind, a text's too."""
    move = block.async_move_resource_to_block_cache

    async def move_upload(url_or_file_path: Any) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise gr.Error("URLs are not fetched here. Upload the picture.", print_exception=False)
        return await move(url_or_file_path)

    block.async_move_resource_to_block_cache = move_upload


def _message(text: str, failed: bool = False) -> str:
    kind, role = ("failure", "alert") if failed else ("status", "status")
    if not text:
        return ""
    return f'<div class="vretrver"><p class="{kind}" role="{role}">{html.escape(text)}</p></div>'


def _busy(text: str) -> str:
    return f'<div class="vretrver"><p class="busy">{html.escape(text)}</p></div>'


def _constant(*values: str) -> str:
    """A function of the browser that returns these."""
    return f"() => {json.dumps(values)}"


def _not_run() -> tuple:
    """What the page shows where Gradio refused a run or lost it; its own note of the reason goes away."""
    text = "This was not run. If too many are waiting for a turn, try again in a minute."
    return _message(text, failed=True), "", gr.Button(interactive=True), gr.Button(interactive=False)


def _label(sample: Sample) -> str:
    text = sample.query.text or "a picture"
    return f"{sample.task}: {text if len(text) <= 60 else text[:59] + '…'}"


def _links(samples: list[Sample]) -> str:
    rows = (f'<li><a href="?sample={html.escape(s.id)}">{html.escape(_label(s))}</a></li>' for s in samples)
    return f'<div class="vretrver"><ul>{"".join(rows)}</ul></div>'


def build(space: Space) -> gr.Blocks:
    """
    The page.

    Args:
        space (`Space`): What it does.
    """
    limits, samples = space.limits, list(space.samples.values())
    shown = _shown(space.saved, limits)
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    at_once = {**hidden, "queue": False}  # what is not to wait behind runs, nor be refused where too many wait
    with gr.Blocks(
        title="Rerank with evidence",
        analytics_enabled=False,
        delete_cache=(max(1, limits.keep_files // 3), limits.keep_files),
    ) as page:
        gr.Markdown(DESCRIPTION)
        source = gr.Radio([SAMPLE, OWN], value=SAMPLE, label="What to rank")
        with gr.Group(visible=True) as sample_box:
            choices = [(_label(sample), sample.id) for sample in samples]
            sample = gr.Dropdown(choices, value=samples[0].id, label="Sample", elem_id="sample")
            plain = {"apply_default_css": False}  # traces bring their own styles
            preview = gr.HTML(space.preview(samples[0].id), padding=True, elem_id="preview", **plain)
            with gr.Accordion("Links to samples", open=False):
                gr.HTML(_links(samples), padding=True)
        with gr.Group(visible=False) as own_box:
            text = gr.Textbox(label="Query", placeholder="What are you looking for?", elem_id="query")
            picture = _gallery(label="Picture of the query (optional)", elem_id="query-picture")
            most = f"Pictures to rank, at most {limits.max_candidates}"
            pictures = _gallery(label=most, elem_id="pictures")
            texts = gr.Textbox(label="Texts to rank, one a line", lines=3, elem_id="texts")
            paired = gr.Checkbox(label="Line 1 belongs to picture 1, line 2 to picture 2, …")
        compare = gr.Checkbox(label="Compare: with and without tools, side by side", elem_id="compare")
        with gr.Accordion("Settings", open=False):
            model = gr.Dropdown(space.models, value=space.models[0], label="Model")
            window = gr.Slider(2, limits.max_candidates, value=shown[0], step=1, label="Candidates at a time")
            calls = gr.Slider(0, _MOST_CALLS, value=shown[1], step=1, label="Calls of tools, at most")
            overview = gr.Slider(0, _MOST_SIDE, value=shown[2], step=1, label=_SIDES[0])
            inspect = gr.Slider(0, _MOST_SIDE, value=shown[3], step=1, label=_SIDES[1])
            temperature = gr.Slider(0, 2, value=shown[4], step=0.1, label="Temperature")
            settings = [window, calls, overview, inspect, temperature]
        with gr.Row():
            run = gr.Button("Run", variant="primary", elem_id="run")
            cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")
        message = gr.HTML("", elem_id="message", **plain)
        with gr.Row():
            left = gr.HTML("", elem_id="trace", min_width=320, **plain)
            right = gr.HTML("", elem_id="other-trace", visible=False, min_width=320, **plain)
        with gr.Row():
            as_page = gr.DownloadButton("The trace as a page", visible=False, elem_id="as-page")
            as_json = gr.DownloadButton("The trace as JSON", visible=False, elem_id="as-json")

        source.change(_show_source, source, [sample_box, own_box], **at_once)
        sample.change(space.preview, sample, preview, **at_once)
        model.change(space.saved_beside, model, [message, *settings], **at_once)
        # The browser itself says so: the queue says nothing before a run begins, however long that takes.
        run.click(None, None, [message, left, right], js=_constant("", _busy("Waiting for a turn …"), ""), **hidden)
        form = [source, sample, text, picture, pictures, texts, paired, compare]
        ran = run.click(
            space.run,
            [*form, model, *settings],
            [message, left, right, as_page, as_json, run, cancel],
            concurrency_limit=limits.concurrency,
            concurrency_id="model",
            **hidden,
        )
        ran.failure(_not_run, None, [message, left, run, cancel], **at_once)
        cancel.click(space.cancel, None, None, **at_once)
        page.load(space.asked_sample, None, sample, **at_once)
        page.unload(space.cancel)
        gr.api(space.rerank, api_name="rerank", concurrency_limit=limits.concurrency, concurrency_id="model")
    for block in page.blocks.values():
        refuse_urls(block)
    return page.queue(max_size=limits.max_queue)


_MOST_CALLS, _MOST_SIDE = 8, 1024
_SIDES = (
    "Pictures at first, as squares of so many pixels a side (0: as saved)",
    "Pictures looked at again, as squares of so many pixels a side (0: as saved)",
)


def _side(pixels: int | None) -> int:
    return min(_MOST_SIDE, round((pixels or 0) ** 0.5))


def _show_source(source: str) -> tuple[dict, dict]:
    return gr.Group(visible=source == SAMPLE), gr.Group(visible=source == OWN)


def launch(page: gr.Blocks, limits: Limits, **options: Any) -> Any:
    """Serves the page; `options` are those of `gr.Blocks.launch`."""
    return page.launch(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{trace_css()}</style>",
        app_kwargs={"middleware": [Middleware(BodyLimit, limits=limits)]},
        max_file_size=limits.max_bytes,
        mcp_server=importlib.util.find_spec("mcp") is not None,
        ssr_mode=False,
        footer_links=["api"],
        **options,
    )


def main() -> None:
    """Serves the models that `VRETRVER_MODELS` lists, within the limits that the environment sets."""
    if os.environ.get("SPACES_ZERO_GPU"):
        sys.exit(
            "This Space does not run on ZeroGPU, which lends a GPU to a process made for one call: here runs share a "
            "model that stays loaded, and Cancel reaches into it. Choose a CPU or a GPU of its own."
        )
    models = [name.strip() for name in os.environ.get("VRETRVER_MODELS", BUNDLED).split(",") if name.strip()]
    limits = Limits.from_environment()
    space = Space(models, limits)
    page = build(space)
    # The page is there before the model and all that runs it, which take longer to load than the rest together.
    launch(page, limits, prevent_thread_lock=True)
    space.stage(models[0])
    page.block_thread()


if __name__ == "__main__":
    main()
