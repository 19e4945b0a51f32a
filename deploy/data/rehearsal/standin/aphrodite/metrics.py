"""The engine's /metrics, with its names."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest


class Metrics:
    """Metrics of one model."""

    def __init__(self, model: str, blocks: int) -> None:
        self.registry = CollectorRegistry()
        label = ["model_name"]

        def gauge(name: str) -> Gauge:
            return Gauge(f"aphrodite:{name}", name, label, registry=self.registry).labels(model)

        def counter(name: str) -> Counter:
            return Counter(f"aphrodite:{name}", name, label, registry=self.registry).labels(model)

        def histogram(name: str) -> Histogram:
            return Histogram(f"aphrodite:{name}", name, label, registry=self.registry).labels(model)

        self.running, self.waiting = gauge("num_requests_running"), gauge("num_requests_waiting")
        for name in ("num_requests_swapped", "gpu_cache_usage_perc", "cpu_cache_usage_perc"):
            gauge(name).set(0)
        counter("num_preemptions_total")
        self.prompt, self.generation = counter("prompt_tokens_total"), counter("generation_tokens_total")
        self.first, self.each = histogram("time_to_first_token_seconds"), histogram("time_per_output_token_seconds")
        self.whole, self.count = histogram("e2e_request_latency_seconds"), histogram("request_generation_tokens")
        self.success = Counter(
            "aphrodite:request_success_total", "Finished", [*label, "finished_reason"], registry=self.registry
        )
        self.model = model
        Info("aphrodite:cache_config", "Cache", registry=self.registry).info({"num_gpu_blocks": str(blocks)})

    def queues(self, running: int, waiting: int) -> None:
        """Set the numbers of requests."""
        self.running.set(running)
        self.waiting.set(waiting)

    def token(self, number: int, arrived: float, prompt: int) -> None:
        """Count a generated token."""
        self.generation.inc()
        if number == 1:
            self.prompt.inc(prompt)
            self.first.observe(time.monotonic() - arrived)
        else:
            self.each.observe((time.monotonic() - arrived) / number)

    def finished(self, tokens: int, arrived: float, reason: str) -> None:
        """Count a finished request."""
        self.whole.observe(time.monotonic() - arrived)
        self.count.observe(tokens)
        self.success.labels(self.model, reason).inc()

    def text(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)
