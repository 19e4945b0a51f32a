"""What the nodes said, judged: one cell per check and node, each red one with its remedy. Pure: each rule has a test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict

GIB = 1 << 30
CLOCK_S = 2.0
"Clocks further apart than this confuse TLS, tokens with an expiry and everybody who reads logs of two nodes."
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

Status = Literal["ok", "bad", "warn", "skipped"]


class Answer(BaseModel):
    """What deploy.remote sends; keys that a newer worker adds are no error."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Gpu(Answer):
    """Bytes as cuMemGetInfo has them."""

    name: str
    free: int
    total: int


class Cuda(Answer):
    """Either GPUs, or why not."""

    absent: bool = False
    device: bool = False
    error: str | None = None
    version: int | None = None
    gpus: tuple[Gpu, ...] = ()


class Interpreter(Answer):
    """An interpreter as it runs on the node."""

    version: str = ""
    implementation: str = ""
    platform: str = ""
    error: str | None = None


class ActiveEnvironment(Answer):
    """environment.json of the active environment, and its interpreter on this node."""

    id: str
    interpreter: str = ""
    alignment: int | None = None
    glibcxx: str | None = None
    python: Interpreter
    ray: str | None = None


class SharedFolder(Answer):
    """The shared folder as this node has it."""

    error: str | None = None
    kind: str = ""
    source: str = ""
    network: bool = False
    free: int = 0


class Space(Answer):
    """Of a file system, in bytes."""

    total: int
    free: int


class Survey(Answer):
    """deploy.remote.preflight.survey."""

    hostname: str
    resolves: tuple[str, ...]
    share: SharedFolder | None
    python: Interpreter
    environment: ActiveEnvironment | None
    page: int
    glibcxx: str | None
    shm: Space | None
    limits: dict[str, tuple[int, int]]
    cuda: Cuda


class Port(Answer):
    """One connection: seconds for a greeting and its answer, or the error; `foreign`: somebody else's service answered."""

    rtt: float | None = None
    foreign: bool = False
    error: str | None = None


class Reached(Answer):
    """One peer, as a node sees it."""

    ports: dict[str, Port]
    rtt: float | None
    offset: float | None


class Pairs(Answer):
    """deploy.remote.preflight.pairs."""

    taken: dict[str, str]
    reached: dict[str, Reached]
    nonces: dict[str, str]


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
class Cell:
    """A check on a node."""

    check: str
    node: str
    status: Status
    text: str
    remedy: str = ""


def judge(surveys: Mapping[str, Survey], pairs: Mapping[str, Pairs], expected: Expected) -> list[Cell]:
    """Every check on every node that answered, in the order in which a person would mend them."""
    cells: list[Cell] = []
    for node, one in surveys.items():
        cells.append(_names(node, one))
    for node, found in pairs.items():
        cells += [_route(node, found, expected), _ports(node, found, expected), _clock(node, found)]
        cells.append(_share(node, surveys[node], found, expected))
    cells += _pythons(surveys, expected.python)
    for node, one in surveys.items():
        gpus = expected.gpus.get(node, 0)
        cells += [_cuda(node, one.cuda, gpus, expected.rehearsal), _memory(node, one.cuda)]
        cells += [
            _token(node, one, expected),
            _pages(node, one),
            _symbols(node, one),
            _shm(node, one.shm),
            _limits(node, one.limits, one.cuda),
        ]
    return cells


def _cell(check: str, node: str, status: Status, text: str, remedy: str = "") -> Cell:
    return Cell(check=check, node=node, status=status, text=text, remedy=remedy)


def _names(node: str, one: Survey) -> Cell:
    local = [address for address in one.resolves if address.startswith("127.") or address == "::1"]
    if not one.resolves:
        return _cell(
            "names", node, "warn", f"{one.hostname} does not resolve", "gloo and Ray look it up: add it to /etc/hosts"
        )
    if local:
        return _cell(
            "names",
            node,
            "bad",
            f"{one.hostname} resolves to {local[0]}",
            f"gloo and NCCL would bind there: give {one.hostname} the private address in /etc/hosts, not {local[0]}",
        )
    return _cell("names", node, "ok", ", ".join(one.resolves))


def _route(node: str, found: Pairs, expected: Expected) -> Cell:
    deaf = {
        peer: next(port.error for port in one.ports.values() if port.error)
        for peer, one in found.reached.items()
        if one.ports and all(port.error for port in one.ports.values())
    }
    if deaf:
        return _cell(
            "route",
            node,
            "bad",
            "; ".join(f"no way to {peer} ({expected.addresses[peer]}): {error}" for peer, error in deaf.items()),
            "the private network of these nodes differs or a firewall stands between them: check `private` in deploy.toml, "
            "and the provider's rules for traffic within the network",
        )
    times = [one.rtt for one in found.reached.values() if one.rtt is not None]
    if not found.reached:
        return _cell("route", node, "skipped", "there is one node alone")
    return _cell("route", node, "ok", f"{max(times) * 1e3:.2f} ms" if times else "reached")


def _ports(node: str, found: Pairs, expected: Expected) -> Cell:
    foreign = {port: who for port, who in found.taken.items() if not any(word in who for word in expected.ours)}
    if foreign:
        port, who = next(iter(foreign.items()))
        return _cell(
            "ports",
            node,
            "bad",
            f"port {port} is held by {who}" + (f", and {len(foreign) - 1} more are taken" if len(foreign) > 1 else ""),
            f"stop it (`deploy down` for a cluster of ours, `ss -ltnp 'sport = :{port}'` shows it) or choose other ports",
        )
    shut = [
        f"{peer}:{number}"
        for peer, one in found.reached.items()
        if not all(port.error for port in one.ports.values())
        for number, port in one.ports.items()
        if port.error
    ]
    if shut:
        text = ", ".join(shut[:3]) + (f" and {len(shut) - 3} more" if len(shut) > 3 else "")
        return _cell("ports", node, "bad", f"cannot connect to {text}", "open these ports within the private network")
    if found.taken:
        return _cell("ports", node, "ok", f"{', '.join(found.taken)} held by ours")
    return _cell("ports", node, "ok", "free and reached" if found.reached else "free")


def _clock(node: str, found: Pairs) -> Cell:
    offsets = {peer: one.offset for peer, one in found.reached.items() if one.offset is not None}
    if not offsets:
        return _cell("clock", node, "skipped", "no other node answered with its clock")
    peer, worst = max(offsets.items(), key=lambda one: abs(one[1]))
    apart = sum(abs(one) > CLOCK_S for one in offsets.values())
    if apart > len(offsets) / 2:  # the majority is right; of two nodes nobody knows which
        return _cell(
            "clock", node, "bad", f"{abs(worst):.1f} s from {peer}", "switch time synchronisation on: timedatectl set-ntp true"
        )
    return _cell("clock", node, "ok", f"within {max(abs(worst) * 1e3, 0.1):.1f} ms" if not apart else f"{peer} is apart")


def _share(node: str, survey: Survey, found: Pairs, expected: Expected) -> Cell:
    share = survey.share
    if share is None:
        return _cell("share", node, "skipped", "no shared folder is configured")
    mend = f"mount the shared file system at {expected.share} on every node; a provider attaches it at launch only"
    if share.error:
        return _cell("share", node, "bad", share.error, mend)
    other = [peer for peer, nonce in expected.nonces.items() if found.nonces.get(peer) != nonce]
    if len(other) >= max(1, len(expected.nonces) - 1) and len(expected.nonces) > 1:
        return _cell("share", node, "bad", f"{expected.share} is this node's own: what the others wrote is not there", mend)
    if other:
        return _cell("share", node, "bad", f"what {', '.join(other)} wrote is not there", mend)
    return _cell("share", node, "ok", f"{share.kind}, {share.free / GIB:.0f} GiB free")


def _pythons(surveys: Mapping[str, Survey], source: str) -> list[Cell]:
    """Ray refuses a worker whose Python differs in the patch release (ray#44063). The nodes' own do not matter where the
    environment is to bring its own, and one that stands on theirs is about to be replaced."""
    cells = []
    passing = {
        node
        for node, one in surveys.items()
        if source != "system" and not (one.environment and f"/python/{source}-" in one.environment.interpreter)
    }
    shown = {node: one.environment.python if one.environment is not None else one.python for node, one in surveys.items()}
    versions = [one.version for one in shown.values() if one.version]
    common = max(sorted(set(versions)), key=versions.count) if versions else ""
    for node, one in shown.items():
        environment = surveys[node].environment
        if node in passing and (environment or not one.error):
            text = f"{one.version or one.error} of the system; the environment will bring its own ({source})"
            cells.append(_cell("python", node, "ok", text))
        elif one.error:
            remedy = (
                "install python3"
                if environment is None
                else f"its interpreter {environment.interpreter} is missing on this node: install it, or set "
                '`python = "managed"` so that the environment brings its own'
                if source == "system"
                else f"{environment.interpreter} lies on the shared folder: is that there, and the same?"
            )
            cells.append(_cell("python", node, "bad", one.error, remedy))
        elif one.version != common:
            cells.append(
                _cell(
                    "python",
                    node,
                    "bad",
                    f"{one.version}, the others have {common}",
                    'the patch release must be one: set `python = "managed"` so that all use the one on the shared folder'
                    if source == "system"
                    else "the shared folder is not the same there",
                )
            )
        else:
            of = f"environment {environment.id[:12]}" if environment else "of the system; no environment is active yet"
            cells.append(_cell("python", node, "ok", f"{one.version}, {of}"))
    return cells


def _cuda(node: str, found: Cuda, gpus: int, rehearsal: bool) -> Cell:
    if rehearsal:
        return _cell("cuda", node, "skipped", "rehearsal: GPUs in name alone")
    if gpus == 0:  # nor had it one when facts were asked: the plan leaves it out, and `up` of the others goes on
        text = f"{found.error or 'no NVIDIA driver'}: the plan leaves this node out"
        if found.gpus:
            text = f"{len(found.gpus)} x {found.gpus[0].name}, which the kept facts do not know: the plan leaves this node out"
        return _cell("cuda", node, "warn", text, "mend its driver or replace it, then `deploy facts`")
    if found.absent:
        return _cell(
            "cuda", node, "bad", "there is no libcuda.so.1", "install the NVIDIA driver, or choose an image that has it"
        )
    if found.error:
        hint = (
            "802: the fabric manager is not running or the box is broken" if "802" in found.error else "reboot or replace it"
        )
        return _cell("cuda", node, "bad", found.error, f"the driver is there and does not work; {hint}")
    if len(found.gpus) < gpus:
        return _cell(
            "cuda", node, "bad", f"{len(found.gpus)} GPUs, not {gpus}", "correct `gpus` in deploy.toml or replace the node"
        )
    version = found.version or 0
    return _cell(
        "cuda", node, "ok", f"{len(found.gpus)} x {found.gpus[0].name}, CUDA {version // 1000}.{version % 1000 // 10}"
    )


def _memory(node: str, found: Cuda) -> Cell:
    if not found.gpus:
        return _cell("memory", node, "skipped", "no usable GPU")
    worst = min(found.gpus, key=lambda one: one.free / one.total)
    text = f"{worst.free / GIB:.1f} of {worst.total / GIB:.1f} GiB free"
    if worst.free < 0.95 * worst.total:
        return _cell(
            "memory", node, "bad", text, "somebody uses this GPU: `nvidia-smi` names the process; `deploy down` stops ours"
        )
    return _cell("memory", node, "ok", text)


def _pages(node: str, one: Survey) -> Cell:
    page = f"{one.page >> 10} KiB pages"
    if one.environment is None or one.environment.alignment is None:
        return _cell("pages", node, "skipped", f"{page}; no environment is active yet whose files could be compared")
    if one.environment.alignment < one.page:
        return _cell(
            "pages",
            node,
            "bad",
            f"{page}, and a library of the environment is aligned to {one.environment.alignment >> 10} KiB",
            "it cannot be loaded here: use wheels that passed `builder audit` (gate alignment), or smaller pages",
        )
    return _cell("pages", node, "ok", f"{page}, libraries aligned to {one.environment.alignment >> 10} KiB")


def tokenless(version: str) -> bool:
    """This Ray knows no token: it ignores RAY_AUTH_MODE and lets everybody in who reaches its ports."""
    return tuple(int(one) for one in re.findall(r"\d+", version)[:2]) < TOKENS


def open_door(version: str) -> str:
    """What a Ray without tokens means."""
    return (
        f"Ray {version} knows no token ({'.'.join(map(str, TOKENS))} is the first): whoever reaches its ports runs code there"
    )


def _token(node: str, one: Survey, expected: Expected) -> Cell:
    if one.environment is None:
        return _cell("token", node, "skipped", "no environment is active yet")
    version = one.environment.ray
    if version is None:
        return _cell("token", node, "skipped", "there is no Ray in the environment")
    if not tokenless(version):
        return _cell("token", node, "ok", f"Ray {version} asks for one")
    place = expected.open.get(node)
    text = open_door(version) + (f"; {place} was reached from this machine, over a public address" if place else "")
    return _cell("token", node, "warn", text, SHUT)


def _symbols(node: str, one: Survey) -> Cell:
    if one.glibcxx is None:
        return _cell("libstdc++", node, "bad", "there is no libstdc++.so.6", "install libstdc++6")
    needed = one.environment.glibcxx if one.environment else None
    if needed is None:
        return _cell("libstdc++", node, "ok", f"GLIBCXX_{one.glibcxx}")
    if _version(needed) > _version(one.glibcxx):
        return _cell(
            "libstdc++",
            node,
            "bad",
            f"GLIBCXX_{one.glibcxx}, and the environment needs GLIBCXX_{needed}",
            "take a newer image on this node (Ubuntu 22.04 has 3.4.30), or a set that was built on an older libstdc++",
        )
    return _cell("libstdc++", node, "ok", f"GLIBCXX_{one.glibcxx}, {needed} needed")


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _shm(node: str, space: Space | None) -> Cell:
    if space is None:
        return _cell("shm", node, "bad", "there is no /dev/shm", "mount a tmpfs there")
    text = f"{space.free / GIB:.1f} GiB free"
    if space.free < min(SHM, space.total) * 0.5 or space.total < SHM // 4:
        return _cell("shm", node, "bad", text, "mount -o remount,size=50% /dev/shm, or remove what fills it")
    if space.total < SHM:
        return _cell(
            "shm", node, "warn", text, "Ray puts its object store on disk below 4 GiB: mount -o remount,size=50% /dev/shm"
        )
    return _cell("shm", node, "ok", text)


def _limits(node: str, limits: Mapping[str, tuple[int, int]], cuda: Cuda) -> Cell:
    """The worst of open files, threads and locked memory. What Ray and the engine raise to the hard limit counts by that."""
    rows = [("nofile", _most(limits["nofile"]), NOFILE_LEAST, NOFILE), ("nproc", _most(limits["nproc"]), NPROC_LEAST, NPROC)]
    if cuda.gpus:
        rows.append(("memlock", _most(limits["memlock"]), 0, MEMLOCK))
    texts = [f"{name} {'unlimited' if have is None else have}" for name, have, _, _ in rows]
    few = [(name, have, wanted) for name, have, least, wanted in rows if have is not None and have < least]
    low = [(name, have, wanted) for name, have, _, wanted in rows if have is not None and have < wanted]
    if few or low:
        shown = few or low
        text = ", ".join(f"{name} {have}" for name, have, _ in shown)
        mend = " and ".join(f"{name} to {wanted}" for name, _, wanted in shown)
        remedy = f"raise {mend} in /etc/security/limits.conf and log in again"
        return _cell("limits", node, "bad" if few else "warn", text, remedy)
    return _cell("limits", node, "ok", ", ".join(texts))


def _most(limit: tuple[int, int]) -> int | None:
    """What a process may raise it to; None: unlimited."""
    return None if -1 in limit else max(limit)
