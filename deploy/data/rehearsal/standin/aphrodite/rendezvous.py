"""Connects the ranks: all connect to rank 0, as with torch's store, and then each to the next one, as with gloo."""

from __future__ import annotations

import json
import socket
import threading
import time
from urllib.parse import urlsplit

SECONDS = 60


def meet(rank: int, world: int, method: str, address: str) -> None:
    """Return when all ranks are connected. Raises RuntimeError with gloo's message if one cannot be reached."""
    where = urlsplit(method)
    host, port = where.hostname or "", where.port or 0
    listener = socket.create_server((address, 0))
    with listener:
        listener.settimeout(SECONDS)
        if rank == 0:
            store = socket.create_server(("", port), reuse_port=True)
            threading.Thread(target=_store, args=(store, world), daemon=True).start()
        try:
            with _reach(host, port) as line:
                line.settimeout(SECONDS)
                mine = {"rank": rank, "address": [address, listener.getsockname()[1]]}
                line.sendall(json.dumps(mine).encode() + b"\n")
                table = json.loads(line.makefile().readline() or "{}")
        except OSError as error:
            raise RuntimeError(f"The client socket has failed to connect to [{host}]:{port} ({error}).") from error
        following = table[str((rank + 1) % world)]
        try:
            with socket.create_connection(tuple(following), timeout=10) as line:
                line.sendall(b"%d\n" % rank)
                other, _ = listener.accept()
                with other:
                    other.settimeout(SECONDS)
                    said = other.makefile().readline().strip()
        except OSError as error:
            raise RuntimeError(
                f"Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] {error}"
            ) from error
        if said != str((rank - 1) % world):
            raise RuntimeError(
                "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error"
            )


def _reach(host: str, port: int) -> socket.socket:
    """Connect to rank 0, which may start later than this rank."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _store(store: socket.socket, world: int) -> None:
    lines, table = [], {}
    with store:
        store.settimeout(SECONDS)
        while len(table) < world:
            try:
                line, _ = store.accept()
            except TimeoutError:
                break
            line.settimeout(SECONDS)
            said = json.loads(line.makefile().readline())
            table[said["rank"]] = said["address"]
            lines.append(line)
        for line in lines:
            line.sendall(json.dumps(table).encode() + b"\n")
            line.close()
