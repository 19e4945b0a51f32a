"""Wheel tags that the Python of a stack accepts on an architecture."""

from __future__ import annotations

from packaging.tags import Tag, compatible_tags, cpython_tags

from builder.planning.stack import Arch, LoadedStack

_GLIBC_FIRST = {Arch.AARCH64: 17, Arch.X86_64: 5}
"glibc 2.N: the oldest manylinux level of the architecture."


def tags(stack: LoadedStack, arch: Arch) -> list[Tag]:
    """The wheel tags that the stack's Python accepts on that architecture, best first, up to the stack's glibc level."""
    return tags_of(stack.python, glibc(stack, arch), arch)


def glibc(stack: LoadedStack, arch: Arch) -> str:
    """The glibc level of a target; for a mere host that of the root, which has the same Debian."""
    return stack.data.glibc.get(arch) or max(stack.data.glibc.values())


def tags_of(python: str, level: str, arch: Arch) -> list[Tag]:
    """The tags of a Python (as 3.11, or 3.13t) with a glibc (as 2_34), best first."""
    major, minor = (int(part) for part in level.split("_"))
    aliases = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    platforms = []
    for number in range(minor, _GLIBC_FIRST[arch] - 1, -1):
        platforms.append(f"manylinux_{major}_{number}_{arch}")
        alias = aliases.get(number)
        if alias and (arch is Arch.X86_64 or alias == "manylinux2014"):
            platforms.append(f"{alias}_{arch}")
    platforms.append(f"linux_{arch}")
    version = tuple(int(part) for part in python.rstrip("t").split("."))
    own = cpython_tags(version, abis=[f"cp{python.replace('.', '')}"] if python.endswith("t") else None, platforms=platforms)
    return [*own, *compatible_tags(version, interpreter=f"cp{version[0]}{version[1]}", platforms=platforms)]
