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
    "--host", "-i", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0 listens on all networks."
)
@click.option(
    "--port",
    "-p",
    default=8080,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on. 0 selects a free port.",
)
@click.option(
    "--port-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the port to this file as soon as clients can connect.",
)
@click.option(
    "--passwords",
    "-P",
    type=click.Path(path_type=Path),
    help="Import this htpasswd file: its users can upload with their passwords. Users who were removed from the file can "
    "no longer upload.",
)
@click.option(
    "--authenticate",
    "-a",
    default="update",
    show_default=True,
    help="Accepted for compatibility with pypiserver. The only valid value is update.",
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
    help="Accept uploads for every project. Without this option, projects must be named with `index host`.",
)
@click.option("--variants", is_flag=True, help="Also accept variant wheels (PEP 825, a draft).")
@click.option("--access-log", metavar="FILE|-", help="Append the access log to FILE. With '-', write it to standard output.")
@click.option("--tls-cert", type=click.Path(exists=True, path_type=Path), help="Serve https with this certificate (PEM).")
@click.option("--tls-key", type=click.Path(exists=True, path_type=Path), help="Private key of the TLS certificate (PEM).")
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="ADDRESS|NETWORK",
    help="Trust X-Forwarded-* headers from this proxy. Repeatable.",
)
@click.option("--url", help="Address of the index, which the web pages show. Default: the address of the request.")
@click.option(
    "--cache-size",
    default="20GiB",
    show_default=True,
    help="Maximum size of the shared compiler cache, or off to disable the cache.",
)
@click.option("--sigstore-offline", is_flag=True, help="Verify attestations with the Sigstore keys on this machine.")
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
    help="Close a connection after this many seconds without data.",
)
@click.option(
    "--connections-per-client",
    default=Limits.connections_per_client,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of connections from one address. If there are more, the connections that are idle for longest "
    "are closed.",
)
@click.option(
    "--open-uploads",
    default=Limits.open_uploads,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of concurrent uploads.",
)
@click.option(
    "--open-uploads-per-client",
    default=Limits.open_uploads_per_client,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of concurrent uploads from one address.",
)
@click.option(
    "--waiting-uploads",
    default=Limits.waiting_uploads,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of uploads that wait for other uploads to end. At most half of the waiting uploads may come "
    "from one address.",
)
@click.option(
    "--writes-per-second",
    default=Limits.writes_per_second,
    show_default=True,
    type=float,
    help="Maximum number of write requests per second from one address.",
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
    """Serve the index until interrupted.

    \b
    index serve
    index serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    if set(authenticate.replace(",", " ").split()) != {"update"}:
        raise ConfigError(
            f"-a {authenticate} is not supported: uploads always require a token or a password, reads never do",
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
