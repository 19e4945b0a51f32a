"""The step `download`: the environment with which the nodes fetch the weights."""

from __future__ import annotations

from importlib import resources

from deploy.nodes.state import StepRecord, digest
from deploy.steps import environment
from deploy.steps.step import Applied, Looks, Step, Work


def download_lock() -> str:
    """The lock of the environment that downloads weights: huggingface_hub >= 1, which an engine's transformers forbids."""
    return (resources.files("deploy") / "data" / "download.lock").read_text()


class DownloadStep(Step):
    """The environment that speaks with the Hub: huggingface_hub >= 1 and an engine's transformers exclude each other."""

    name = "download"

    def inputs(self, work: Work, looks: Looks) -> str:
        """Its lock, the index, the Python and the nodes."""
        data = work.deployment.data
        # As it was before another Python could be named: what is there stays.
        python = data.python if data.python_version == "3.11" else (data.python, data.python_version)
        return digest("download", work.environment_root, download_lock(), data.index, python, work.inventory)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Active everywhere."""
        bad = [node for node, seen in looks.items() if seen["environments"].get("download") != record.data["id"]]
        return f"{bad[0]} does not see it" if bad else None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Build, prove, switch."""
        spec = environment.spec_with_lock(work, download_lock(), engine="download", link="download", set_name="download")
        built = await environment.build_and_activate(work.nodes, spec, work.settings, work.console)
        return Applied(text=f"environment for downloads {built.id[:12]} on {len(built.rows)} nodes", data={"id": built.id})
