"""Host keys as a person meets them: what each node shows, whether it is known, and pinning what was accepted. Never blind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import asyncssh

from deploy.fleet.connections import explain, parse_jump
from deploy.fleet.results import try_all
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, SshError
from gracefarm.files import atomic_write

ALGORITHMS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512")
"Kinds of host keys that are pinned, best first."
SECONDS = 30
KeyStatus = Literal["pinned", "known", "new", "changed"]


@dataclass(frozen=True, kw_only=True)
class HostKey:
    """A host key that a node or its jump host showed now."""

    node: Node
    name: str
    "As known_hosts writes it."
    key: asyncssh.SSHKey
    status: KeyStatus
    "pinned: by us before; known: in ~/.ssh/known_hosts; new: to nobody; changed: another one is pinned."

    @property
    def fingerprint(self) -> str:
        """As ssh-keygen -lf writes it."""
        return self.key.get_fingerprint()

    @property
    def kind(self) -> str:
        """ssh-ed25519, …"""
        return self.key.get_algorithm()


async def look_jumps(
    fleet: Fleet, nodes: Sequence[Node], own: Path | None = None
) -> tuple[list[HostKey], dict[str, GracefarmError]]:
    """The host keys of the jump hosts: before any node behind them can be looked at, theirs must be trusted."""
    shown: list[HostKey] = []
    bad: dict[str, GracefarmError] = {}
    for text in dict.fromkeys(node.jump for node in nodes if node.jump):
        _user, host, port = parse_jump(text)
        node = Node(name="jump host", rank=-1, address=host, port=port)
        try:
            async with asyncio.timeout(SECONDS):
                key = await asyncssh.get_server_host_key(host, port, server_host_key_algs=list(ALGORITHMS))
        except (OSError, asyncssh.Error, ValueError) as error:
            bad |= {behind.name: explain(node, error) for behind in nodes if behind.jump == text}
            continue
        if key is not None:
            name = entry_name(host, port)
            shown.append(HostKey(node=node, name=name, key=key, status=_status(fleet.known_hosts, own, name, key)))
    return shown, bad


async def look(
    fleet: Fleet, nodes: Sequence[Node], own: Path | None = None
) -> tuple[list[HostKey], dict[str, GracefarmError]]:
    """The host keys of all nodes at once, and why some could not be had. `own`: the user's known_hosts."""
    scanned, bad = await try_all(nodes, lambda node: scan(fleet, node))
    shown = []
    for node in nodes:
        if node.name in scanned:
            name, key = scanned[node.name]
            shown.append(HostKey(node=node, name=name, key=key, status=_status(fleet.known_hosts, own, name, key)))
    return shown, bad


def _status(known_hosts: Path, own: Path | None, name: str, key: asyncssh.SSHKey) -> KeyStatus:
    before = pinned(known_hosts).get(name)
    if before is not None:
        return "pinned" if matches(known_hosts, name, key) else "changed"
    if own and own.is_file() and matches(own, name, key):
        return "known"
    return "new"


def refuse_changed(shown: Sequence[HostKey]) -> None:
    """Raises SshError with every key that is not the one that was pinned."""
    changed = [host_key for host_key in shown if host_key.status == "changed"]
    if changed:
        raise SshError(
            "another host key than the pinned one: "
            + "; ".join(f"{host_key.name} shows {host_key.fingerprint}" for host_key in changed),
            remedy="somebody may stand between you and the node: compare with its console; if it was made anew: "
            "`deploy init --repin`",
        )


async def scan(fleet: Fleet, node: Node) -> tuple[str, asyncssh.SSHKey]:
    """The host key that a node shows, after its name in known_hosts. Shown to a person, not trusted.

    Raises:
        SshError: not reached.
    """
    try:
        async with asyncio.timeout(SECONDS):
            options = fleet.options(node)
            # ProxyJump of ~/.ssh/config stands under the name, not the address.
            tunnel: Any = await fleet.jump(node.jump, node.key) if node.jump else options.tunnel or ()
            key = await asyncssh.get_server_host_key(
                options.host,
                options.port,
                tunnel=tunnel,
                config=fleet.config,
                server_host_key_algs=list(ALGORITHMS),
            )
    except (OSError, asyncssh.Error, ValueError) as error:  # ValueError: a key or a configuration that cannot be read
        raise explain(node, error) from error
    if key is None:
        raise SshError(f"{node} shows no host key", remedy="is that an SSH server?")
    return entry_name(node.address, options.port), key


def entry_name(address: str, port: int) -> str:
    """As known_hosts writes it."""
    return address if port == 22 else f"[{address}]:{port}"


def pinned(known_hosts: Path) -> dict[str, str]:
    """Name to `type base64` of a known_hosts file that we wrote; hashed names are not among them."""
    if not known_hosts.is_file():
        return {}
    entries: dict[str, str] = {}
    for line in known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and not line.startswith(("#", "@", "|")):
            entries.update((name, f"{words[1]} {words[2]}") for name in words[0].split(","))
    return entries


def pin(known_hosts: Path, keys: Iterable[tuple[str, asyncssh.SSHKey]]) -> None:
    """Write keys into known_hosts (0600), replacing what stood there under the same names."""
    entries = pinned(known_hosts)
    for name, key in keys:
        entries[name] = " ".join(key.export_public_key().decode().split()[:2])
    atomic_write(known_hosts, "".join(f"{name} {key}\n" for name, key in entries.items()))
    os.chmod(known_hosts, 0o600)  # noqa: PTH101


def matches(known_hosts: Path, name: str, key: asyncssh.SSHKey) -> bool:
    """The file (hashed names too) holds this very key for this name."""
    host, _, port = name.removeprefix("[").partition("]:")
    trusted = asyncssh.read_known_hosts(str(known_hosts)).match(host, "", int(port) if port else None)[0]
    return any(trusted_key.public_data == key.public_data for trusted_key in trusted)
