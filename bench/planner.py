"""Compares deploy's planner with NVIDIA's aiconfigurator: memory and tokens/s of five models on H100 and H200.

aiconfigurator is on the Python index. It uses measured times of vLLM's kernels. It supports neither GH200 nor uneven splits of
pipelines, and it has no commands. This benchmark creates a separate environment for it. aiconfigurator does not use the
network for these models. It takes minutes, since it loads its tables for every estimate.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.nodes.config import LayoutConfig
from deploy.planning import engines, hardware, layouts, models, placement, shards, speed
from deploy.planning.layouts import Question

VERSION = "0.12.0"
MODELS = (
    # Each row has the repository, the degree of tensor parallelism, and whether the model has experts.
    ("meta-llama/Meta-Llama-3.1-8B", 1, False),
    ("Qwen/Qwen3-32B", 2, False),
    ("meta-llama/Meta-Llama-3.1-70B", 4, False),
    ("Qwen/Qwen3-235B-A22B-FP8", 4, True),
    ("openai/gpt-oss-120b", 2, True),
)
GPUS = (("h100-80x8", "h100_sxm"), ("h200-141x8", "h200_sxm"))
STREAMS = (1, 64)
PROMPT = 512

THEIRS = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from aiconfigurator.cli.api import cli_estimate
for repo, tp, experts, system, streams, prompt in json.load(sys.stdin):
    more = {"moe_tp_size": tp, "moe_ep_size": 1} if experts else {}
    made = cli_estimate(
        repo, system, mode="static_gen", backend_name="vllm", isl=prompt, osl=2, batch_size=streams, tp_size=tp, **more
    )
    said = {"tokens_per_s": streams / made.tpot * 1e3, "gib": made.raw["memory"], "version": made.backend_version}
    print(json.dumps(said), flush=True)
"""


def main() -> None:
    """Print one row for each model, kind of GPU and number of streams."""
    asked = [(*model, gpu, streams) for model in MODELS for gpu in GPUS for streams in STREAMS]
    wanted = [(repo, tp, experts, gpu[1], streams, PROMPT) for repo, tp, experts, gpu, streams in asked]
    with tempfile.TemporaryDirectory(prefix="gracefarm-bench-") as folder:
        answers = theirs(environment(Path(folder)), wanted)
    beside = f"ours weights and {layouts.RESERVE / layouts.GIB:g} for what is beside them, theirs in all"
    print(f"aiconfigurator {VERSION}, vLLM {answers[0]['version']}; GiB: {beside}")
    print(f"{'model':30} {'GPUs':>12} {'streams':>7} {'GiB':>7} {'theirs':>7} {'tokens/s':>9} {'theirs':>9} {'ours':>6}")
    for (repo, tp, _, gpu, streams), answer in zip(asked, answers, strict=True):
        gib, rate = ours(repo, gpu[0], tp, streams)
        other = float(answer["tokens_per_s"])
        print(
            f"{repo.rpartition('/')[2]:30} {f'{tp} {gpu[0][:4]}':>12} {streams:>7} {gib:7.1f} {float(answer['gib']):7.1f} "
            f"{rate:9.1f} {other:9.1f} {rate / other - 1:+6.0%}"
        )


def environment(folder: Path) -> Path:
    """Create the environment of aiconfigurator. Return its Python."""
    uv, place = Path(sys.executable).with_name("uv"), folder / "env"
    subprocess.run([uv, "venv", "-q", "--no-project", "--python", sys.executable, place], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "--python", place / "bin" / "python", f"aiconfigurator=={VERSION}"], check=True
    )
    return place / "bin" / "python"


def theirs(python: Path, asked: list[tuple[str, int, bool, str, int, int]]) -> list[dict[str, object]]:
    """The estimates of aiconfigurator, in the order of the questions."""
    process = subprocess.run([python, "-c", THEIRS], input=json.dumps(asked), capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"aiconfigurator {VERSION} failed: {process.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def ours(repo: str, gpu: str, tp: int, streams: int) -> tuple[float, float]:
    """GiB of the weights and of the reserved memory, and tokens/s of all streams together."""
    model = models.built_in(repo, "main")
    if model is None:
        sys.exit(f"{repo} is not a built-in model")
    question = Question(
        engine=engines.engine("vllm"),
        model=model,
        machines=placement.machines_of(hardware.named(gpu), 1),
        forced=LayoutConfig(max_model_len=2 * PROMPT),
    )
    candidate = layouts.evaluate(question, tp, 1)
    held = shards.shares(question.engine, model, layouts.split_of(question, tp), candidate.layout.partition)[0]
    stages = layouts.stage_loads(question, candidate.layout, candidate.slots, held)
    rate = speed.rate(stages, layouts.traffic(model), question.link, streams, PROMPT)
    return candidate.memory.weights_gib + candidate.memory.reserve_gib, rate


if __name__ == "__main__":
    main()
