"""What an engine's log says: how far loading is, and the first cause of a failure. Pure.

The lines are those of aphrodite-engine 0.6.4.post1 and of vLLM, whose names for the same things differ a little.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PHASES = ("starting", "placing", "loading", "profiling", "capturing", "listening")
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("placing", re.compile(r"Connecting to existing Ray cluster|Connected to Ray cluster|use_ray_spmd_worker|driver_ip:")),
    ("loading", re.compile(r"Loading model|Loading safetensors checkpoint|Starting to load model|Loading weights")),
    ("profiling", re.compile(r"Model (weights )?loaded in|Total model weights memory|Profiling peak memory|oading .* took")),
    ("capturing", re.compile(r"# GPU blocks:|GPU KV cache size|Capturing .*CUDA graph")),
    ("listening", re.compile(r"Completions API:|Application startup complete|Uvicorn running on|Started server process")),
)
_PERCENT = re.compile(r"(\d{1,3})%")
_OF = re.compile(r"\b(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)\b")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WORKER = re.compile(r"^\((?P<actor>\S+) pid=(?P<pid>\d+)(?:, ip=(?P<ip>[0-9a-fA-F.:]+))?\)\s*")


def clean(line: str) -> str:
    """A line without colours, and of a progress bar its last state."""
    return _ANSI.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip()


@dataclass(kw_only=True)
class Progress:
    """Fed line by line; knows the phase, when each began, and how much of the weights is loaded."""

    clock: Callable[[], float] = time.monotonic
    phase: str = PHASES[0]
    begun: dict[str, float] = field(default_factory=dict)
    fraction: float | None = None
    "Of the weights, while loading."
    lines: list[str] = field(default_factory=list)
    keep: int = 20000

    def __post_init__(self) -> None:
        self.begun.setdefault(self.phase, self.clock())

    def feed(self, line: str) -> None:
        """The next line. Phases only go forward: a worker's late line does not turn the clock back."""
        text = clean(line)
        if len(self.lines) < self.keep:  # the first cause matters, and it is early
            self.lines.append(text)
        for name, pattern in _SIGNS:
            if PHASES.index(name) > PHASES.index(self.phase) and pattern.search(text):
                self.phase = name
                self.begun[name] = self.clock()
                self.fraction = None
        if self.phase == "loading" and (loaded := fraction(text)) is not None:
            self.fraction = max(loaded, self.fraction or 0.0)

    def elapsed(self) -> float:
        """Seconds in this phase."""
        return self.clock() - self.begun[self.phase]

    def durations(self) -> dict[str, float]:
        """Seconds of each phase so far: what the next start is measured by."""
        names = [name for name in PHASES if name in self.begun]
        ends = [*(self.begun[name] for name in names[1:]), self.clock()]
        return {name: round(end - self.begun[name], 3) for name, end in zip(names, ends, strict=True)}

    def left(self, last: Mapping[str, float]) -> float | None:
        """Seconds that are left: of loading from its own speed, of the rest from `last` time's durations; None: unknown."""
        later = PHASES[PHASES.index(self.phase) + 1 :]
        if self.phase == "loading" and self.fraction:
            own: float | None = self.elapsed() * (1 - self.fraction) / self.fraction
        elif self.phase in last:
            own = max(0.0, last[self.phase] - self.elapsed())
        else:
            own = None
        if own is None or not (last or self.phase == "loading"):
            return None
        return own + sum(last.get(name, 0.0) for name in later)


def fraction(line: str) -> float | None:
    """How much of the weights is loaded, as a progress bar of tqdm or rich says it; None for any other line."""
    if not re.search(r"[Ll]oading|[Ss]hards", line):
        return None
    if match := _PERCENT.search(line):
        return min(int(match[1]), 100) / 100
    if (match := _OF.search(line)) and float(match[2]) > 0:
        return min(float(match[1]) / float(match[2]), 1.0)
    return None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why the engine failed, in one sentence, and what to do."""

    kind: str
    text: str
    remedy: str
    line: str = ""
    "What it was read from."
    consequence: bool = False
    "Something else is behind it: shown only where nothing better was found."


@dataclass(frozen=True, kw_only=True)
class _Rule:
    kind: str
    pattern: re.Pattern[str]
    text: str
    remedy: str
    consequence: bool = False


def _rule(kind: str, pattern: str, text: str, remedy: str, *, consequence: bool = False) -> _Rule:
    return _Rule(kind=kind, pattern=re.compile(pattern), text=text, remedy=remedy, consequence=consequence)


RULES: tuple[_Rule, ...] = (
    _rule(
        "memory",
        r"OutOfMemoryError|CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY",
        "GPU memory ran out{where}: {line}",
        "`deploy plan` shows the memory of each GPU: more nodes, cpu_offload_gib, or a smaller max_model_len in [layout]",
    ),
    _rule(
        "kv-cache",
        r"No available memory for the cache blocks",
        "after the weights no GPU memory is left for the KV cache{where}",
        "raise gpu_memory_utilization, or set cpu_offload_gib, in [layout] of deploy.toml",
    ),
    _rule(
        "shard",
        r"(No such file or directory|FileNotFoundError).*(safetensors|\.bin\b|index\.json|config\.json)"
        r"|Cannot find any model weights|No model weights found|does not appear to have a file named",
        "a file of the weights is missing{where}: {line}",
        "`deploy up --from weights` brings what is missing",
    ),
    _rule(
        "shard",
        r"SafetensorError|deserializing header|MetadataIncompleteBuffer|InvalidHeader|invalid header",
        "a file of the weights is damaged{where}: {line}",
        "`deploy weights verify --remove`, then `deploy up`",
    ),
    _rule(
        "driver-gpu",
        r"Ray does not allocate any GPUs on the driver node",
        "Ray gave the head's GPU to nobody of this engine",
        "the head must bring a GPU into Ray, and nobody else may use this Ray: `deploy down`, then `deploy serve`",
    ),
    _rule(
        "gpus",
        r"[Nn]umber of required GPUs exceeds|Cannot provide a placement group",
        "Ray has fewer free GPUs than the layout needs",
        "`deploy status` shows Ray's nodes; `deploy down`, then `deploy serve` starts all of them again",
    ),
    _rule(
        "port",
        r"[Aa]ddress already in use|Errno 98|EADDRINUSE",
        "the engine's port is taken: {line}",
        "end whoever holds it, or choose another in [ports] of deploy.toml",
    ),
    _rule(
        "layout",
        r"is not divisible by|must be divisible by tensor parallel|does not match (pp_size|num_hidden_layers)",
        "the engine refuses this layout: {line}",
        "tensor_parallel of 1 to 8 for Llama; `deploy plan` says what fits",
    ),
    _rule(
        "driver",
        r"driver version is insufficient|no CUDA-capable device|CUDA driver initialization failed|system not yet initialized"
        r"|No CUDA GPUs are available|uncorrectable ECC|Xid|CUDA error: ",
        "a GPU cannot be used{where}: {line}",
        "`deploy preflight` names the node; reboot or replace it",
    ),
    _rule(
        "nccl",
        r"NCCL error|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|ncclRemoteError|no socket interface found",
        "NCCL could not connect the GPUs{where}: {line}",
        "`deploy preflight` tries it node by node; set `nic` in [nodes] where a node has several networks",
    ),
    _rule(
        "gloo",
        r"[Gg]loo.*(connectFullMesh|refused|timed out|no route|unreachable)|connectFullMesh failed|third_party/gloo",
        "gloo could not connect the nodes{where}: {line}",
        "a host name that resolves to loopback does this: `deploy preflight`, row names",
    ),
    _rule(
        "usage",
        r"error: (unrecognized arguments|argument |the following arguments|invalid choice)",
        "the engine does not take its arguments: {line}",
        "look at [engine_options] in deploy.toml; `deploy plan` prints the whole command",
    ),
    _rule(
        "import",
        r"ModuleNotFoundError|ImportError:|undefined symbol|cannot open shared object",
        "the environment is not whole{where}: {line}",
        "`deploy env matrix` tries every import on every node",
    ),
    _rule(
        "ray",
        r"Could not find any running Ray instance|Failed to connect to GCS|AuthenticationError|Authentication.*failed"
        r"|Can't find a node_ip_address",
        "the engine does not get into Ray: {line}",
        "`deploy serve` starts Ray again where it is gone",
    ),
    _rule(
        "timeout",
        r"[Ee]ngine iteration timed out",
        "a step of the engine took longer than its limit: a node hangs",
        "`deploy status` tells which; APHRODITE_ENGINE_ITERATION_TIMEOUT_S in [env] where weights are offloaded",
        consequence=True,
    ),
    _rule(
        "node",
        r"ActorDiedError|RayActorError|[Aa]ctor .*(died|dead)|ActorUnavailable|[Ww]orker .*died|node .*(died|dead|failed)",
        "a worker died{where}: {line}",
        "`deploy status` tells whether its node is gone; `deploy serve` starts everything again",
        consequence=True,
    ),
)
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: |$)|^\[?(?:ERROR|CRITICAL)")


def first_cause(lines: list[str], names: Mapping[str, str], *, returncode: int | None = None) -> Cause:
    """The first cause in a log. `names`: private address to node name.

    The last traceback is mostly a consequence (aws-do-eks#69), so the first line that a rule knows wins; a consequence does
    only where no rule knows a cause.
    """
    best: Cause | None = None
    for index in range(len(lines)):
        cause = _match_wrapped([clean(line) for line in lines[index : index + WRAPPED]], names)
        if cause and not cause.consequence:
            return cause
        best = best or cause
    if best:
        return best
    error = next((text for text in map(_bare, lines) if _ERROR.search(text)), None)
    if error:
        return Cause(kind="unknown", text=error, remedy="`deploy logs` shows all of it", line=error)
    if returncode in (137, -9, 9):
        return Cause(
            kind="killed",
            text="it was killed (SIGKILL): by the kernel for host memory, or by hand",
            remedy="`deploy collect` has the kernel's words; less cpu_offload_gib needs less host memory",
        )
    last = next((text for text in map(_bare, reversed(lines)) if text), "it said nothing")
    return Cause(kind="unknown", text=last, remedy="`deploy logs` shows all of it", line=last)


WRAPPED = 3
"Lines that one message may take: rich breaks them at 80 columns where there is no terminal."


def _match_wrapped(texts: Sequence[str], names: Mapping[str, str]) -> Cause | None:
    """A cause that begins in the first of these lines."""
    for count in range(1, len(texts) + 1):
        cause = _match(" ".join([texts[0], *(text.strip() for text in texts[1:count])]), names)
        if cause:
            later = any(_match(" ".join(text.strip() for text in texts[start:count]), names) for start in range(1, count))
            return None if later else cause
    return None


def _bare(line: str) -> str:
    return _WORKER.sub("", clean(line)).strip()


def _match(text: str, names: Mapping[str, str]) -> Cause | None:
    for rule in RULES:
        if not rule.pattern.search(text):
            continue
        worker = _WORKER.match(text)
        ip = worker["ip"] if worker else None
        where = f" on {names.get(ip, ip)}" if ip else ""
        line = _bare(text)[:300]
        return Cause(
            kind=rule.kind,
            text=rule.text.format(where=where, line=line),
            remedy=rule.remedy,
            line=line,
            consequence=rule.consequence,
        )
    return None
