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

    An upload token is a secret that allows uploads to the index. Clients send it as the password, with the user name
    __token__.

    \b
    # Create the token ci, which is valid for 90 days.
    index token create --name ci --expires 90d
    # Revoke the token ci.
    index token revoke ci
    """


@token.command("create")
@in_context
@click.option("--name", required=True, help="Name of the token. The audit log shows this name for each upload.")
@click.option("--project", help="Accept the token only for this project.")
@click.option("--set", "set_name", help="Accept the token only for this set of wheels (see `index stage`).")
@click.option("--nightly", is_flag=True, help="Accept the token only for uploads to the nightly channel (/nightly/legacy/).")
@click.option("--cache", is_flag=True, help="Accept the token only for the compiler cache that build machines share.")
@click.option("--expires", help="Lifetime of the token, such as 90d (days) or 12h (hours). Default: no limit.")
def create(
    context: IndexContext,
    name: str,
    project: str | None,
    set_name: str | None,
    nightly: bool,
    cache: bool,
    expires: str | None,
) -> None:
    """Create an upload token and print it.

    Store the token: the index cannot show it again. Clients send the token as the password, with the user name __token__. If
    none of --project, --set, --nightly and --cache is given, the token is valid for all uploads.

    \b
    # Create a token for one project. The token is valid for 90 days.
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
@click.option("--project", help="Let the users upload only to this project.")
@click.option("--set", "set_name", help="Let the users upload only to this set of wheels (see `index stage`).")
def import_(context: IndexContext, file: Path, project: str | None, set_name: str | None) -> None:
    """Import the users of an htpasswd file, and let them upload with their passwords.

    FILE is a file that the program htpasswd has written. If a user of an earlier import is missing in this file, the
    user can no longer upload.

    \b
    # Let the users in htpasswd.txt upload.
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
    """List the upload tokens and users.

    Each line shows the name, the projects and sets for which uploads are allowed, the kind, and when the token expires. The
    kinds are token, user (from an htpasswd file) and short (a short-lived token of a CI workflow). The secrets are not
    shown.

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
    """Revoke all tokens and users that have the name NAME.

    The index refuses later uploads with these tokens and passwords. `index token list` shows the names.

    \b
    # Revoke the token ci.
    index token revoke ci
    """
    count = auth.revoke(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "revoked": count}, f"{name}: revoked")
