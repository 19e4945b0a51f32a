"""Collects all logs and facts of a deployment in one redacted archive, with a summary that starts with the first cause."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import posixpath
import re
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from deploy.engine.log import Cause, first_cause, no_cause
from deploy.fleet.calls import RemoteNode, call
from deploy.fleet.results import try_all
from deploy.fleet.ssh import Fleet
from deploy.nodes import paths, redact
from deploy.nodes.deployment import Deployment
from deploy.nodes.redact import Redactor
from deploy.nodes.state import State
from deploy.planning.plans import ServePlan
from deploy.remote.wire import Json
from deploy.watch import status
from deploy.watch.status import NodeStatus, Status, Watch
from gracefarm.errors import GracefarmError, NodeError

LOCAL = (".deploy/state.json", ".deploy/plan.json", ".deploy/facts.json")
ENGINE_LOG, ENGINE_EXIT, STACKS = "jobs/engine/log", "jobs/engine/exit", "stacks.txt"
SILENT = 60.0
"Seconds without a line in the log of a loading engine, after which its stacks are shown."
OWN = ("memory", "kv-cache", "shard", "driver-gpu", "gpus", "port", "layout", "usage", "import", "ray")
"Kinds of causes that are not consequences of a defect of a machine. They always come first."
_KERNEL = re.compile(r"\bXid\b|Killed process|Machine check|fallen off the bus", re.I)
_KILLED = re.compile(r"Killed process \d+ \(([^)]*)\)", re.I)
OURS = ("python", "ray", "gcs_server", "aphrodite", "vllm", "pt_main")
"Prefixes of the names of processes that the engine needs."
_XID = re.compile(r"Xid \(([^)]*)\): (\d+)")
GATHER = 600.0
"Timeout in seconds for collecting data from a node."
LAST = 8
"Rank of the finding that no cause was found."
SHOWN = 4
"Maximum number of stacks in a message. The archive contains all."
EARLY = 120.0
"Seconds before the engine's start from which messages of the kernel may be related to it."
STUCK = "check the server of that file system; `deploy run --timeout 10 -- df -h` shows on which nodes it answers"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A possible cause. The finding with the lowest `rank` is the first cause."""

    rank: int
    where: str
    text: str
    remedy: str = ""
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The archive that was written."""

    path: Path
    findings: tuple[Finding, ...]
    files: int
    size: int
    missing: Mapping[str, str]
    "Errors of nodes whose data is missing."
    status: Status


@dataclass
class _Archive:
    """A tar file whose every member is redacted."""

    tar: tarfile.TarFile
    root: str
    redactor: Redactor
    count: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)
    "Members that are searched for causes."
    written: dict[str, float] = field(default_factory=dict)
    "When each of these was last written, by the node's clock."

    def add(self, name: str, content: bytes, modified: float, *, keep: bool = False) -> None:
        """Add a member. Its name is redacted too."""
        clean = self.redactor.clean(content)
        info = tarfile.TarInfo(posixpath.join(self.root, self.redactor.line(name)))
        info.size, info.mtime, info.mode = len(clean), int(modified), 0o600
        self.tar.addfile(info, io.BytesIO(clean))
        self.count += 1
        if keep:
            self.texts[name], self.written[name] = clean, modified


async def write_bundle(
    deployment: Deployment, fleet: Fleet, folder: Path, *, environ: Mapping[str, str] = os.environ
) -> Bundle:
    """Write the archive to `folder` atomically, with mode 0600. Nodes that cannot be reached are noted in it.

    Raises:
        OSError: it cannot be written.
    """
    watch = status.watch_of(deployment, fleet)
    redactor = redact.of(deployment.folder, environ)
    now = time.time()
    name = f"{deployment.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}"
    seen = await status.look(watch)
    target = folder / f"{name}.tar.gz"
    with _whole(target) as stream, tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as tar:
        archive = _Archive(tar, name, redactor)
        kept = _local(archive, deployment)
        archive.add("status.json", seen.model_dump_json(indent=1).encode(), now)
        missing = await _nodes(archive, watch)
        silence = silent_for(archive, seen)
        causes = findings(archive.texts, seen, kept, watch.plan, missing, silence=silence)
        archive.add("summary.md", summary(seen, causes, kept, missing).encode(), now)
    size = target.stat().st_size
    cleaned = [replace(cause, text=redactor.line(cause.text), file=redactor.line(cause.file)) for cause in causes]
    return Bundle(path=target, findings=tuple(cleaned), files=archive.count, size=size, missing=missing, status=seen)


@contextmanager
def _whole(target: Path) -> Iterator[IO[bytes]]:
    """A file with mode 0600 that gets its name when it is complete."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
        Path(partial).replace(target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _local(archive: _Archive, deployment: Deployment) -> State:
    """Add the files of this machine, and return the state."""
    base = deployment.path.parent
    more = sorted([*deployment.folder.logs.rglob("*"), *(deployment.folder.path / "bench").glob("*")])
    for path in (deployment.path, *(base / name for name in LOCAL), *more):
        with suppress(OSError):  # a folder, or a missing file
            inside = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
            archive.add(f"local/{inside.as_posix().removeprefix('.')}", path.read_bytes(), path.stat().st_mtime)
    return status.kept_or_empty(deployment.folder)


async def _nodes(archive: _Archive, watch: Watch) -> dict[str, str]:
    """Collect from every node in parallel. Return the errors by node."""

    async def gather(node: RemoteNode) -> Json:
        def heard(event: Json) -> None:
            name = f"nodes/{node.name}/{event['name']}"
            if event["event"] == "file":
                content = zlib.decompress(base64.b64decode(event["data"]))
                archive.add(name, content, event["modified"], keep=_interesting(event["name"]))
            elif event["event"] == "unread":
                archive.add(f"nodes/{node.name}/unread.txt", f"{event['name']}: {event['cause']}\n".encode(), time.time())

        try:
            async with asyncio.timeout(GATHER):
                request = {
                    "files": await _wanted(watch, node),
                    "prefix": f"{watch.fleet.mark}/{node.name}/",
                    "environment": paths.environment(watch.deployment) if watch.deployment.data.share else "",
                }
                return await call(node, "gather.gather", request, on_event=heard)
        except TimeoutError as error:
            raise NodeError(
                f"{node.name}: collecting its data timed out after {GATHER:g} s",
                remedy=f"find out with `deploy ssh {node.name}` why the node is slow",
            ) from error

    _good, bad = await try_all(watch.nodes, gather)
    return {node: error.cause for node, error in bad.items()}


def _interesting(name: str) -> bool:
    """Whether a file may contain a cause."""
    base = posixpath.basename(name)
    return name in (ENGINE_LOG, ENGINE_EXIT, "dmesg-gpu.txt", STACKS) or base.startswith("worker-")


async def _wanted(watch: Watch, node: RemoteNode) -> list[Json]:
    """The files for deploy.remote.gather: logs of our jobs, and of all sessions of Ray."""
    deployment, place = watch.deployment, watch.deployment.node(node.name)
    folder = await watch.fleet.folder(place)
    users = {known.name: known.user for known in watch.facts.nodes} if watch.facts else {}
    temps: dict[str, None] = {}
    with suppress(GracefarmError):  # if `local` is too long for Ray, Ray was never started
        temps = dict.fromkeys(paths.ray_temp(deployment, at, users[at.name]) for at in (place, deployment.head) if users)
    jobs = posixpath.join(folder, "jobs")
    return [
        {"name": "jobs", "pattern": f"{jobs}/*/log"},
        {"name": "jobs", "pattern": f"{jobs}/*/log.old"},
        {"name": "jobs", "pattern": f"{jobs}/*/exit"},
        *({"name": "ray", "pattern": f"{temp}/session_2*/logs/**"} for temp in temps),
    ]


# the first cause


def silent_for(archive: _Archive, seen: Status) -> float:
    """Seconds since the engine's log was last written; 0 if there is none."""
    written = archive.written.get(f"nodes/{seen.nodes[0].name}/{ENGINE_LOG}")
    return max(0.0, seen.taken - written) if written else 0.0


def findings(
    texts: Mapping[str, bytes],
    seen: Status,
    kept: State,
    plan: ServePlan | None,
    missing: Mapping[str, str],
    *,
    silence: float = 0.0,
) -> tuple[Finding, ...]:
    """All possible causes, the most likely first.

    A reason in the engine itself (memory, a damaged file, a refused layout) comes first. If the engine's error is only a
    consequence, these come before it: a GPU's Xid, a process killed by the kernel, a lost node, an exception in a worker's log
    (aws-do-eks#69 hid one behind ActorHandleNotFoundError). Failed steps come after them.
    """
    names = {node.private: node.name for node in plan.nodes} if plan else {}
    causes: list[Finding] = []
    running = seen.service.word in ("READY", "BUSY", "LOADING")
    causes += _of_engine(texts, seen, names, silence, ended=not running)
    begun = kept.steps["engine"].begun if "engine" in kept.steps else 0.0
    for name, content in texts.items():
        node, base = name.split("/")[1], posixpath.basename(name)
        if base == "dmesg-gpu.txt":
            causes += _kernel(content, node, name, begun)
        elif not running and ((base.startswith("worker-") and _latest(name, texts)) or _follower(name, plan)):
            causes += _worker(content, names, node, name)
    check = "check the nodes with `deploy preflight`"
    causes += [Finding(rank=2, where=node, text=why, remedy=check) for node, why in missing.items()]
    causes += [
        Finding(rank=2, where=status.name, text=f"{status.name}: the file system at {path} does not answer", remedy=STUCK)
        for status in seen.nodes
        for path in status.stuck
    ]
    causes += [
        Finding(rank=2, where=status.name, text=_lost(status), remedy=seen.service.remedy)
        for status in seen.nodes
        if status.ray is False and status.name not in missing
    ]
    if plan and plan.followers and not running and f"nodes/{plan.head.name}/{ENGINE_EXIT}" not in texts:
        lost = [node.name for node in plan.followers if f"nodes/{node.name}/{ENGINE_EXIT}" in texts]
        causes += [Finding(rank=2, where=lost[0], text=plan.lost(lost), remedy=seen.service.remedy)] if lost else []
    causes += [
        Finding(rank=6, where=name, text=f"step {name} failed: {record.text}", remedy=seen.service.remedy)
        for name, record in kept.steps.items()
        if record.outcome == "failed"
    ]
    return tuple(sorted(causes, key=lambda cause: cause.rank))


def _follower(name: str, plan: ServePlan | None) -> bool:
    """Whether this is the log of an engine without Ray on a node other than the head."""
    return plan is not None and name in {f"nodes/{node.name}/{ENGINE_LOG}" for node in plan.followers}


def _of_engine(
    texts: Mapping[str, bytes], seen: Status, names: Mapping[str, str], silence: float, *, ended: bool
) -> list[Finding]:
    """Findings about the engine: from its log, from its stacks if it hangs, or why it cannot be reached."""
    word, head = seen.service.word, seen.nodes[0]
    if word == "UNREACHABLE" and not head.error:  # the node answers, but its engine cannot be reached
        return [Finding(rank=0, where="engine", text=seen.service.text, remedy=seen.service.remedy)]
    log = texts.get(f"nodes/{head.name}/{ENGINE_LOG}")
    if log is None:
        return []
    causes = _engine(log, names, head.name, texts.get(f"nodes/{head.name}/{ENGINE_EXIT}", b"").strip()) if ended else []
    if word == "WEDGED" or (word == "LOADING" and silence > SILENT):
        causes = [cause for cause in causes if cause.rank != LAST] + _hanging(log, texts, head.name, silence)
    return causes


def _lost(node: NodeStatus) -> str:
    return f"Ray lost {node.name}: " + (
        "its raylet runs but does not reach the head" if node.raylet else "its raylet has ended"
    )


def _engine(log: bytes, names: Mapping[str, str], head: str, exited: bytes) -> list[Finding]:
    """Why the engine ended, from its log."""
    code = int(exited) if exited.isdigit() else None
    cause = first_cause(log.decode(errors="replace").splitlines(), names, returncode=code)
    vague = cause.consequence or cause.kind in ("unknown", "killed", "none")
    if exited == b"stopped" and vague:
        return []
    rank = 0 if cause.kind in OWN else LAST if cause.kind == "none" else 5 if vague else 3
    return [Finding(rank=rank, where="engine", text=cause.text, remedy=cause.remedy, file=f"nodes/{head}/{ENGINE_LOG}")]


def _hanging(log: bytes, texts: Mapping[str, bytes], head: str, silence: float) -> list[Finding]:
    """The finding for a running engine without output: its phase, its last line, and where each rank waits."""
    cause = no_cause(log.decode(errors="replace").splitlines())
    waits = [
        f"{name.split('/')[1]}: {place}"
        for name, content in texts.items()
        if posixpath.basename(name) == STACKS
        for place in places(content.decode(errors="replace"))
    ]
    where = f"; the engine waits at {'; '.join(waits[:SHOWN])}" + (" …" if len(waits) > SHOWN else "") if waits else ""
    text = f"{cause.text}; no output for {silence:.0f} s{where}"
    remedy = "check the network between the nodes with `deploy preflight`; see the stacks in nodes/NODE/stacks.txt"
    return [Finding(rank=LAST, where="engine", text=text, remedy=remedy, file=f"nodes/{head}/{ENGINE_LOG}")]


def places(stacks: str) -> list[str]:
    """The innermost frame of each main thread in the output of py-spy, such as `all_reduce (torch/…py:1) in process 7`."""
    frames, process, main = [], "", False
    for line in stacks.splitlines():
        if match := re.match(r"Process (\d+):", line):
            process, main = match[1], False
        elif line.startswith("Thread "):
            main = "MainThread" in line
        elif main and line.startswith("    "):
            frames.append(f"{line.strip()} in process {process}")
            main = False
    return frames


def _worker(content: bytes, names: Mapping[str, str], node: str, file: str) -> list[Finding]:
    """An exception in a worker's log. Only exceptions that match a rule are reported, since these logs are large."""
    cause: Cause = first_cause(content.decode(errors="replace").splitlines(), names)
    if cause.kind in ("unknown", "killed", "none") or cause.consequence:
        return []
    rank = 1 if cause.kind in OWN else 3
    return [Finding(rank=rank, where=node, text=f"{node}: {cause.text}", remedy=cause.remedy, file=file)]


def _kernel(content: bytes, node: str, file: str, begun: float) -> list[Finding]:
    """The most important kernel message about GPUs, kills and machine checks since shortly before the engine's start."""
    seen = []
    for line in content.decode(errors="replace").splitlines():
        when = _when(line)
        if not _KERNEL.search(line) or (when is not None and begun and when < begun - EARLY):
            continue
        xid, killed = _XID.search(line), _KILLED.search(line)
        what = f"GPU error Xid {xid[2]} ({xid[1]})" if xid else "the kernel"
        remedy = "reboot the node; if the error returns, replace the node"
        if killed:
            remedy = "reduce cpu_offload_gib in [layout], or stop other processes on that node: its host memory was full"
        elif xid:
            remedy = "reboot or replace the node; NVIDIA's list of Xid errors shows which is necessary"
        stranger = killed is not None and not killed[1].lower().startswith(OURS)
        text = f"{node}: {what}: {line.strip()[:300]}"
        seen.append(Finding(rank=7 if stranger else 1, where=node, text=text, remedy=remedy, file=file))
    return sorted(seen, key=lambda finding: finding.rank)[:1]


def _when(line: str) -> float | None:
    """The time of a line of dmesg, such as `2026-11-24T22:45:00,123456+00:00`."""
    try:
        return datetime.fromisoformat(line.split()[0].replace(",", ".")).timestamp()
    except (ValueError, IndexError):
        return None


def _latest(name: str, names: Iterable[str]) -> bool:
    """Whether a file belongs to the last session on its node."""
    session = re.search(r"session_[^/]+", name)
    prefix = name[: name.index("/ray/")] if "/ray/" in name else name
    others = [match[0] for other in names if other.startswith(prefix) and (match := re.search(r"session_[^/]+", other))]
    return bool(session) and session[0] == max(others) if session else True


# the first page


def summary(seen: Status, causes: Sequence[Finding], kept: State, missing: Mapping[str, str]) -> str:
    """The first page of the archive."""
    parts: list[str] = []
    line: Callable[[str], None] = parts.append
    line(f"# {seen.deployment}: {seen.service.label}\n")
    if causes:
        first = causes[0]
        line(f"{first.text[0].upper()}{first.text[1:]}\n" if first.rank == LAST else f"**First cause:** {first.text}\n")
        if first.remedy:
            line(f"Remedy: {first.remedy}\n")
        if first.file:
            line(f"Source: {first.file}\n")
    else:
        line("No cause was found.\n")
    parts += [f"Not read: {note}\n" for note in seen.notes]
    line(f"State at {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(seen.taken))}: {seen.service.text}\n")
    if causes[1:]:
        line("## Also found\n")
        parts += [f"- {cause.text}" + (f" ({cause.file})" if cause.file else "") for cause in causes[1:]]
        line("")
    line("## Nodes\n")
    line("| node | address | reached | Ray | GPUs (MiB used of) | disk free | up |\n|---|---|---|---|---|---|---|")
    parts += [_row(node) for node in seen.nodes]
    line("\n## Steps\n")
    parts += [f"- {name}: {record.outcome}{': ' + record.text if record.text else ''}" for name, record in kept.steps.items()]
    if missing:
        line("\n## Missing\n")
        parts += [f"- {node}: {why}" for node, why in missing.items()]
    line(
        "\nlocal/ has files of the deploying machine. nodes/ has files of each node: jobs (the engine's log), ray (its logs), "
        "dmesg-gpu.txt, nvidia-smi.txt and others. The middle of long logs is removed. Keys and tokens are redacted; "
        "addresses, user names and paths are not."
    )
    return "\n".join(parts) + "\n"


def _row(node: NodeStatus) -> str:
    reached = "yes" if not node.error else f"no: {node.error}"
    ray = {True: "alive", False: "lost", None: "runs" if node.raylet else "-"}[node.ray]
    gpus = ", ".join(f"{_mib(gpu.used_mib)}/{_mib(gpu.total_mib)}" for gpu in node.gpus) or node.gpu_error or "-"
    disks = ", ".join(f"{gpu.path} {gpu.free / 1e9:.0f} GB" for gpu in node.disks) or "-"
    return f"| {node.name} | {node.address} | {reached} | {ray} | {gpus} | {disks} | {node.uptime / 3600:.1f} h |"


def _mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def as_json(bundle: Bundle) -> Json:
    """The result for JSON."""
    return {
        "path": str(bundle.path),
        "files": bundle.files,
        "size": bundle.size,
        "service": bundle.status.service.label,
        "missing": dict(bundle.missing),
        "findings": [asdict(finding) for finding in bundle.findings],
    }
