"""The command line, `vretrver`. Commands import what is heavy when they run, so that `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import demo, evaluate, push, rank, report, retrieve, sample, serve, synthesize, view
from .common import one_line


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="demo")(demo.demo)
app.command(name="rank")(rank.rank)
app.command(name="evaluate")(evaluate.evaluate)
app.command(name="report")(report.report)
app.command(name="retrieve")(retrieve.retrieve)
app.add_typer(push.push, name="push")
app.command(name="sample")(sample.sample)
app.command(name="serve")(serve.serve)
app.command(name="synthesize")(synthesize.synthesize)
app.command(name="view")(view.view)


@app.callback(invoke_without_command=True)
def vretrver(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False,
) -> None:
    """
    Rerank text and pictures with a model that thinks, looks closer, and says why.

    Start with `vretrver demo`.

    Exit codes: 0 done, 1 something went wrong in the program, 2 something in what you asked for is to be put right
    (one line on standard error says what), 130 interrupted.
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


def main(args: Sequence[str] | None = None) -> None:
    """
    Runs the command line and ends the process with its exit code.

    Args:
        args (sequence of `str`, *optional*):
            Arguments; those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console's encoding may lack what an item or a model writes
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=args, prog_name="vretrver", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as mistake:
        print(f"vretrver: {one_line(mistake.format_message())}", file=sys.stderr)
        code = mistake.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # who read the output has had enough; nothing is left to flush into at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
