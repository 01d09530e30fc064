"""Reranking over HTTP, in the shape that Jina, Cohere and vLLM clients send. Needs the `serve` extra."""

from .app import create_app
from .connections import server_config
from .limits import Limits


__all__ = ["Limits", "create_app", "server_config"]
