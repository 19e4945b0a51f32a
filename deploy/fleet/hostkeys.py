"""Host keys: which key each node has, whether it is known, and pinning accepted keys. No key is trusted without a decision."""

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
"Types of host keys that are pinned, in order of preference."
SECONDS = 30
KeyStatus = Literal["pinned", "known", "new", "changed"]


@dataclass(frozen=True, kw_only=True)
class HostKey:
    """The host key of a node or jump host."""

    node: Node
    name: str
    "Name in known_hosts."
    key: asyncssh.SSHKey
    status: KeyStatus
    "pinned: by this deployment; known: in ~/.ssh/known_hosts; new: in neither file; changed: another key is pinned."

    @property
    def fingerprint(self) -> str:
        """The fingerprint in the format of ssh-keygen -lf."""
        return self.key.get_fingerprint()

    @property
    def kind(self) -> str:
        """The type of the key, such as ssh-ed25519."""
        return self.key.get_algorithm()


async def look_jumps(
    fleet: Fleet, nodes: Sequence[Node], own: Path | None = None
) -> tuple[list[HostKey], dict[str, GracefarmError]]:
    """Read the host keys of the jump hosts. They must be trusted before the nodes behind them can be reached.

    Returns:
        The keys, and the errors of the nodes whose jump host cannot be reached.
    """
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
    """Read the host keys of all nodes in parallel. `own`: the user's known_hosts.

    Returns:
        The keys, and the errors of the nodes that could not be reached.
    """
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
    """Raise SshError if any key differs from the pinned one."""
    changed = [host_key for host_key in shown if host_key.status == "changed"]
    if changed:
        raise SshError(
            "the host key differs from the pinned one: "
            + "; ".join(f"{host_key.name} has {host_key.fingerprint}" for host_key in changed),
            remedy="compare the fingerprint with the one on the console of the node, since the connection may be "
            "intercepted; if the node was reinstalled, run `deploy init --repin`",
        )


async def scan(fleet: Fleet, node: Node) -> tuple[str, asyncssh.SSHKey]:
    """Read the host key of a node without trusting it.

    Returns:
        Its name in known_hosts, and the key.

    Raises:
        SshError: the node cannot be reached.
    """
    try:
        async with asyncio.timeout(SECONDS):
            options = fleet.options(node)
            # ProxyJump in ~/.ssh/config is looked up by the name, not by the address.
            tunnel: Any = await fleet.jump(node.jump, node.key) if node.jump else options.tunnel or ()
            key = await asyncssh.get_server_host_key(
                options.host,
                options.port,
                tunnel=tunnel,
                config=fleet.config,
                server_host_key_algs=list(ALGORITHMS),
            )
    except (OSError, asyncssh.Error, ValueError) as error:  # ValueError: an unreadable key or configuration
        raise explain(node, error) from error
    if key is None:
        raise SshError(
            f"{node} sent no host key",
            remedy="check in deploy.toml that the address and the port of this node belong to an SSH server",
        )
    return entry_name(node.address, options.port), key


def entry_name(address: str, port: int) -> str:
    """The name of an address in known_hosts."""
    return address if port == 22 else f"[{address}]:{port}"


def pinned(known_hosts: Path) -> dict[str, str]:
    """Read a known_hosts file without hashed names: name to `type base64`."""
    if not known_hosts.is_file():
        return {}
    entries: dict[str, str] = {}
    for line in known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and not line.startswith(("#", "@", "|")):
            entries.update((name, f"{words[1]} {words[2]}") for name in words[0].split(","))
    return entries


def pin(known_hosts: Path, keys: Iterable[tuple[str, asyncssh.SSHKey]]) -> None:
    """Write keys to known_hosts with mode 0600, replacing entries with the same names."""
    entries = pinned(known_hosts)
    for name, key in keys:
        entries[name] = " ".join(key.export_public_key().decode().split()[:2])
    atomic_write(known_hosts, "".join(f"{name} {key}\n" for name, key in entries.items()))
    os.chmod(known_hosts, 0o600)  # noqa: PTH101


def matches(known_hosts: Path, name: str, key: asyncssh.SSHKey) -> bool:
    """Whether the file has this key for this name, hashed names included."""
    host, _, port = name.removeprefix("[").partition("]:")
    trusted = asyncssh.read_known_hosts(str(known_hosts)).match(host, "", int(port) if port else None)[0]
    return any(trusted_key.public_data == key.public_data for trusted_key in trusted)
