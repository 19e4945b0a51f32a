"""Reads an engine's log: the progress of loading, and the first cause of a failure.

It knows the lines of aphrodite-engine 0.6.4.post1 and of vLLM, which differ slightly.
"""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from pydantic import BaseModel, ConfigDict

PHASES = ("starting", "placing", "loading", "profiling", "capturing", "listening")
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("placing", re.compile(r"Connecting to existing Ray cluster|Connected to Ray cluster|use_ray_spmd_worker|driver_ip:")),
    ("loading", re.compile(r"Loading model|Loading safetensors checkpoint|Starting to load model|Loading weights")),
    (
        "profiling",
        re.compile(r"Model (weights )?loaded in|Total model weights memory|Profiling peak memory|oading (.* )?took"),
    ),
    ("capturing", re.compile(r"# GPU blocks:|GPU KV cache size|Capturing .*CUDA graph")),
    ("listening", re.compile(r"Completions API:|Application startup complete|Uvicorn running on|Started server process")),
)
_PERCENT = re.compile(r"(\d{1,3})%")
_OF = re.compile(r"\b(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)\b")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_WORKER = re.compile(r"^\((?P<actor>\S+) pid=(?P<pid>\d+)(?:, ip=(?P<ip>[0-9a-fA-F.:]+))?\)\s*")

OVERDUE = 10
"A phase is reported if it takes this many times its usual duration."
SHORTEST = 10.0
"Minimum of the usual duration in seconds. Ray forwards the lines of workers late: 30 s of compiling counted as loading."
USUAL = {"starting": 60.0, "placing": 30.0, "profiling": 60.0, "capturing": 60.0, "listening": 20.0}
"Usual seconds of each phase if none was measured. Loading depends on the model and its storage."

KEPT = 20000
"Number of lines of the log that are searched for causes."


def clean(line: str) -> str:
    """A line without colours; of a progress bar, only the last state."""
    return _ANSI.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip()


@dataclass(kw_only=True)
class Progress:
    """Gets the log line by line, and has the phase, the start of each phase, and the share of the weights that is loaded."""

    clock: Callable[[], float] = time.monotonic
    phase: str = PHASES[0]
    begun: dict[str, float] = field(default_factory=dict)
    fraction: float | None = None
    "Share of the weights that is loaded."
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun.setdefault(self.phase, self.clock())

    def feed(self, line: str) -> None:
        """Add a line. Phases only go forward, since workers' lines may arrive late."""
        text = clean(line)
        if len(self.lines) < KEPT:  # the first cause is near the start
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
        """Seconds of each phase so far, to estimate the next start."""
        names = [name for name in PHASES if name in self.begun]
        ends = [*(self.begun[name] for name in names[1:]), self.clock()]
        return {name: round(end - self.begun[name], 3) for name, end in zip(names, ends, strict=True)}

    def left(self, last: Mapping[str, float]) -> float | None:
        """Estimated seconds left, from the speed of loading and the durations of the `last` start; None: unknown."""
        later = PHASES[PHASES.index(self.phase) + 1 :]
        if self.phase == "loading" and self.fraction and self.fraction < 1:
            own = self.elapsed() * (1 - self.fraction) / self.fraction
        elif self.phase in last and self.elapsed() <= last[self.phase]:
            own = last[self.phase] - self.elapsed()
        else:  # longer than last time, so unknown
            return None
        return own + sum(last.get(name, 0.0) for name in later)

    def usual(self, last: Mapping[str, float]) -> float | None:
        """Usual seconds of this phase: from the last start, else from USUAL; None: it depends on the model."""
        return last.get(self.phase, USUAL.get(self.phase))

    def overdue(self, last: Mapping[str, float]) -> bool:
        """Whether the phase takes more than OVERDUE times its usual duration. A hanging engine shows no other sign."""
        usual = self.usual(last)
        return usual is not None and self.elapsed() > OVERDUE * max(usual, SHORTEST)


def fraction(line: str) -> float | None:
    """The loaded share of the weights, from a progress bar of tqdm or rich; None for other lines."""
    if not re.search(r"[Ll]oading|[Ss]hards", line):
        return None
    if match := _PERCENT.search(line):
        return min(int(match[1]), 100) / 100
    if (match := _OF.search(line)) and float(match[2]) > 0:
        return min(float(match[1]) / float(match[2]), 1.0)
    return None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why the engine failed, and a remedy."""

    kind: str
    "Kind of a rule; `unknown`: an error that no rule matches; `killed`; `none`: no cause was found."
    text: str
    remedy: str
    line: str = ""
    "The line of the log."
    consequence: bool = False
    "It is a consequence of something else, and is shown only if no other cause is found."


class Rule(BaseModel):
    """A rule of deploy/data/engine-log.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    pattern: re.Pattern[str]
    text: str
    remedy: str
    consequence: bool = False


def _rules() -> tuple[Rule, ...]:
    table = tomllib.loads((resources.files("deploy") / "data" / "engine-log.toml").read_text())
    return tuple(Rule.model_validate(rule) for rule in table["rule"])


RULES = _rules()
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: |$)|^\[?(?:ERROR|CRITICAL)")


def first_cause(lines: list[str], names: Mapping[str, str], *, returncode: int | None = None) -> Cause:
    """The first cause in a log. `names`: node name by private address.

    The last traceback is usually a consequence (aws-do-eks#69), so the first line that matches a rule is used. Rules for
    consequences are used only if no other rule matches.
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
        return Cause(kind="unknown", text=error, remedy="read the engine's log with `deploy logs`", line=error)
    if returncode in (137, -9, 9):
        return Cause(
            kind="killed",
            text="it was killed with SIGKILL, by the kernel (host memory ran out) or by a user",
            remedy="collect the kernel's messages with `deploy collect`; if host memory was full, reduce cpu_offload_gib "
            "in [layout]",
        )
    return no_cause(lines)


def no_cause(lines: Sequence[str]) -> Cause:
    """The cause for a log without a recognised cause: the phase, and the last line."""
    progress = Progress()
    for line in lines:
        progress.feed(line)
    last = next((text for text in map(_bare, reversed(lines)) if text), "")
    line = f"the last line of its log: {last[:300]}" if last else "its log is empty"
    return Cause(
        kind="none",
        text=f"no cause found; the engine was in phase `{progress.phase}`; {line}",
        remedy="see the whole log with `deploy logs`; collect the logs of all nodes, and the stacks of their processes, "
        "with `deploy collect`",
        line=last,
    )


WRAPPED = 3
"Maximum number of lines of one message. Without a terminal, rich wraps lines at 80 columns."


def _match_wrapped(texts: Sequence[str], names: Mapping[str, str]) -> Cause | None:
    """A cause that starts in the first of these lines."""
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
