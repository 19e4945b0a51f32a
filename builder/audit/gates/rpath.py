"""Gate `rpath`: objects search libraries relative to themselves, not in folders of the build machine."""

from __future__ import annotations

from collections.abc import Sequence

from builder import elf
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.providers import ORIGIN
from builder.audit.verdict import Verdict, not_applicable, passed, refused

GATE = "rpath"


def allowed(entry: str, build_paths: Sequence[str] = ()) -> bool:
    """Whether the entry is relative to $ORIGIN. An empty or relative entry would mean the working directory."""
    head = entry.split("/", 1)[0]
    return head in ORIGIN and not any(path in entry for path in build_paths)


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Check every entry of DT_RPATH and DT_RUNPATH."""
    objects = contents.loadable(policy.target)
    if not objects:
        return not_applicable(GATE, f"the wheel has no ELF object for {policy.target}")
    complaints = [
        f"{name} has {kind} {entry or '(the working directory)'}"
        for name, binary in objects.items()
        for kind, entry in entries(binary)
        if not allowed(entry, policy.build_paths)
    ]
    if complaints:
        return refused(GATE, complaints)
    kept = [f"{name}: {kind} {entry}" for name, binary in objects.items() for kind, entry in entries(binary)]
    return passed(GATE, "only entries relative to $ORIGIN" if kept else "no RPATH and no RUNPATH", kept)


def entries(binary: elf.Object) -> list[tuple[str, str]]:
    """Tag and folder of each entry."""
    return [("RPATH", entry) for entry in binary.rpath] + [("RUNPATH", entry) for entry in binary.runpath]
