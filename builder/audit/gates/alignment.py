"""Gate `alignment`: kernels with pages of 64 KiB, as on many Grace systems, can map every segment.

The loader refuses a PT_LOAD whose p_align is smaller than the page ("ELF load command alignment not page-aligned").
GNU ld's default for aarch64 is 64 KiB; old patchelf and foreign linkers break it (pypa/auditwheel#251).
"""

from __future__ import annotations

from builder import elf
from builder.audit.contents import Contents
from builder.audit.policy import Policy
from builder.audit.verdict import Verdict, not_applicable, passed, refused
from builder.planning.stack import Arch

GATE = "alignment"
PAGE = 64 << 10


def judge(contents: Contents, policy: Policy) -> Verdict:
    """Check the alignment of each PT_LOAD, and that address and file offset are equal modulo a page."""
    if policy.target != Arch.AARCH64:
        return not_applicable(GATE, f"pages of {policy.target} are always 4 KiB")
    objects = contents.loadable(policy.target)
    if not objects:
        return not_applicable(GATE, f"the wheel has no ELF object for {policy.target}")
    complaints = [f"{name}: {wrong}" for name, binary in objects.items() for wrong in _wrong(binary)]
    if complaints:
        return refused(GATE, complaints)
    return passed(GATE, "every PT_LOAD is aligned to at least 64 KiB")


def _wrong(binary: elf.Object) -> list[str]:
    small = sorted({segment.align for segment in binary.segments if segment.align < PAGE})
    if small:
        return [f"PT_LOAD aligned to {align} bytes, less than a page of 64 KiB" for align in small]
    if any((segment.address - segment.offset) % PAGE for segment in binary.segments):
        return ["a PT_LOAD whose address and file offset differ modulo 64 KiB"]
    return []
