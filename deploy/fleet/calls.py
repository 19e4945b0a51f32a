"""Calls into `deploy.remote` on a node: the package goes along as an archive on stdin, runs, and leaves nothing there."""

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
"""Length, archive, request: all on stdin, so that no argument list shows anything. The archive stays in memory (memfd_create):
a disk that is full does not matter, and nothing is left behind.
TERM is what a command that is left gets (deploy.fleet.ssh): the worker takes away what it has half made."""

CHECK = "check"
"Job of what lasts and is not detached."
_LASTING = (
    *("environment.matrix", "cluster.warm", "cache.measure", "weights.manifest", "weights.rehash"),
    *("preflight.survey", "preflight.pairs", "preflight.collective"),
)
"Minutes, perhaps, and on a node no longer than whoever asked: what a killed command left of these, `down` finds by its mark."

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
    """A way to run commands on one node. Implementations hold the connection; SshError, NodeError: it was lost."""

    async def stream(self, command: str, *, stdin: bytes, on_line: Callable[[str], None]) -> Exit:
        """Run `command` with `stdin`, hand each line of its stdout to `on_line`; it ends with the connection."""
        ...

    async def start(self, job: str, command: str, *, stdin: bytes) -> bool:
        """Start `command` so that it outlives the connection and this process; False: a job of this name is at work."""
        ...

    async def follow(self, job: str, on_line: Callable[[str], None]) -> Exit:
        """Hand on each line that a job says, from its first one, until it ends; a cut is mended."""
        ...

    async def at_work(self, job: str) -> bool:
        """A job of this name runs there."""
        ...


@dataclass(frozen=True, kw_only=True)
class RemoteNode:
    """A node as the steps see it."""

    name: str
    address: str
    "Private address: what the other nodes use."
    gpus: int
    shell: Shell
    mark: str = ""
    "DEPLOYMENT/NODE: how the marks of our processes there begin."


@cache
def archive() -> bytes:
    """deploy.remote and what it takes of gracefarm as a zip, the same bytes every time."""
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
    """`module.function` of deploy.remote on `node`, run by its `python`; events come as they are said.

    `job`: its name there, where it is long and must not end with the connection; what an earlier command left at work under
    this name comes first.
    Raises:
        GracefarmError: what the worker refused, named by its class; HostError when it ended without an answer; SshError,
        NodeError: the node was lost.
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
        raise HostError(f"{node.name}: {last}", remedy=f"install {python} on this node")
    raise HostError(
        f"{node.name}: {function} ended without an answer: {last}", remedy="repeat the command; it goes on from what is done"
    )


async def settle(node: RemoteNode, job: str, on_event: OnEvent = lambda _event: None) -> None:
    """Follow to its end what an earlier command, which was killed or cut off, has left at work; its answer is nobody's."""
    if await node.shell.at_work(job):
        on_event({"event": "wait", "owner": "of an earlier command"})
        await node.shell.follow(job, _Heard(on_event))


@dataclass
class _Heard:
    """The lines of a worker."""

    on_event: OnEvent
    answer: Json = field(default_factory=dict)
    last: str = ""
    "What was said beside it, by a library that prints or by Python when it gave up."

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
    """A worker's words as an error of ours."""
    return _CLASSES.get(failed["kind"], HostError)(f"{node}: {failed['cause']}", remedy=failed["remedy"])
