"""`index serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gracefarm.errors import ConfigError
from gracefarm.files import atomic_write
from index.cli.common import IndexContext, in_context
from index.limits import Limits
from index.serving import granian, proxies
from index.serving.service import ServeOptions
from index.store import auth, htpasswd


@click.command("serve")
@in_context
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
@click.option("--variants", is_flag=True, help="Take variant wheels too (PEP 825, a draft).")
@click.option("--access-log", help="A file, or - for stdout.")
@click.option("--tls-cert", type=click.Path(exists=True, path_type=Path))
@click.option("--tls-key", type=click.Path(exists=True, path_type=Path))
@click.option("--trusted-proxy", multiple=True, metavar="ADDRESS|NETWORK", help="Believe X-Forwarded-* from there.")
@click.option("--url", help="Address to print on the pages; default: what the browser asked for.")
@click.option("--sigstore-offline", is_flag=True, help="Verify attestations with the keys of Sigstore that are here already.")
@click.option("--max-upload", "upload", default=Limits.upload, show_default=True, type=click.IntRange(1), help="Bytes.")
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
@click.option(
    "--waiting-uploads",
    default=Limits.waiting_uploads,
    show_default=True,
    type=click.IntRange(0),
    help="Beyond --open-uploads they wait; at most half of these from one address.",
)
@click.option("--writes-per-second", default=Limits.writes_per_second, show_default=True, type=float, help="By one address.")
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
    sigstore_offline: bool,
    **limits: Any,
) -> None:
    """Serve the index until interrupted."""
    if set(authenticate.replace(",", " ").split()) != {"update"}:
        raise ConfigError(
            f"-a {authenticate}: here uploads always need a token or a password, reads never do",
            remedy="leave -a away; to close reads, put a proxy in front",
        )
    if passwords is not None:
        auth.import_users(context.catalogue(), context.actor, htpasswd.read(passwords))
    options = ServeOptions(
        allow_new=allow_new,
        variants=variants,
        limits=Limits(**limits),
        trusted_proxies=proxies.parse(trusted_proxy),
        base_url=url,
        sigstore_offline=sigstore_offline,
        access_log=access_log,
    )

    def announce(address: str) -> None:
        if port_file is not None:
            atomic_write(port_file, address.rpartition(":")[2] + "\n")
        context.console.event("listening", f"serving {context.store.root} on {address}/simple/", url=address)

    listen = granian.Listen(host=host, port=port, certificate=tls_cert, key=tls_key)
    granian.run(context.store, options, listen, announce)
