"""Host keys as a person meets them: what each node shows, whether it is known, and pinning what was accepted. Never blind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import asyncssh

from deploy.fleet import ssh
from deploy.fleet.ssh import Fleet
from deploy.nodes.deployment import Node
from gracefarm.errors import GracefarmError, SshError

SECONDS = 30
Status = Literal["pinned", "known", "new", "changed"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A host key that a node or its jump host showed now."""

    node: Node
    name: str
    "As known_hosts writes it."
    key: asyncssh.SSHKey
    status: Status
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
) -> tuple[list[Shown], dict[str, GracefarmError]]:
    """The host keys of the jump hosts: before any node behind them can be looked at, theirs must be trusted."""
    shown: list[Shown] = []
    bad: dict[str, GracefarmError] = {}
    for text in dict.fromkeys(one.jump for one in nodes if one.jump):
        _user, host, port = ssh.parse_jump(text)
        node = Node(name="jump host", rank=-1, address=host, port=port)
        try:
            async with asyncio.timeout(SECONDS):
                key = await asyncssh.get_server_host_key(host, port, server_host_key_algs=list(ssh.ALGORITHMS))
        except (OSError, asyncssh.Error, ValueError) as error:
            bad |= {one.name: ssh.explain(node, error) for one in nodes if one.jump == text}
            continue
        if key is not None:
            name = ssh.entry_name(host, port)
            shown.append(Shown(node=node, name=name, key=key, status=_status(fleet.known_hosts, own, name, key)))
    return shown, bad


async def look(fleet: Fleet, nodes: Sequence[Node], own: Path | None = None) -> tuple[list[Shown], dict[str, GracefarmError]]:
    """The host keys of all nodes at once, and why some could not be had. `own`: the user's known_hosts."""
    outcomes = await asyncio.gather(*(ssh.scan(fleet, one) for one in nodes), return_exceptions=True)
    shown: dict[tuple[str, bytes], Shown] = {}
    bad: dict[str, GracefarmError] = {}
    for node, outcome in zip(nodes, outcomes, strict=True):
        if isinstance(outcome, GracefarmError):
            bad[node.name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            for name, key in outcome:  # a jump host is shown by every node behind it
                status = _status(fleet.known_hosts, own, name, key)
                shown.setdefault((name, key.public_data), Shown(node=node, name=name, key=key, status=status))
    return list(shown.values()), bad


def _status(known_hosts: Path, own: Path | None, name: str, key: asyncssh.SSHKey) -> Status:
    before = ssh.pinned(known_hosts).get(name)
    if before is not None:
        return "pinned" if ssh.matches(known_hosts, name, key) else "changed"
    if own and own.is_file() and ssh.matches(own, name, key):
        return "known"
    return "new"


def refuse_changed(shown: Sequence[Shown]) -> None:
    """Raises SshError with every key that is not the one that was pinned."""
    changed = [one for one in shown if one.status == "changed"]
    if changed:
        raise SshError(
            "another host key than the pinned one: " + "; ".join(f"{one.name} shows {one.fingerprint}" for one in changed),
            remedy="somebody may stand between you and the node: compare with its console; if it was made anew: "
            "`deploy init --repin`",
        )


def pin(known_hosts: Path, shown: Sequence[Shown]) -> None:
    """Trust these keys from now on."""
    ssh.pin(known_hosts, [(one.name, one.key) for one in shown])
