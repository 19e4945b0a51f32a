"""Requirements of g++'s runtime library on the machine of a wheel, as far as the source shows them before the compile.

Objects of g++ 12 and later that wait on a condition variable require `condition_variable::wait` of GLIBCXX_3.4.30, with every
C library (the libstdc++ of GCC 12 gave it a new version). manylinux_2_35 is the first level that allows it; Ubuntu 22.04 has
both.
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
"In bytes; a larger source file is considered data."


def warning(plan: Plan, tree: Path) -> str | None:
    """A warning, if the source waits on a condition variable and the stack allows only levels without the required symbol.

    None for toolchains with other compilers than the stack's.
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
        f"{place.relative_to(tree)} uses std::condition_variable. With g++ {gcc}, code that waits on a condition variable "
        f"requires {SYMBOL}. The first glibc level that allows this version is {first}, but stack {stack} allows only "
        f"{allowed}. If the file is compiled into the wheel, the gate platform-tag will refuse the wheel"
    )


def _waiting(tree: Path) -> Iterator[Path]:
    """Source files that use a condition variable."""
    for folder, folders, names in os.walk(tree):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(names):
            path = Path(folder, name)
            readable = path.suffix in _SOURCE and not path.is_symlink() and path.stat().st_size <= _LARGEST
            if readable and _WAITS.search(path.read_bytes()):
                yield path
