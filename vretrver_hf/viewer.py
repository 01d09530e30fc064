"""A local page to look through trajectories: filters, and each one as the Space shows it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .html import ranking_fragment, trace_css
from .items import Item
from .ranking import Ranking


if TYPE_CHECKING:
    import gradio as gr

    from .data.conversations import TrajectoryRecord
    from .trajectory import Trajectory

ALL, WRONG, INVALID, NO_ANSWER = "all", "wrong", "calls not carried out", "answer mended or missing"
FILTERS = (ALL, WRONG, INVALID, NO_ANSWER)
AS_WRITTEN, MOST_CALLS, MOST_TOKENS = "as written", "most calls", "most tokens"
ORDERS = (AS_WRITTEN, MOST_CALLS, MOST_TOKENS)


@dataclasses.dataclass(frozen=True)
class Entry:
    """
    What the filters look at.

    Args:
        index (`int`):
            Place in the file.
        query_id (`str`):
            The query.
        task (`str`):
            Data source, and what query and candidates are; `"–"` where only trajectories are known.
        right (`bool`, *optional*):
            Whether a relevant candidate came first; `None` where nobody says which are relevant.
        calls (`int`), invalid (`int`), tokens (`int`):
            Calls, those among them that were not carried out, and tokens.
        status (`str`):
            `"ok"`, `"repaired"` or `"fallback"`.
    """

    index: int
    query_id: str
    task: str
    right: bool | None
    calls: int
    invalid: int
    tokens: int
    status: str

    @property
    def label(self) -> str:
        verdict = {True: "right", False: "wrong", None: ""}[self.right]
        facts = [verdict, f"{self.calls} calls", "" if self.status == "ok" else self.status]
        return f"{self.index + 1}. {self.query_id} ({', '.join(filter(None, facts))})"


class Traces:
    """
    The trajectories of a folder of records, or of a file of its own, which then come without their pictures.

    Args:
        source (`str` or `os.PathLike`):
            A folder that `vretrver sample` wrote, or a `trajectories.jsonl`; `examples.parquet` beside it says what
            they are about.

    Raises:
        `ValueError`, `OSError`: if there is none, or it cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str]):
        from .data.conversations import EXAMPLES, TRAJECTORIES, read_records
        from .trajectory import read_jsonl

        path = Path(source)
        folder = path if path.is_dir() else path.parent
        if path.is_dir() or (path.name == TRAJECTORIES and (folder / EXAMPLES).is_file()):
            self._records: Any = read_records(folder)
            self.entries = [_entry(i, record.trajectory, record) for i, record in enumerate(self._records)]
        else:
            self._records = list(read_jsonl(path))
            self.entries = [_entry(i, trajectory, None) for i, trajectory in enumerate(self._records)]
        if not self.entries:
            raise ValueError(f"{source} holds no trajectory")

    @property
    def tasks(self) -> list[str]:
        return sorted({entry.task for entry in self.entries})

    def select(self, task: str = ALL, kind: str = ALL, order: str = AS_WRITTEN) -> list[Entry]:
        """
        The entries that pass the filters.

        Args:
            task (`str`, *optional*):
                One of `tasks`, or all.
            kind (`str`, *optional*):
                One of `FILTERS`.
            order (`str`, *optional*):
                One of `ORDERS`.
        """
        passes = {
            ALL: lambda entry: True,
            WRONG: lambda entry: entry.right is False,
            INVALID: lambda entry: entry.invalid > 0,
            NO_ANSWER: lambda entry: entry.status != "ok",
        }[kind]
        chosen = [entry for entry in self.entries if task in (ALL, entry.task) and passes(entry)]
        key = {MOST_CALLS: lambda entry: -entry.calls, MOST_TOKENS: lambda entry: -entry.tokens}.get(order)
        return chosen if key is None else sorted(chosen, key=key)

    def html(self, index: int) -> str:
        """A trajectory as a piece of a page."""
        record = self._records[index]
        if hasattr(record, "trajectory"):
            example, trajectory = record.example, record.trajectory
            ranking = _ranking(trajectory, example.query, example.candidates)
            best = min(example.positives, key=ranking.order.index)
            return ranking_fragment(ranking, title=example.query_id, positive=best, key="record-")
        count = max(record.candidate_indices, default=-1) + 1
        unknown = [
            Item(text=f"(candidate {number}: its picture and text are not here)") for number in range(1, count + 1)
        ]
        ranking = _ranking(record, Item(text="(the query is not in this file)"), unknown)
        return ranking_fragment(ranking, title=record.query_id, key="record-")


def build(traces: Traces) -> gr.Blocks:
    """The page. Needs the `space` extra."""
    import gradio as gr

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Trajectories", analytics_enabled=False) as page:
        gr.Markdown(f"# {len(traces.entries):,} trajectories")
        with gr.Row():
            task = gr.Dropdown([ALL, *traces.tasks], value=ALL, label="Task", elem_id="task")
            kind = gr.Radio(FILTERS, value=ALL, label="Show", elem_id="kind")
            order = gr.Radio(ORDERS, value=AS_WRITTEN, label="Order", elem_id="order")
        chosen = gr.Dropdown(_choices(traces.entries), value=0, label="Trajectory", elem_id="chosen")
        with gr.Row():
            before, after = gr.Button("Previous"), gr.Button("Next")
        trace = gr.HTML(traces.html(0), elem_id="trace", apply_default_css=False, padding=True)

        def refresh(*filters: str) -> tuple[Any, str]:
            entries = traces.select(*filters)
            if not entries:
                return gr.Dropdown([], value=None), '<div class="vretrver"><p>None is like that.</p></div>'
            return gr.Dropdown(_choices(entries), value=entries[0].index), traces.html(entries[0].index)

        def move(step: int, index: int | None, *filters: str) -> tuple[Any, str]:
            places = [entry.index for entry in traces.select(*filters)]
            if index not in places:
                return gr.skip(), gr.skip()
            index = places[(places.index(index) + step) % len(places)]
            return index, traces.html(index)

        filters = [task, kind, order]
        for each in filters:
            each.change(refresh, filters, [chosen, trace], **hidden)
        chosen.input(lambda index: traces.html(index), chosen, trace, **hidden)
        before.click(lambda *given: move(-1, *given), [chosen, *filters], [chosen, trace], **hidden)
        after.click(lambda *given: move(1, *given), [chosen, *filters], [chosen, trace], **hidden)
    return page


def serve(traces: Traces, port: int | None = None, open_browser: bool = True) -> None:
    """Serves the page on this computer only, until it is interrupted."""
    import gradio as gr

    page = build(traces)
    page.launch(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=open_browser,
        head=f"<style>{trace_css()}</style>",
        ssr_mode=False,
        footer_links=[],
    )


def _choices(entries: list[Entry]) -> list[tuple[str, int]]:
    return [(entry.label, entry.index) for entry in entries]


def _entry(index: int, trajectory: Trajectory, record: TrajectoryRecord | None) -> Entry:
    task, right = "–", None
    if record is not None:
        from .data.rejection import modalities

        task = f"{record.example.data_source or '–'}: {modalities(record.example)}"
        right = trajectory.candidate_indices[trajectory.order[0]] in record.example.positives
    invalid = trajectory.num_calls - trajectory.num_valid_calls
    counts = trajectory.num_calls, invalid, trajectory.num_tokens
    return Entry(index, trajectory.query_id, task, right, *counts, trajectory.status)


def _ranking(trajectory: Trajectory, query: Item, candidates: list[Item]) -> Ranking:
    """The ranking of one window; candidates outside of it keep their order behind it."""
    order = [trajectory.candidate_indices[place] for place in trajectory.order]
    order += [index for index in range(len(candidates)) if index not in order]
    named = [dataclasses.replace(item, id=item.id or str(index)) for index, item in enumerate(candidates)]
    return Ranking(query, named, order, trajectory.status, [trajectory], query_id=trajectory.query_id)
