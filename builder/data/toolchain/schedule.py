"""Ninja with the longest units first, and units too large for a job's share of the memory kept apart.

    python -I -S schedule.py NINJA ARGUMENT...

Ninja starts edges in the order of its manifest, and holds back those of a pool that is full without giving up a job for them.
So a copy of build.ninja beside it, with its edges in another order and a pool for the large ones, says both; the commands, and
what ninja remembers of them, are the same. GRACEFARM_SCHEDULE names a JSON file: `jobs`, `memory` (bytes for all of them),
`per_job` (of a unit that nothing is known of), `seconds` and `peaks` by unit, `declared` (bytes by glob).

Run by the root's native Python; standard library only. Imported by builder.jobs, which plans by the same rule.
"""

import fnmatch
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

POOL = "gracefarm_large"
COPY = ".gracefarm.ninja"
SOURCE = re.compile(r"\.(?:cu|cpp|cc|cxx|c\+\+|C|c)$")
_EDGE = re.compile(r"build (?:[^:$]|\$.)+: *(\S+) +((?:[^\s$|]|\$.)+)")
_FIXED = re.compile(r"rule |include |subninja |pool |[\w.-]+ *=")
"What may stand between edges and must not change its place among them."


@dataclass
class Block:
    """A statement of the manifest with the lines that belong to it; of a compilation, the source's name."""

    lines: list[str]
    unit: str | None = None


def large_at_once(memory: int, peaks: Sequence[int], jobs: int) -> int | None:
    """How many of the units above a job's share of the memory may run beside each other, the other jobs taken by the largest
    of the rest; `jobs` where none is above it, None where not even one fits, so that there have to be fewer jobs."""
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
    """Write the copy and become ninja."""
    ninja, *arguments = sys.argv[1:]
    try:
        folder = working_folder(arguments)
        with open(os.environ["GRACEFARM_SCHEDULE"], encoding="utf-8") as stream:  # noqa: PTH123
            plan = json.load(stream)
        with open(os.path.join(folder, "build.ninja"), encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            text = scheduled(stream.read(), plan, folder)
        with open(os.path.join(folder, COPY), "w", encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            stream.write(text)
        arguments = ["-f", COPY, *arguments]
    except (OSError, ValueError, KeyError) as error:
        print(f"gracefarm: ninja without a schedule: {error!r}", file=sys.stderr)
    sys.stdout.flush()
    os.execv(ninja, [ninja, *arguments])  # noqa: S606


def working_folder(arguments: Sequence[str]) -> str:
    """Where ninja reads build.ninja."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.startswith("-C"):
            return word[2:] or following
    return "."


def scheduled(text: str, plan: dict[str, object], folder: str) -> str:
    """The manifest with its compilations in order, and the large ones in a pool."""
    blocks = parse(text, folder)
    units = [one for one in blocks if one.unit is not None]
    names = [one.unit for one in units if one.unit is not None]
    memory, jobs = int(str(plan["memory"])), int(str(plan["jobs"]))
    peaks = {name: peak_of(name, plan) for name in names}
    depth = large_at_once(memory, list(peaks.values()), jobs) or 1
    large = {name for name, peak in peaks.items() if jobs > 1 and peak * jobs > memory}
    for one in units:
        if one.unit in large:
            into_pool(one)
    if movable(blocks):
        seconds = plan["seconds"]
        assert isinstance(seconds, dict)
        # Large ones wait for each other, so they begin at once; of what nothing is known may be long as well.
        ordered = sorted(units, key=lambda one: (one.unit not in large, -float(seconds.get(one.unit, 1e9))))
        places = iter(ordered)
        blocks = [next(places) if one.unit is not None else one for one in blocks]
    said = f"# gracefarm: {len(large)} of {len(units)} units need more than their share, {depth} of them at once\n"
    print(said[2:], end="", file=sys.stderr)
    lines = [line for one in blocks for line in one.lines]
    return f"{said}pool {POOL}\n  depth = {depth}\n" + "".join(lines)


def parse(text: str, folder: str) -> list[Block]:
    """The manifest's statements: a line, its continuations, the indented lines after it."""
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
    """The source that an edge compiles, relative to the source tree, as front.py names it; None: it compiles none."""
    match = _EDGE.match(re.sub(r"\$\r?\n *", "", statement))
    if match is None or match[1] == "phony":
        return None
    source = re.sub(r"\$([ :$])", r"\1", match[2])
    if not SOURCE.search(source):
        return None
    tree = os.path.join(os.path.dirname(os.environ["GRACEFARM_UNITS"]), "source")  # noqa: PTH118, PTH120
    return os.path.relpath(os.path.join(os.path.abspath(folder), source), tree)  # noqa: PTH100, PTH118


def peak_of(name: str, plan: dict[str, object]) -> int:
    """Bytes that a unit takes: as seen, else as declared, else as every job's."""
    seen, declared = plan["peaks"], plan["declared"]
    assert isinstance(seen, dict)
    assert isinstance(declared, dict)
    if name in seen:
        return int(seen[name])
    globs = [int(size) for glob, size in declared.items() if fnmatch.fnmatchcase(f"/{name}", f"*/{glob}")]
    return max(globs) if globs else int(str(plan["per_job"]))


def into_pool(block: Block) -> None:
    """Set the pool of an edge, in place of one of the package's own; the console's is for programs that talk to a person."""
    if any(re.match(r"\s+pool\s*=\s*console\s*$", line) for line in block.lines):
        return
    block.lines = [line for line in block.lines if not re.match(r"\s+pool\s*=", line)]
    at = next(i for i, line in enumerate(block.lines) if not line.rstrip("\r\n").endswith("$")) + 1
    if not block.lines[at - 1].endswith("\n"):
        block.lines[at - 1] += "\n"
    block.lines.insert(at, f"  pool = {POOL}\n")


def movable(blocks: Sequence[Block]) -> bool:
    """Nothing stands between the compilations that one of them might depend on for being read after it."""
    places = [i for i, one in enumerate(blocks) if one.unit is not None]
    between = blocks[places[0] : places[-1]] if places else []
    return not any(_FIXED.match(one.lines[0]) for one in between)


if __name__ == "__main__":
    main()
