"""`index publisher`: workflows that may upload without a stored token."""

from __future__ import annotations

from dataclasses import asdict

import click

from gracefarm.cli import CommandGroup
from index.cli.common import IndexContext, in_context
from index.names import normalise
from index.trust import publishers
from index.trust.publishers import GITHUB, GITLAB, TrustedPublisher


@click.group("publisher", cls=CommandGroup)
def publisher() -> None:
    """Manage the workflows that may upload without a stored token (docs/howto/index-trust.md).

    \b
    index publisher add flash-attn github OWNER/NAME nightly.yml
    index publisher list
    """


@publisher.command("add")
@in_context
@click.argument("project")
@click.argument("kind", type=click.Choice(["github", "gitlab"]))
@click.argument("repository")
@click.argument("workflow")
@click.option("--environment", default="", help="Accept only jobs of this deployment environment.")
@click.option(
    "--issuer",
    help="Issuer of the identity tokens, if the server is self-hosted: https://HOST/_services/token for GitHub, "
    "https://HOST for GitLab.",
)
def add(
    context: IndexContext, project: str, kind: str, repository: str, workflow: str, environment: str, issuer: str | None
) -> None:
    """Allow a WORKFLOW of a REPOSITORY to upload to PROJECT, and accept attestations of this workflow.

    \b
    index publisher add flash-attn github OWNER/NAME nightly.yml
    index publisher add flash-attn gitlab GROUP/NAME .gitlab-ci.yml
    """
    is_github = kind == "github"
    trusted = TrustedPublisher(
        project=normalise(project),
        kind="github" if is_github else "gitlab",
        issuer=(issuer or (GITHUB if is_github else GITLAB)),
        repository=repository,
        workflow=workflow,
        environment=environment,
    )
    catalogue = context.catalogue()
    publishers.add(catalogue, context.actor, trusted)
    audience = publishers.audience(catalogue)
    text = f"{trusted.name} may upload to {trusted.project}; its identity tokens must name the audience {audience}"
    context.console.result({"project": trusted.project, "publisher": trusted.name, "audience": audience}, text)


@publisher.command("list")
@in_context
def list_(context: IndexContext) -> None:
    """List the publishers of all projects.

    \b
    index publisher list
    """
    trusted = publishers.all_publishers(context.catalogue())
    lines = [
        f"{item.project:<24} {item.kind:<7} {item.repository}  {item.workflow}"
        + (f"  environment {item.environment}" if item.environment else "")
        + ("" if item.issuer in (GITHUB, GITLAB) else f"  {item.issuer}")
        for item in trusted
    ]
    context.console.result([asdict(item) for item in trusted], "\n".join(lines))


@publisher.command("remove")
@in_context
@click.argument("project")
@click.argument("repository")
def remove(context: IndexContext, project: str, repository: str) -> None:
    """Remove the publishers with this repository from the project. Their upload tokens expire immediately.

    \b
    index publisher remove flash-attn OWNER/NAME
    """
    count = publishers.remove(context.catalogue(), context.actor, normalise(project), repository)
    context.console.result({"project": normalise(project), "removed": count}, f"{repository}: removed from {project}")
