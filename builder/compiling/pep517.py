"""Run the command that builds a wheel (from `wrappers.command`), and find the cause of a failure in its log."""

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
        r"|^\s*CMake Error\b|^\s*Caused by: |^\S*meson\.build:\d+:\d+: ERROR: "
    ),
    re.compile(r"^(?:make(?:\[\d+\])?: \*\*\*|ninja: error|FAILED: )"),
)
"From most to least specific: messages of compilers, Python exceptions, messages of CMake, maturin and Meson, of build tools."
CMAKE = re.compile(r"^(?P<indent>\s*)CMake Error(?: \(\w+\))?(?:: (?P<reason>.+)| (?P<place>(?:at|in) .+):)\s*$")
"The first line of CMake's message. If it has a place, the reason follows in indented paragraphs."
LONGEST_REASON = 300
"Length limit of CMake's reason, which may list every folder that it searched."
DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")


def check_requirements(plan: Plan, source: Path) -> None:
    """Compare the package's build requirements with the stack, on the host, so that no emulated Python starts for it.

    Raises:
        CompileError: a requirement is missing in the stack's lock or has another version there.
    """
    pyproject = source / plan.recipe.data.build.subdirectory / "pyproject.toml"
    if not pyproject.is_file():
        return
    try:
        wanted = _requires(pyproject.read_bytes())
    except ValueError as error:
        raise CompileError(
            f"pyproject.toml of {plan.recipe.data.name} is not valid: {error}",
            remedy="correct the file with a patch in the recipe",
        ) from error
    locked = plan.toolchain.installed(plan)
    marker = {"python_version": plan.stack.python.rstrip("t"), "platform_machine": plan.target.value}
    unmet = []
    for requirement in wanted:
        version = locked.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate(marker)
        if applies and (version is None or not requirement.specifier.contains(version, prereleases=True)):
            unmet.append(f"{str(requirement)!r} (stack {plan.stack.data.name} has {version or 'no such package'})")
    if unmet:
        raise CompileError(
            f"the build of {plan.recipe.data.name} requires {', '.join(unmet)}",
            remedy="add the missing requirements to `requires` of [build] in the recipe and lock the recipe, or remove "
            "them from the source with a patch",
            repeat=f"builder lock {plan.recipe.key}",
        )


def _requires(pyproject: bytes) -> list[Requirement]:
    """The requirements in build-system.requires.

    Raises:
        ValueError: the file is not TOML, or the value is not a list of requirements.
    """
    system = tomllib.loads(pyproject.decode()).get("build-system", {})
    requires = system.get("requires", []) if isinstance(system, dict) else None
    if not isinstance(requires, list) or not all(isinstance(text, str) for text in requires):
        msg = "build-system.requires is not a list of requirements"
        raise ValueError(msg)
    return [Requirement(text) for text in requires]


def run(place: Place, command: tuple[str, ...], log: Path, on_progress: Callable[[int, int], None]) -> Outcome:
    """Compile; `on_progress` gets ninja's numbers of finished and of all translation units."""

    def on_line(line: str) -> None:
        if match := NINJA.match(line):
            on_progress(int(match[1]), int(match[2]))

    return sandbox.run(place, command, log=log, on_line=on_line)


def judge(outcome: Outcome, plan: Plan, log: Path, start: int, source: Path) -> None:
    """Raise an error for a failed compile. A build that tried to access the network fails even if it continued.

    Its output begins at byte `start` of `log`; `source` is its source tree.

    Raises:
        MemoryBoundError, NetworkError, DiskFullError, CompileError: with the cause from the log.
    """
    name = plan.recipe.key
    repeat = plan.repeat
    if outcome.killed_by_memory:
        raise MemoryBoundError(
            f"the build of {name} was killed at its limit of {outcome.memory_bound / 2**30:.1f} GiB of memory "
            f"({outcome.memory_by})",
            remedy="in [build] of the recipe, raise memory_per_job or list large sources in unit_memory; or set a "
            "smaller --jobs",
            repeat=f"{repeat} --jobs 1",
        )
    if outcome.reached:
        raise NetworkError(
            f"the build of {name} tried to access the network ({', '.join(outcome.reached)}), which is disabled during builds",
            remedy=f"{_switch(plan, source)}add the file to [[files]] of the recipe, or remove the download with a patch",
            repeat=repeat,
        )
    if outcome.returncode == 0:
        return
    error = first_error(log, start)
    if DISK_FULL.search(error):
        raise DiskFullError(
            f"no space left during the build of {name}: {error}",
            remedy="free space with `builder clean`, or set GRACEFARM_HOME to a folder on a larger disk",
            repeat=repeat,
        )
    raise CompileError(
        f"the build of {name} failed: {error}",
        remedy=f"read the log (`builder log {name}`)"
        + ("" if plan.toolchain.closed else f", or open the sandbox of the build (`builder shell {name}`)"),
        repeat=repeat,
    )


def _switch(plan: Plan, source: Path) -> str:
    """The beginning of a remedy: the variable with which the build script avoids its download, if there is one."""
    build = plan.recipe.data.build
    for download in build_script.read(source / build.subdirectory).downloads(build.environment):
        for name, value in download.avoided_by.items():
            return f'set {name} = "{value}" in [build.environment], which avoids the download at {download.place}; or '
    return ""


def first_error(log: Path, start: int = 0) -> str:
    """The line of a build log, from byte `start`, that names the cause: the first line of the most specific kind."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    # The last message of cibuildwheel has its command, but no cause.
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
    """Reason and place of a CMake message that begins in the first line; None: it is not a message of CMake.

    A sentence may span several paragraphs, for example if the path of a program is a separate paragraph.
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
    """The number of jobs for the retry after a kill for memory, or None if it cannot be reduced."""
    return jobs // 2 if isinstance(error, MemoryBoundError) and jobs > 1 else None


def bound(settings: Settings) -> int:
    """Memory that a build may use, in bytes: the setting, else nine tenths of the free memory."""
    return parse_size(settings.memory) if settings.memory else meter.available_memory() * 9 // 10
