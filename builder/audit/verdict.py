"""The verdict of a gate on a wheel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gracefarm.errors import AuditError
from gracefarm.tables import Table

GateStatus = Literal["passed", "failed", "not applicable"]

SHOWN = 3
"Number of complaints in the summary; the details have all."


class Verdict(Table):
    """Result of one gate."""

    gate: str
    "Name of the gate"
    status: GateStatus
    "`not applicable`: the gate does not apply to this wheel"
    summary: str
    "Result in one sentence"
    details: tuple[str, ...] = ()
    "Complaints of the gate, and other facts about the wheel"


def passed(gate: str, summary: str, details: Sequence[str] = ()) -> Verdict:
    """The gate accepts the wheel."""
    return Verdict(gate=gate, status="passed", summary=summary, details=tuple(details))


def refused(gate: str, complaints: Sequence[str], details: Sequence[str] = ()) -> Verdict:
    """The gate refuses the wheel; the summary has the first complaints, the details have all."""
    more = f", and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
    return Verdict(gate=gate, status="failed", summary="; ".join(complaints[:SHOWN]) + more, details=(*complaints, *details))


def not_applicable(gate: str, why: str) -> Verdict:
    """The gate does not apply to the wheel."""
    return Verdict(gate=gate, status="not applicable", summary=why)


def require(verdicts: Sequence[Verdict]) -> None:
    """Raise if a gate refused the wheel.

    Raises:
        AuditError: names each gate that refused, with its summary.
    """
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    if failed:
        gates = "gate" if len(failed) == 1 else "gates"
        raise AuditError(
            f"the wheel is refused by {len(failed)} {gates}: "
            + "; ".join(f"{verdict.gate} ({verdict.summary})" for verdict in failed),
            remedy="see docs/reference/audit.md, which describes what each gate requires and how to fix a recipe",
        )
