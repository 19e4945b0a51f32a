"""The counters as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from index.serving.metrics import Metrics


def text(metrics: Metrics, gauges: dict[str, tuple[str, float]]) -> bytes:
    """The text format; `gauges` are name to help and value."""
    registry = CollectorRegistry()
    registry.register(_Collector(metrics, gauges))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, metrics: Metrics, gauges: dict[str, tuple[str, float]]) -> None:
        self._metrics, self._gauges = metrics, gauges

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("gracefarm_index_requests", "Requests answered", labels=["method", "status"])
        for (method, status), count in sorted(self._metrics.requests.items()):
            requests.add_metric([method, str(status)], count)
        yield requests
        uploads = CounterMetricFamily("gracefarm_index_uploads", "Uploads by outcome", labels=["outcome"])
        for outcome, count in sorted(self._metrics.uploads.items()):
            uploads.add_metric([outcome], count)
        yield uploads
        yield CounterMetricFamily("gracefarm_index_sent_bytes", "Bytes of bodies sent", value=self._metrics.sent)
        for name, (help_text, value) in self._gauges.items():
            yield GaugeMetricFamily(f"gracefarm_index_{name}", help_text, value=value)
