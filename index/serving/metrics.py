"""Counters of the server: plain numbers, rendered as Prometheus text on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass
class ServerMetrics:
    """Counters since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    "By method and status."
    sent: int = 0
    "Bytes of bodies."
    uploads: Counter[str] = field(default_factory=Counter)
    "By outcome: created, same, or the HTTP status of the refusal."
    gauges: dict[str, tuple[str, float]] = field(default_factory=dict)
    "Name to help and value."

    def request(self, method: str, status: int, size: int) -> None:
        """Count one response."""
        self.requests[method, status] += 1
        self.sent += size

    def text(self) -> bytes:
        """Prometheus' text format."""
        from prometheus_client.exposition import (
            generate_latest,
        )  # imported here: the import is slow, and the server should start quickly

        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """The interface of prometheus_client collectors."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        requests = CounterMetricFamily("gracefarm_index_requests", "Requests answered", labels=["method", "status"])
        for (method, status), count in sorted(self.requests.items()):
            requests.add_metric([method, str(status)], count)
        yield requests
        uploads = CounterMetricFamily("gracefarm_index_uploads", "Uploads by outcome", labels=["outcome"])
        for outcome, count in sorted(self.uploads.items()):
            uploads.add_metric([outcome], count)
        yield uploads
        yield CounterMetricFamily("gracefarm_index_sent_bytes", "Bytes of bodies sent", value=self.sent)
        for name, (help_text, value) in self.gauges.items():
            yield GaugeMetricFamily(f"gracefarm_index_{name}", help_text, value=value)
