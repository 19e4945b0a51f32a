"""The gates that a wheel must pass before it is published. docs/reference/audit.md describes each gate."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from builder.audit.contents import UNREADABLE, Contents, opened
from builder.audit.gates import (
    alignment,
    cubins,
    elf_machine,
    grafted,
    licence,
    platform_tag,
    python_abi,
    rpath,
    symbols,
    variant_label,
    wheel,
)
from builder.audit.gates.wheel import only_wheel, target_of
from builder.audit.policy import Policy
from builder.audit.repair import repair
from builder.audit.verdict import Verdict, not_applicable, refused, require

__all__ = [
    "GATES",
    "OBJECT_GATES",
    "Policy",
    "Verdict",
    "audit",
    "holds_device_code",
    "only_wheel",
    "repair",
    "require",
    "target_of",
]


class Gate(Protocol):
    """A module of audit/gates that judges an opened wheel."""

    GATE: str

    def judge(self, contents: Contents, policy: Policy) -> Verdict:
        """The verdict of the gate."""


_CONTENT_GATES: tuple[Gate, ...] = (
    *(elf_machine, python_abi, platform_tag, grafted),
    *(licence, rpath, alignment, cubins, variant_label, symbols),
)

GATES: tuple[str, ...] = (wheel.GATE, *(gate.GATE for gate in _CONTENT_GATES))
"All gates, in the order of the verdicts."

OBJECT_GATES = (
    *(wheel.GATE, elf_machine.GATE, python_abi.GATE, licence.GATE),
    *(alignment.GATE, cubins.GATE, variant_label.GATE),
)
"Gates for a wheel that was built with headers only: those that do not depend on libraries."


def holds_device_code(path: Path) -> bool:
    """Whether an object of the wheel has CUDA device code. Unreadable files are ignored here; `audit` refuses them."""
    try:
        with opened(path) as contents:
            return any(binary.fatbin for binary in contents.objects.values())
    except UNREADABLE:
        return False


def audit(path: Path, policy: Policy) -> tuple[Verdict, ...]:
    """The verdicts of all gates on a wheel, in the order of GATES; nothing of the wheel is executed.

    With `objects_only` in the policy: the verdicts of OBJECT_GATES.

    Raises:
        HostError: a tool of this machine does not run. A bad wheel never raises; it is refused.
    """
    try:
        with opened(path) as contents:
            first = wheel.judge(contents.wheel, policy, contents)
            verdicts = [first, *(gate.judge(contents, policy) for gate in _CONTENT_GATES)]
    except UNREADABLE as error:
        first = wheel.judge(path, policy)
        if first.status == "passed":
            first = refused(wheel.GATE, [f"the archive cannot be read: {error}"])
        verdicts = [first, *(not_applicable(gate.GATE, "the wheel cannot be read") for gate in _CONTENT_GATES)]
    return tuple(verdict for verdict in verdicts if not policy.objects_only or verdict.gate in OBJECT_GATES)
