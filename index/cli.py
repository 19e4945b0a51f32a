"""The command `index`: serve, tokens, and everything that changes what is served."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from gracefarm import console
from gracefarm.console import Console
from gracefarm.errors import ConfigError, SeveralError, UsageError
from gracefarm.files import atomic_write
from gracefarm.pins import read as read_lock
from index.errors import DamagedError
from index.intake import keeping
from index.limits import Limits
from index.names import check_set_name, normalise
from index.serving import proxies
from index.serving.service import Options
from index.sets import stage
from index.store import auth, htpasswd, projects
from index.store.catalogue import Catalogue, open_catalogue
from index.store.files import Store


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every command has."""

    store: Store
    console: Console

    def catalogue(self) -> Catalogue:
        """The root's catalogue, created when there is none."""
        self.store.prepare()
        found = open_catalogue(self.store.catalogue)
        click.get_current_context().call_on_close(found.close)
        return found

    @property
    def actor(self) -> str:
        """How the audit log names who runs this."""
        try:
            return f"cli:{getpass.getuser()}"
        except (KeyError, OSError):
            return f"cli:{os.getuid()}"


pass_context = click.make_pass_decorator(Context)


def json_option(command: click.decorators.FC) -> click.decorators.FC:
    """`--json` is taken before and after the command's name."""
    return click.option("--json", "_json", is_flag=True, expose_value=False, help="JSON lines on stdout.")(command)


def root_option(command: click.decorators.FC) -> click.decorators.FC:
    """`--root` is taken before and after the command's name; the environment says GRACEFARM_INDEX_ROOT."""
    return click.option(
        "--root",
        "_root",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="GRACEFARM_INDEX_ROOT",
        expose_value=False,
        callback=_set_root,
        is_eager=True,
        help="Folder of the index.",
    )(command)


def _set_root(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None and isinstance(context.find_root().obj, Context):
        context.find_root().obj = context.obj = Context(
            store=Store(root=value.absolute()), console=context.find_root().obj.console
        )


@click.group()
@json_option
@click.option(
    "--root", type=click.Path(file_okay=False, path_type=Path), envvar="GRACEFARM_INDEX_ROOT", help="Folder of the index."
)
@click.version_option(package_name="gracefarm")
@click.pass_context
def cli(context: click.Context, root: Path | None) -> None:
    """A package index for CUDA wheels: uploads checked, pages ready before they are asked for."""
    if root is None:
        from gracefarm import settings  # here: a server that is told its root starts quicker without

        root = settings.load().home / "index"
    context.obj = Context(store=Store(root=root.absolute()), console=Console(as_json="--json" in sys.argv))


@cli.command("serve")
@json_option
@root_option
@click.option("--host", "-i", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every network.")
@click.option("--port", "-p", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any free one, printed.")
@click.option(
    "--port-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the port there once clients can connect."
)
@click.option(
    "--passwords",
    "-P",
    type=click.Path(path_type=Path),
    help="An htpasswd file, as pypiserver takes it: its users may upload as well; those who left it no longer.",
)
@click.option(
    "--authenticate", "-a", default="update", show_default=True, help="As pypiserver's; update is what there is to say here."
)
@click.option("--disable-fallback", is_flag=True, hidden=True, expose_value=False, help="pypiserver's; there is none here.")
@click.option("--allow-new", is_flag=True, help="Uploads may create projects that nobody named with `index host`.")
@click.option("--server", type=click.Choice(["granian", "uvicorn"]), default="granian", show_default=True)
@click.option("--access-log", help="A file, or - for stdout.")
@click.option("--tls-cert", type=click.Path(exists=True, path_type=Path))
@click.option("--tls-key", type=click.Path(exists=True, path_type=Path))
@click.option("--trusted-proxy", multiple=True, metavar="ADDRESS|NETWORK", help="Believe X-Forwarded-* from there.")
@click.option("--url", help="Address to print on the pages; default: what the browser asked for.")
@click.option("--max-upload", default=Limits.upload, show_default=True, type=click.IntRange(1), help="Bytes.")
@click.option("--idle", default=Limits.idle, show_default=True, type=float, help="Seconds a client may stand still.")
@click.option(
    "--connections-per-client",
    default=Limits.connections_per_client,
    show_default=True,
    type=click.IntRange(1),
    help="By one address; of more, the quietest are closed.",
)
@click.option("--open-uploads", default=Limits.open_uploads, show_default=True, type=click.IntRange(1))
@click.option("--open-uploads-per-client", default=Limits.open_uploads_per_client, show_default=True, type=click.IntRange(1))
@click.option("--writes-per-second", default=Limits.writes_per_second, show_default=True, type=float, help="By one address.")
@pass_context
def serve_command(
    context: Context,
    host: str,
    port: int,
    port_file: Path | None,
    passwords: Path | None,
    authenticate: str,
    allow_new: bool,
    server: Literal["granian", "uvicorn"],
    access_log: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    trusted_proxy: tuple[str, ...],
    url: str | None,
    max_upload: int,
    idle: float,
    connections_per_client: int,
    open_uploads: int,
    open_uploads_per_client: int,
    writes_per_second: float,
) -> None:
    """Serve the index until interrupted."""
    from index.serving import serve  # here, because the servers take longer to import than the other commands to run

    if set(authenticate.replace(",", " ").split()) != {"update"}:
        raise ConfigError(
            f"-a {authenticate}: here uploads always need a token or a password, reads never do",
            remedy="leave -a away; to close reads, put a proxy in front",
        )
    if passwords is not None:
        auth.import_users(context.catalogue(), context.actor, htpasswd.read(passwords))
    limits = Limits(
        upload=max_upload,
        idle=idle,
        connections_per_client=connections_per_client,
        open_uploads=open_uploads,
        open_uploads_per_client=open_uploads_per_client,
        writes_per_second=writes_per_second,
    )
    options = Options(
        allow_new=allow_new, limits=limits, trusted_proxies=proxies.parse(trusted_proxy), base_url=url, access_log=access_log
    )

    def announce(address: str) -> None:
        if port_file is not None:
            atomic_write(port_file, address.rpartition(":")[2] + "\n")
        context.console.event("listening", f"serving {context.store.root} on {address}/simple/", url=address)

    serve.run(
        context.store,
        options,
        serve.Listen(host=host, port=port, certificate=tls_cert, key=tls_key, server=server),
        announce,
    )


@cli.group("token")
def token_group() -> None:
    """Who may upload."""


@token_group.command("create")
@json_option
@root_option
@click.option("--name", required=True, help="What the audit log will call its holder.")
@click.option("--project", help="Good for this project alone.")
@click.option("--set", "set_name", help="Good for this set alone.")
@click.option("--nightly", is_flag=True, help="Good for the nightly channel alone.")
@click.option("--expires", help="90d, 12h …; default: never.")
@pass_context
def token_create(
    context: Context, name: str, project: str | None, set_name: str | None, nightly: bool, expires: str | None
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


@token_group.command("import")
@json_option
@root_option
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--project", help="Good for this project alone.")
@click.option("--set", "set_name", help="Good for this set alone.")
@pass_context
def token_import(context: Context, file: Path, project: str | None, set_name: str | None) -> None:
    """Let the users of an htpasswd file upload with their passwords; those of an earlier file who left it no longer."""
    added, revoked = auth.import_users(
        context.catalogue(),
        context.actor,
        htpasswd.read(file),
        project=normalise(project) if project else None,
        set_name=check_set_name(set_name) if set_name else None,
    )
    context.console.result({"added": added, "revoked": revoked}, f"{added} users added or changed, {revoked} revoked")


@token_group.command("list")
@json_option
@root_option
@pass_context
def token_list(context: Context) -> None:
    """Tokens, without their secrets."""
    rows = context.catalogue().rows(
        "SELECT name, project, set_name, created, expires, revoked, hashed NOT NULL AS user FROM token ORDER BY id"
    )
    lines = [
        f"{row['name']:<20} {row['project'] or 'any project':<20} {row['set_name'] or 'any set':<16}"
        f" {'user' if row['user'] else 'token':<5}"
        f" {'revoked' if row['revoked'] else 'expires ' + row['expires'][:10] if row['expires'] else 'no end'}"
        for row in rows
    ]
    context.console.result([dict(row) for row in rows], "\n".join(lines))


@token_group.command("revoke")
@json_option
@root_option
@click.argument("name")
@pass_context
def token_revoke(context: Context, name: str) -> None:
    """End a token now."""
    count = auth.revoke(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "revoked": count}, f"{name}: revoked")


@cli.command("host")
@json_option
@root_option
@click.argument("names", nargs=-1)
@click.option("--remove", is_flag=True, help="Take no more uploads for these names; what is there stays.")
@pass_context
def host_command(context: Context, names: tuple[str, ...], remove: bool) -> None:
    """Name the projects that this index hosts; without NAMES, list them."""
    catalogue = context.catalogue()
    if names:
        projects.host(catalogue, context.actor, [normalise(name) for name in names], hosted=not remove)
    hosted = projects.hosted(catalogue)
    context.console.result(hosted, "\n".join(hosted))


@cli.command("yank")
@json_option
@root_option
@click.argument("name")
@click.argument("version")
@click.option("--reason", default="", help="Installers print it.")
@pass_context
def yank_command(context: Context, name: str, version: str, reason: str) -> None:
    """Keep a release for those who pinned it, and from everybody else (PEP 592)."""
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, reason)
    context.console.result({"name": name, "version": version, "files": count}, f"{name} {version}: {count} files yanked")


@cli.command("unyank")
@json_option
@root_option
@click.argument("name")
@click.argument("version")
@pass_context
def unyank_command(context: Context, name: str, version: str) -> None:
    """Take a yank back."""
    count = projects.yank(context.catalogue(), context.actor, normalise(name), version, None)
    context.console.result({"name": name, "version": version, "files": count}, f"{name} {version}: {count} files unyanked")


@cli.command("status")
@json_option
@root_option
@click.argument("name")
@click.argument("status", type=click.Choice(["active", "archived", "deprecated", "quarantined"]))
@click.option("--reason", default="")
@pass_context
def status_command(context: Context, name: str, status: str, reason: str) -> None:
    """Say how a project is (PEP 792). A quarantined one offers no file."""
    projects.set_status(context.catalogue(), context.actor, normalise(name), status, reason)
    context.console.result({"name": name, "status": status}, f"{name}: {status}")


@cli.command("delete")
@json_option
@root_option
@click.argument("name")
@click.argument("version")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def delete_command(context: Context, name: str, version: str, yes: bool) -> None:
    """Delete a release. Its file names are never usable again."""
    if not yes:
        click.confirm(f"delete every file of {name} {version}? Their names can never be used again", abort=True, err=True)
    count = projects.delete(context.catalogue(), context.actor, normalise(name), version)
    context.console.result({"name": name, "version": version, "files": count}, f"{name} {version}: {count} files deleted")


@cli.group("stage")
def stage_group() -> None:
    """Sets of wheels that become visible at once."""


@stage_group.command("create")
@json_option
@root_option
@click.argument("name")
@click.option(
    "--expect", multiple=True, metavar="LINE", help="A wheel the set must hold: 'causal-conv1d==1.7.0 cp311 aarch64'."
)
@click.option("--matrix", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file of such lines.")
@click.option("--nightly", is_flag=True, help="Its files go to the nightly channel.")
@pass_context
def stage_create(context: Context, name: str, expect: tuple[str, ...], matrix: Path | None, nightly: bool) -> None:
    """Open a set; upload its wheels to /stage/NAME/legacy/."""
    lines = [*expect, *(matrix.read_text().splitlines() if matrix else [])]
    found = stage.create(
        context.catalogue(), context.actor, name, stage.parse_matrix(lines), channel="nightly" if nightly else "release"
    )
    context.console.result(
        {**asdict(found), "upload_path": f"/stage/{name}/legacy/", "preview_path": f"/preview/{found.preview}/simple/"},
        f"upload to /stage/{name}/legacy/\npreview at /preview/{found.preview}/simple/",
    )


@stage_group.command("list")
@json_option
@root_option
@pass_context
def stage_list(context: Context) -> None:
    """Every set, with what it still lacks."""
    found = stage.all_sets(context.catalogue())
    lines = []
    for item in found:
        lines.append(f"{item.name:<24} {item.state:<10} {len(item.files)} files, {len(item.missing)} missing")
        if item.state == "staged":
            lines.append(f"    preview /preview/{item.preview}/simple/")
        lines += [f"    lacks {missing}" for missing in item.missing]
    context.console.result([asdict(item) for item in found], "\n".join(lines))


@stage_group.command("add")
@json_option
@root_option
@click.argument("name")
@click.argument("filenames", nargs=-1, required=True)
@pass_context
def stage_add(context: Context, name: str, filenames: tuple[str, ...]) -> None:
    """Put files that are here already into a set."""
    stage.add(context.catalogue(), context.actor, name, list(filenames))
    context.console.result({"name": name, "added": len(filenames)}, f"{name}: {len(filenames)} added")


@stage_group.command("publish")
@json_option
@root_option
@click.argument("name")
@pass_context
def stage_publish(context: Context, name: str) -> None:
    """Show the whole set at once, at /NAME/simple/ and in the other views."""
    found = stage.publish(context.catalogue(), context.actor, name)
    context.console.result(asdict(found), f"{name}: {len(found.files)} files are visible at /{name}/simple/")


@stage_group.command("drop")
@json_option
@root_option
@click.argument("name")
@pass_context
def stage_drop(context: Context, name: str) -> None:
    """Give a staged set up."""
    stage.drop(context.catalogue(), context.actor, name)
    context.console.result({"name": name, "state": "dropped"}, f"{name}: dropped")


@cli.command("mirror")
@json_option
@root_option
@click.argument("lock", type=click.Path(path_type=Path))
@click.option("--set", "set_name", required=True, help="Created, staged, when there is none of that name.")
@click.option("--link", is_flag=True, help="Absolute links instead of copies.")
@pass_context
def mirror_command(context: Context, lock: Path, set_name: str, link: bool) -> None:
    """Bring the wheels of a lock into a set, by sha256, from the configured Python index."""
    from gracefarm import settings
    from index.sets import mirror  # as above: clients of HTTP and HTML

    pins = read_lock(lock)
    catalogue = context.catalogue()
    if catalogue.row("SELECT 1 FROM release_set WHERE name = ?", (set_name,)) is None:
        stage.create(catalogue, context.actor, set_name, [])
    with context.store.using_staging(), context.console.progress("mirror") as tick:
        done = mirror.mirror(
            context.store,
            catalogue,
            context.actor,
            set_name,
            lock.name,
            pins,
            index_url=settings.load().index_url,
            link=link,
            tick=tick,
        )
    state = stage.find(catalogue, set_name).state
    hint = "" if state == "published" else f"; `index stage publish {set_name}` shows the set"
    context.console.result([asdict(item) for item in done], f"{set_name}: {len(done)} files{hint}")


@cli.command("withdraw")
@json_option
@root_option
@click.argument("filename")
@click.option("--reason", default="", help="For the audit log.")
@click.option("--undo", is_flag=True, help="Take the withdrawal back.")
@pass_context
def withdraw_command(context: Context, filename: str, reason: str, undo: bool) -> None:
    """Take a mirrored file out of every set, published ones too; a set lacks it then (410)."""
    from index.sets import mirror  # as above

    sets = mirror.withdraw(context.catalogue(), context.actor, filename, reason, undo=undo)
    what = "is back in" if undo else "is withdrawn from"
    context.console.result({"filename": filename, "sets": sets}, f"{filename} {what} {', '.join(sets)}")


@cli.command("export")
@json_option
@root_option
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", help="Address of the tree, as the pages for people print it.")
@pass_context
def export_command(context: Context, folder: Path, url: str | None) -> None:
    """Write (or update) a static tree for nginx or an object store."""
    from index.people import export  # the pages' templates, as above

    with context.console.progress("export") as tick:
        done = export.export(context.store, context.catalogue(), folder, tick, url=url)
    context.console.result(
        {"written": done.written, "kept": done.kept, "removed": done.removed},
        f"{folder}: {done.written} written, {done.kept} kept, {done.removed} removed",
    )


@cli.command("import")
@json_option
@root_option
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@pass_context
def import_command(context: Context, folder: Path) -> None:
    """Take in every wheel and sdist of a folder, as pypiserver keeps them."""
    with context.store.using_staging(), context.console.progress("import") as tick:
        done = keeping.import_folder(context.store, context.catalogue(), context.actor, folder, tick)
    context.console.result(
        asdict(done),
        "\n".join([f"{done.created} taken in, {done.same} here already, {len(done.refused)} refused", *done.refused]),
    )
    if done.refused:
        raise SeveralError(f"{len(done.refused)} files were refused", remedy="mend or remove them, then import again")


@cli.command("fsck")
@json_option
@root_option
@click.option("--set-aside", is_flag=True, help="Take what is damaged out of the lists, so that it can be uploaded again.")
@pass_context
def fsck_command(context: Context, set_aside: bool) -> None:
    """Rehash everything that is stored."""
    with context.console.progress("fsck") as tick:
        found = keeping.fsck(context.store, context.catalogue(), tick, set_aside=context.actor if set_aside else None)
    context.console.result(
        asdict(found), f"{found.files} files, {found.bytes} bytes, {len(found.damaged)} damaged, {found.unnamed} unnamed"
    )
    if found.damaged:
        raise DamagedError(
            f"damaged or absent: {', '.join(found.damaged[:20])}",
            remedy="copy the files from a backup, or run `index fsck --set-aside` and upload them again",
        )


@cli.command("gc")
@json_option
@root_option
@pass_context
def gc_command(context: Context) -> None:
    """Free the space of what nothing names any more."""
    count, size = keeping.gc(context.store, context.catalogue(), context.actor)
    context.console.result({"files": count, "bytes": size}, f"{count} files removed, {size} bytes")


@cli.command("prune")
@json_option
@root_option
@click.option(
    "--keep", default=14, show_default=True, type=click.IntRange(1), help="Nightlies to keep of each project and variant."
)
@click.option("--dry-run", is_flag=True)
@pass_context
def prune_command(context: Context, keep: int, dry_run: bool) -> None:
    """Delete old nightlies."""
    names = keeping.prune(context.catalogue(), context.actor, keep, dry_run=dry_run)
    context.console.result(names, "\n".join([*names, f"{len(names)} {'would be ' if dry_run else ''}deleted"]))


@cli.command("stats")
@json_option
@root_option
@pass_context
def stats_command(context: Context) -> None:
    """What the index holds."""
    catalogue = context.catalogue()
    rows = catalogue.rows(
        "SELECT project, count(DISTINCT version) AS releases, count(*) AS files, sum(size) AS bytes FROM file"
        " WHERE deleted IS NULL GROUP BY project ORDER BY project"
    )
    lines = [
        f"{row['project']:<32} {row['releases']:>5} releases {row['files']:>6} files {row['bytes']:>14} bytes" for row in rows
    ]
    context.console.result({"serial": catalogue.serial(), "projects": [dict(row) for row in rows]}, "\n".join(lines))


@cli.command("log")
@json_option
@root_option
@click.option("--since", default=0, type=int, help="Serial.")
@pass_context
def log_command(context: Context, since: int) -> None:
    """The audit log: who did what, when."""
    rows = context.catalogue().rows("SELECT * FROM audit WHERE serial > ? ORDER BY serial", (since,))
    lines = [f"{row['serial']:>6} {row['time']} {row['actor']:<20} {row['action']:<16} {row['subject']}" for row in rows]
    context.console.result([dict(row) for row in rows], "\n".join(lines))


def main() -> None:
    """Entry point of the console script and of `python -m index`."""
    console.run(lambda: cli.main(standalone_mode=False), as_json="--json" in sys.argv)
