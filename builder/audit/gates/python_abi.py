"""Gate `python-abi`: extension modules are for the Python of the wheel's tag, and the tag fits the stack's Python."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from builder import elf
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused

GATE = "python-abi"
_SUFFIX = re.compile(r"\.cpython-(\d+)[a-z]*-(.+)\.so$")


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Compare file suffixes with the tag, and the tag with the stack's Python; check the name of the init function."""
    modules = {name: binary for name, binary in contents.loadable(policy.target).items() if _inits(binary)}
    if not modules:
        return not_applicable(GATE, "the wheel has no extension module")
    try:
        tags = parse_wheel_filename(contents.wheel.name)[3]
    except InvalidWheelFilename:
        return not_applicable(GATE, "the file name has no valid tags; the gate `wheel` refuses it")
    complaints = _installable(tags, policy.python)
    for name, binary in modules.items():
        complaints += _suffix(name, tags, policy) + _init(name, binary)
    if complaints:
        return refused(GATE, complaints)
    return passed(GATE, f"the extension modules fit the tag {_text(tags)} and Python {policy.python}", sorted(modules))


def _inits(binary: elf.Object) -> list[str]:
    return [symbol.removeprefix("PyInit_") for symbol in binary.exports.symbols if symbol.startswith("PyInit_")]


def _text(tags: frozenset[Tag]) -> str:
    return " ".join(sorted({f"{tag.interpreter}-{tag.abi}" for tag in tags}))


def _installable(tags: frozenset[Tag], python: str) -> list[str]:
    minor = int(python.split(".")[1])
    for tag in tags:
        match = re.fullmatch(r"cp3(\d+)", tag.interpreter)
        if tag.abi == f"cp3{minor}" or (tag.abi == "abi3" and match and int(match[1]) <= minor):
            return []
        if tag.interpreter in ("py3", f"py3{minor}", f"cp3{minor}") and tag.abi == "none":
            return []
    return [f"a wheel with the tag {_text(tags)} cannot be installed with Python {python}"]


def _suffix(name: str, tags: frozenset[Tag], policy: Policy) -> list[str]:
    abis = {tag.abi for tag in tags}
    if name.endswith(".abi3.so"):
        ok = bool(abis & {"abi3", "none"}) or any(abi.startswith("cp3") for abi in abis)
        return [] if ok else [f"{name} is a stable-ABI module in a wheel for {_text(tags)}"]
    match = _SUFFIX.search(name)
    if match is None:
        return []
    complaints = []
    if f"cp{match[1]}" not in abis:
        complaints.append(f"{name} is for CPython {match[1]} in a wheel for {_text(tags)}; other Pythons would not find it")
    if match[2] != policy.target.triplet:
        complaints.append(f"{name} has the suffix {match[2]}, which Python on {policy.target} does not import")
    return complaints


def _init(name: str, binary: elf.Object) -> list[str]:
    stem = PurePosixPath(name).name.split(".")[0]
    inits = _inits(binary)
    return [] if stem in inits else [f"{name} has no PyInit_{stem} (it has PyInit_{', PyInit_'.join(sorted(inits)[:3])})"]
