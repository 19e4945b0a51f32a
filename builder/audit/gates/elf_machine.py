"""Gate `elf-machine`: every object that a loader could load is for the target."""

from __future__ import annotations

from builder import elf
from builder.audit.contents import Contents, is_for
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused

GATE = "elf-machine"


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Check machine, word size and byte order of shared objects and executables; other object files are not loaded."""
    loadable = {name: binary for name, binary in contents.objects.items() if binary.kind in elf.LOADABLE}
    complaints = [f"{name}: {reason}" for name, reason in contents.damaged.items()]
    complaints += [
        f"{name} is for {_machine(binary)}, not {policy.target}"
        for name, binary in loadable.items()
        if not is_for(binary, policy.target)
    ]
    if complaints:
        return refused(GATE, complaints)
    if not loadable:
        return not_applicable(GATE, "the wheel has no ELF object")
    objects = "the one ELF object is" if len(loadable) == 1 else f"all {len(loadable)} ELF objects are"
    return passed(GATE, f"{objects} for {policy.target}", sorted(loadable))


def _machine(binary: elf.Object) -> str:
    order = "" if binary.little_endian else ", big-endian"
    return f"{binary.machine.removeprefix('EM_').lower()} ({binary.bits} bit{order})"
