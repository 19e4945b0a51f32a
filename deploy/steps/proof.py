"""The step `proof`: preflight again, in the environment that serves."""

from __future__ import annotations

from deploy.nodes.state import StepRecord, digest
from deploy.steps.preflight import boots, cells_of, require, summary, tell
from deploy.steps.step import Applied, Looks, Step, Work

OF_THE_NODE = ("tunnel", "names", "disk", "share", "route", "ports", "clock", "cuda", "memory", "shm", "limits")
"Checks that an environment does not change."


class ProofStep(Step):
    """Runs preflight again in the environment that serves: pages, libstdc++, all-reduce."""

    name = "proof"

    def inputs(self, work: Work, looks: Looks) -> str | None:
        """The environment and the nodes. None if there is no environment."""
        identifier = work.keeper.state.data("environment").get("id")
        return digest("proof", work.inventory, identifier, boots(looks)) if identifier else None

    def check(self, work: Work, record: StepRecord, looks: Looks) -> None:
        """Nothing: the inputs are sufficient."""

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Run the checks."""
        cells = await cells_of(work, looks)
        tell(work.console, cells, told=OF_THE_NODE)
        require(cells)
        reduced = next((cell.text for cell in cells if cell.check == "gloo" and cell.status == "ok"), None)
        return Applied(text=f"with the environment: {summary(cells)}" + (f"; all-reduce {reduced}" if reduced else ""))
