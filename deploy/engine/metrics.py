"""What an engine's /metrics say: aphrodite's and vLLM's names, summed over models."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

PREFIXES = ("aphrodite:", "vllm:")


class EngineMetrics(BaseModel):
    """Counters since its start, gauges of now. None: the engine has no such one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    generation_tokens_total: float | None = None
    prompt_tokens_total: float | None = None
    num_requests_running: float | None = None
    num_requests_waiting: float | None = None
    num_preemptions_total: float | None = None
    cache: float | None = None
    "Of the KV cache, 0 to 1."
    first_sum: float | None = None
    "Seconds until the first token, of `first_count` requests."
    first_count: float | None = None


_OTHER_NAMES = {
    "gpu_cache_usage_perc": "cache",
    "kv_cache_usage_perc": "cache",
    "time_to_first_token_seconds_sum": "first_sum",
    "time_to_first_token_seconds_count": "first_count",
}


def parse(text: str) -> EngineMetrics | None:
    """None: nothing of an engine is in it."""
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
    except ValueError:  # the parser's, for what is no exposition
        return None
    return EngineMetrics(**values) if values else None


async def scrape(local: int, seconds: float = 10) -> EngineMetrics | None:
    """Of the server behind 127.0.0.1:`local`; None: not to be had. They need no key."""
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{local}", timeout=seconds, trust_env=False) as client:
            response = await client.get("/metrics")
    except httpx.HTTPError:
        return None
    return parse(response.text) if response.status_code == 200 else None


def rate(before: EngineMetrics | None, after: EngineMetrics | None, seconds: float) -> float | None:
    """Tokens/s between two; None: unknown, or the engine was started in between."""
    if not before or not after or before.generation_tokens_total is None or after.generation_tokens_total is None:
        return None
    tokens = after.generation_tokens_total - before.generation_tokens_total
    return tokens / seconds if tokens >= 0 and seconds > 0 else None


def moved(before: EngineMetrics | None, after: EngineMetrics | None) -> bool:
    """Tokens were made between two looks."""
    return bool(before and after and (after.generation_tokens_total or 0) > (before.generation_tokens_total or 0))


def first(before: EngineMetrics | None, after: EngineMetrics | None) -> float | None:
    """Mean seconds until the first token, of requests between two; None: there was none."""
    if not before or not after or None in (before.first_sum, after.first_sum, before.first_count, after.first_count):
        return None
    count = (after.first_count or 0) - (before.first_count or 0)
    return ((after.first_sum or 0) - (before.first_sum or 0)) / count if count > 0 else None
