"""What Prometheus may ask of this process: the numbers of `GET /metrics`."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The numbers of one service, in a registry of its own: a process may hold several services (tests do)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        self.rows = Counter(
            "brn_ingest_rows", "Rows that were stored and acknowledged.", ["table"], registry=self._registry
        )
        self.batches = Counter(
            "brn_ingest_batches",
            "Batches by what became of them: stored, duplicate (stored before), gone (run deleted), failed, "
            "busy (sent away: too many wait).",
            ["outcome"],
            registry=self._registry,
        )
        self.lag = Histogram(
            "brn_ingest_lag_seconds",
            "From a batch's last byte until it is on disk.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.group = Histogram(
            "brn_ingest_group_batches",
            "Batches written together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self.held_bytes = Gauge(
            "brn_ingest_held_bytes", "Memory that batches on their way to the store take.", registry=self._registry
        )
        self.waiting = Gauge("brn_ingest_queue_batches", "Decoded batches that wait.", registry=self._registry)
        self.query_seconds = Histogram(
            "brn_query_seconds",
            "How long answers took, by route.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.event_streams = Gauge("brn_event_streams", "Event streams that are open.", registry=self._registry)
        self.event_streams_refused = Counter(
            "brn_event_streams_refused", "Event streams refused: too many were open.", registry=self._registry
        )
        self.store_bytes = Gauge(
            "brn_store_bytes", "Bytes of all stored rows on disk, compressed.", registry=self._registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
