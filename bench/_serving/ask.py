"""Asks an engine on its node for log-probabilities of prompts, or measures the time of a step for several numbers of streams.

    python ask.py URL KEY_FILE logprobs <PROMPTS.json
    python ask.py URL KEY_FILE steps 1,4,16,64,256

This file is copied to the head and runs with any Python. The answers are not streamed. So the times include no tunnel, and
almost no time of this program. A step is (time of 72 tokens - time of 8 tokens) / 64 for prompts of 32 tokens. Each time is
the best of REPEATS.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROMPT, SHORT, LONG, VOCABULARY, REPEATS = 32, 8, 72, 128000, 2


def asked(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request to /v1/completions. Return the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise SystemExit(f"HTTP {answer.status}: {text[:500]}")
    value: dict[str, Any] = json.loads(text)
    return value


def logprobs(url: str, key: str, model: str, prompts: list[list[int]], top: int) -> list[dict[str, float]]:
    """For each prompt, the `top` likeliest next tokens with their log-probabilities."""
    answers = []
    for prompt in prompts:
        more = {"max_tokens": 1, "temperature": 0, "logprobs": top, "return_tokens_as_token_ids": True}
        answer = asked(url, key, {"model": model, "prompt": prompt, **more})
        first = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        answers.append({token.removeprefix("token_id:"): value for token, value in first.items()})
    return answers


def step_ms(url: str, key: str, model: str, streams: int) -> float:
    """Milliseconds of one step with this number of concurrent streams."""
    chance = random.Random(time.time())

    def taken(tokens: int) -> float:
        bodies = [
            {
                "model": model,
                "prompt": [chance.randrange(VOCABULARY) for _ in range(PROMPT)],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for _ in range(streams)
        ]
        begun = time.perf_counter()
        with ThreadPoolExecutor(max_workers=streams) as pool:
            answers = list(pool.map(lambda body: asked(url, key, body), bodies))
        seconds = time.perf_counter() - begun
        counts = {answer["usage"]["completion_tokens"] for answer in answers}
        if counts != {tokens}:
            raise SystemExit(f"the request was for {tokens} tokens, but the numbers of tokens in the answers are {counts}")
        return seconds

    taken(SHORT)
    short = min(taken(SHORT) for _ in range(REPEATS))
    long = min(taken(LONG) for _ in range(REPEATS))
    return round((long - short) / (LONG - SHORT) * 1e3, 3)


def main() -> None:
    """See the module."""
    url, key_file, verb, *more = sys.argv[1:]
    key = Path(key_file).read_text().strip()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
    model = json.loads(connection.getresponse().read())["data"][0]["id"]
    if verb == "logprobs":
        given = json.load(sys.stdin)
        answer: Any = logprobs(url, key, model, given["prompts"], given["top"])
    else:
        answer = {int(word): step_ms(url, key, model, int(word)) for word in more[0].split(",")}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
