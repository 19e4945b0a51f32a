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
    """Verify the model's files in the shared folder.

    \b
    deploy weights verify
    """


@weights_group.command("verify")
@click.option("--remove", is_flag=True, help="Remove damaged files, so that `deploy up` fetches them again.")
@reporting
def weights_verify(context: DeployContext, remove: bool) -> None:
    """Hash every file of the model again. Each node hashes a part of the files.

    \b
    deploy weights verify
    """
    deployment = context.deployment
    with held(context) as keeper:
        kept = keeper.state.data("weights")
        if not kept:
            raise ConfigError("the weights are not downloaded yet", remedy="run `deploy up`")
        spec = weights.WeightsSpec(root=paths.root(deployment), repo=deployment.data.model.repo)
        wrong = at_work(context, keeper, lambda work: weights.verify(work.nodes, spec, str(kept["commit"]), remove=remove))
        if wrong and remove:
            keeper.forget("weights")
    if wrong:
        raise InstallError(
            f"{len(wrong)} files are wrong or missing: {', '.join(wrong[:3])}",
            remedy="download them again with `deploy up`"
            if remove
            else "run `deploy weights verify --remove`, then `deploy up`",
        )
    context.console.result({"wrong": wrong}, "all files match the Hub's digests")
