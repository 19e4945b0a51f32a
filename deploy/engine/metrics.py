"""Reads an engine's /metrics, with the names of Aphrodite and vLLM, summed over models."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

PREFIXES = ("aphrodite:", "vllm:")


class EngineMetrics(BaseModel):
    """Counters since the engine's start, and gauges. None: the engine does not have this metric."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    generation_tokens_total: float | None = None
    prompt_tokens_total: float | None = None
    num_requests_running: float | None = None
    num_requests_waiting: float | None = None
    num_preemptions_total: float | None = None
    cache: float | None = None
    "Used share of the KV cache, from 0 to 1."
    first_sum: float | None = None
    "Sum of the seconds to the first token, of `first_count` requests."
    first_count: float | None = None


_OTHER_NAMES = {
    "gpu_cache_usage_perc": "cache",
    "kv_cache_usage_perc": "cache",
    "time_to_first_token_seconds_sum": "first_sum",
    "time_to_first_token_seconds_count": "first_count",
}


def parse(text: str) -> EngineMetrics | None:
    """Parse the text of /metrics; None if it has no metrics of an engine."""
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                prefix = next((known for known in PREFIXES if sample.name.startswith(known)), None)
                if prefix is None:
                    continue
                short = sample.name.removeprefix(prefix)
                name = _OTHER_NAMES.get(short, short)
                if name in EngineMetrics.model_fields:
                    values[name] = values.get(name, 0.0) + sample.value
    except ValueError:  # from the parser, for another format
        return None
    return EngineMetrics(**values) if values else None


async def scrape(local: int, seconds: float = 10) -> EngineMetrics | None:
    """The metrics of the server at 127.0.0.1:`local`; None if they cannot be read. No key is necessary."""
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{local}", timeout=seconds, trust_env=False) as client:
            response = await client.get("/metrics")
    except httpx.HTTPError:
        return None
    return parse(response.text) if response.status_code == 200 else None


def rate(before: EngineMetrics | None, after: EngineMetrics | None, seconds: float) -> float | None:
    """Tokens/s between two measurements; None: unknown, or the engine was restarted in between."""
    if not before or not after or before.generation_tokens_total is None or after.generation_tokens_total is None:
        return None
    tokens = after.generation_tokens_total - before.generation_tokens_total
    return tokens / seconds if tokens >= 0 and seconds > 0 else None


def moved(before: EngineMetrics | None, after: EngineMetrics | None) -> bool:
    """Whether tokens were generated between two measurements."""
    return bool(before and after and (after.generation_tokens_total or 0) > (before.generation_tokens_total or 0))


def first(before: EngineMetrics | None, after: EngineMetrics | None) -> float | None:
    """Mean seconds to the first token, of the requests between two measurements; None: there were none."""
    if not before or not after or None in (before.first_sum, after.first_sum, before.first_count, after.first_count):
        return None
    count = (after.first_count or 0) - (before.first_count or 0)
    return ((after.first_sum or 0) - (before.first_sum or 0)) / count if count > 0 else None
