"""`vretrver view`: look through trajectories in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Mistake, one_line


def view(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder that vretrver sample wrote, or a trajectories.jsonl.")
    ],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; a free one by default.")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only serve the page.")] = False,
) -> None:
    """
    Look through trajectories in a browser: the wrong ones, those with invalid calls, those with most calls, by task.

    The page is served on this computer only. Needs the `space` extra. End it with Ctrl-C.

    Example: `vretrver view outputs/accepted`
    """
    from ..viewer import Traces, serve

    try:
        traces = Traces(source)
        serve(traces, port, not no_browser)
    except ImportError as error:
        raise Mistake('viewing needs gradio: pip install "vretrver-hf[space]"') from error
    except (OSError, ValueError) as error:
        raise Mistake(one_line(str(error))) from error
