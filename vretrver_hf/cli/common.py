"""What the commands share: options, mistakes in one line, and loading a model without noise."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer


if TYPE_CHECKING:
    from ..reranker import Reranker

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Hub id or folder; the bundled tiny model by default.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Where to run: cpu, cuda, cuda:1, …; a GPU where there is one.")
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Number format; auto takes the checkpoint's, and float32 on a CPU.")
]
Engine = Literal["transformers", "vllm", "openai"]
EngineOption = Annotated[
    Engine, typer.Option("--engine", help="What runs the model: transformers or vllm here, or an openai endpoint.")
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="Of the endpoint, such as http://localhost:8000/v1; implies it."),
]
NoToolsOption = Annotated[bool, typer.Option("--no-tools", help="Rank at first sight: the model may not look closer.")]


class Mistake(typer.TyperException):
    """Something that the user can put right. It is told in one line and ends the process with exit code 2."""

    exit_code = 2


def one_line(text: str) -> str:
    """The text on one line, without characters that would do something to a terminal."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split())
    )


def load_reranker(
    model: str | None,
    device: str | None,
    dtype: Dtype,
    engine: Engine = "transformers",
    base_url: str | None = None,
    **settings: Any,
) -> Reranker:
    """
    Loads a model and keeps its libraries quiet.

    Args:
        model (`str`, *optional*):
            Hub id or folder; the bundled model by default.
        device (`str`, *optional*), dtype (`str`):
            As [`TransformersEngine.from_pretrained`] takes them.
        engine (`str`, *optional*, defaults to `"transformers"`), base_url (`str`, *optional*):
            What runs it; an address means an endpoint.
        settings:
            Further arguments of [`Reranker.from_pretrained`].

    Raises:
        `Mistake`: if there is no such model or device, or they cannot be used.
    """
    _hush()
    from safetensors import SafetensorError

    from ..reranker import Reranker

    engine = "openai" if base_url else engine
    place: dict[str, Any] = {"dtype": dtype}
    if engine == "openai":
        place = {"base_url": base_url}
    elif engine == "transformers":
        place["device"] = device
        _check_device(device)
    elif device is not None:
        raise Mistake("--device and processes of accelerate are for transformers; tell vLLM by CUDA_VISIBLE_DEVICES")
    if model is None:
        _use_one_thread()
    elif engine != "openai":
        _check_model(model)
    try:
        return Reranker.from_pretrained(model, engine=engine, **place, **settings)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = _first_line(error)
        raise Mistake(reason if model is None else f"model {model}: {reason}") from error


@contextlib.contextmanager
def engine_mistakes() -> Iterator[None]:
    """Tells in one line that an endpoint does not answer, or that an engine failed."""
    from ..engines.base import EngineError

    try:
        yield
    except EngineError as error:
        raise Mistake(str(error)) from error


def check_output(path: Path, option: str) -> None:
    """Makes the folder of a file that is to be written later, so that a mistake is known before the work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"{option} {path}: its folder cannot be made ({error.strerror})") from error
    if path.is_dir():
        raise Mistake(f"{option} {path} is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Mistake(f"{option} {path} cannot be written; check its permissions")


def _hush() -> None:
    """Advice of libraries is for programmers; only to a person at a terminal are waiting and downloads shown."""
    if sys.stderr.isatty():
        print("Loading …", file=sys.stderr)
    warnings.filterwarnings("ignore")
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Mistake(f"--device {device}: {_first_line(error)}") from error


def _use_one_thread() -> None:
    """The bundled model is too small to gain from more, and on a busy machine threads wait long for each other."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _check_model(name: str) -> None:
    """Looks at a folder before anything heavy is loaded; what the hub has is told by who loads it."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise Mistake(f"model {name}: the folder has no config.json, so it holds no model")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
