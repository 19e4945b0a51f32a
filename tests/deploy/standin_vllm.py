"""STAND-IN for the program `vllm` of vLLM 0.26.0, not the original. It has only `vllm bench serve`, without a tokenizer.

Like the original, it refuses unknown options with exit code 2, takes the key from OPENAI_API_KEY, uses the proxies of the
environment, requires the files of the tokenizer, sends the same prompts again with the same --seed, counts failed requests
without a reason, and writes its result only at the end.

A file `mode` beside the program orders a fault: `old` has no command `bench`, `traceback` fails with exit code 1, `no-file`
and `half-file` end with exit code 0, `hang` ignores SIGTERM. The program writes its arguments to the file `seen`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    """The options of the original that `deploy bench` uses."""
    top = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    commands = top.add_subparsers(required=True)
    commands.add_parser("serve")
    if mode() != "old":
        serve = commands.add_parser("bench").add_subparsers(required=True).add_parser("serve", allow_abbrev=False)
        serve.add_argument("--backend", choices=["openai", "openai-chat"], default="openai")
        for name in ("--base-url", "--endpoint", "--model", "--tokenizer", "--result-dir", "--result-filename"):
            serve.add_argument(name)
        serve.add_argument("--tokenizer-mode", default="auto")
        serve.add_argument("--dataset-name", choices=["random"], default="random")
        for name, default in (("--random-input-len", 1024), ("--random-output-len", 128), ("--num-prompts", 1000)):
            serve.add_argument(name, type=int, default=default)
        serve.add_argument("--seed", type=int, default=0)
        serve.add_argument("--max-concurrency", type=int)
        serve.add_argument("--temperature", type=float)
        serve.add_argument("--percentile-metrics", default="ttft,tpot,itl")
        serve.add_argument("--metric-percentiles", default="99")
        for name in ("--ignore-eos", "--save-result", "--disable-tqdm", "--trust-remote-code"):
            serve.add_argument(name, action="store_true")
    return top


def mode() -> str:
    """The fault that the file `mode` orders."""
    path = HERE / "mode"
    return path.read_text().strip() if path.exists() else ""


class Answer:
    """One request, with its times."""

    def __init__(self, options: argparse.Namespace, prompt: str) -> None:
        chat = options.backend == "openai-chat"
        assert options.endpoint.endswith("chat/completions" if chat else "completions")
        self.body: dict[str, Any] = {"model": options.model, "max_tokens": options.random_output_len, "stream": True}
        self.body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        self.body |= {"stream_options": {"include_usage": True}, "ignore_eos": options.ignore_eos}
        if options.temperature is not None:
            self.body["temperature"] = options.temperature
        self.url = options.base_url + options.endpoint
        self.times: list[float] = []
        self.begun = 0.0
        self.usage: dict[str, int] = {}

    def send(self) -> None:
        """Send the request. As in the original, an answer without text and usage counts as failed."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}
        self.begun = time.perf_counter()
        try:
            request = urllib.request.Request(self.url, json.dumps(self.body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                for line in response:
                    self.read(line)
        except (OSError, ValueError):
            self.usage = {}  # the original stores the reason of a failure only with --save-detailed

    def read(self, line: bytes) -> None:
        """Read a line of the stream."""
        if not line.startswith(b"data: {"):
            return
        chunk = json.loads(line.removeprefix(b"data: "))
        if chunk.get("object") == "error":
            raise ValueError(chunk["message"])
        for choice in chunk["choices"]:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                self.times.append(time.perf_counter())
        self.usage = chunk.get("usage") or self.usage

    @property
    def tokens(self) -> int:
        """The number of tokens according to the server."""
        return self.usage.get("completion_tokens", 0)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result with the keys of the original."""
    source = random.Random(options.seed)
    limit = asyncio.Semaphore(options.max_concurrency)
    answers = []
    for _ in range(options.num_prompts):
        words = " ".join(source.choice(["wheel", "lock", "node", "rank"]) for _ in range(options.random_input_len))
        answers.append(Answer(options, words))

    async def send(answer: Answer) -> None:
        async with limit:
            await asyncio.to_thread(answer.send)

    begun = time.perf_counter()
    await asyncio.gather(*(send(answer) for answer in answers))
    duration = time.perf_counter() - begun
    good = [answer for answer in answers if answer.usage]
    output = sum(answer.tokens for answer in good)
    series = {
        "ttft": [answer.times[0] - answer.begun for answer in good],
        "tpot": [(answer.times[-1] - answer.times[0]) / (answer.tokens - 1) for answer in good if answer.tokens > 1],
        "itl": [later - earlier for answer in good for earlier, later in zip(answer.times, answer.times[1:], strict=False)],
    }
    result: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": None,
        "model_id": options.model,
        "tokenizer_id": options.tokenizer,
        "num_prompts": options.num_prompts,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": options.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": sum(answer.usage["prompt_tokens"] for answer in good),
        "total_output_tokens": output,
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": output / duration,
    }
    for name in options.percentile_metrics.split(","):
        for percent in options.metric_percentiles.split(","):
            values = series[name] or [0.0]
            cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
            result[f"p{percent}_{name}_ms"] = 1000 * cuts[int(percent) - 1]
    return result


def main() -> None:
    options = parser().parse_args()
    with (HERE / "seen").open("a") as seen:
        environ = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "OPENAI_API_KEY")}
        seen.write(json.dumps({"argv": sys.argv, "environ": environ}) + "\n")
    print("INFO Namespace(" + ", ".join(f"{name}={value!r}" for name, value in vars(options).items()) + ")", flush=True)
    if mode() == "traceback":
        raise ValueError("the tokenizer class of this model does not exist")
    if not (Path(options.tokenizer) / "tokenizer.json").exists():
        raise OSError(f"Can't load tokenizer for '{options.tokenizer}'")
    place = Path(options.result_dir) / options.result_filename
    place.parent.mkdir(parents=True, exist_ok=True)
    if mode() == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    result = asyncio.run(measure(options))
    text = json.dumps(result)
    if mode() != "no-file" and options.save_result:
        place.write_text(text[: len(text) // 2] if mode() == "half-file" else text)
    print("=" * 50, end="", flush=True)


if __name__ == "__main__":
    main()
