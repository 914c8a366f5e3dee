"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and times of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.verdicts = Counter(
            "efficientad_verdicts",
            "Pictures that were judged, stored and answered",
            ("model", "verdict"),
            registry=registry,
        )
        self.refused = Counter(
            "efficientad_refused", "Requests that were refused", ("status",), registry=registry
        )
        self.seconds = Histogram(
            "efficientad_request_seconds",
            "From a picture's last byte to its answer, and the parts of that",
            ("model", "part"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "efficientad_batch_images",
            "Pictures in a batch",
            ("model",),
            buckets=_BATCHES,
            registry=registry,
        )
        self.deliveries = Counter(
            "efficientad_deliveries",
            "Verdicts delivered, tries that failed, verdicts refused for good or deleted before",
            ("sink", "result"),
            registry=registry,
        )
        self._gauges: list[Gauge] = []

    def gauge(self, name: str, text: str, value: Callable[[], float], **labels: str) -> None:
        """A figure that is asked for when it is shown."""
        known = [g for g in self._gauges if g._name == name]
        gauge = known[0] if known else Gauge(name, text, tuple(labels), registry=self.registry)
        if not known:
            self._gauges.append(gauge)
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
