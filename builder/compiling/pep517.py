"""From a source tree to a wheel, by PEP 517, in its place; and what a failed build's log really says."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder.box import meter, sandbox
from builder.box.place import Place
from builder.box.sandbox import Outcome
from builder.compiling import build_script
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from gracefarm.errors import CompileError, DiskFullError, GracefarmError, MemoryBoundError, NetworkError
from gracefarm.tables import parse_size

NINJA = re.compile(r"^\[(\d+)/(\d+)\] ")
FIRST_ERROR = (
    re.compile(
        r"(?:fatal error|error)(?:\[E\d+\])?: |(?:error|fatal)\s+: |\berror #\d+|undefined reference to|cannot find -l"
    ),
    re.compile(
        r"^(?:\w+\.)*\w*(?:Error|Exception)\b(?!.*returned non-zero exit status)(?::.*|$)"
        r"|^\s*CMake Error\b|^\S*meson\.build:\d+:\d+: ERROR: "
    ),
    re.compile(r"^(?:make(?:\[\d+\])?: \*\*\*|ninja: error|FAILED: )"),
)
"In the order in which they name the cause: a compiler's word, a Python exception, CMake's or Meson's word, a build tool's."
CMAKE = re.compile(r"^(?P<indent>\s*)CMake Error(?: \(\w+\))?(?:: (?P<reason>.+)| (?P<place>(?:at|in) .+):)\s*$")
"The first line of CMake's message. With a place, the reason follows in paragraphs that are indented."
LONGEST_REASON = 300
"Characters of CMake's reason, which may list every place that it searched."
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")


def check_requirements(plan: Plan, source: Path) -> None:
    """Compare the package's build requirements with the stack, on the host, so that no emulated Python starts for it.

    Raises:
        CompileError: one is missing from the stack's lock or has another version there.
    """
    pyproject = source / plan.recipe.data.build.subdirectory / "pyproject.toml"
    if not pyproject.is_file():
        return
    try:
        wanted = _requires(pyproject.read_bytes())
    except ValueError as error:
        raise CompileError(f"pyproject.toml of {plan.recipe.data.name}: {error}", remedy="patch it in the recipe") from error
    locked = plan.toolchain.installed(plan)
    marker = {"python_version": plan.stack.python.rstrip("t"), "platform_machine": plan.target.value}
    unmet = []
    for requirement in wanted:
        version = locked.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate(marker)
        if applies and (version is None or not requirement.specifier.contains(version, prereleases=True)):
            unmet.append(f"{str(requirement)!r} (stack {plan.stack.data.name} has {version or 'none'})")
    if unmet:
        raise CompileError(
            f"{plan.recipe.data.name} needs to build: {', '.join(unmet)}",
            remedy="list it in [build] requires of the recipe and lock it, or patch the requirement in the recipe",
            repeat=f"builder lock {plan.recipe.key}",
        )


def _requires(pyproject: bytes) -> list[Requirement]:
    """build-system.requires.

    Raises:
        ValueError: not TOML, or not a list of requirements.
    """
    system = tomllib.loads(pyproject.decode()).get("build-system", {})
    requires = system.get("requires", []) if isinstance(system, dict) else None
    if not isinstance(requires, list) or not all(isinstance(text, str) for text in requires):
        msg = "build-system.requires is no list of requirements"
        raise ValueError(msg)
    return [Requirement(text) for text in requires]


def run(place: Place, command: tuple[str, ...], log: Path, on_progress: Callable[[int, int], None]) -> Outcome:
    """Compile; `on_progress` gets translation units done and in all as ninja counts them."""

    def on_line(line: str) -> None:
        if match := NINJA.match(line):
            on_progress(int(match[1]), int(match[2]))

    return sandbox.run(place, command, log=log, on_line=on_line)


def judge(outcome: Outcome, plan: Plan, log: Path, start: int, source: Path) -> None:
    """Raise what a finished compile deserves; a build that reached for the network fails even when it went on.

    Its output stands in `log` from byte `start` on; `source` is its source tree.

    Raises:
        MemoryBoundError, NetworkError, DiskFullError, CompileError: each with the log's own words.
    """
    name = plan.recipe.key
    repeat = plan.repeat
    if outcome.killed_by_memory:
        raise MemoryBoundError(
            f"the build of {name} was killed at its bound of {outcome.memory_bound / 2**30:.1f} GiB ({outcome.memory_by})",
            remedy="raise memory_per_job in the recipe, name large sources in unit_memory, use fewer --jobs, or more memory",
            repeat=f"{repeat} --jobs 1",
        )
    if outcome.reached:
        raise NetworkError(
            f"the build of {name} reached for the network, which a build has not: {', '.join(outcome.reached)}",
            remedy=f"{_switch(plan, source)}pin what it wants as a [[files]] entry of the recipe, or patch the download out",
            repeat=repeat,
        )
    if outcome.returncode == 0:
        return
    error = first_error(log, start)
    if DISK_FULL.search(error):
        raise DiskFullError(
            f"the build of {name} filled the disk: {error}",
            remedy="free space (`builder clean`) or move GRACEFARM_HOME",
            repeat=repeat,
        )
    raise CompileError(
        f"the build of {name} failed: {error}",
        remedy=f"read the log (`builder log {name}`) or look around in its sandbox (`builder shell {name}`)",
        repeat=repeat,
    )


def _switch(plan: Plan, source: Path) -> str:
    """The beginning of a remedy: the variable by which the build script itself avoids its download, if it has one."""
    build = plan.recipe.data.build
    for download in build_script.read(source / build.subdirectory).downloads(build.environment):
        for name, value in download.avoided_by.items():
            return f'set {name} = "{value}" in [build] environment, which keeps {download.place} from its download; or '
    return ""


def first_error(log: Path, start: int = 0) -> str:
    """The line of a build log, from byte `start` on, that names the cause: the first of the strongest kind, not the last
    traceback's."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    # cibuildwheel's last word names its own command and no cause.
    lines = [line for line in lines if not line.startswith("cibuildwheel: error: Command [")]
    full = next((line for line in lines if DISK_FULL.search(line)), None)
    if full is not None:
        return full.strip()
    for kind in FIRST_ERROR:
        for number, line in enumerate(lines):
            if kind.search(line):
                return _cmake_reason(lines[number:]) or line.strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), "the log is empty")


def _cmake_reason(lines: Sequence[str]) -> str | None:
    """CMake's reason and where it stands, of a message that begins in the first line; None: that line is not CMake's.

    A sentence may be spread over paragraphs, as where a program's path stands in one of its own.
    """
    match = CMAKE.match(lines[0])
    if match is None:
        return None
    depth, reason, place = len(match["indent"]), (match["reason"] or "").strip(), match["place"]
    for line in lines[1:]:
        indented = len(line) - len(line.lstrip()) > depth
        if line.strip() and not indented:
            break
        if not line.strip() and reason.endswith((".", ")", "!", "?")):
            break
        reason = f"{reason} {line.strip()}".strip()
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
            break
    if not reason:
        return None
    return f"CMake: {reason} ({place})" if place else f"CMake: {reason}"


def fewer_jobs(error: GracefarmError, jobs: int) -> int | None:
    """The job count of the one retry after a kill by memory, or None where there is nothing to lower."""
    return jobs // 2 if isinstance(error, MemoryBoundError) and jobs > 1 else None


def bound(settings: Settings) -> int:
    """Bytes that a build may use: the setting, else nine tenths of what is free, so that the machine stays usable."""
    return parse_size(settings.memory) if settings.memory else meter.available_memory() * 9 // 10
