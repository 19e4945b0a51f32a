"""`index token`: create, list and revoke upload tokens."""

from __future__ import annotations

from pathlib import Path

import click

from gracefarm.cli import CommandGroup
from gracefarm.errors import UsageError
from index.cli.common import IndexContext, in_context
from index.names import check_set_name, normalise
from index.store import auth, htpasswd


@click.group("token", cls=CommandGroup)
def token() -> None:
    """Create, list and revoke upload tokens.

    \b
    index token create --name ci --expires 90d
    index token revoke ci
    """


@token.command("create")
@in_context
@click.option("--name", required=True, help="Name of the token in the audit log.")
@click.option("--project", help="Valid only for this project.")
@click.option("--set", "set_name", help="Valid only for this set.")
@click.option("--nightly", is_flag=True, help="Valid only for the nightly channel.")
@click.option("--cache", is_flag=True, help="Valid only for the shared compiler cache.")
@click.option("--expires", help="Lifetime, such as 90d or 12h. Default: the token does not expire.")
def create(
    context: IndexContext,
    name: str,
    project: str | None,
    set_name: str | None,
    nightly: bool,
    cache: bool,
    expires: str | None,
) -> None:
    """Create a token and print it. It is not shown again.

    \b
    index token create --name ci --project causal-conv1d --expires 90d
    """
    if (set_name is not None) + nightly + cache > 1 or (cache and project):
        raise UsageError(
            "--nightly, --cache and --set cannot be used together, and --cache cannot be used with --project",
            remedy="give only one of --nightly, --cache and --set; omit --project with --cache",
        )
    secret = auth.create(
        context.catalogue(),
        context.actor,
        name,
        project=normalise(project) if project else None,
        set_name=auth.NIGHTLY if nightly else auth.CACHE if cache else check_set_name(set_name) if set_name else None,
        expires=auth.duration(expires) if expires else None,
    )
    context.console.result({"name": name, "token": secret}, secret)
    if cache and not context.console.as_json:
        context.console.event(
            "hint", "set the environment variable GRACEFARM_CACHE_TOKEN to this token on the machine that builds"
        )
    elif not context.console.as_json:
        context.console.event(
            "hint",
            "upload with `twine upload --verbose` (without it twine hides the reason of a failure)\n"
            "or `uv publish --check-url`; /legacy/ of the index shows both commands; repeating an upload is safe",
        )


@token.command("import")
@in_context
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--project", help="Valid only for this project.")
@click.option("--set", "set_name", help="Valid only for this set.")
def import_(context: IndexContext, file: Path, project: str | None, set_name: str | None) -> None:
    """Import an htpasswd file: its users can upload with their passwords.

    If you import the file again, users that were removed from it can no longer upload.

    \b
    index token import htpasswd.txt
    """
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
    """List tokens, without their secrets.

    \b
    index token list
    """
    rows = context.catalogue().rows(
        "SELECT name, project, set_name, created, expires, revoked, hashed NOT NULL AS user, minted FROM token ORDER BY id"
    )
    lines = [
        f"{row['name']:<20} {row['project'] or ('its projects' if row['minted'] else 'any project'):<20}"
        f" {row['set_name'] or 'any set':<16} {'user' if row['user'] else 'short' if row['minted'] else 'token':<5}"
        f" {'revoked' if row['revoked'] else 'expires ' + row['expires'][:10] if row['expires'] else 'no expiry'}"
        for row in rows
    ]
    context.console.result([dict(row) for row in rows], "\n".join(lines))


@token.command("revoke")
@in_context
@click.argument("name")
def revoke(context: IndexContext, name: str) -> None:
    """Revoke a token immediately.

    \b
    index token revoke ci
    """
    count = auth.revoke(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "revoked": count}, f"{name}: revoked")
