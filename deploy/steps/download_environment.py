"""The step `download`: the environment in which the nodes download the weights."""

from __future__ import annotations

from importlib import resources

from deploy.nodes.state import StepRecord, digest
from deploy.steps import environment
from deploy.steps.step import Applied, Looks, Step, Work


def download_lock() -> str:
    """The lock of the environment for downloads. It has huggingface_hub >= 1, which the engine's transformers excludes."""
    return (resources.files("deploy") / "data" / "download.lock").read_text()


class DownloadStep(Step):
    """The environment for downloads from the Hub."""

    name = "download"

    def inputs(self, work: Work, looks: Looks) -> str:
        """Its lock, the index, the Python and the nodes."""
        data = work.deployment.data
        # For 3.11, the same value as before python_version existed, so that older environments stay valid.
        python = data.python if data.python_version == "3.11" else (data.python, data.python_version)
        return digest("download", work.environment_root, download_lock(), data.index, python, work.inventory)

    def check(self, work: Work, record: StepRecord, looks: Looks) -> str | None:
        """Check that the environment is active on all nodes."""
        bad = [node for node, seen in looks.items() if seen["environments"].get("download") != record.data["id"]]
        return f"it is not active on {bad[0]}" if bad else None

    async def apply(self, work: Work, looks: Looks) -> Applied:
        """Build, test and activate the environment."""
        spec = environment.spec_with_lock(work, download_lock(), engine="download", link="download", set_name="download")
        built = await environment.build_and_activate(work.nodes, spec, work.settings, work.console)
        return Applied(text=f"environment for downloads {built.id[:12]} on {len(built.rows)} nodes", data={"id": built.id})
