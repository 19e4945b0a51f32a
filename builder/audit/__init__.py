"""The gates that a wheel passes before anybody gets it. docs/reference/audit.md describes each."""

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
    """What a module of audit/gates has that judges an opened wheel."""

    GATE: str

    def judge(self, contents: Contents, policy: Policy) -> Verdict:
        """The gate's verdict."""


_CONTENT_GATES: tuple[Gate, ...] = (
    *(elf_machine, python_abi, platform_tag, grafted),
    *(licence, rpath, alignment, cubins, variant_label, symbols),
)

GATES: tuple[str, ...] = (wheel.GATE, *(gate.GATE for gate in _CONTENT_GATES))
"Every gate, in the order of the verdicts."

OBJECT_GATES = (
    *(wheel.GATE, elf_machine.GATE, python_abi.GATE, licence.GATE),
    *(alignment.GATE, cubins.GATE, variant_label.GATE),
)
"What can be judged of a wheel built against headers alone: nothing that asks what its libraries define."


def holds_device_code(path: Path) -> bool:
    """Whether an object of the wheel has CUDA device code; a file that cannot be read has none, which `audit` refuses."""
    try:
        with opened(path) as contents:
            return any(binary.fatbin for binary in contents.objects.values())
    except UNREADABLE:
        return False


def audit(path: Path, policy: Policy) -> tuple[Verdict, ...]:
    """Every gate's verdict on a wheel, always all of them and in the order of GATES; nothing of the wheel is executed.

    Where the policy asks for objects only, those of OBJECT_GATES.

    Raises:
        HostError: a tool of this machine does not run. A bad wheel, however bad, only gets bad verdicts.
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
