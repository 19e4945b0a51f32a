"""What the nodes said, judged: one cell per check and node, each red one with its remedy. Pure: each rule has a test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deploy.nodes.facts import Bytes, Cuda, KeptFact

GIB = 1 << 30
CLOCK_S = 2.0
"Clocks further apart than this confuse TLS, tokens with an expiry and everybody who reads logs of two nodes."
DISK = 2 * GIB
"Bytes on a node's own disk: Ray writes its logs there, and what its object store has no room for."
SHM = 4 * GIB
"Ray's object store and NCCL live in /dev/shm."
NOFILE = 65536
"Ray's own recommendation for the number of open files."
NOFILE_LEAST = 2048
"With fewer a raylet and its workers cannot hold their connections."
NPROC = 8192
"Threads of the user: a raylet starts a worker for each core, of some thirty threads each."
NPROC_LEAST = 1024
MEMLOCK = 1 << 30
"Bytes that NCCL may pin, where it goes over InfiniBand: less, and the first all-reduce fails to register its memory."
TOKENS = (2, 52)
"The first Ray that asks for a token (RAY_AUTH_MODE). It listens on every address, whatever --node-ip-address says."
SHUT = "let ssh alone in at the provider's firewall: `deploy tunnel` needs no more; or a set with a later Ray"

CellStatus = Literal["ok", "bad", "warn", "skipped"]


class NodePython(KeptFact):
    """An interpreter as it runs on the node."""

    version: str = ""
    error: str | None = None


class ActiveEnvironment(KeptFact):
    """environment.json of the active environment, and its interpreter on this node."""

    id: str
    interpreter: str = ""
    alignment: int | None = None
    glibcxx: str | None = None
    python: NodePython
    ray: str | None = None


class SharedFolder(KeptFact):
    """The shared folder as this node has it."""

    error: str | None = None
    kind: str = ""
    free: int = 0


class OwnDisk(KeptFact):
    """The disk that holds `local` of deploy.toml on this node."""

    path: str
    error: str | None = None
    total: int = 0
    free: int = 0


class Survey(KeptFact):
    """deploy.remote.preflight.survey."""

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
    """One connection; without an error this node or somebody else's service answered."""

    error: str | None = None


class BulkAnswer(KeptFact):
    """64 KiB to a peer and back (deploy.remote.exchange)."""

    stalled: Literal["to", "from"] | None = None


class Reached(KeptFact):
    """One peer, as a node sees it."""

    ports: dict[str, PortAnswer]
    rtt: float | None
    offset: float | None
    bulk: BulkAnswer = BulkAnswer()


class Pairs(KeptFact):
    """deploy.remote.preflight.pairs."""

    taken: dict[str, str]
    reached: dict[str, Reached]
    nonces: dict[str, str]
    mtu: int | None = None
    "Of the interface between the nodes, in bytes."


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the deployment wants of its nodes."""

    addresses: Mapping[str, str]
    "Node to private address, in the inventory's order."
    share: str | None
    gpus: Mapping[str, int]
    "Node to the number of GPUs that the inventory says."
    nonces: Mapping[str, str]
    ours: Sequence[str] = ()
    "Words in the command line of a process that may hold a needed port: a cluster of ours that runs already."
    rehearsal: bool = False
    "Nodes are namespaces of one machine, with GPUs in name alone."
    open: Mapping[str, str] = field(default_factory=dict)
    "Node to a place of Ray's that was reached there over a public address."
    python: str = "system"
    "What environments are to stand on: the nodes' own Python, or one that uv (managed) or conda brings onto the share."


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """A check on a node."""

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
    """Every check on every node that answered, in the order in which a person would fix them.

    A node whose share cannot be written is told on its own row alone: that its nonce is missing is no fault of the others.
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
        return _warn(f"{name} does not resolve", "gloo and Ray look it up: add it to /etc/hosts")
    if local:
        remedy = f"gloo and NCCL would bind there: give {name} the private address in /etc/hosts, not {local[0]}"
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
            "; ".join(f"no way to {peer} ({expected.addresses[peer]}): {error}" for peer, error in deaf.items()),
            "the private network of these nodes differs or a firewall stands between them: check `private` in deploy.toml, "
            "and the provider's rules for traffic within the network",
        )
    if lost := [
        f"{reached.bulk.stalled} {peer} ({expected.addresses[peer]})"
        for peer, reached in seen.reached.items()
        if reached.bulk.stalled
    ]:
        here = f"; the interface here has mtu {seen.mtu}" if seen.mtu else ""
        return _bad(
            f"64 KiB {' and '.join(lost)} do not arrive, though single small packets do{here}",
            "the network between these nodes carries smaller packets than their interfaces send: set the mtu that it carries "
            "on every node (`ip link set dev NAME mtu 1500`), or allow jumbo frames on its switches",
        )
    times = [reached.rtt for reached in seen.reached.values() if reached.rtt is not None]
    if not seen.reached:
        return _skipped("there is one node alone")
    return _ok(f"{max(times) * 1e3:.2f} ms" if times else "reached")


def _ports(seen: Pairs, expected: Expected) -> Judgement:
    foreign = {port: who for port, who in seen.taken.items() if not any(word in who for word in expected.ours)}
    if foreign:
        port, who = next(iter(foreign.items()))
        return _bad(
            f"port {port} is held by {who}" + (f", and {len(foreign) - 1} more are taken" if len(foreign) > 1 else ""),
            f"stop it (`deploy down` for a cluster of ours, `ss -ltnp 'sport = :{port}'` shows it) or choose other ports",
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
        return _bad(f"cannot connect to {text}", "open these ports within the private network")
    if seen.taken:
        return _ok(f"{', '.join(seen.taken)} held by ours")
    return _ok("free and reached" if seen.reached else "free")


def _clock(seen: Pairs) -> Judgement:
    offsets = {peer: reached.offset for peer, reached in seen.reached.items() if reached.offset is not None}
    if not offsets:
        return _skipped("no other node answered with its clock")
    peer, worst = max(offsets.items(), key=lambda item: abs(item[1]))
    apart = sum(abs(offset) > CLOCK_S for offset in offsets.values())
    if apart > len(offsets) / 2:  # the majority is right; of two nodes nobody knows which
        return _bad(f"{abs(worst):.1f} s from {peer}", "switch time synchronisation on: timedatectl set-ntp true")
    return _ok(f"within {max(abs(worst) * 1e3, 0.1):.1f} ms" if not apart else f"{peer} is apart")


def _share(survey: Survey, seen: Pairs, expected: Expected) -> Judgement:
    share = survey.share
    if share is None:
        return _skipped("no shared folder is configured")
    mend = f"mount the shared file system at {expected.share} on every node; a provider attaches it at launch only"
    if share.error:
        return _bad(share.error, mend)
    other = [peer for peer, nonce in expected.nonces.items() if seen.nonces.get(peer) != nonce]
    if len(other) >= max(1, len(expected.nonces) - 1) and len(expected.nonces) > 1:
        return _bad(f"{expected.share} is this node's own: what the others wrote is not there", mend)
    if other:
        return _bad(f"what {', '.join(other)} wrote is not there", mend)
    return _ok(f"{share.kind}, {share.free / GIB:.0f} GiB free")


def _disk(disk: OwnDisk) -> Judgement:
    """Logs, secrets and Ray's folder lie there."""
    remedy = f"free space there (`df -h {disk.path}`), or set another `local` in deploy.toml"
    if disk.error == "No space left on device":
        return _bad(f"no space left on {disk.path}", remedy)
    if disk.error:
        return _bad(f"{disk.path}: {disk.error}", "make it writable for the user that deploys, or set another `local`")
    text = f"{disk.free / GIB:.1f} GiB free on {disk.path}"
    return _warn(f"{text}: Ray's logs and what it spills go there", remedy) if disk.free < DISK else _ok(text)


def _pythons(surveys: Mapping[str, Survey], source: str) -> dict[str, Judgement]:
    """Ray refuses a worker whose Python differs in the patch release (ray#44063)."""
    shown = {node: survey.environment.python if survey.environment else survey.python for node, survey in surveys.items()}
    versions = [python.version for python in shown.values() if python.version]
    common = max(sorted(set(versions)), key=versions.count) if versions else ""
    return {node: _python(python, surveys[node].environment, source, common) for node, python in shown.items()}


def _python(python: NodePython, environment: ActiveEnvironment | None, source: str, common: str) -> Judgement:
    """The nodes' own do not matter where the environment is to bring its own, and one that stands on theirs is about to be
    replaced."""
    passing = source != "system" and not (environment and f"/python/{source}-" in environment.interpreter)
    if passing and (environment or not python.error):
        return _ok(f"{python.version or python.error} of the system; the environment will bring its own ({source})")
    if python.error and environment is None:
        return _bad(python.error, "install python3")
    if python.error and environment and source == "system":
        return _bad(
            python.error,
            f"its interpreter {environment.interpreter} is missing on this node: install it, or set "
            '`python = "managed"` so that the environment brings its own',
        )
    if python.error and environment:
        return _bad(python.error, f"{environment.interpreter} lies on the shared folder: is that there, and the same?")
    if python.version != common:
        remedy = "the shared folder is not the same there"
        if source == "system":
            remedy = 'the patch release must be one: set `python = "managed"` so that all use the one on the shared folder'
        return _bad(f"{python.version}, the others have {common}", remedy)
    of = f"environment {environment.id[:12]}" if environment else "of the system; no environment is active yet"
    return _ok(f"{python.version}, {of}")


def _cuda(cuda: Cuda, gpus: int, rehearsal: bool) -> Judgement:
    if rehearsal:
        return _skipped("rehearsal: GPUs in name alone")
    count = f"{len(cuda.gpus)} x {cuda.gpus[0].name}" if cuda.gpus else ""
    if gpus == 0:  # nor had it one when facts were asked: the plan leaves it out, and `up` of the others goes on
        reason = f"{count}, which the kept facts do not know" if count else cuda.error or "no NVIDIA driver"
        return _warn(f"{reason}: the plan leaves this node out", "mend its driver or replace it, then `deploy facts`")
    if cuda.absent:
        return _bad("there is no libcuda.so.1", "install the NVIDIA driver, or choose an image that has it")
    if cuda.error:
        broken = "802" in cuda.error
        hint = "802: the fabric manager is not running or the box is broken" if broken else "reboot or replace it"
        return _bad(cuda.error, f"the driver is there and does not work; {hint}")
    if len(cuda.gpus) < gpus:
        return _bad(f"{len(cuda.gpus)} GPUs, not {gpus}", "correct `gpus` in deploy.toml or replace the node")
    return _ok(f"{count}, CUDA {cuda.version_text}")


def _memory(cuda: Cuda) -> Judgement:
    if not cuda.gpus:
        return _skipped("no usable GPU")
    worst = min(cuda.gpus, key=lambda gpu: gpu.free / gpu.total)
    text = f"{worst.free / GIB:.1f} of {worst.total / GIB:.1f} GiB free"
    if worst.free < 0.95 * worst.total:
        return _bad(text, "somebody uses this GPU: `nvidia-smi` names the process; `deploy down` stops ours")
    return _ok(text)


def _pages(survey: Survey) -> Judgement:
    page = f"{survey.page >> 10} KiB pages"
    if survey.environment is None or survey.environment.alignment is None:
        return _skipped(f"{page}; no environment is active yet whose files could be compared")
    aligned = f"aligned to {survey.environment.alignment >> 10} KiB"
    if survey.environment.alignment < survey.page:
        remedy = "it cannot be loaded here: use wheels that passed `builder audit` (gate alignment), or smaller pages"
        return _bad(f"{page}, and a library of the environment is {aligned}", remedy)
    return _ok(f"{page}, libraries {aligned}")


def tokenless(version: str) -> bool:
    """This Ray knows no token: it ignores RAY_AUTH_MODE and lets everybody in who reaches its ports."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TOKENS


def open_door(version: str) -> str:
    """What a Ray without tokens means."""
    return (
        f"Ray {version} knows no token ({'.'.join(map(str, TOKENS))} is the first): whoever reaches its ports runs code there"
    )


def _token(environment: ActiveEnvironment | None, place: str | None) -> Judgement:
    if environment is None:
        return _skipped("no environment is active yet")
    if environment.ray is None:
        return _skipped("there is no Ray in the environment")
    if not tokenless(environment.ray):
        return _ok(f"Ray {environment.ray} asks for one")
    reached = f"; {place} was reached from this machine, over a public address" if place else ""
    return _warn(open_door(environment.ray) + reached, SHUT)


def _symbols(survey: Survey) -> Judgement:
    if survey.glibcxx is None:
        return _bad("there is no libstdc++.so.6", "install libstdc++6")
    needed = survey.environment.glibcxx if survey.environment else None
    if needed is None:
        return _ok(f"GLIBCXX_{survey.glibcxx}")
    if _version(needed) > _version(survey.glibcxx):
        return _bad(
            f"GLIBCXX_{survey.glibcxx}, and the environment needs GLIBCXX_{needed}",
            "take a newer image on this node (Ubuntu 22.04 has 3.4.30), or a set that was built on an older libstdc++",
        )
    return _ok(f"GLIBCXX_{survey.glibcxx}, {needed} needed")


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shm(space: Bytes | None) -> Judgement:
    if space is None:
        return _bad("there is no /dev/shm", "mount a tmpfs there")
    text, mend = f"{space.free / GIB:.1f} GiB free", "mount -o remount,size=50% /dev/shm"
    if space.free < min(SHM, space.total) * 0.5 or space.total < SHM // 4:
        return _bad(text, f"{mend}, or remove what fills it")
    if space.total < SHM:
        return _warn(text, f"Ray puts its object store on disk below 4 GiB: {mend}")
    return _ok(text)


def _limits(limits: Mapping[str, tuple[int, int]], cuda: Cuda) -> Judgement:
    """The worst of open files, threads and locked memory. What Ray and the engine raise to the hard limit counts by that."""
    rows = [("nofile", _most(limits["nofile"]), NOFILE_LEAST, NOFILE), ("nproc", _most(limits["nproc"]), NPROC_LEAST, NPROC)]
    if cuda.gpus:
        rows.append(("memlock", _most(limits["memlock"]), 0, MEMLOCK))
    few = [(name, have, wanted) for name, have, least, wanted in rows if have is not None and have < least]
    low = [(name, have, wanted) for name, have, _, wanted in rows if have is not None and have < wanted]
    if few or low:
        shown = few or low
        text = ", ".join(f"{name} {have}" for name, have, _ in shown)
        mend = " and ".join(f"{name} to {wanted}" for name, _, wanted in shown)
        return "bad" if few else "warn", text, f"raise {mend} in /etc/security/limits.conf and log in again"
    return _ok(", ".join(f"{name} {'unlimited' if have is None else have}" for name, have, _, _ in rows))


def _most(limit: tuple[int, int]) -> int | None:
    """What a process may raise it to; None: unlimited."""
    return None if -1 in limit else max(limit)
