"""`deploy weights`: the model's files in the shared folder."""

from __future__ import annotations

import click

from deploy.cli.common import DeployContext, reporting
from deploy.cli.work import at_work, held
from deploy.nodes import paths
from deploy.steps import weights
from gracefarm.cli import CommandGroup
from gracefarm.errors import ConfigError, InstallError


@click.group("weights", cls=CommandGroup)
def weights_group() -> None:
    """Check the model's files in the folder that all nodes share.

    \b
    # Compare the hash of every file with the hash on the Hugging Face Hub.
    deploy weights verify
    """


@weights_group.command("verify")
@click.option("--remove", is_flag=True, help="Remove damaged files. `deploy up` then downloads them again.")
@reporting
def weights_verify(context: DeployContext, remove: bool) -> None:
    """Compare the hash of every file of the model with the hash on the Hugging Face Hub.

    The files are in the folder that all nodes share. Each node reads a part of them. If a file is wrong or missing, the
    command fails and names it.

    \b
    # Check all files.
    deploy weights verify
    # Check all files, and remove the damaged files.
    deploy weights verify --remove
    """
    deployment = context.deployment
    with held(context) as keeper:
        kept = keeper.state.data("weights")
        if not kept:
            raise ConfigError("the weights are not downloaded yet", remedy="download the weights with `deploy up`")
        spec = weights.WeightsSpec(root=paths.root(deployment), repo=deployment.data.model.repo)
        wrong = at_work(context, keeper, lambda work: weights.verify(work.nodes, spec, str(kept["commit"]), remove=remove))
        if wrong and remove:
            keeper.forget("weights")
    if wrong:
        raise InstallError(
            f"{len(wrong)} files are wrong or missing: {', '.join(wrong[:3])}",
            remedy="download these files again with `deploy up`"
            if remove
            else "remove these files with `deploy weights verify --remove`, then download them again with `deploy up`",
        )
    context.console.result({"wrong": wrong}, "all files match the Hub's digests")
