"""The bench against a real HTTP server that is as nasty as the engines': tokens by usage, errors counted, streams timed."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
from typing import Any

import pytest

from deploy.engine import completion
from deploy.engine.completion import Answer, CompletionServer, Prompt
from deploy.measure import bench
from deploy.measure.bench import Sweep, SweepReport
from deploy.planning.plans import ServePlan
from gracefarm.errors import EngineError
from tests.deploy import openai_server
from tests.deploy.test_engine_step import a_plan


def ask(url: str, *, patience: float = 5.0, key: str | None = None, **more: Any) -> tuple[Answer, str]:
    """One answer and its text."""
    said: list[str] = []
    prompt = Prompt(**{"model": "org/tiny", "text": "Hello", "max_tokens": 20, "to_the_end": True, **more})

    async def go() -> Answer:
        async with CompletionServer(url=url, key=key).client() as client:
            return await completion.stream(client, prompt, patience=patience, on_text=said.append)

    return asyncio.run(go()), "".join(said)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_chunk_is_not_a_token(api: str) -> None:
    with openai_server.server(delay=0.01, before=0.1) as (url, seen):
        answer, text = ask(url + "/v1/", api=api)
    assert answer.failure is None, answer.cause
    assert (answer.tokens, answer.chunks) == (20, 8)
    assert answer.prompt_tokens
    assert text.count("to\u2028ken") == 20
    assert seen.requests[0]["path"].endswith("/chat/completions" if api == "chat" else "/v1/completions")
    assert answer.first is not None
    assert 0.1 <= answer.first < 0.4
    assert answer.per_token is not None
    assert 0.009 < answer.per_token < 0.03  # a chunk comes every 25 ms


@pytest.mark.parametrize(
    ("fault", "failure", "words"),
    [
        ("error", "stream", "Ray lost a worker"),
        ("stall", "stall", "no text for 0.5 s"),
        ("cut", "cut", ""),
        ("500", "http", "HTTP 500: background loop has errored"),
    ],
)
def test_what_goes_wrong_in_a_stream_is_told(fault: str, failure: str, words: str) -> None:
    with openai_server.server(faults={0: fault}) as (url, _):
        answer, _text = ask(url, patience=0.5)
    assert (answer.failure, words in answer.cause) == (failure, True), answer.cause


def test_patience_is_for_each_chunk_and_not_for_the_answer() -> None:
    with openai_server.server(delay=0.1) as (url, _):
        answer, _text = ask(url, patience=1.0)
    assert answer.failure is None, answer.cause
    assert answer.seconds > 1.5


def test_nobody_there_a_wrong_key_and_no_count_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    assert ask(f"http://127.0.0.1:{free}")[0].failure == "refused"
    with openai_server.server(key="right", usage=False) as (url, _):
        assert ask(url, key="wrong")[0].status == 401
        answer, text = ask(url, key="right")
        assert answer.failure == "usage"
        assert text.count("ken") == 20
        with pytest.raises(EngineError, match="HTTP 401") as error:
            asyncio.run(bench.run_sweep(CompletionServer(url=url, key="wrong"), Sweep(concurrency=[1])))
        assert "OPENAI_API_KEY" in error.value.remedy


def sweep(url: str, plan: ServePlan | None = None, **more: Any) -> SweepReport:
    values = {"concurrency": [1, 4], "requests": 8, "prompt_tokens": 30, "max_tokens": 20, "patience": 1.0, **more}
    return asyncio.run(bench.run_sweep(CompletionServer(url=url), Sweep(**values), plan=plan))


def test_a_sweep_keeps_so_many_under_way_and_counts_what_the_server_counted() -> None:
    plan = a_plan(1)
    price = plan.prediction.model_copy(update={"usd_per_hour": 22.9})
    plan = plan.model_copy(update={"prediction": price})
    with openai_server.server(delay=0.004) as (url, seen):
        report = sweep(url, plan)
    one, four = report.levels
    assert report.to_the_end
    assert seen.most_at_once == 4
    assert len(seen.requests) == 1 + 16
    assert len({each["prompt"] for each in seen.requests[1:]}) == 16  # no prefix for a cache
    assert {each["prompt"].count(" ") + 1 for each in seen.requests[1:]} == {27}
    assert (one.answered, one.tokens, four.tokens) == (8, 160, 160)
    assert one.tokens_per_s == pytest.approx(160 / one.seconds, rel=0.01)
    assert four.tokens_per_s > 2 * one.tokens_per_s
    assert one.first_ms
    assert one.token_ms
    assert one.first_ms.p50 <= one.first_ms.p90 <= one.first_ms.p99
    assert 3.5 < one.token_ms.p50 < 12
    assert one.usd_per_mtok == pytest.approx(22.9 / (one.tokens_per_s * 3600) * 1e6, rel=0.01)
    assert four.predicted_tokens_per_s == plan.prediction.at(4)
    assert report.plan == plan.id


def test_errors_are_counted_and_their_tokens_are_not() -> None:
    # The warm-up is request 0.
    with openai_server.server(faults={1: "error", 2: "500", 3: "stall", 5: "cut"}) as (url, _):
        (level,) = sweep(url, concurrency=[2], patience=0.5).levels
    assert dict(level.errors) == {"stream": 1, "http": 1, "stall": 1, "cut": 1}
    assert (level.answered, level.tokens) == (4, 80)
    assert level.first_error


def test_a_server_without_ignore_eos_is_measured_without() -> None:
    with openai_server.server(ignore_eos=False) as (url, seen):
        report = sweep(url, concurrency=[1])
    assert not report.to_the_end
    assert report.levels[0].tokens == 80  # it ends by itself after 10 of 20
    assert "ignore_eos" not in seen.requests[-1]


def test_percentiles_are_those_of_the_statistics_module() -> None:
    values = [float((number * 7919) % 101) for number in range(57)]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (50, 90, 99):
        assert bench.percentile(values, percent) == pytest.approx(cuts[percent - 1])
    assert bench.percentile([3.0], 99) == 3.0


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy", *arguments], capture_output=True, text=True, check=False, timeout=60, env=env
    )


def test_the_command_without_a_deployment() -> None:
    with openai_server.server(key="sk-my-own-key") as (url, _):
        one = command("ask", "why?", "--api", "completions", "--url", url, "--max-tokens", "9", OPENAI_API_KEY="sk-my-own-key")
        assert one.returncode == 0, one.stderr
        assert one.stdout.count("ken") == 9
        assert "9 tokens in" in one.stderr
        assert "(4 chunks)" in one.stderr
        words = ("--concurrency", "1,2", "--requests", "4", "--max-tokens", "8")
        many = command("bench", "--url", url, *words, "--json", OPENAI_API_KEY="sk-my-own-key")
        assert many.returncode == 0, many.stdout
        report = json.loads(many.stdout.splitlines()[-1])
        assert [each["tokens"] for each in report["levels"]] == [32, 32]
        refused = command("ask", "why?", "--url", url)
        assert refused.returncode == 63
        assert "OPENAI_API_KEY" in refused.stderr
    assert "sk-my-own-key" not in one.stdout + one.stderr + many.stdout + many.stderr + refused.stderr
