"""`vretrver push`: models, data, trajectories and the Space, to the hub."""

from __future__ import annotations

import contextlib
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import Mistake, one_line
from .jobs import ImageRootOption, SplitOption


if TYPE_CHECKING:
    from ..hub import Push

push = typer.Typer(help="Publish a model, data, trajectories or the Space on the hub.", no_args_is_help=True)

RepoArgument = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where there is none.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would go where, and the card; change nothing.")
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="Let everybody see a new repository. One that exists stays as it is.")
]
RevisionOption = Annotated[str, typer.Option(metavar="BRANCH", help="Made where there is none.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the revision holds, as a whole; its history stays.")
]
MessageOption = Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's message.")]
LicenseOption = Annotated[str, typer.Option(metavar="NAME", help="Licence, by its name on the hub, as cc-by-4.0.")]
AttributionOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Whose work this is; goes along as ATTRIBUTION.md.")
]


@push.command()
def model(
    folder: Annotated[
        Path, typer.Argument(help="What a training stage or save_pretrained wrote; or the word bundled.")
    ],
    repo: RepoArgument,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="As cc-by-4.0; that of the model's own card by default.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="What evaluate wrote, or a list of rows; FOLDER/evaluation.json else."),
    ] = None,
    public: PublicOption = False,
    revision: RevisionOption = "main",
    overwrite: OverwriteOption = False,
    message: MessageOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """
    Push a model or an adapter, with a card made from what ran.

    Only safetensors weights, processor, protocol and what belongs to the card go along; checkpoints and optimizer
    states stay. Use `bundled` as FOLDER for the model that comes with the package.

    Example: `vretrver push model outputs/v-retrver-7b/grpo someone/reranker --license apache-2.0 --dry-run`
    """
    from .. import hub
    from ..cards import read_figures
    from ..reranker import bundled_model

    with _mistakes():
        source = bundled_model() if str(folder) == "bundled" else folder
        figures = None if results is None else read_figures(results)
        options = _options(public, revision, overwrite, message)
        _run(hub.model_push(source, repo, license=license, figures=figures, **options), dry_run)


@push.command()
def data(
    source: Annotated[str, typer.Argument(help="Parquet or JSONL file, folder of parquet files, or hub id.")],
    repo: RepoArgument,
    license: LicenseOption,
    split: SplitOption = "train",
    image_root: ImageRootOption = None,
    attribution: AttributionOption = None,
    public: PublicOption = False,
    revision: RevisionOption = "main",
    overwrite: OverwriteOption = False,
    message: MessageOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """
    Push queries with candidates and labels, as parquet with every picture in it.

    Example: `vretrver push data train.parquet someone/queries --license cc-by-4.0 --attribution ATTRIBUTION.md`
    """
    from .. import hub

    with _mistakes():
        options = _options(public, revision, overwrite, message)
        push = hub.data_push(
            source, repo, license=license, split=split, image_root=image_root, attribution=attribution, **options
        )
        _run(push, dry_run)


@push.command()
def trajectories(
    folder: Annotated[Path, typer.Argument(help="What vretrver sample or synthesize wrote.")],
    repo: RepoArgument,
    license: LicenseOption,
    attribution: AttributionOption = None,
    public: PublicOption = False,
    revision: RevisionOption = "main",
    overwrite: OverwriteOption = False,
    message: MessageOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """
    Push trajectories as a data set that the hub's viewer shows: queries, candidates, thoughts, and what was looked at.

    Example: `vretrver push trajectories outputs/accepted someone/traces --license cc-by-4.0`
    """
    from .. import hub

    with _mistakes():
        options = _options(public, revision, overwrite, message)
        _run(hub.trajectories_push(folder, repo, license=license, attribution=attribution, **options), dry_run)


@push.command()
def space(
    repo: RepoArgument,
    public: PublicOption = False,
    revision: RevisionOption = "main",
    overwrite: OverwriteOption = False,
    message: MessageOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """
    Push the Space: its app, this package and the bundled model.

    Example: `vretrver push space someone/rerank --dry-run`
    """
    from .. import hub

    with _mistakes():
        _run(hub.space_push(repo, **_options(public, revision, overwrite, message)), dry_run)


def _options(public: bool, revision: str, overwrite: bool, message: str | None) -> dict:
    return {"private": not public, "revision": revision, "overwrite": overwrite, "message": message}


@contextlib.contextmanager
def _mistakes():
    """Tells what the user can put right in one line."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise Mistake(one_line(str(error))) from error


def _run(staging: AbstractContextManager[Push], dry_run: bool) -> None:
    with staging as push:
        print(_plan(push))
        if dry_run:
            print(f"{'hub':<10}{_remote(push)}\n\n{push.card}")
        else:
            print(push.upload())


def _plan(push: Push) -> str:
    files = push.files
    seen = "private, where it is new" if push.private else "public, where it is new"
    lines = [f"{push.repo_type:<10}{push.repo_id} at {push.revision} ({seen})"]
    lines += [f"{_size(size):>10}  {path}" for path, size in files.items()]
    lines.append(f"{_size(sum(files.values())):>10}  in {len(files)} files")
    return "\n".join(lines)


def _remote(push: Push) -> str:
    """What the hub would do; that it cannot be asked is no mistake of a trial."""
    from ..hub import HubError

    try:
        remote = push.check()
    except HubError as error:
        return f"would refuse, or was not asked: {error}"
    if not remote.exists:
        return "the repository would be made"
    whose = "private" if remote.private else "public"
    gone = f", {len(remote.other)} others would be replaced" if remote.other else ""
    return f"the repository exists and is {whose}; {len(remote.same)} of the files are there{gone}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
