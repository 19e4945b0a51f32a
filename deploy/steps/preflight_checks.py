"""Judges the answers of the nodes: one cell per check and node. Each red cell has a remedy, and each rule has a test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deploy.nodes.facts import Bytes, Cuda, KeptFact
from deploy.steps.processes import stop_hint

GIB = 1 << 30
CLOCK_S = 2.0
"Maximum difference of clocks in seconds. Larger differences break TLS and expiring tokens, and make logs hard to compare."
DISK = 2 * GIB
"Bytes on a node's local disk, for Ray's logs and spilled objects."
SHM = 4 * GIB
"Bytes in /dev/shm, for Ray's object store and NCCL."
NOFILE = 65536
"Open files that Ray recommends."
NOFILE_LEAST = 2048
"Open files that a raylet and its workers need at least for their connections."
NPROC = 8192
"Threads of the user. A raylet starts one worker per core, with about thirty threads each."
NPROC_LEAST = 1024
MEMLOCK = 1 << 30
"Bytes that NCCL must be able to pin for InfiniBand. With less, the first all-reduce fails to register its memory."
TOKENS = (2, 52)
"The first Ray with tokens (RAY_AUTH_MODE). Ray listens on every address, in spite of --node-ip-address."
SHUT = "allow only ssh in the provider's firewall, which is sufficient for `deploy tunnel`; or use a set with a newer Ray"

CellStatus = Literal["ok", "bad", "warn", "skipped"]


class NodePython(KeptFact):
    """A Python interpreter on the node."""

    version: str = ""
    error: str | None = None


class ActiveEnvironment(KeptFact):
    """environment.json of the active environment, and the state of its interpreter on this node."""

    id: str
    interpreter: str = ""
    alignment: int | None = None
    glibcxx: str | None = None
    python: NodePython
    ray: str | None = None


class SharedFolder(KeptFact):
    """The shared folder on this node."""

    error: str | None = None
    kind: str = ""
    free: int = 0


class OwnDisk(KeptFact):
    """The disk of `local` of deploy.toml on this node."""

    path: str
    error: str | None = None
    total: int = 0
    free: int = 0


class Survey(KeptFact):
    """The answer of deploy.remote.preflight.survey."""

    hostname: str
    resolves: tuple[str, ...]
    share: SharedFolder | None
    disk: OwnDisk
    python: NodePython
    environment: ActiveEnvironment | None
    page: int
    glibcxx: str | None
    shm: Bytes | None
    limits: dict[str, tuple[int, int]]
    cuda: Cuda


class PortAnswer(KeptFact):
    """The result of one connection. Without an error, this node or another service answered."""

    error: str | None = None


class BulkAnswer(KeptFact):
    """The result of sending 64 KiB to a peer and back (deploy.remote.exchange)."""

    stalled: Literal["to", "from"] | None = None


class Reached(KeptFact):
    """How a node reaches one peer."""

    ports: dict[str, PortAnswer]
    rtt: float | None
    offset: float | None
    bulk: BulkAnswer = BulkAnswer()


class Pairs(KeptFact):
    """The answer of deploy.remote.preflight.pairs."""

    taken: dict[str, str]
    reached: dict[str, Reached]
    nonces: dict[str, str]
    mtu: int | None = None
    "MTU of the interface between the nodes in bytes."


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the deployment requires of its nodes."""

    addresses: Mapping[str, str]
    "Private address by node, in the order of the nodes."
    share: str | None
    gpus: Mapping[str, int]
    "Number of GPUs by node, from the facts or deploy.toml."
    nonces: Mapping[str, str]
    ours: Sequence[str] = ()
    "Parts of command lines of our processes, which may use a required port."
    rehearsal: bool = False
    "Nodes are namespaces of one machine, with declared GPUs."
    open: Mapping[str, str] = field(default_factory=dict)
    "Address of a port of Ray that was reached from the internet, by node."
    python: str = "system"
    "Python of the environments: of the nodes (system), or installed on the share by uv (managed) or conda."


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """The result of a check on a node."""

    check: str
    node: str
    status: CellStatus
    text: str
    remedy: str = ""


Judgement = tuple[CellStatus, str, str]
"Status, text and remedy of a cell."


def _ok(text: str) -> Judgement:
    return "ok", text, ""


def _skipped(text: str) -> Judgement:
    return "skipped", text, ""


def _warn(text: str, remedy: str) -> Judgement:
    return "warn", text, remedy


def _bad(text: str, remedy: str) -> Judgement:
    return "bad", text, remedy


def judge(surveys: Mapping[str, Survey], pairs: Mapping[str, Pairs], expected: Expected) -> list[NodeCheck]:
    """The results of all checks on every node that answered.

    If a node cannot write to the share, only this node gets a red cell: the others are not responsible for its missing nonce.
    """
    pythons = _pythons(surveys, expected.python)
    broken = {node for node, survey in surveys.items() if survey.share and survey.share.error}
    expected = replace(expected, nonces={node: nonce for node, nonce in expected.nonces.items() if node not in broken})
    cells: list[NodeCheck] = []
    for node, survey in surveys.items():
        judged = {"names": _names(survey), "disk": _disk(survey.disk)}
        if node in pairs:
            judged["share"] = _share(survey, pairs[node], expected)
            judged |= {"route": _route(pairs[node], expected), "ports": _ports(pairs[node], expected)}
            judged["clock"] = _clock(pairs[node])
        judged |= {
            "python": pythons[node],
            "cuda": _cuda(survey.cuda, expected.gpus.get(node, 0), expected.rehearsal),
            "memory": _memory(survey.cuda),
            "token": _token(survey.environment, expected.open.get(node)),
            "pages": _pages(survey),
            "libstdc++": _symbols(survey),
            "shm": _shm(survey.shm),
            "limits": _limits(survey.limits, survey.cuda),
        }
        cells += [
            NodeCheck(check=check, node=node, status=status, text=text, remedy=remedy)
            for check, (status, text, remedy) in judged.items()
        ]
    return cells


def _names(survey: Survey) -> Judgement:
    name = survey.hostname
    local = [address for address in survey.resolves if address.startswith("127.") or address == "::1"]
    if not survey.resolves:
        return _warn(f"{name} does not resolve", "add this name to /etc/hosts, because gloo and Ray look up this name")
    if local:
        remedy = (
            f"set the address of {name} in /etc/hosts to the node's private address; otherwise gloo and NCCL bind to "
            f"{local[0]}"
        )
        return _bad(f"{name} resolves to {local[0]}", remedy)
    return _ok(", ".join(survey.resolves))


def _route(seen: Pairs, expected: Expected) -> Judgement:
    deaf = {
        peer: next(port.error for port in reached.ports.values() if port.error)
        for peer, reached in seen.reached.items()
        if reached.ports and all(port.error for port in reached.ports.values())
    }
    if deaf:
        return _bad(
            "; ".join(f"cannot reach {peer} ({expected.addresses[peer]}): {error}" for peer, error in deaf.items()),
            "the nodes are in different networks, or a firewall is between them: check `private` in deploy.toml, and the "
            "provider's firewall",
        )
    if lost := [
        f"{reached.bulk.stalled} {peer} ({expected.addresses[peer]})"
        for peer, reached in seen.reached.items()
        if reached.bulk.stalled
    ]:
        here = f"; the interface of this node has mtu {seen.mtu}" if seen.mtu else ""
        return _bad(
            f"64 KiB {' and '.join(lost)} do not arrive, but small packets arrive{here}",
            "the network drops packets of the size that the interfaces send: set a smaller mtu on every node (`ip link set "
            "dev NAME mtu 1500`), or allow jumbo frames on the switches",
        )
    times = [reached.rtt for reached in seen.reached.values() if reached.rtt is not None]
    if not seen.reached:
        return _skipped("there is only one node")
    return _ok(f"{max(times) * 1e3:.2f} ms" if times else "reached")


def _ports(seen: Pairs, expected: Expected) -> Judgement:
    foreign = {port: who for port, who in seen.taken.items() if not any(word in who for word in expected.ours)}
    if foreign:
        port, who = next(iter(foreign.items()))
        return _bad(
            f"port {port} is used by {who}" + (f", and {len(foreign) - 1} more are in use" if len(foreign) > 1 else ""),
            stop_hint(
                who,
                f"stop the process (`deploy down` stops the processes of this deployment; `ss -ltnp 'sport = :{port}'` shows "
                "other processes)",
            )
            + ", or set different ports in [ports] of deploy.toml",
        )
    shut = [
        f"{peer}:{number}"
        for peer, reached in seen.reached.items()
        if not all(tried.error for tried in reached.ports.values())
        for number, tried in reached.ports.items()
        if tried.error
    ]
    if shut:
        text = ", ".join(shut[:3]) + (f" and {len(shut) - 3} more" if len(shut) > 3 else "")
        return _bad(
            f"cannot connect to {text}",
            "allow connections to these ports between the nodes, in their firewalls and in the provider's firewall",
        )
    if seen.taken:
        return _ok(f"{', '.join(seen.taken)} used by this deployment")
    return _ok("free and reachable" if seen.reached else "free")


def _clock(seen: Pairs) -> Judgement:
    offsets = {peer: reached.offset for peer, reached in seen.reached.items() if reached.offset is not None}
    if not offsets:
        return _skipped("no other node sent its time")
    peer, worst = max(offsets.items(), key=lambda item: abs(item[1]))
    apart = sum(abs(offset) > CLOCK_S for offset in offsets.values())
    if apart > len(offsets) / 2:  # the majority is right; with two nodes, both get a red cell
        return _bad(
            f"the clock differs by {abs(worst):.1f} s from the clock of {peer}",
            "switch on time synchronisation: `timedatectl set-ntp true`",
        )
    return _ok(f"within {max(abs(worst) * 1e3, 0.1):.1f} ms" if not apart else f"only the clock of {peer} differs")


def _share(survey: Survey, seen: Pairs, expected: Expected) -> Judgement:
    share = survey.share
    if share is None:
        return _skipped("no shared folder is configured")
    remedy = f"mount the shared file system at {expected.share} on every node; some providers attach it only at launch"
    if share.error:
        return _bad(share.error, remedy)
    other = [peer for peer, nonce in expected.nonces.items() if seen.nonces.get(peer) != nonce]
    if len(other) >= max(1, len(expected.nonces) - 1) and len(expected.nonces) > 1:
        return _bad(f"{expected.share} is not shared on this node: it does not have the files of the other nodes", remedy)
    if other:
        return _bad(f"files of {', '.join(other)} are missing", remedy)
    return _ok(f"{share.kind}, {share.free / GIB:.0f} GiB free")


def _disk(disk: OwnDisk) -> Judgement:
    """The disk for logs, secrets and Ray's folder."""
    remedy = f"free space on this disk (`df -h {disk.path}`), or set a different `local` in deploy.toml"
    if disk.error == "No space left on device":
        return _bad(f"no space left on {disk.path}", remedy)
    if disk.error:
        return _bad(
            f"{disk.path}: {disk.error}",
            "give the user of the ssh connection permission to write there, or set a different `local` in deploy.toml",
        )
    text = f"{disk.free / GIB:.1f} GiB free on {disk.path}"
    return _warn(f"{text}, which has Ray's logs and spilled objects", remedy) if disk.free < DISK else _ok(text)


def _pythons(surveys: Mapping[str, Survey], source: str) -> dict[str, Judgement]:
    """Compare the Python versions. Ray refuses a worker with another patch release (ray#44063)."""
    shown = {node: survey.environment.python if survey.environment else survey.python for node, survey in surveys.items()}
    versions = [python.version for python in shown.values() if python.version]
    common = max(sorted(set(versions)), key=versions.count) if versions else ""
    return {node: _python(python, surveys[node].environment, source, common) for node, python in shown.items()}


def _python(python: NodePython, environment: ActiveEnvironment | None, source: str, common: str) -> Judgement:
    """Judge the Python of a node. The system's Python does not matter if the environment has, or will have, its own."""
    passing = source != "system" and not (environment and f"/python/{source}-" in environment.interpreter)
    if passing and (environment or not python.error):
        return _ok(f"{python.version or python.error} of the system; the environment will have its own Python ({source})")
    if python.error and environment is None:
        return _bad(python.error, "install python3 on this node")
    if python.error and environment and source == "system":
        return _bad(
            python.error,
            f'install the environment\'s interpreter {environment.interpreter} on this node, or set `python = "managed"` in '
            "deploy.toml, so that uv installs it in the shared folder",
        )
    if python.error and environment:
        return _bad(
            python.error, f"check that the shared folder, which contains {environment.interpreter}, is mounted on this node"
        )
    if python.version != common:
        remedy = "check that this node has the same shared folder as the other nodes"
        if source == "system":
            remedy = 'install the same patch release on all nodes, or set `python = "managed"` in deploy.toml'
        return _bad(f"{python.version}, but the other nodes have {common}", remedy)
    of = f"environment {environment.id[:12]}" if environment else "of the system; no environment is active yet"
    return _ok(f"{python.version}, {of}")


def _cuda(cuda: Cuda, gpus: int, rehearsal: bool) -> Judgement:
    if rehearsal:
        return _skipped("rehearsal with declared GPUs")
    count = f"{len(cuda.gpus)} x {cuda.gpus[0].name}" if cuda.gpus else ""
    if gpus == 0:  # the facts have no GPU either, so the plan does not use the node, and `up` of the others continues
        reason = f"{count}, but the stored facts have no GPU of this node" if count else cuda.error or "no NVIDIA driver"
        return _warn(
            f"{reason}, so the plan does not use this node", "fix the driver or replace the node, then run `deploy facts`"
        )
    if cuda.absent:
        return _bad("libcuda.so.1 is missing", "install the NVIDIA driver, or use an image that has it")
    if cuda.error:
        fabric = "802" in cuda.error
        remedy = "start NVIDIA's fabric manager on the node, or replace the node" if fabric else "reboot or replace the node"
        return _bad(f"the driver is installed but does not work: {cuda.error}", remedy)
    if len(cuda.gpus) < gpus:
        return _bad(f"{len(cuda.gpus)} GPUs instead of {gpus}", "correct `gpus` in deploy.toml, or replace the node")
    return _ok(f"{count}, CUDA {cuda.version_text}")


def _memory(cuda: Cuda) -> Judgement:
    if not cuda.gpus:
        return _skipped("no usable GPU")
    worst = min(cuda.gpus, key=lambda gpu: gpu.free / gpu.total)
    text = f"{worst.free / GIB:.1f} of {worst.total / GIB:.1f} GiB free"
    if worst.free < 0.95 * worst.total:
        return _bad(
            text,
            "stop the process that uses this GPU: `nvidia-smi` shows it; `deploy down` stops the processes of this deployment",
        )
    return _ok(text)


def _pages(survey: Survey) -> Judgement:
    page = f"{survey.page >> 10} KiB pages"
    if survey.environment is None or survey.environment.alignment is None:
        return _skipped(f"{page}; not compared, because no environment is active yet")
    aligned = f"aligned to {survey.environment.alignment >> 10} KiB"
    if survey.environment.alignment < survey.page:
        remedy = "use wheels that passed `builder audit` (gate alignment), or a kernel with smaller pages"
        return _bad(f"{page}, but a library of the environment is only {aligned} and cannot be loaded", remedy)
    return _ok(f"{page}, libraries {aligned}")


def tokenless(version: str) -> bool:
    """Whether this version of Ray has no tokens. It ignores RAY_AUTH_MODE, so everyone who reaches its ports has access."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TOKENS


def open_door(version: str) -> str:
    """The warning about a Ray without tokens."""
    return (
        f"Ray {version} has no token (Ray {'.'.join(map(str, TOKENS))} was the first with one): everyone who reaches its "
        "ports can run code"
    )


def _token(environment: ActiveEnvironment | None, place: str | None) -> Judgement:
    if environment is None:
        return _skipped("no environment is active yet")
    if environment.ray is None:
        return _skipped("the environment has no Ray")
    if not tokenless(environment.ray):
        return _ok(f"Ray {environment.ray} requires a token")
    reached = f"; this machine reached {place} over a public address" if place else ""
    return _warn(open_door(environment.ray) + reached, SHUT)


def _symbols(survey: Survey) -> Judgement:
    if survey.glibcxx is None:
        return _bad("libstdc++.so.6 is missing", "install libstdc++6")
    needed = survey.environment.glibcxx if survey.environment else None
    if needed is None:
        return _ok(f"GLIBCXX_{survey.glibcxx}")
    if _version(needed) > _version(survey.glibcxx):
        return _bad(
            f"GLIBCXX_{survey.glibcxx}, but the environment requires GLIBCXX_{needed}",
            "use a newer image on this node (Ubuntu 22.04 has 3.4.30), or a set that was built with an older libstdc++",
        )
    return _ok(f"GLIBCXX_{survey.glibcxx}, {needed} required")


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shm(space: Bytes | None) -> Judgement:
    if space is None:
        return _bad("there is no /dev/shm", "mount a tmpfs at /dev/shm")
    text, enlarge = f"{space.free / GIB:.1f} GiB free", "`mount -o remount,size=50% /dev/shm`"
    if space.free < min(SHM, space.total) * 0.5 or space.total < SHM // 4:
        return _bad(text, f"enlarge it with {enlarge}, or remove large files from it")
    if space.total < SHM:
        return _warn(text, f"enlarge it with {enlarge}; with less than 4 GiB, Ray's object store is on disk")
    return _ok(text)


def _limits(limits: Mapping[str, tuple[int, int]], cuda: Cuda) -> Judgement:
    """Judge the limits of open files, threads and locked memory. Ray and the engine raise them to the hard limits."""
    rows = [("nofile", _most(limits["nofile"]), NOFILE_LEAST, NOFILE), ("nproc", _most(limits["nproc"]), NPROC_LEAST, NPROC)]
    if cuda.gpus:
        rows.append(("memlock", _most(limits["memlock"]), 0, MEMLOCK))
    few = [(name, have, wanted) for name, have, least, wanted in rows if have is not None and have < least]
    low = [(name, have, wanted) for name, have, _, wanted in rows if have is not None and have < wanted]
    if few or low:
        shown = few or low
        text = ", ".join(f"{name} {have}" for name, have, _ in shown)
        limits_ = " and ".join(f"{name} to {wanted}" for name, _, wanted in shown)
        return "bad" if few else "warn", text, f"raise {limits_} in /etc/security/limits.conf and log in again"
    return _ok(", ".join(f"{name} {'unlimited' if have is None else have}" for name, have, _, _ in rows))


def _most(limit: tuple[int, int]) -> int | None:
    """The hard limit; None: unlimited."""
    return None if -1 in limit else max(limit)
