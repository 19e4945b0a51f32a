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
    """Allow CI workflows to upload without a stored token.

    A publisher is a workflow on GitHub or GitLab that may upload to a project. The workflow proves its identity with a
    token of the CI system, and receives a short-lived upload token. docs/howto/index-trust.md describes the steps.

    \b
    # Allow the workflow nightly.yml to upload to flash-attn.
    index publisher add flash-attn github OWNER/NAME nightly.yml
    # List all publishers.
    index publisher list
    """


@publisher.command("add")
@in_context
@click.argument("project")
@click.argument("kind", type=click.Choice(["github", "gitlab"]))
@click.argument("repository")
@click.argument("workflow")
@click.option("--environment", default="", help="Accept only CI jobs in this deployment environment.")
@click.option(
    "--issuer",
    help="Only for your own GitHub or GitLab server: address of the issuer of its identity tokens. GitHub: "
    "https://HOST/_services/token. GitLab: https://HOST.",
)
def add(
    context: IndexContext, project: str, kind: str, repository: str, workflow: str, environment: str, issuer: str | None
) -> None:
    """Allow a CI workflow to upload to a project, and accept its attestations.

    PROJECT is the name of the project on the index. REPOSITORY is OWNER/NAME on GitHub, or GROUP/NAME on GitLab. WORKFLOW is
    the file name of the workflow in .github/workflows on GitHub, or the path of the CI file on GitLab. Attestations are
    signatures of the uploaded files. The workflow must request its identity token for a certain audience. The
    command prints this audience.

    \b
    # Allow the workflow nightly.yml on GitHub to upload to flash-attn.
    index publisher add flash-attn github OWNER/NAME nightly.yml
    # Allow the GitLab CI of GROUP/NAME to upload to flash-attn.
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
    """List the CI workflows that may upload.

    Each line shows a project of the index, and a workflow that may upload to this project. For the workflow, the line shows
    github or gitlab, the repository and the file.

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
    """Remove the workflows of a repository from the publishers of a project.

    PROJECT is the name of the project on the index. REPOSITORY is OWNER/NAME on GitHub, or GROUP/NAME on GitLab. The
    workflows of REPOSITORY can then no longer upload to the project. Their existing upload tokens become invalid for the
    project.

    \b
    # Remove all workflows of OWNER/NAME from flash-attn.
    index publisher remove flash-attn OWNER/NAME
    """
    count = publishers.remove(context.catalogue(), context.actor, normalise(project), repository)
    context.console.result({"project": normalise(project), "removed": count}, f"{repository}: removed from {project}")
