"""`vretrver rank`: candidates from the command line, ranked for one query."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    BaseUrlOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    Mistake,
    ModelOption,
    NoToolsOption,
    check_output,
    engine_mistakes,
    load_reranker,
)
from .trace import Trace


if TYPE_CHECKING:
    from ..items import Item


def rank(
    candidate: Annotated[
        list[str] | None, typer.Argument(metavar="CANDIDATE", help="Picture files and texts, in any mixture.")
    ] = None,
    query: Annotated[str | None, typer.Option(metavar="TEXT", help="What is looked for, in words.")] = None,
    query_image: Annotated[str | None, typer.Option(metavar="FILE", help="A picture of what is looked for.")] = None,
    model: ModelOption = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="List only so many of the best.")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Candidates that the model compares at a time; saved with the model.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Step from a window to the next; half of --window where that is given.")
    ] = None,
    no_tools: NoToolsOption = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a web page with the evidence.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    base_url: BaseUrlOption = None,
) -> None:
    """
    Rank candidates for a query, best first, and show how the model came to it.

    A candidate that names a file is a picture, and so is one that ends like a picture's file name; any other is text.
    The query is text, a picture, or both.

    With --json, one object: order (0-based, best first), ids, status, calls, tokens, seconds and trajectories.

    Example: `vretrver rank --query "a cat" photos/*.jpg "Felis catus" --top-k 3 --html ranking.html`
    """
    query_item, candidates = _items(query, query_image, candidate or [])
    if html is not None:
        check_output(html, "--html")
    if window is not None and stride is None:
        stride = window // 2
    settings = {"tools": False if no_tools else None, "window": window, "stride": stride}
    reranker = load_reranker(model, device, dtype, engine, base_url, **settings)
    trace = None if as_json else Trace()
    if trace is not None:
        trace.model(model, reranker)
        trace.ask(query_item, candidates)
    with engine_mistakes(), reranker.engine:
        ranking = reranker.rank(query_item, candidates, top_k=top_k, on_event=None if trace is None else trace.event)
    if html is not None:
        ranking.save_html(html)
    if trace is None:
        print(json.dumps(ranking.to_dict()))
        return
    trace.ranking(ranking)
    if html is not None:
        print(html.absolute())


def _items(query: str | None, query_image: str | None, candidates: list[str]) -> tuple[Item, list[Item]]:
    """All items, each picture read once: what is wrong with one is told before a model is loaded."""
    from ..images import ItemError
    from ..items import Item, coerce_candidates, coerce_query

    if not (query or "").strip() and query_image is None:
        raise Mistake("no query: give --query TEXT, --query-image FILE, or both")
    if not candidates:
        raise Mistake("no candidates: name at least one file or text")
    try:
        query_item = coerce_query(Item(text=query, image=query_image))
        # What lies on the disk is a file, whatever its name; a string alone would be judged by its suffix.
        items = coerce_candidates(Path(value) if os.path.exists(value) else value for value in candidates)
        for name, item in [("query", query_item), *((f"candidate {n}", item) for n, item in enumerate(items, 1))]:
            if item.image is not None:
                item.load_image(name=name)
    except ItemError as error:
        raise Mistake(str(error).partition("; if you meant text")[0]) from error  # a hint for programmers
    return query_item, items
