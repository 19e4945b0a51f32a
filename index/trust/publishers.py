"""Trusted publishers: workflows of repositories that may upload to a project. `index publisher add` adds them."""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit

from gracefarm.errors import UsageError
from index.errors import NotFoundError
from index.store.catalogue import Catalogue

PublisherKind = Literal["github", "gitlab"]

GITHUB = "https://token.actions.githubusercontent.com"
GITLAB = "https://gitlab.com"
"Issuers of the public services. Sigstore's certificates name the same issuers."

_REPOSITORY: Mapping[PublisherKind, re.Pattern[str]] = MappingProxyType(
    {
        "github": re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+"),
        "gitlab": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)+"),
    }
)
_WORKFLOW: Mapping[PublisherKind, re.Pattern[str]] = MappingProxyType(
    {
        "github": re.compile(r"[A-Za-z0-9._-]+\.ya?ml"),
        "gitlab": re.compile(r"([A-Za-z0-9._-]+/)*[A-Za-z0-9._-]+\.ya?ml"),
    }
)


@dataclass(frozen=True, kw_only=True)
class TrustedPublisher:
    """A workflow of a repository that may upload to a project."""

    id: int = 0
    project: str
    kind: PublisherKind
    issuer: str
    "URL of the issuer that signs its identity tokens."
    repository: str
    "OWNER/NAME on GitHub, GROUP/…/NAME on GitLab."
    workflow: str
    "File name in .github/workflows on GitHub; path of the CI file on GitLab."
    environment: str = ""
    "Required deployment environment; empty: not required."
    repository_id: str | None = None
    "The service's numeric id of the repository, stored at the first exchange."

    @property
    def name(self) -> str:
        """The name of the publisher in the audit log."""
        return f"{self.kind}:{self.repository}/{self.workflow}"

    def matches(self, claims: Mapping[str, object]) -> bool:
        """Whether these claims, with a verified signature, belong to this publisher."""

        def claim(key: str) -> str:
            return str(claims.get(key) or "")

        if claim("iss") != self.issuer:
            return False
        if self.environment and claim("environment").casefold() != self.environment.casefold():
            return False
        if self.kind == "github":
            path, workflow = claim("repository"), claim("job_workflow_ref")
            expected = f"{self.repository}/.github/workflows/{self.workflow}@"
        else:
            path, workflow = claim("project_path"), claim("ci_config_ref_uri")
            expected = f"{urlsplit(self.issuer).netloc}/{self.repository}//{self.workflow}@"
        if path.casefold() != self.repository.casefold():
            return False
        # The path of the repository is case-insensitive; the name of the file is case-sensitive.
        start = workflow[: len(expected)]
        return start.casefold() == expected.casefold() and start.endswith(f"{self.workflow}@")

    def number_in(self, claims: Mapping[str, object]) -> str:
        """The numeric id of the repository in the claims."""
        return str(claims.get("repository_id" if self.kind == "github" else "project_id") or "")


def publisher_of(row: sqlite3.Row) -> TrustedPublisher:
    """A row of the table `publisher`."""
    return TrustedPublisher(**dict(row))


def all_publishers(catalogue: Catalogue) -> list[TrustedPublisher]:
    """Every publisher, by project."""
    return [publisher_of(row) for row in catalogue.rows("SELECT * FROM publisher ORDER BY project, id")]


def of_project(catalogue: Catalogue, project: str) -> list[TrustedPublisher]:
    """The publishers of one project, in the order of their addition."""
    return [publisher_of(row) for row in catalogue.rows("SELECT * FROM publisher WHERE project = ? ORDER BY id", (project,))]


def add(catalogue: Catalogue, actor: str, publisher: TrustedPublisher) -> None:
    """Let the publisher upload to its project, and host the project. Adding a publisher again changes nothing.

    Raises:
        UsageError: the name of the repository, workflow or issuer is not valid.
    """
    _check(publisher)
    with catalogue.change(actor) as change:
        change.execute(
            "INSERT INTO project (name) VALUES (?) ON CONFLICT (name) DO UPDATE SET hosted = 1", (publisher.project,)
        )
        change.execute(
            "INSERT OR IGNORE INTO publisher (project, kind, issuer, repository, workflow, environment)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(publisher.project, publisher.kind, publisher.issuer),
                *(publisher.repository, publisher.workflow, publisher.environment),
            ),
        )
        change.execute(
            "INSERT OR IGNORE INTO meta (key, value) VALUES ('audience', ?)", (f"gracefarm-{secrets.token_hex(8)}",)
        )
        change.note("token.trust", publisher.project, publisher=publisher.name, issuer=publisher.issuer)


def remove(catalogue: Catalogue, actor: str, project: str, repository: str) -> int:
    """Remove the publishers with this repository from the project; their tokens expire immediately. Returns their number.

    Raises:
        UsageError: the project has no such publisher.
    """
    with catalogue.change(actor) as change:
        gone = change.execute("DELETE FROM publisher WHERE project = ? AND repository = ?", (project, repository)).rowcount
        if not gone:
            raise UsageError(
                f"the project {project} has no publisher with the repository {repository}",
                remedy="give a project and a repository that `index publisher list` shows",
            )
        change.note("token.distrust", project, repository=repository)
    return gone


def audience(catalogue: Catalogue) -> str:
    """The audience that identity tokens must name. It is unique to this index, so tokens for another index are not accepted.

    Raises:
        NotFoundError: no publisher was ever added.
    """
    row = catalogue.row("SELECT value FROM meta WHERE key = 'audience'")
    if row is None:
        raise NotFoundError("no project of this index has a publisher", remedy="add a publisher with `index publisher add`")
    return str(row["value"])


def is_safe_url(url: str) -> bool:
    """Whether a third party cannot change responses on the way: https, or this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    return (parts.scheme == "https" and bool(host)) or (parts.scheme == "http" and host in ("127.0.0.1", "::1", "localhost"))


def _check(publisher: TrustedPublisher) -> None:
    if not is_safe_url(publisher.issuer):
        raise UsageError(
            f"{publisher.issuer!r} is not an https address", remedy="give the issuer's https address, such as https://HOST"
        )
    if not _REPOSITORY[publisher.kind].fullmatch(publisher.repository):
        shape = "OWNER/NAME" if publisher.kind == "github" else "GROUP/NAME"
        raise UsageError(
            f"{publisher.repository!r} is not a repository of {publisher.kind}",
            remedy=f"give the repository as {shape}, without the host",
        )
    if not _WORKFLOW[publisher.kind].fullmatch(publisher.workflow):
        github, gitlab = "its file name, such as release.yml", "the file's path in the repository, such as .gitlab-ci.yml"
        example = github if publisher.kind == "github" else gitlab
        raise UsageError(f"{publisher.workflow!r} is not a workflow of {publisher.kind}", remedy=f"give {example}")
