"""The engine's log: phases, time left, and the first cause instead of the last traceback."""

from __future__ import annotations

import pytest

from deploy.engine.log import PHASES, RULES, Progress, first_cause, fraction

NAMES = {"10.0.0.12": "k1"}

# As aphrodite-engine 0.6.4.post1 prints it: rich's colours, bars with carriage returns, workers' lines with their place.
LOG = [
    "INFO:     Initializing Aphrodite Engine (v0.6.4.post1 commit 8b8d2ce7) with the following config:",
    "2024-12-03 10:00:00,123\tINFO worker.py:1634 -- Connecting to existing Ray cluster at address: 10.0.0.11:6379...",
    "INFO:     use_ray_spmd_worker: False",
    "INFO:     driver_ip: 10.0.0.11",
    "\x1b[36mLoading model weights...\x1b[0m ━━━━━ \x1b[35m 10%\x1b[0m 75.60/756.00 GiB 0:01:00",
    "\x1b[36mLoading model weights...\x1b[0m ━━━━━ 10%\r\x1b[36mLoading model weights...\x1b[0m ━━━━━  50% 378.00/756.00 GiB",
    "(RayWorkerWrapper pid=4711, ip=10.0.0.12) INFO:     Model weights loaded in 601.00 seconds.",
    "INFO:     Total model weights memory usage: 78.90 GiB",
    "INFO:     Profiling peak memory usage...",
    "INFO:     # GPU blocks: 4251, # CPU blocks: 520",
    "INFO:     Capturing the model for CUDA graphs. This may lead to OOM errors if there is not enough memory",
    "INFO:     Graph capturing finished in 20.12 secs",
    "INFO:     Completions API:  http://127.0.0.1:2242/v1/completions",
    "INFO:     Application startup complete.",
    "",
]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_are_passed_in_order_and_measured() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    seen = []
    for line in LOG:
        progress.feed(line)
        clock.now += 10
        seen.append(progress.phase)
    assert list(dict.fromkeys(seen)) == list(PHASES)
    assert progress.durations()["loading"] == 20
    progress.feed("(RayWorkerWrapper pid=1, ip=10.0.0.12) Loading model weights... 3%")  # a slow worker's late line
    assert progress.phase == "listening"


def test_time_left_is_the_loadings_own_speed_and_then_last_time() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    assert progress.left({}) is None
    assert progress.left({"starting": 30, "placing": 10, "loading": 600, "profiling": 20}) == 660
    for line in LOG[:4]:
        progress.feed(line)
    progress.feed(LOG[4])
    clock.now += 60
    progress.feed("Loading model weights... 10%")
    assert progress.left({}) == pytest.approx(540)
    assert progress.left({"loading": 9999, "profiling": 20, "capturing": 25}) == pytest.approx(585)
    progress.feed(LOG[6])
    clock.now += 5
    assert progress.left({"profiling": 20, "capturing": 25}) == 40
    assert progress.left({}) is None


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("Loading model weights... ━━━ 42% 317.52/756.00 GiB", 0.42),
        ("Loading safetensors checkpoint shards:  12% Completed | 23/191 [00:10<01:20,  2.1it/s]", 0.12),
        ("Loading shards 23/191", 23 / 191),
        ("INFO: 50% of nothing", None),
        ("Loading weights took 3 s", None),
    ],
)
def test_progress_bars_of_both_engines(line: str, part: float | None) -> None:
    assert fraction(line) == part


FAILURES = {
    "memory": [
        "(RayWorkerWrapper pid=4711, ip=10.0.0.12) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.66 GiB.",
        "Traceback (most recent call last):",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
    ],
    "kv-cache": ["ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"],
    "shard": [
        'FileNotFoundError: No such file or directory: "/share/model/model-00007-of-00191.safetensors"',
        "RuntimeError: Engine process failed",
    ],
    "driver-gpu": ["ValueError: Ray does not allocate any GPUs on the driver node. Consider adjusting the Ray placement"],
    "gpus": ["ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group."],
    "port": ["ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 2242): address already in use"],
    "layout": ["AssertionError: 8 is not divisible by 10", "RuntimeError: Engine core initialization failed"],
    "driver": ["RuntimeError: CUDA driver initialization failed, you might not have a CUDA gpu."],
    "nccl": ["(RayWorkerWrapper pid=1, ip=10.0.0.12) RuntimeError: NCCL error: unhandled system error"],
    "gloo": ["RuntimeError: Gloo connectFullMesh failed with [127.0.1.1]:29500: Connection refused"],
    "usage": ["aphrodite: error: unrecognized arguments: --max-model-length 4096"],
    "import": ["ModuleNotFoundError: No module named 'aphrodite_flash_attn_2_cuda'"],
    "ray": ["ConnectionError: Could not find any running Ray instance. Please specify the one to connect to"],
}


@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_each_failure_is_named_by_its_first_cause_with_a_remedy(kind: str) -> None:
    noise = ["INFO:     driver_ip: 10.0.0.11", "WARNING:  Kobold API is now enabled by default."]
    found = first_cause([*noise, *FAILURES[kind], "SystemExit: 1"], NAMES)
    assert found.kind == kind
    assert found.remedy
    assert "{" not in found.text


# Lines of vLLM 0.26.0 with Ray 2.60.0 on two H200, 2026-11-29, by what must be told of them; the sentence on free memory as
# vllm/v1/worker/utils.py has it.
REAL = {
    "No module named 'flashinfer'": """\
(EngineCore pid=3038) ERROR 11-29 06:13:18 [core.py:1330] EngineCore failed to start.
(EngineCore pid=3038) ERROR 11-29 06:13:18 [core.py:1330] ray.exceptions.RayTaskError(ModuleNotFoundError): \x1b[36mray::RayWo
(EngineCore pid=3038) ERROR 11-29 06:13:18 [core.py:1330] ModuleNotFoundError: No module named 'flashinfer'""",
    "EngineCore": """\
(APIServer pid=2824) ERROR 11-29 06:32:22 [async_llm.py:704] AsyncLLM output_handler failed.
(APIServer pid=2824) INFO:     Shutting down""",
    "on k1": """\
(EngineCore pid=3038) ERROR 11-29 06:33:51 [core.py:1330] EngineCore failed to start.
(RayWorkerProc pid=344, ip=10.0.0.12) ValueError: Free memory on device cuda:0 (38.8/139.8 GiB) on startup is less than \
desired GPU memory utilization (0.9, 125.82 GiB).""",
}


@pytest.mark.parametrize("words", sorted(REAL))
def test_what_was_broken_on_real_gpus_is_told(words: str) -> None:
    found = first_cause([*REAL[words].splitlines(), "SystemExit: 1"], NAMES)
    assert words in found.text
    assert found.kind != "unknown"


def test_ray_hands_on_the_lines_of_workers_late_and_a_short_phase_is_not_overdue_for_that() -> None:
    """On two H200 30 s of compiling counted as loading, which had taken 3 s the time before."""
    clock = Clock()
    progress = Progress(clock=clock)
    progress.feed("(EngineCore pid=3038) (RayWorkerProc pid=3203) Loading safetensors checkpoint shards: 100% Completed | 8/8")
    clock.now += 31
    assert not progress.overdue({"loading": 3.0})
    clock.now += 70
    assert progress.overdue({"loading": 3.0})
    progress.feed(
        "(RayWorkerProc pid=344) INFO 11-29 06:15:32 [model_runner.py:305] Model loading took 7.54 GiB and 3.76 seconds"
    )
    assert progress.phase == "profiling"


def test_every_rule_has_a_failure_that_it_knows() -> None:
    assert {rule.kind for rule in RULES if not rule.consequence} == set(FAILURES)


def test_the_node_is_named_where_a_worker_says_it() -> None:
    assert first_cause(FAILURES["memory"], NAMES).text.startswith("GPU memory ran out on k1: torch.OutOfMemoryError")
    assert "on 10.0.0.99" in first_cause(["(W pid=1, ip=10.0.0.99) CUDA out of memory"], NAMES).text


def test_a_consequence_counts_only_where_there_is_no_cause() -> None:
    died = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."
    assert first_cause([died, *FAILURES["nccl"]], NAMES).kind == "nccl"
    assert first_cause(["nothing", died], NAMES).kind == "node"


def test_a_message_that_was_broken_at_80_columns_is_known_and_told_whole() -> None:
    lines = [
        "INFO:     driver_ip: 10.0.0.11",
        "ValueError: The number of",
        "required GPUs exceeds the total number of available GPUs in the placement group.",
        "RuntimeError: the last and least",
    ]
    found = first_cause(lines, NAMES)
    assert found.kind == "gpus"
    assert found.line.startswith("ValueError: The number of required GPUs exceeds")
    whole = first_cause(["INFO: something", "torch.OutOfMemoryError: CUDA out of memory. Tried"], NAMES)
    assert whole.line.startswith("torch.OutOfMemoryError")


def test_what_no_rule_knows_is_the_first_error_not_the_last() -> None:
    lines = ["Traceback (most recent call last):", "  File x", "KeyError: 'rope'", "Traceback:", "RuntimeError: engine died"]
    assert first_cause(lines, NAMES).text == "KeyError: 'rope'"
    assert first_cause([], NAMES, returncode=137).kind == "killed"


def test_a_log_without_a_cause_says_so_with_its_phase_and_its_last_line() -> None:
    found = first_cause([*LOG[:4], "INFO: waiting for the others", ""], NAMES, returncode=1)
    assert found.kind == "none"
    assert (
        found.text
        == "no cause found; the engine was in phase `placing`; the last line of its log: INFO: waiting for the others"
    )
    assert first_cause([], NAMES).text == "no cause found; the engine was in phase `starting`; its log is empty"


def test_a_phase_that_takes_ten_times_as_long_as_usual_is_overdue() -> None:
    clock = Clock()
    progress = Progress(clock=clock)
    for line in LOG[:4]:
        progress.feed(line)
    clock.now += 121
    assert progress.phase == "placing"
    assert not progress.overdue({})  # usually 30 s
    assert not progress.overdue({"placing": 12.2})
    assert progress.overdue({"placing": 12.0})
    assert progress.left({"placing": 6.0, "loading": 600.0}) is None  # it was "about 0 s left" for hours
    clock.now += 180
    assert progress.overdue({})
    progress.feed(LOG[4])
    clock.now += 7200
    assert not progress.overdue({})  # loading depends on the model
    assert progress.overdue({"loading": 600.0})
