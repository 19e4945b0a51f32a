"""The gates that a wheel passes before anybody gets it. docs/audit.md describes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builder.audit import alignment, cubins, grafted, machine, python_abi, rpath, symbols, tag, wheel_file
from builder.audit.contents import UNREADABLE, Contents, opened
from builder.audit.policy import Policy
from builder.audit.repair import repair
from builder.audit.verdict import Verdict, not_applicable, refused, require
from builder.audit.wheel_file import only_wheel, target_of
from gracefarm.console import Tick, no_tick

__all__ = ["GATES", "OBJECT_GATES", "Policy", "Verdict", "audit", "only_wheel", "repair", "require", "target_of"]

Gate = Callable[[Contents, Policy], Verdict]

_CONTENT_GATES: tuple[tuple[str, Gate], ...] = (
    (machine.GATE, machine.judge),
    (python_abi.GATE, python_abi.judge),
    (tag.GATE, tag.judge),
    (grafted.GATE, grafted.judge),
    (rpath.GATE, rpath.judge),
    (alignment.GATE, alignment.judge),
    (cubins.GATE, cubins.judge),
    (symbols.GATE, symbols.judge),
)

GATES: tuple[str, ...] = (wheel_file.GATE, *(name for name, _judge in _CONTENT_GATES))
"Every gate, in the order of the verdicts."

OBJECT_GATES = (wheel_file.GATE, machine.GATE, python_abi.GATE, alignment.GATE, cubins.GATE)
"What can be judged of a wheel built against headers alone: nothing that asks what its libraries define."


def audit(wheel: Path, policy: Policy, tick: Tick = no_tick) -> tuple[Verdict, ...]:
    """Every gate's verdict on a wheel, always all of them and in the order of GATES; nothing of the wheel is executed.

    Where the policy asks for objects only, those of OBJECT_GATES.

    Raises:
        HostError: a tool of this machine does not run. A bad wheel, however bad, only gets bad verdicts.
    """
    tick(0, len(GATES), wheel_file.GATE)
    first = wheel_file.judge(wheel, policy)
    try:
        with opened(wheel) as contents:
            verdicts = [first]
            for name, judge in _CONTENT_GATES:
                tick(len(verdicts), len(GATES), name)
                verdicts.append(judge(contents, policy))
    except UNREADABLE as error:
        if first.status == "passed":
            first = refused(wheel_file.GATE, [f"the archive cannot be read: {error}"])
        verdicts = [first, *(not_applicable(name, "the wheel cannot be read") for name, _judge in _CONTENT_GATES)]
    tick(len(GATES), len(GATES), "")
    return tuple(verdict for verdict in verdicts if not policy.objects_only or verdict.gate in OBJECT_GATES)
