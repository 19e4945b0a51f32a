"""Calls functions of `deploy.remote` on a node. The package is sent as an archive on stdin and leaves no files on the node."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Protocol

from deploy.fleet.results import full, refusal_of
from deploy.remote.wire import Json
from gracefarm.errors import DigestError, DiskFullError, EngineError, FetchError, GracefarmError, HostError, InstallError
from gracefarm.process import last_line

OnEvent = Callable[[Json], None]

_BOOT = (
    "import sys,runpy,os,signal;signal.signal(15,lambda *_:sys.exit(143));"
    "r=sys.stdin.buffer;n=int(r.readline());f=os.memfd_create('gracefarm.pyz');"
    "w=os.fdopen(f,'wb',closefd=False);w.write(r.read(n));w.close();"
    "sys.path.insert(0,'/proc/self/fd/%d'%f);runpy.run_module('deploy.remote',run_name='__main__')"
)
"""Length, archive and request come on stdin, so that they do not appear in arguments. The archive stays in memory
(memfd_create), so it works on a full disk and leaves no files. When the caller ends early, the worker gets TERM
(deploy.fleet.ssh) and removes its partial files."""

CHECK = "check"
"Name of the job for calls that take long and are not detached."
_LASTING = (
    *("environment.matrix", "cluster.warm", "cache.measure", "weights.manifest", "weights.rehash"),
    *("preflight.survey", "preflight.pairs", "preflight.collective"),
)
"Calls that may take minutes and end with their caller. If the caller was killed, `deploy down` finds them by their mark."

_CLASSES: Mapping[str, type[GracefarmError]] = {
    "disk": DiskFullError,
    "digest": DigestError,
    "install": InstallError,
    "fetch": FetchError,
    "gated": FetchError,
    "engine": EngineError,
}


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a remote command ended."""

    code: int
    stderr: str


class Shell(Protocol):
    """Runs commands on one node. The methods raise SshError or NodeError if the connection is lost."""

    async def stream(self, command: str, *, stdin: bytes, on_line: Callable[[str], None]) -> Exit:
        """Run `command` with `stdin`, and call `on_line` with each line of its stdout. It ends with the connection."""
        ...

    async def start(self, job: str, command: str, *, stdin: bytes) -> bool:
        """Start `command` detached from the connection and this process. Return False if a job of this name is running."""
        ...

    async def follow(self, job: str, on_line: Callable[[str], None]) -> Exit:
        """Call `on_line` with each line of a job's output, from the first one, until it ends. Reconnects when necessary."""
        ...

    async def at_work(self, job: str) -> bool:
        """Whether a job of this name is running on the node."""
        ...


@dataclass(frozen=True, kw_only=True)
class RemoteNode:
    """A node on which functions of deploy.remote are called."""

    name: str
    address: str
    "Private address, for the other nodes."
    gpus: int
    shell: Shell
    mark: str = ""
    "DEPLOYMENT/NODE, the prefix of the marks of our processes on the node."


@cache
def archive() -> bytes:
    """A zip of deploy.remote and the modules of gracefarm that it imports. Its bytes are reproducible."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(zipfile.ZipInfo("deploy/__init__.py"), "")
        for name in ("__init__.py", "process.py", "uv.py"):
            zipped.writestr(zipfile.ZipInfo(f"gracefarm/{name}"), (resources.files("gracefarm") / name).read_bytes())
        for file in sorted(resources.files("deploy.remote").iterdir(), key=lambda entry: entry.name):
            if file.name.endswith(".py"):
                zipped.writestr(zipfile.ZipInfo(f"deploy/remote/{file.name}"), file.read_bytes())
    return target.getvalue()


async def call(
    node: RemoteNode,
    function: str,
    arguments: Json,
    *,
    python: str = "python3",
    on_event: OnEvent = lambda _event: None,
    job: str | None = None,
) -> Json:
    """Call `module.function` of deploy.remote on `node` with the node's `python`. `on_event` gets events as they arrive.

    `job`: name of the job for a long call that must not end with the connection. If an earlier call still runs under this
    name, wait for its end first.

    Raises:
        GracefarmError: the error of the worker, with the class for its kind.
        HostError: the worker ended without an answer.
        SshError, NodeError: the connection to the node was lost.
    """
    heard = _Heard(on_event)
    packed = archive()
    request = json.dumps({"call": function, "arguments": arguments}).encode()
    command, stdin = f"{shlex.quote(python)} -c {shlex.quote(_BOOT)}", b"%d\n" % len(packed) + packed + request
    if job is None:
        if function in _LASTING and node.mark:
            command = f"env GRACEFARM_MARK={shlex.quote(f'{node.mark}/{CHECK}')} {command}"
        ended = await node.shell.stream(command, stdin=stdin, on_line=heard)
    else:
        while not await node.shell.start(job, command, stdin=stdin):
            await settle(node, job, on_event)
        ended = await node.shell.follow(job, heard)
    if "result" in heard.answer:
        return dict(heard.answer["result"])
    if "failed" in heard.answer:
        raise refusal(node.name, heard.answer["failed"])
    if full(ended.stderr):
        raise refusal_of(node.name, function, ended.stderr)
    last = last_line(ended.stderr, heard.last or f"exit code {ended.code}")
    if ended.code == 127 or "not found" in last:
        there = f"check that the shared folder, which contains {python}, is mounted on this node"
        raise HostError(f"{node.name}: {last}", remedy=there if "/" in python else f"install {python} on this node")
    raise HostError(
        f"{node.name}: the program for {function} ended without an answer: {last}",
        remedy="repeat the command, which continues where it stopped",
    )


async def settle(node: RemoteNode, job: str, on_event: OnEvent = lambda _event: None) -> None:
    """Wait for the end of a job that an interrupted command has left running. Its result is ignored."""
    if await node.shell.at_work(job):
        on_event({"event": "wait", "owner": "of an earlier command"})
        await node.shell.follow(job, _Heard(on_event))


@dataclass
class _Heard:
    """Parses the output lines of a worker."""

    on_event: OnEvent
    answer: Json = field(default_factory=dict)
    last: str = ""
    "The last line that is not JSON, such as the end of a traceback."

    def __call__(self, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            self.last = text.strip() or self.last
            return
        if not isinstance(message, dict):
            return
        if "event" in message:
            self.on_event(message)
        else:
            self.answer.update(message)


def refusal(node: str, failed: Mapping[str, str]) -> GracefarmError:
    """The error for a failure that a worker reported."""
    return _CLASSES.get(failed["kind"], HostError)(f"{node}: {failed['cause']}", remedy=failed["remedy"])
