"""`vretrver serve`: a rerank server."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BaseUrlOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    Mistake,
    ModelOption,
    NoToolsOption,
    load_reranker,
)
from .jobs import mistakes


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(help="Name that requests may call the model by, besides default. Repeatable.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the key that requests must bring, if set.")
    ] = "VRETRVER_API_KEY",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows under way at a time; others wait.")] = 16,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time; others are answered 429.")] = 128,
    max_connections: Annotated[int, typer.Option(min=2, help="Open connections; others are closed.")] = 512,
    max_documents: Annotated[int, typer.Option(min=1, help="Documents of a request.")] = 200,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 64 * 2**20,
    max_characters: Annotated[
        int, typer.Option(min=1, help="Characters of a text: the query's, a document's.")
    ] = 20_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = 16_000_000,
    max_total_pixels: Annotated[int, typer.Option(min=1, help="Pixels of all pictures of a request.")] = 160_000_000,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds for a request from its arrival on; then 504, or 408 while it is read."),
    ] = 300,
    allow_files: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", exists=True, file_okay=False, help="Let documents name pictures below it."),
    ] = None,
    no_tools: NoToolsOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "transformers",
    base_url: BaseUrlOption = None,
) -> None:
    """
    Serve a model over HTTP, in the shape that Jina, Cohere and vLLM clients send.

    POST /v1/rerank (also /v2/rerank and /rerank) takes model ("default", or a --name), query, documents, top_n and
    return_documents. A query or document is a text, or {"text": …, "image": a data: URL}. With "evidence": true the
    answer also has what the model thought, called and saw. relevance_score is 1 − place/n: a listwise ranking has an
    order and no other score.

    GET /health answers 200 while requests are taken, and 503 with the reason once the engine has failed for good or
    the server is to end. GET /metrics speaks to Prometheus. Requests at the same time share the model's batch. SIGTERM
    and Ctrl-C finish the requests that were taken, and end.

    URLs are never fetched, and files are not read unless --allow-files says which.

    Example: `vretrver serve --model V-Retrver/V-Retrver-7B --device cuda --dtype bfloat16 --host 0.0.0.0`
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise Mistake(f"{package} is not installed: pip install 'vretrver-hf[serve]'")
    listener = _listen(host, port)  # a port in use is told before a model is loaded

    import uvicorn

    from ..server import Limits, create_app, server_config

    with mistakes():
        limits = Limits(
            max_documents=max_documents,
            max_bytes=max_bytes,
            max_characters=max_characters,
            max_pixels=max_pixels,
            max_total_pixels=max_total_pixels,
            max_requests=max_requests,
            max_connections=max_connections,
            seconds=timeout,
            image_root=allow_files,
        )
    tools = False if no_tools else None
    reranker = load_reranker(model, device, dtype, engine, base_url, tools=tools, max_sessions=batch_size)
    names = [*(name or []), *([model] if model else ["vretrver-tiny"])]
    with reranker.engine:
        try:
            application = create_app(reranker, names, limits, os.environ.get(api_key_env) or None)
        except ValueError as error:
            raise Mistake(f"{names[-1]} cannot be served: {error}") from error
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listener.getsockname()[1]} serves {', '.join(names)}", file=sys.stderr, flush=True)
        listener.listen(2048)
        # uvicorn raises the signal again once it is done, which would end the process before the engine.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        uvicorn.Server(server_config(application, limits, log_level="warning")).run([listener])


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, which does not accept connections yet."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise Mistake(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener
