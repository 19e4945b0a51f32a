"""`index token`: who may upload."""

from __future__ import annotations

from pathlib import Path

import click

from gracefarm.errors import UsageError
from index.cli.common import IndexContext, in_context
from index.names import check_set_name, normalise
from index.store import auth, htpasswd


@click.group("token")
def token() -> None:
    """Who may upload."""


@token.command("create")
@in_context
@click.option("--name", required=True, help="What the audit log will call its holder.")
@click.option("--project", help="Good for this project alone.")
@click.option("--set", "set_name", help="Good for this set alone.")
@click.option("--nightly", is_flag=True, help="Good for the nightly channel alone.")
@click.option("--expires", help="90d, 12h …; default: never.")
def create(
    context: IndexContext, name: str, project: str | None, set_name: str | None, nightly: bool, expires: str | None
) -> None:
    """Make a token and print it, once."""
    if nightly and set_name:
        raise UsageError("a token is for the nightly channel or for a set", remedy="give --nightly or --set, not both")
    secret = auth.create(
        context.catalogue(),
        context.actor,
        name,
        project=normalise(project) if project else None,
        set_name=auth.NIGHTLY if nightly else check_set_name(set_name) if set_name else None,
        expires=auth.duration(expires) if expires else None,
    )
    context.console.result({"name": name, "token": secret}, secret)
    if not context.console.as_json:
        context.console.event(
            "hint",
            "upload with `twine upload --verbose` (without it twine hides why it failed) or `uv publish --check-url`;\n"
            "the index's own /legacy/ has both lines to copy; repeating an upload is harmless",
        )


@token.command("import")
@in_context
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--project", help="Good for this project alone.")
@click.option("--set", "set_name", help="Good for this set alone.")
def import_(context: IndexContext, file: Path, project: str | None, set_name: str | None) -> None:
    """Let the users of an htpasswd file upload with their passwords; those of an earlier file who left it no longer."""
    added, revoked = auth.import_users(
        context.catalogue(),
        context.actor,
        htpasswd.read(file),
        project=normalise(project) if project else None,
        set_name=check_set_name(set_name) if set_name else None,
    )
    context.console.result({"added": added, "revoked": revoked}, f"{added} users added or changed, {revoked} revoked")


@token.command("list")
@in_context
def list_(context: IndexContext) -> None:
    """Tokens, without their secrets."""
    rows = context.catalogue().rows(
        "SELECT name, project, set_name, created, expires, revoked, hashed NOT NULL AS user, minted FROM token ORDER BY id"
    )
    lines = [
        f"{row['name']:<20} {row['project'] or ('its projects' if row['minted'] else 'any project'):<20}"
        f" {row['set_name'] or 'any set':<16} {'user' if row['user'] else 'short' if row['minted'] else 'token':<5}"
        f" {'revoked' if row['revoked'] else 'expires ' + row['expires'][:10] if row['expires'] else 'no end'}"
        for row in rows
    ]
    context.console.result([dict(row) for row in rows], "\n".join(lines))


@token.command("revoke")
@in_context
@click.argument("name")
def revoke(context: IndexContext, name: str) -> None:
    """End a token now."""
    count = auth.revoke(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "revoked": count}, f"{name}: revoked")
