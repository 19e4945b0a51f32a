"""Measures the engine with `vllm bench serve` on the head, so that neither the tunnel nor this machine is measured.

It runs as a detached job, once for each number of concurrent requests, and writes its result to a file in the job's folder.
The job prints this file as the last line of its log. Options and keys of the result are those of vLLM 0.26.0.
"""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy.engine.completion import Api
from deploy.fleet.jobs import JobStatus, follow_job, job_status, start_job, stop_job
from deploy.fleet.results import require
from deploy.fleet.ssh import Fleet
from deploy.measure.bench import Level, Spread, Sweep, predicted_rate, usd_per_mtok
from deploy.nodes import paths, redact
from deploy.nodes.deployment import Deployment
from deploy.planning.commands import option
from deploy.planning.plans import ServePlan
from gracefarm.errors import NodeError
from gracefarm.files import atomic_write
from gracefarm.process import last_line

BACKENDS: dict[Api, tuple[str, str]] = {
    "completions": ("openai", "/v1/completions"),
    "chat": ("openai-chat", "/v1/chat/completions"),
}
"Values of --backend and --endpoint."
MISSING = (2, 126, 127)
"Exit codes of argparse for an unknown command or option, and of the shell for a program that it cannot start."
RESULT = "gracefarm-result "
"Start of the job's last line. The rest is the result file."
SCRIPT = f"""
trap 'rm -rf "$0"' EXIT
trap 'exit 143' TERM
"$@" --result-dir "$0" --result-filename result.json || exit
printf '\\n{RESULT}'
cat "$0/result.json" 2>/dev/null
:
"""
"$0: folder for the result. The other arguments: the command."


class NoVllmBenchError(NodeError):
    """The engine's environment has no `vllm bench serve` that accepts the options of `deploy bench`."""


class VllmResult(BaseModel):
    """The used keys of the result file."""

    model_config = ConfigDict(frozen=True)

    completed: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    output_throughput: float
    p50_ttft_ms: float
    p90_ttft_ms: float
    p99_ttft_ms: float
    p50_tpot_ms: float
    p90_tpot_ms: float
    p99_tpot_ms: float
    p50_itl_ms: float
    p90_itl_ms: float
    p99_itl_ms: float


@dataclass(frozen=True, kw_only=True)
class VllmBench:
    """`vllm bench serve` for a deployment."""

    fleet: Fleet
    deployment: Deployment
    plan: ServePlan
    sweep: Sweep
    key: str | None = field(repr=False)

    async def level(self, model: str, concurrency: int) -> Level:
        """Measure one level. The job and its files are removed, also if this call is cancelled.

        Raises:
            NoVllmBenchError: the environment does not have the program.
            NodeError: it failed, it wrote no result, or another measurement is running.
            SshError: the head cannot be reached.
        """
        head, lines = self.deployment.head, deque[str](maxlen=2000)
        folder = f"{await self.fleet.folder(head)}/jobs/{paths.BENCH_JOB}"
        if (await job_status(self.fleet, head, paths.BENCH_JOB)).state == "running":
            raise NodeError(
                f"{head.name}: another `vllm bench serve` of this deployment is running",
                remedy="wait until it has ended, then repeat the command; or measure with --client own",
            )
        command = ["sh", "-c", SCRIPT, f"{folder}/result", *self._command(model, concurrency)]
        # The program would send its requests to a proxy of the login.
        env = {**self.plan.serve_env, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        try:
            await start_job(self.fleet, head, paths.BENCH_JOB, command, {**env, "OPENAI_API_KEY": self.key or ""})
            status = await follow_job(self.fleet, head, paths.BENCH_JOB, lines.append)
        finally:
            await stop_job(self.fleet, head, paths.BENCH_JOB, grace=5)
            require(await self.fleet.run(["rm", "-rf", folder], nodes=[head], timeout=60), f"removing {folder}")
        return self._level(self._result(status, lines), concurrency)

    def _command(self, model: str, concurrency: int) -> list[str]:
        plan, sweep = self.plan, self.sweep
        backend, endpoint = BACKENDS[sweep.api]
        weights = paths.weights(paths.root(self.deployment), plan.model, plan.revision)
        mode = option(plan.serve, "--tokenizer-mode")
        return [
            *(paths.program(self.deployment, "vllm"), "bench", "serve"),
            *("--backend", backend, "--endpoint", endpoint),
            *("--base-url", f"http://127.0.0.1:{self.deployment.data.ports.engine}"),
            *("--model", model, "--tokenizer", option(plan.serve, "--tokenizer") or weights),
            *(("--tokenizer-mode", mode) if mode else ()),
            *(("--trust-remote-code",) if "--trust-remote-code" in plan.serve else ()),
            # With the default seed, all levels have the same prompts, which the engine finds in its prefix cache.
            *("--dataset-name", "random", "--seed", str(secrets.randbits(31))),
            *("--random-input-len", str(sweep.prompt_tokens), "--random-output-len", str(sweep.max_tokens)),
            *("--num-prompts", str(sweep.count(concurrency)), "--max-concurrency", str(concurrency)),
            *("--ignore-eos", "--temperature", "0"),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,90,99"),
            *("--save-result", "--disable-tqdm"),
        ]

    def _result(self, status: JobStatus, lines: deque[str]) -> VllmResult:
        head, what = self.deployment.head, "`vllm bench serve`"
        kind: type[NodeError] = NodeError
        if status.state != "exited":
            raise NodeError(
                f"{head.name}: {what} was stopped or killed",
                remedy="check the engine with `deploy status`, then repeat the command",
            )
        result = lines[-1].removeprefix(RESULT) if lines and lines[-1].startswith(RESULT) else None
        if status.returncode in MISSING:
            cause, kind = f"the environment has no {what} that accepts the options", NoVllmBenchError
        elif status.returncode or result is None:
            cause = f"{what} failed with exit code {status.returncode}"
        else:
            try:
                return VllmResult.model_validate_json(result)
            except ValidationError:
                cause = f"{what} wrote {'an unreadable result' if result else 'no result'}"
        text = redact.of(self.deployment.folder).line("\n".join(lines))
        log = self.deployment.folder.logs / "vllm-bench.log"
        atomic_write(log, text + "\n")
        reason = f": {last_line(text)}" if result is None else ""
        raise kind(f"{head.name}: {cause}{reason}", remedy=f"read the output in {log}, or measure with --client own")

    def _level(self, result: VllmResult, concurrency: int) -> Level:
        requests, some = self.sweep.count(concurrency), result.completed > 0
        failed = requests - result.completed
        rate = result.output_throughput
        return Level(
            concurrency=concurrency,
            requests=requests,
            answered=result.completed,
            errors={"failed": failed} if failed else {},
            first_error="`vllm bench serve` does not report why; see `deploy logs`" if failed else "",
            seconds=round(result.duration, 3),
            prompt_tokens=result.total_input_tokens,
            tokens=result.total_output_tokens,
            tokens_per_s=round(rate, 3),
            stream_tokens_per_s=round(1000 / result.p50_tpot_ms, 3) if result.p50_tpot_ms else None,
            first_ms=_spread(result.p50_ttft_ms, result.p90_ttft_ms, result.p99_ttft_ms) if some else None,
            token_ms=_spread(result.p50_tpot_ms, result.p90_tpot_ms, result.p99_tpot_ms) if some else None,
            chunk_ms=_spread(result.p50_itl_ms, result.p90_itl_ms, result.p99_itl_ms) if some else None,
            usd_per_mtok=usd_per_mtok(self.plan, rate),
            predicted_tokens_per_s=predicted_rate(self.plan, concurrency),
        )


def _spread(p50: float, p90: float, p99: float) -> Spread:
    return Spread(p50=round(p50, 2), p90=round(p90, 2), p99=round(p99, 2))
