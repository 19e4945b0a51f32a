"""Run ninja with the longest units first, and limit how many large units run at the same time.

    python -I -S schedule.py NINJA ARGUMENT...

A unit is large if it needs more than a job's share of the memory. Ninja starts edges in the order of its manifest. If the pool
of an edge is full, the edge waits and ninja starts a different edge. So this program writes a copy of build.ninja into the
same folder, and runs ninja on the copy. In the copy, the edges have a different order, and the large units are in a pool. The
copy contains the same commands, so ninja's log of the commands stays valid.

GRACEFARM_SCHEDULE names a JSON file with these keys: `jobs`, `memory` (bytes for all jobs), `per_job` (bytes for a unit that
is neither measured nor declared), `seconds` and `peaks` (by unit), `declared` (bytes by glob).

The native Python of the root runs this program. The program uses only the standard library. builder.compiling uses the same
rules to compute the number of jobs.
"""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

POOL = "gracefarm_large"
COPY = ".gracefarm.ninja"
SOURCE = re.compile(r"\.(?:cu|cpp|cc|cxx|c\+\+|C|c)$")
_EDGE = re.compile(r"build (?:[^:$]|\$.)+: *(\S+) +((?:[^\s$|]|\$.)+)")
_FIXED = re.compile(r"rule |include |subninja |pool |[\w.-]+ *=")
"Statements whose position relative to the edges matters."
_MANIFEST = re.compile(r"^build (?:[^:\n]* )?build\.ninja[ :|]", re.MULTILINE)
"An edge that writes build.ninja itself. CMake generates such an edge."
_WITH_VALUE = ("-C", "-d", "-f", "-j", "-k", "-l", "-t", "-w")
"Options of ninja whose value can be the next word."


@dataclass
class Block:
    """A statement of the manifest: its lines and, if the statement is a compilation, the name of the unit."""

    lines: list[str]
    unit: str | None = None


def large_at_once(memory: int, peaks: Sequence[int], jobs: int) -> int | None:
    """The number of large units that may run at the same time.

    A unit is large if it needs more than a job's share of the memory. The function assumes that every remaining job compiles
    the largest of the small units. It returns `jobs` if no unit is large. It returns None if the memory is too small for one
    large unit and the remaining jobs; the caller then has to use fewer jobs.
    """
    if jobs == 1:
        return 1
    large = sorted((peak for peak in peaks if peak * jobs > memory), reverse=True)
    if not large:
        return jobs
    rest = max((peak for peak in peaks if peak * jobs <= memory), default=0)
    for count in range(min(jobs, len(large)), 0, -1):
        if sum(large[:count]) + (jobs - count) * rest <= memory:
            return count
    return None


def main() -> None:
    """Write the copy of the manifest, then replace this process by ninja."""
    ninja, *arguments = sys.argv[1:]
    try:
        folder = working_folder(arguments)
        with open(os.environ["GRACEFARM_SCHEDULE"], encoding="utf-8") as stream:  # noqa: PTH123
            plan = json.load(stream)
        text = scheduled(manifest(ninja, folder), plan, folder, needed(ninja, folder, arguments))
        with open(os.path.join(folder, COPY), "w", encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            stream.write(text)
        arguments = ["-f", COPY, *arguments]
    except (OSError, ValueError, KeyError) as error:
        print(f"gracefarm: ninja runs without a schedule: {error!r}", file=sys.stderr)
    sys.stdout.flush()
    os.execv(ninja, [ninja, *arguments])  # noqa: S606


def working_folder(arguments: Sequence[str]) -> str:
    """The folder from which ninja reads build.ninja."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word.startswith("-C"):
            return word[2:] or following
    return "."


def manifest(ninja: str, folder: str) -> str:
    """The text of build.ninja.

    build.ninja can contain an edge that writes build.ninja again. For example, CMake's edge does so when a CMakeLists.txt has
    changed. The function runs this edge first, because ninja reads the copy and would not run the edge.

    Raises:
        ValueError: the edge failed. The caller then runs ninja without a schedule; ninja runs the edge again and shows the
        error.
    """
    place = os.path.join(folder, "build.ninja")  # noqa: PTH118
    with open(place, encoding="utf-8") as stream:  # noqa: PTH123
        text = stream.read()
    if not _MANIFEST.search(text):
        return text
    written = subprocess.run([ninja, "build.ninja"], cwd=folder, capture_output=True, text=True, check=False)
    if written.returncode:
        raise ValueError("build.ninja cannot be written again")
    if "no work to do" not in written.stdout:
        print(written.stdout, end="")
    with open(place, encoding="utf-8") as stream:  # noqa: PTH123
        return stream.read()


def needed(ninja: str, folder: str, arguments: Sequence[str]) -> set[str] | None:
    """The units that this call of ninja builds if their objects are missing.

    The function returns None if ninja cannot list its inputs (before 1.11).
    """
    command = [ninja, "-t", "inputs", *targets(arguments)]
    inputs = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if inputs.returncode:
        return None
    paths = [word for line in inputs.stdout.splitlines() for word in shlex.split(line)]
    return {unit_name(path, folder) for path in paths if SOURCE.search(path)}


def targets(arguments: Sequence[str]) -> Iterator[str]:
    """The targets on ninja's command line."""
    words = iter(arguments)
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            yield word


def scheduled(text: str, plan: dict[str, object], folder: str, needed: Collection[str] | None = None) -> str:
    """The manifest with its compilations in the new order, and with the large units in a pool.

    `needed` contains the units that this call of ninja builds; it is None if they are not known.
    """
    blocks = parse(text, folder)
    memory, jobs = int(str(plan["memory"])), int(str(plan["jobs"]))
    names = {block.unit for block in blocks if block.unit is not None}
    peaks = {name: peak_of(name, plan) for name in names if needed is None or name in needed}
    depth = large_at_once(memory, list(peaks.values()), jobs) or 1
    large = {name for name, peak in peaks.items() if jobs > 1 and peak * jobs > memory}
    for block in blocks:
        if block.unit in large:
            into_pool(block)
    if movable(blocks):
        seconds = plan["seconds"]
        assert isinstance(seconds, dict)
        # Large units wait for each other, so they start first. A unit without a known time may be long too.
        places = iter(
            sorted(
                (block for block in blocks if block.unit is not None),
                key=lambda block: (block.unit not in large, -float(seconds.get(block.unit, 1e9))),
            )
        )
        blocks = [next(places) if block.unit is not None else block for block in blocks]
    title = f"# gracefarm: {message(len(large), len(peaks), depth)}\n"
    print(title[2:], end="", file=sys.stderr)
    lines = [line for block in blocks for line in block.lines]
    return f"{title}pool {POOL}\n  depth = {depth}\n" + "".join(lines)


def message(large: int, units: int, depth: int) -> str:
    """What the program prints about the large units."""
    text = f"{large} of {units} units to build need more memory than a job's share"
    if not large:
        return text
    pace = "1 of these units is compiled at a time" if depth == 1 else f"{depth} of these units are compiled at the same time"
    return f"{text}; {pace}"


def parse(text: str, folder: str) -> list[Block]:
    """The statements of the manifest. A statement is a line, its continuations, and the indented lines after the line."""
    blocks: list[Block] = []
    continued = False
    for line in text.splitlines(keepends=True):
        if continued or (line[:1] in (" ", "\t") and blocks):
            blocks[-1].lines.append(line)
        else:
            blocks.append(Block(lines=[line]))
        continued = line.rstrip("\r\n").endswith("$")
    for block in blocks:
        block.unit = unit_of("".join(block.lines), folder)
    return blocks


def unit_of(statement: str, folder: str) -> str | None:
    """The name of the unit that an edge compiles; None if the edge does not compile a unit.

    front.py uses the same names.
    """
    match = _EDGE.match(re.sub(r"\$\r?\n *", "", statement))
    if match is None or match[1] == "phony":
        return None
    source = re.sub(r"\$([ :$])", r"\1", match[2])
    return unit_name(source, folder) if SOURCE.search(source) else None


def unit_name(source: str, folder: str) -> str:
    """The name of a unit: the path of its source, relative to the source tree.

    The source tree and the file that GRACEFARM_UNITS names are in the same folder.
    """
    tree = os.path.join(os.path.dirname(os.environ["GRACEFARM_UNITS"]), "source")  # noqa: PTH118, PTH120
    return os.path.relpath(os.path.join(os.path.abspath(folder), source), tree)  # noqa: PTH100, PTH118


def peak_of(name: str, plan: dict[str, object]) -> int:
    """The bytes of memory that a unit needs.

    The function returns the measured value if there is one. Otherwise it returns the declared value. If there is no declared
    value either, it returns `per_job`.
    """
    measured, declared = plan["peaks"], plan["declared"]
    assert isinstance(measured, dict)
    assert isinstance(declared, dict)
    if name in measured:
        return int(measured[name])
    sizes = [int(size) for glob, size in declared.items() if named(name, glob)]
    return max(sizes) if sizes else int(str(plan["per_job"]))


def named(name: str, glob: str) -> bool:
    """Whether a recipe's glob matches the end of a unit's path, or a folder that contains the unit."""
    pattern = f"*/{glob.rstrip('/')}"
    return fnmatch.fnmatchcase(f"/{name}", pattern) or fnmatch.fnmatchcase(f"/{name}", f"{pattern}/*")


def into_pool(block: Block) -> None:
    """Put an edge into the pool of large units, and remove the pool that the package set.

    An edge in the console pool stays in that pool, because its program needs the terminal.
    """
    if any(re.match(r"\s+pool\s*=\s*console\s*$", line) for line in block.lines):
        return
    block.lines = [line for line in block.lines if not re.match(r"\s+pool\s*=", line)]
    at = next(number for number, line in enumerate(block.lines) if not line.rstrip("\r\n").endswith("$")) + 1
    if not block.lines[at - 1].endswith("\n"):
        block.lines[at - 1] += "\n"
    block.lines.insert(at, f"  pool = {POOL}\n")


def movable(blocks: Sequence[Block]) -> bool:
    """Whether the order of the compilations may change.

    It may change if no statement between the compilations affects only the compilations after the statement.
    """
    places = [number for number, block in enumerate(blocks) if block.unit is not None]
    between = blocks[places[0] : places[-1]] if places else []
    return not any(_FIXED.match(block.lines[0]) for block in between)


if __name__ == "__main__":
    main()
