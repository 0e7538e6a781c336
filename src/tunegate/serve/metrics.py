"""Figures for Prometheus: what the front counts, and what the engine says of itself when it is asked.

One registry per application, nothing process-wide. Labels hold names of models and of keys, never a client's text, so
there are as many series as these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one server, all named ``tunegate_...``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _Engine()
        self._registry.register(self._engine)
        own: Any = {"registry": self._registry}
        self.requests = Counter("tunegate_requests", "Answered requests", ["route", "status"], **own)
        self.key_requests = Counter("tunegate_key_requests", "Answered requests of a key", ["key", "status"], **own)
        self.key_tokens = Counter("tunegate_key_tokens", "Tokens of a key's prompts and answers", ["key"], **own)
        self.answers = Counter("tunegate_answers", "Finished answers", ["model", "finish"], **own)
        self.prompt_tokens = Counter("tunegate_prompt_tokens", "Tokens of prompts", ["model"], **own)
        self.cached_tokens = Counter("tunegate_cached_tokens", "Of these, not computed again", ["model"], **own)
        self.generated_tokens = Counter("tunegate_generated_tokens", "Tokens of answers", ["model"], **own)
        self.first_token = Histogram(
            "tunegate_time_to_first_token_seconds",
            "From a request to its first text",
            ["model"],
            buckets=SECONDS,
            **own,
        )
        self.queue = Histogram(
            "tunegate_time_in_queue_seconds",
            "Until an answer's prompt is begun, where the engine says it",
            ["model"],
            buckets=SECONDS,
            **own,
        )
        self.request_seconds = Histogram(
            "tunegate_request_seconds", "From a request to the end of its answers", ["model"], buckets=SECONDS, **own
        )
        self.per_token = Histogram(
            "tunegate_time_per_token_seconds",
            "Behind the first, mean of a request",
            ["model"],
            buckets=PER_TOKEN,
            **own,
        )

    def text(self, alive: bool, stats: Mapping[str, Any]) -> bytes:
        """All figures in Prometheus' text format. ``stats``: the engine's own."""
        self._engine.figures = {"up": int(alive), **stats}
        return generate_latest(self._registry)


class _Engine:
    """The engine's figures at this scrape: numbers are gauges, anything else is left out."""

    def __init__(self) -> None:
        self.figures: Mapping[str, Any] = {"up": 0}

    def collect(self) -> Iterable[Metric]:
        for name, value in self.figures.items():
            if isinstance(value, (int, float)):
                yield GaugeMetricFamily(f"tunegate_engine_{name}", f"The engine's {name.replace('_', ' ')}", value)
