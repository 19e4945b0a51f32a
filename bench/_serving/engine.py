"""Compares the engine in a wheel, on a GPU, with transformers: log-probabilities and greedy tokens of the same prompts.

    python -m bench._serving.engine ask MODEL OUT.json [NAME=VALUE…]        asks the engine; NAME is an argument of the engine
    python -m bench._serving.engine serve MODEL OUT.json                    asks the engine's server for the first tokens only
    python -m bench._serving.engine compare FOLDER NAME… [--refused NAME…]  compares the answers

`ask` and `serve` require a Python with the engine. `compare` runs with any Python. FOLDER has reference.json and greedy.json
of bench/_serving/model.py, and NAME.json of each `ask`. The exit code of `compare` is 0 if each NAME agrees with transformers
in 32 bit and each refused NAME does not agree; else 1. A NAME agrees if both of these are true:

- The mean difference of its log-probabilities from those of transformers is at most TIMES the mean difference of transformers
  between 16 and 32 bit. This applies to the first TOP tokens after each prompt, and to the tokens of each prompt.
- Its greedy tokens are the same as those of transformers up to the first near tie. A near tie is a step in which the 32-bit
  log-probabilities of the engine's token and of the likeliest token differ by at most twice the largest difference between 16
  and 32 bit.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench._serving.ask import logprobs
from bench._serving.model import STEPS, TIMES, TOP, differences, prompts


def ask(model: str, out: Path, options: dict[str, Any]) -> None:
    """Send all prompts together. Store the log-probabilities of each prompt and of TOP tokens after it, and greedy tokens."""
    import torch
    from aphrodite import LLM, SamplingParams

    begun = time.monotonic()
    engine = LLM(model=model, max_model_len=1024, max_logprobs=TOP, **options)
    ready = time.monotonic()
    wanted = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=TOP, prompt_logprobs=1)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts()], wanted)
    ended = time.monotonic()
    document = {
        "options": options,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "load_s": round(ready - begun, 1),
        "generate_s": round(ended - ready, 1),
        "next": [],
        "inside": [],
        "greedy": [],
    }
    for prompt, answer in zip(prompts(), answers, strict=True):
        (text,) = answer.outputs
        first = sorted(text.logprobs[0].items(), key=lambda item: -item[1].logprob)[:TOP]
        document["next"].append({str(token): value.logprob for token, value in first})
        pairs = zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
        document["inside"].append([values[token].logprob for token, values in pairs])
        document["greedy"].append(list(text.token_ids))
    out.write_text(json.dumps(document))


def serve(model: str, out: Path) -> None:
    """Start `aphrodite run`, and ask it with bench/_serving/ask.py."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--api-keys", "key"]
    options += ["--max-model-len", "1024", "--max-logprobs", str(TOP), "--return-tokens-as-token-ids"]
    begun = time.monotonic()
    with subprocess.Popen([Path(sys.executable).with_name("aphrodite"), "run", model, *options]) as server:
        try:
            while not healthy(port):
                if server.poll() is not None:
                    sys.exit(f"the server ended with exit code {server.returncode}")
                time.sleep(0.5)
            ready = time.monotonic()
            first = logprobs(f"http://127.0.0.1:{port}", "key", "small", prompts(), TOP)
        finally:
            server.terminate()
    document = {
        "options": {"aphrodite run": options},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "load_s": round(ready - begun, 1),
        "generate_s": round(time.monotonic() - ready, 1),
        "next": first,
    }
    out.write_text(json.dumps(document))


def healthy(port: int) -> bool:
    """Whether the server's /health returns 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def greedy_apart(ours: list[list[int]], theirs: list[list[dict[str, float]]], near: float) -> dict[str, Any]:
    """The number of equal tokens; and for each first difference, the distance of the two tokens according to transformers."""
    same, ties, wrong = 0, [], []
    for mine, steps in zip(ours, theirs, strict=True):
        best = [int(next(iter(step))) for step in steps]
        place = next((place for place, pair in enumerate(zip(mine, best, strict=True)) if pair[0] != pair[1]), len(best))
        same += place
        if place < len(best):
            step = steps[place]
            gap = step[str(best[place])] - step.get(str(mine[place]), float("-inf"))
            (ties if gap <= near else wrong).append(round(gap, 5))
    return {"same": same, "of": sum(map(len, theirs)), "ties": ties, "wrong": wrong, "near": round(near, 5)}


def agrees(
    ours: dict[str, Any], reference: dict[str, Any], greedy: list[list[dict[str, float]]]
) -> tuple[bool, dict[str, Any]]:
    """Whether the answers agree (see the module), and the figures. The answers of a server have only the first tokens."""
    half = reference["half"]
    after = differences(ours["next"], reference["kept"])
    figures: dict[str, Any] = {"next": after, "bounds": {"next": round(TIMES * half["mean"], 5)}}
    holds = after["common"] == 1 and after["mean"] <= figures["bounds"]["next"]
    if "inside" in ours:
        mine, theirs = (
            [dict(zip(map(str, range(len(row))), row, strict=True)) for row in rows]
            for rows in (ours["inside"], reference["inside"])
        )
        figures["inside"] = differences(mine, theirs)
        figures["bounds"]["inside"] = round(TIMES * half["inside_mean"], 5)
        holds &= figures["inside"]["mean"] <= figures["bounds"]["inside"]
    if "greedy" in ours:
        figures["greedy"] = greedy_apart(ours["greedy"], greedy, 2 * max(half["max"], half["inside_max"]))
        holds &= not figures["greedy"]["wrong"]
    return holds, figures


def compare(folder: Path, names: list[str], refused: list[str]) -> bool:
    """Print the figures of each run. Return whether all runs have the expected result."""
    reference = json.loads((folder / "reference.json").read_text())
    greedy = json.loads((folder / "greedy.json").read_text())
    print(f"transformers {reference['transformers']}: 16 bit {reference['half']}, exchanged shards {reference['swapped']}")
    good = True
    for name in [*names, *refused]:
        answers = folder / f"{name}.json"
        if not answers.exists():
            print(f"{name}: there are no answers; see {name}.log")
            good = False
            continue
        ours = json.loads(answers.read_text())
        holds, figures = agrees(ours, reference, greedy)
        (folder / f"{name}.figures.json").write_text(json.dumps(figures, indent=1))
        expected = holds == (name not in refused)
        good &= expected
        verdict = "agrees" if holds else "refused"
        print(f"{name}: {verdict}{'' if expected else ', WHICH IS WRONG'}; {ours['device']}, torch {ours['torch']}")
        print(f"    loaded in {ours['load_s']} s, {len(ours['next'])} prompts in {ours['generate_s']} s, {ours['options']}")
        for what, value in figures.items():
            print(f"    {what}: {value}")
    return good


def main() -> None:
    """See the module."""
    verb, first, *more = sys.argv[1:]
    if verb == "ask":
        out, *pairs = more
        options = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
        ask(first, Path(out), options)
    elif verb == "serve":
        serve(first, Path(more[0]))
    else:
        cut = more.index("--refused") if "--refused" in more else len(more)
        sys.exit(not compare(Path(first), more[:cut], more[cut + 1 :]))


if __name__ == "__main__":
    main()
