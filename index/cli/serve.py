"""`index serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gracefarm.errors import ConfigError, UsageError
from gracefarm.files import atomic_write
from index.cli.common import IndexContext, in_context
from index.limits import Limits
from index.serving import proxies, server
from index.serving.service import ServeOptions
from index.store import auth, htpasswd


@click.command("serve")
@in_context
@click.option(
    "--host",
    "-i",
    default="127.0.0.1",
    show_default=True,
    help="Network address to listen on. With 0.0.0.0, other machines can connect.",
)
@click.option(
    "--port",
    "-p",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on. With 0, the server chooses a free port.",
)
@click.option(
    "--port-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the port number to this file when clients can connect.",
)
@click.option(
    "--passwords",
    "-P",
    type=click.Path(path_type=Path),
    help="Import the users of this htpasswd file. They can upload with their user name and password. If a user of an "
    "earlier file is missing in this file, the user can no longer upload.",
)
@click.option(
    "--authenticate",
    "-a",
    default="update",
    show_default=True,
    help="Has no effect. It exists because pypiserver has this option. The only valid value is update.",
)
@click.option(
    "--disable-fallback",
    is_flag=True,
    hidden=True,
    expose_value=False,
    help="Accepted for compatibility with pypiserver; there is no fallback.",
)
@click.option(
    "--allow-new",
    is_flag=True,
    help="Accept uploads for all projects. Without this option, allow each project with `index host NAME` first.",
)
@click.option(
    "--variants",
    is_flag=True,
    help="Also accept wheels with a variant label in their file name (PEP 825, a draft).",
)
@click.option(
    "--access-log",
    metavar="FILE|-",
    help="Append a line to FILE for each request. With -, write these lines to standard output.",
)
@click.option(
    "--tls-cert",
    type=click.Path(exists=True, path_type=Path),
    help="Certificate for https (PEM file). Requires --tls-key.",
)
@click.option(
    "--tls-key",
    type=click.Path(exists=True, path_type=Path),
    help="Private key of the certificate (PEM file). Requires --tls-cert.",
)
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="ADDRESS|NETWORK",
    help="Use the X-Forwarded-* headers of this reverse proxy. The option can be repeated.",
)
@click.option(
    "--url",
    help="Address that the web pages show for the index. Default: the address that the browser uses.",
)
@click.option(
    "--cache-size",
    default="20GiB",
    show_default=True,
    help="Maximum size of the compiler cache that build machines share through this index, such as 20GiB. off: no cache.",
)
@click.option(
    "--sigstore-offline",
    is_flag=True,
    help="Check attestations (signatures of CI systems) with the Sigstore keys on this machine. Do not download newer keys.",
)
@click.option(
    "--max-upload",
    "upload",
    default=Limits.upload,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum size of one upload in bytes.",
)
@click.option(
    "--idle",
    default=Limits.idle,
    show_default=True,
    type=float,
    help="Close a connection if it transfers no data for this many seconds.",
)
@click.option(
    "--connections-per-client",
    default=Limits.connections_per_client,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of open connections from one client address. If there are more, the server closes the connections "
    "that have been idle for the longest time.",
)
@click.option(
    "--open-uploads",
    default=Limits.open_uploads,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of uploads at the same time.",
)
@click.option(
    "--open-uploads-per-client",
    default=Limits.open_uploads_per_client,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of uploads at the same time from one client address.",
)
@click.option(
    "--waiting-uploads",
    default=Limits.waiting_uploads,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of uploads that wait until another upload ends. At most half of them may come from one client "
    "address.",
)
@click.option(
    "--writes-per-second",
    default=Limits.writes_per_second,
    show_default=True,
    type=float,
    help="Maximum number of requests from one client address in one second. Only requests that upload or change data count.",
)
def serve(
    context: IndexContext,
    host: str,
    port: int,
    port_file: Path | None,
    passwords: Path | None,
    authenticate: str,
    allow_new: bool,
    variants: bool,
    access_log: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    trusted_proxy: tuple[str, ...],
    url: str | None,
    cache_size: str,
    sigstore_offline: bool,
    **limits: Any,
) -> None:
    """Run the index server until Ctrl-C.

    pip and uv install packages from http://HOST:PORT/simple/. twine and uv upload to http://HOST:PORT/legacy/. Each upload
    requires a token (see `index token create`) or a password. Downloads require no token.

    \b
    # Serve this machine on port 8080.
    index serve
    # Serve other machines with https.
    index serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    if set(authenticate.replace(",", " ").split()) != {"update"}:
        raise ConfigError(
            f"-a {authenticate} is not supported: uploads always require a token or a password, and "
            "downloads never require them",
            remedy="omit -a; to restrict downloads, put a reverse proxy with authentication in front of the index",
        )
    if passwords is not None:
        auth.import_users(context.catalogue(), context.actor, htpasswd.read(passwords))
    options = ServeOptions(
        allow_new=allow_new,
        variants=variants,
        limits=Limits(**limits),
        trusted_proxies=proxies.parse(trusted_proxy),
        base_url=url,
        cache_size=_size(cache_size),
        sigstore_offline=sigstore_offline,
        access_log=access_log,
    )

    def announce(address: str) -> None:
        if port_file is not None:
            atomic_write(port_file, address.rpartition(":")[2] + "\n")
        context.console.event("listening", f"serving {context.store.root} on {address}/simple/", url=address)

    listen = server.Listen(host=host, port=port, certificate=tls_cert, key=tls_key)
    server.run(context.store, options, listen, announce)


def _size(text: str) -> int:
    """Bytes of --cache-size.

    Raises:
        UsageError: it is neither a size nor off.
    """
    from gracefarm.tables import parse_size  # imported here: a server starts more quickly without it

    try:
        return 0 if text == "off" else parse_size(text)
    except ValueError as error:
        raise UsageError(f"--cache-size: {error}", remedy="give a size, such as 20GiB, or off") from error
