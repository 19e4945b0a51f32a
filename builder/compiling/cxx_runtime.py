"""What g++'s runtime library will ask of the machine that a wheel runs on, as far as the source shows it before the compile.

Objects of g++ 12 and later that wait on a condition variable need `condition_variable::wait` of GLIBCXX_3.4.30, whatever the
age of the C library (GCC 12's libstdc++ gave it a new version); manylinux_2_35 is the first level that allows it, and Ubuntu
22.04 has both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from builder.planning.plan import Plan

SINCE_GCC = 12
FIRST_LEVEL = (2, 35)
SYMBOL = "GLIBCXX_3.4.30"
_WAITS = re.compile(rb"\bstd::condition_variable\b(?!_any)")
_SOURCE = (".cpp", ".cc", ".cxx", ".cu", ".h", ".hpp", ".hh", ".cuh", ".inl")
_LARGEST = 4 << 20
"Bytes; a source file that is larger is data."


def warning(plan: Plan, tree: Path) -> str | None:
    """A sentence, if the source waits on a condition variable and the stack allows no level that has what it needs.

    Nothing is said of a toolchain that brings compilers other than the stack's.
    """
    level = tuple(int(part) for part in plan.stack.data.glibc[plan.target].split("_"))
    if level >= FIRST_LEVEL or plan.stack.data.toolchain.gcc < SINCE_GCC or plan.toolchain.inputs(plan):
        return None
    place = next(_waiting(tree), None)
    if place is None:
        return None
    stack, gcc = plan.stack.data.name, plan.stack.data.toolchain.gcc
    allowed, first = (".".join(map(str, version)) for version in (level, FIRST_LEVEL))
    return (
        f"{place.relative_to(tree)} uses std::condition_variable: objects of g++ {gcc} that wait on one need {SYMBOL}. "
        f"Level {first} is the first to allow that, and stack {stack} allows {allowed}: if it is compiled in, the gate "
        "platform-tag refuses the wheel"
    )


def _waiting(tree: Path) -> Iterator[Path]:
    """Source files that name a condition variable."""
    for folder, folders, names in os.walk(tree):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(names):
            path = Path(folder, name)
            readable = path.suffix in _SOURCE and not path.is_symlink() and path.stat().st_size <= _LARGEST
            if readable and _WAITS.search(path.read_bytes()):
                yield path
