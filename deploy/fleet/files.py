"""Copies a file to a node atomically."""

from __future__ import annotations

import shlex

from deploy.fleet.calls import RemoteNode
from deploy.fleet.results import refusal_of

_PLACE = """
umask 077
LC_ALL=C
export LC_ALL
folder=$(dirname "$1") partial=$1.$$.part
mkdir -p "$folder" || exit 73
[ -O "$folder" ] || { echo "$folder belongs to another user" >&2; exit 73; }
trap 'rm -f "$partial"' EXIT
trap 'exit 143' TERM HUP
if ! cat >"$partial"; then
    echo "$folder: cannot be written" >&2
    exit 73
fi
[ "$(wc -c <"$partial")" -eq "$3" ] || { echo "the connection was cut" >&2; exit 75; }
chmod "$2" "$partial" && mv -f "$partial" "$1"
"""
"The content comes from stdin, so that it does not appear in arguments. A partial file never gets the final name."


async def put_file(node: RemoteNode, content: bytes, path: str, *, mode: int = 0o600) -> None:
    """Write a file on a node atomically. A missing folder is created with mode 0700.

    Raises:
        DiskFullError: the disk of the node is full.
        NodeError: the folder belongs to another user or cannot be written.
        SshError: the node cannot be reached.
    """
    command = shlex.join(["sh", "-c", _PLACE, "gracefarm-place", path, f"{mode:o}", str(len(content))])
    ended = await node.shell.stream(command, stdin=content, on_line=lambda _line: None)
    if ended.code:
        raise refusal_of(node.name, f"writing {path}", ended.stderr.strip() or f"exit code {ended.code}")
