"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..ranking import Ranking
from .worker import Worker


_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """
    Counters and clocks of one server.

    Args:
        worker (`Worker`):
            Whose queue is shown.
    """

    def __init__(self, worker: Worker):
        self._registry = CollectorRegistry()
        options = {"registry": self._registry, "namespace": "vretrver"}
        self._requests = Counter("requests", "Rerank requests by HTTP status.", ["status"], **options)
        self._seconds = Histogram("request_seconds", "Time of answered requests.", buckets=_BUCKETS, **options)
        self._rankings = Counter("rankings", "Rankings by status: ok, repaired, fallback.", ["status"], **options)
        self._documents = Counter("documents", "Documents ranked.", **options)
        self._calls = Counter("tool_calls", "Tool calls that the model made.", **options)
        self._tokens = Counter("tokens", "Tokens read and written.", **options)
        Gauge("requests_here", "Requests being read, waiting or under way.", **options).set_function(
            lambda: worker.num_requests
        )
        Gauge("requests_waiting", "Requests waiting for the engine.", **options).set_function(
            lambda: worker.num_waiting
        )

    def answered(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def ranked(self, ranking: Ranking) -> None:
        self._rankings.labels(ranking.status).inc()
        self._documents.inc(len(ranking.order))
        self._calls.inc(ranking.num_calls)
        self._tokens.inc(ranking.num_tokens)

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
