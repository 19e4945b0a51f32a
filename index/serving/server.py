"""Run the server of a root on granian: repair the store, assemble the application, listen, end. One server per root."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from gracefarm.errors import ConfigError, HostError
from index.serving import connections
from index.serving.assembly import build
from index.serving.connections import Bounds
from index.serving.front import Front
from index.serving.service import ServeOptions
from index.store.files import Store
from index.store.upkeep import heal

GRACE = 30.0
"Seconds that open uploads and responses have to finish after the first signal. A second signal ends them immediately."


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Address, port and TLS certificate of the listener."""

    host: str = "127.0.0.1"
    port: int = 8080
    "0: any free port."
    certificate: Path | None = None
    key: Path | None = None


def run(store: Store, options: ServeOptions, listen: Listen, on_listen: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then at most GRACE seconds longer. `on_listen` receives the URL once clients can connect.

    Raises:
        HostError: the address is not available, or another server already serves this root.
    """
    if (listen.certificate is None) != (listen.key is None):
        raise ConfigError("TLS requires both the certificate and the key", remedy="give --tls-cert and --tls-key")
    if listen.certificate is not None and listen.key is not None:
        _check_pair(listen.certificate, listen.key)
    with store.serving() as ours:
        if not ours:
            raise HostError(
                f"another server already serves {store.root}",
                remedy="stop that server, or give a different folder with --root",
            )
        # The parser warns about every malformed body. The client gets the error, and a hostile client must not fill the log.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        store.sweep()
        front = build(store, options)
        heal(store, front.service.catalogue, "start")
        # Checkpoint now, so that the main file does not change while the server runs (see catalogue).
        front.service.catalogue.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        listener = _bind(listen)
        scheme = "https" if listen.certificate else "http"
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        port = listener.getsockname()[1]
        url = f"{scheme}://{host}:{port}"
        bounds = connections.raise_limits(options.limits.connections_per_client)

        async def serve() -> None:
            watching = asyncio.ensure_future(connections.watch(port, bounds, options.trusted_proxies))
            try:
                await _serve(front, listener, listen, bounds, ready)
            finally:
                watching.cancel()

        def ready() -> None:
            connections.set_deadline(port, options.limits.idle)
            on_listen(url)

        uvloop.run(serve())


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are not a valid certificate and key: {error.reason or error}",
            remedy="provide the certificate and the key in PEM format; the key must have no password",
        ) from error


def _bind(listen: Listen) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((listen.host, listen.port))
    except OSError as error:
        listener.close()
        remedy = "give a different address with --host and --port (port 0 selects a free port)"
        if error.errno == errno.EADDRINUSE:
            remedy = f"stop the program that listens there, or {remedy}"
        cause = f"cannot listen on {listen.host} port {listen.port}: {error.strerror}"
        raise HostError(cause, remedy=remedy) from error
    return listener


async def _serve(front: Front, listener: socket.socket, listen: Listen, bounds: Bounds, ready: Callable[[], None]) -> None:
    # granian binds its own socket and does not support port 0: our socket holds the number until granian has bound it.
    host, port = listener.getsockname()[:2]
    listener.close()
    server = Server(
        front,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        websockets=False,
        http=HTTPModes.http1,  # an HTTP/2 connection carries 200 responses, and every limit here counts connections
        backlog=1024,
        backpressure=bounds.total,  # counts connections; above it granian accepts no more
        http1_settings=HTTP1Settings(header_read_timeout=15_000),
        log_level=LogLevels.error,
        ssl_cert=listen.certificate,
        ssl_key=listen.key,
    )
    serving = asyncio.ensure_future(server.serve())
    _on_signal(port, server.stop)
    await _announce(serving, host, port, ready)
    await serving


def _on_signal(port: int, stop: Callable[[], None]) -> None:
    """Stop on SIGINT and SIGTERM; granian would wait forever for a client that reads slowly."""
    loop = asyncio.get_running_loop()
    grace = iter((GRACE,))

    def end() -> None:
        stop()
        loop.call_later(next(grace, 0), connections.close, port)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)


async def _announce(serving: asyncio.Future[None], host: str, port: int, ready: Callable[[], None]) -> None:
    """Call `ready` once a connection is accepted."""
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        writer.close()
        ready()
        return
