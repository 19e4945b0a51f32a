"""What a gate says about a wheel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from gracefarm.errors import AuditError
from gracefarm.tables import Table

GateStatus = Literal["passed", "failed", "not applicable"]

SHOWN = 3
"Complaints quoted in a gate's one sentence; the details hold all."


class Verdict(Table):
    """The verdict of one gate. The record contains all verdicts."""

    gate: str = Field(description="Name of the gate")
    status: GateStatus = Field(description="Result of the gate")
    summary: str = Field(description="One sentence; says why where the gate does not apply")
    details: tuple[str, ...] = Field(default=(), description="All complaints and further facts")


def passed(gate: str, summary: str, details: Sequence[str] = ()) -> Verdict:
    """The gate let the wheel through."""
    return Verdict(gate=gate, status="passed", summary=summary, details=tuple(details))


def refused(gate: str, complaints: Sequence[str], details: Sequence[str] = ()) -> Verdict:
    """The gate refuses the wheel; the first complaints make the sentence, the details hold every one."""
    more = f", and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
    return Verdict(gate=gate, status="failed", summary="; ".join(complaints[:SHOWN]) + more, details=(*complaints, *details))


def not_applicable(gate: str, why: str) -> Verdict:
    """The gate has nothing to judge."""
    return Verdict(gate=gate, status="not applicable", summary=why)


def require(verdicts: Sequence[Verdict]) -> None:
    """Go on only when no gate refused.

    Raises:
        AuditError: names each gate that failed, with its sentence.
    """
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    if failed:
        gates = "gate" if len(failed) == 1 else "gates"
        raise AuditError(
            f"the wheel is refused by {len(failed)} {gates}: "
            + "; ".join(f"{verdict.gate} ({verdict.summary})" for verdict in failed),
            remedy="docs/reference/audit.md says what each gate wants and how a recipe meets it",
        )
