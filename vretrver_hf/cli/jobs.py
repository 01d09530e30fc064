"""What the long-running commands share: reading data, telling a model's weights apart, and a bar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from ..tables import percent
from .common import Mistake, one_line


if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..data.rejection import Summary
    from ..journal import Journal

_CONFIGS = ("config.json", "adapter_config.json")
"""Of a model and of an adapter."""

DataOption = Annotated[
    str, typer.Option("--data", metavar="NAME", help="Parquet or JSONL file, folder of parquet files, or hub id.")
]
SplitOption = Annotated[str, typer.Option(help="Split of a folder or of a data set on the hub.")]
ImageRootOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder or zip archive that picture paths start from and all pictures lie below; "
        "the folder of a local source by default."
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only so many queries, from the first.")]
OutOption = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Where the result goes, and the journal to go on from.")
]
MaxTurnTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of one model turn; as saved with the model by default.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
KeepOption = Annotated[
    str,
    typer.Option(
        metavar="RULE",
        help="How right a ranking must be: first (a relevant candidate is first), top-3 (or another number), or any.",
    ),
]


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Tells a setting that cannot work, or a package that is missing, in one line."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise Mistake(str(error)) from error


def check_folder(path: Path, option: str) -> None:
    """Makes a folder that is to be written into, so that a mistake is known before the work is done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"{option} {path}: the folder cannot be made ({error.strerror})") from error


def check_keep(rule: str) -> int | None:
    """The worst rank that `--keep` allows."""
    from ..data.rejection import parse_keep

    try:
        return parse_keep(rule)
    except ValueError as error:
        raise Mistake(f"--keep: {error}") from error


def quiet_datasets() -> None:
    """Keeps the library from talking: what goes wrong is told in one line."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def load_data(data: str, split: str, image_root: Path | None, limit: int | None) -> tuple[Examples, list[str]]:
    """
    The queries of a data set and their ids.

    Raises:
        `Mistake`: if there is no such data, it cannot be read, or is empty, or two queries share an id.
    """
    import datasets

    from ..data.examples import load_examples

    quiet_datasets()
    try:
        examples = load_examples(data, split=split, image_root=image_root, limit=limit)
        keys = examples.query_ids
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Mistake(f"--data {data}: {reason}") from error
    rows: dict[str, int] = {}
    for row, key in enumerate(keys):
        if rows.setdefault(key, row) != row:
            raise Mistake(
                f"--data {data}: rows {rows[key]} and {row} have the same query id {key!r}; give each its own"
            )
    return examples, keys


def weights_digest(model: str | None, engine: str = "transformers") -> str:
    """
    Tells the weights of a model, or of an adapter and its base, from those of others that stood in the same place
    before.

    One row of every tensor is looked at and not all of it: reading gigabytes would take longer than many a job, and
    training changes nearly every tensor that is not frozen, nearly everywhere.

    Raises:
        `Mistake`: if a file of weights is broken.
    """
    from ..reranker import bundled_model

    if engine == "openai":
        return "behind an endpoint"  # whose weights nobody here can tell apart
    folder = bundled_model() if model is None else Path(model) if Path(model).is_dir() else _snapshot(model)
    configs = [path for name in _CONFIGS if (path := folder / name).is_file()]
    digest = hashlib.sha256()
    if [path.name for path in configs] == [_CONFIGS[1]]:
        base = json.loads(configs[0].read_text(encoding="utf-8"))["base_model_name_or_path"]
        digest.update(weights_digest(base).encode())
    for path in configs:
        digest.update(path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(path: Path) -> Iterator[bytes]:
    """Name, type and shape of each tensor of a safetensors file, and its middle row."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape = part.get_shape()
                row = part[shape[0] // 2 : shape[0] // 2 + 1] if len(shape) > 1 else file.get_tensor(name)
                yield f"{name} {part.get_dtype()} {shape} ".encode()
                yield row.flatten().view(torch.uint8).numpy().tobytes()
    except (OSError, SafetensorError) as error:
        raise Mistake(f"{path} is no whole safetensors file: {one_line(str(error))}") from error


def _snapshot(model: str) -> Path:
    """The folder in the cache of a model or an adapter that was loaded from the hub."""
    from ..hub import find

    found = [path for name in _CONFIGS if (path := find(model, name)) is not None]
    return found[0].parent


class Bar:
    """
    A bar on standard error that counts queries and says how long it will take; in a log file it moves rarely.

    Args:
        keys (sequence of `str`):
            The queries of this process.
        journal (`Journal`):
            Says which of them are done already.
        label (`str`):
            What is being done.
        shown (`bool`, *optional*, defaults to `True`):
            Whether there is a bar at all.
    """

    def __init__(self, keys: Sequence[str], journal: Journal, label: str, shown: bool = True):
        from tqdm import tqdm

        patience = 0.5 if sys.stderr.isatty() else 30
        done = sum(key in journal for key in keys)
        self._bar = tqdm(
            total=len(keys), initial=done, unit="query", desc=label, mininterval=patience, disable=not shown
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def step(self, note: str) -> None:
        """Counts a query, and writes behind the bar how things stand."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()


class Progress(Bar):
    """A bar that also says how much is accepted; see [`Bar`]."""

    _accepted = _sampled = _failed = 0

    def add(self, verdicts: Sequence[str | None] | None) -> None:
        """Counts a query by why its trajectories were rejected, if they were; `None` for a query that failed."""
        if verdicts is None:
            self._failed += 1
        else:
            self._accepted += list(verdicts).count(None)
            self._sampled += len(verdicts)
        failed = f", {self._failed} failed" if self._failed else ""
        self.step(f"accepted {percent(self._accepted, self._sampled)}{failed}")


def tell_memory() -> None:
    """Prints the most memory that PyTorch held for this process on a GPU, where it used one."""
    import torch

    if not torch.cuda.is_initialized():
        return
    held = max(torch.cuda.max_memory_reserved(place) for place in range(torch.cuda.device_count()))
    if held:
        print(f"\nGPU memory: {held / 1e9:.1f} GB at most")


def tell(summary: Summary, out: Path, reasons: Mapping[str, str] | None = None) -> None:
    """
    Prints what came of a job: tables, what failed on standard error, and as last line the folder.

    Raises:
        `Mistake`: if nothing was accepted.
    """
    told = summary.reason_table() if reasons is None else summary.reason_table(reasons)
    print(summary.group_table(), told, summary.call_table(), sep="\n\n")
    if summary.errors:
        key, error = next(iter(summary.errors.items()))
        queries = "1 query" if len(summary.errors) == 1 else f"{len(summary.errors)} queries"
        print(f"{queries} failed, first {key}: {one_line(error)}", file=sys.stderr)
    if not summary.total.kept:
        raise Mistake(f"nothing was accepted, so there is nothing to train on; {out / 'README.md'} says why")
    tell_memory()
    print(f"\n{out.absolute()}")
