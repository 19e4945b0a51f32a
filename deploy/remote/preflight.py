"""Preflight on a node: the state of the node, and how it reaches the other nodes. The caller judges the answers."""

from __future__ import annotations

import getpass
import json
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from deploy.remote import exchange, mounts
from deploy.remote.driver import cuda
from deploy.remote.libraries import glibcxx
from deploy.remote.mounts import space
from deploy.remote.network import holder, interface_of
from deploy.remote.wire import Json, WorkerError, event

ROOM = 1 << 20
"Bytes that are written to the node's local disk as a test. Logs, secrets and Ray's sockets need it."
STALE = 86400.0
"Age in seconds after which a preflight's nonces are removed by another run."
_PRIVATE = "correct `private` of this node in deploy.toml"


def survey(request: Json) -> Json:
    """Collect the state of this node.

    `share`: the shared folder or None. `run`: name of this preflight. `me`: name of the node. `environment`: link to the
    active environment. `local`: the deployment's folder on the node's local disk, with the placeholder {user}.
    """
    share = request["share"]
    return {
        "hostname": socket.gethostname(),
        "resolves": _resolve(socket.gethostname()),
        "share": _share(Path(share), request["run"], request["me"], request["nonce"]) if share else None,
        "disk": _disk(request["local"].replace("{user}", getpass.getuser())),
        "python": _python(sys.executable),
        "environment": _environment(Path(request["environment"])) if request["environment"] else None,
        "page": resource.getpagesize(),
        "glibcxx": glibcxx(),
        "shm": space("/dev/shm"),  # noqa: S108 - only checked, not used
        "limits": {
            name: resource.getrlimit(getattr(resource, "RLIMIT_" + name.upper())) for name in ("nofile", "memlock", "nproc")
        },
        "cuda": cuda(),
    }


def _resolve(name: str) -> list[str]:
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError:
        return []


def _share(share: Path, run: str, me: str, nonce: str) -> Json:
    """Write this node's nonce for the others, and return kind and free space of the file system."""
    if not share.is_dir():
        return {"error": f"{share} is not a folder on this node"}
    folder = share / ".gracefarm" / "preflight" / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / me).open("w") as stream:
            stream.write(nonce)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return {"error": f"{share} cannot be written: {os.strerror(error.errno or 0).lower()}"}
    mount = mounts.mount_of(share)
    return {"kind": mount.kind if mount else "?", "free": os.statvfs(share).f_bavail * os.statvfs(share).f_frsize}


def _disk(local: str) -> Json:
    """Test the node's local disk with an unnamed temporary file."""
    place = mounts.existing(local)
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(bytes(ROOM))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return {"path": str(place), "error": os.strerror(error.errno or 0)}
    return {"path": str(place), **(mounts.space(place) or {})}


def _python(executable: str) -> Json:
    code = "import platform; print(platform.python_version())"
    try:
        process = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"{executable} does not start: {error}"}
    return {"version": process.stdout.strip()}


def _environment(link: Path) -> Json | None:
    """The description of the active environment (deploy.remote.environment), and the state of its Python on this node."""
    try:
        described: Json = json.loads((link / "environment.json").read_text())
    except (OSError, ValueError):
        return None
    return {**described, "python": _python(str(link / "bin" / "python")), "ray": _ray(link)}


def _ray(link: Path) -> str | None:
    """Ray's version, from its metadata, since importing Ray takes seconds."""
    folders = link.glob("lib/python3*/site-packages/ray-*.dist-info")
    return next((folder.name.removeprefix("ray-").removesuffix(".dist-info") for folder in folders), None)


def pairs(request: Json) -> Json:
    """Listen on all required ports of the private address, connect to those of every peer, and read every peer's nonce.

    `me`, `address`, `ports`, `loopback` (ports that must be free on the loopback), `peers` ([{name, address}]), `share`,
    `run`, `seconds` (how long to wait for the slowest peer). All nodes run this at the same time. It ends when all peers have
    been reached and have connected, or after `seconds`.
    """
    deadline = time.monotonic() + float(request["seconds"])
    listeners, taken = _listen(request["address"], request["ports"])
    own, held = _listen("127.0.0.1", request["loopback"])
    for listener in own:
        listener.close()
    heard: set[str] = set()
    over = threading.Event()
    server = threading.Thread(target=_answer, args=(listeners, heard, over), daemon=True)
    server.start()
    reached = {peer["name"]: _reach(request, peer, deadline) for peer in request["peers"]}
    with ThreadPoolExecutor(max_workers=32) as pool:
        for peer, bulk in zip(
            request["peers"], pool.map(partial(_bulk, request["me"], reached), request["peers"]), strict=True
        ):
            reached[peer["name"]]["bulk"] = bulk
    for peer in request["peers"]:
        _part(request["me"], peer["address"], reached[peer["name"]]["ports"])
    expected = set(reached)
    free = [port for port in request["ports"] if str(port) not in taken]
    while free and not expected <= heard and time.monotonic() < deadline:
        time.sleep(0.05)
    over.set()
    server.join()
    for listener in listeners:
        listener.close()
    return {
        "taken": taken | held,
        "reached": reached,
        "mtu": exchange.mtu(request["address"]),
        "nonces": _nonces(request, expected | {request["me"]}, deadline),
    }


def _bulk(me: str, reached: Json, peer: Json) -> Json:
    """Exchange 64 KiB with the peer, on a port on which the peer itself has answered."""
    ports = [port for port, tried in reached[peer["name"]]["ports"].items() if "offset" in tried]
    return exchange.ask(me, peer["address"], int(ports[0])) if ports else {}


def outside(request: Json) -> Json:
    """Listen on `ports` of every address for `seconds`, like Ray, and answer with `nonce`. Return the ports that are in use.

    It ends early when each port was used. The caller connects from outside of the nodes' network.
    """
    deadline = time.monotonic() + float(request["seconds"])
    listeners, taken = _listen("::" if socket.has_dualstack_ipv6() else "0.0.0.0", request["ports"])  # noqa: S104 - the point
    event("listening", taken=sorted(taken))
    left = set(listeners)
    while left and time.monotonic() < deadline:
        ready, _, _ = select.select(listeners, [], [], 0.1)
        for listener in ready:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.settimeout(2)
                if connection.recv(200) == b"gracefarm outside\n":
                    connection.sendall(request["nonce"].encode())
                    left.discard(listener)
    for listener in listeners:
        listener.close()
    return {"taken": sorted(taken)}


def _part(me: str, address: str, ports: dict[str, Json]) -> None:
    """Tell a peer that this node has finished with its ports."""
    for port, tried in ports.items():
        if "offset" in tried:
            with suppress(OSError), socket.create_connection((address, int(port)), timeout=2) as connection:
                connection.sendall(f"gracefarm {me} bye\n".encode())
                return


def clean(request: Json) -> Json:
    """Remove the nonces of this preflight, and those that are older than a day."""
    folder = Path(request["share"]) / ".gracefarm" / "preflight"
    for run in folder.glob("*"):
        with suppress(OSError):  # another preflight may remove the same files
            if run.name == request["run"] or time.time() - run.stat().st_mtime > STALE:
                for file in run.glob("*"):
                    file.unlink(missing_ok=True)
                run.rmdir()
    return {}


def _listen(address: str, ports: list[int]) -> tuple[list[socket.socket], dict[str, str]]:
    listeners, taken = [], {}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in ports:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind((address, port))
        except OSError as error:
            listener.close()
            if error.errno == 99:  # EADDRNOTAVAIL
                raise WorkerError("node", f"{address} is not an address of this node", _PRIVATE) from error
            taken[str(port)] = holder(port)
        else:
            listener.listen(64)
            listeners.append(listener)
    return listeners, taken


def _answer(listeners: list[socket.socket], heard: set[str], over: threading.Event) -> None:
    """Answer peers: a greeting is a line with the peer's name, and the answer is this node's time."""
    while not over.is_set():
        ready, _, _ = select.select(listeners, [], [], 0.1)
        for listener in ready:
            connection, _ = listener.accept()
            threading.Thread(target=_greet, args=(connection, heard), daemon=True).start()


def _greet(connection: socket.socket, heard: set[str]) -> None:
    with connection, suppress(OSError):
        connection.settimeout(2)
        word = connection.recv(200).decode(errors="replace").split()
        if word[2:] == ["bye"]:
            heard.add(word[1])
        elif word[2:] == ["bulk"]:
            exchange.answer(connection)
        elif word[:1] == ["gracefarm"]:
            connection.sendall(f"{time.time()}\n".encode())


def _reach(request: Json, peer: Json, deadline: float) -> Json:
    """The round trip in seconds or the error of each port, and the offset of the peer's clock by the shortest round trip."""
    ports = {str(port): _connect(peer["address"], port, request["me"], deadline) for port in request["ports"]}
    greeted = [tried for tried in ports.values() if "offset" in tried]
    best = min(greeted, key=lambda tried: float(tried["rtt"]), default={})
    return {"ports": ports, "rtt": best.get("rtt"), "offset": best.get("offset")}


def _connect(address: str, port: int, me: str, deadline: float) -> Json:
    while True:
        try:
            seconds = min(3.0, max(0.2, deadline - time.monotonic()))
            with socket.create_connection((address, port), timeout=seconds) as connection:
                connection.settimeout(2)
                before = time.time()
                connection.sendall(f"gracefarm {me}\n".encode())
                try:
                    answer = float(connection.recv(64))
                except (OSError, ValueError):
                    return {}  # connected to another service, so the route works
                after = time.time()
                return {"rtt": after - before, "offset": answer - (before + after) / 2}
        except OSError as error:
            if time.monotonic() >= deadline:
                return {"error": os.strerror(error.errno) if error.errno else str(error)}
            time.sleep(0.1)


def _nonces(request: Json, names: set[str], deadline: float) -> Json:
    if not request["share"]:
        return {}
    folder = Path(request["share"]) / ".gracefarm" / "preflight" / request["run"]
    nonces: Json = {}
    while len(nonces) < len(names):
        for name in names - set(nonces):
            with suppress(OSError):
                nonces[name] = (folder / name).read_text()
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return nonces


def collective(request: Json) -> Json:
    """Run one rank of an all-reduce. Run by the environment's Python, since it needs torch.

    `backend` (gloo, nccl), `rank`, `world`, `master` (address), `port`, `address` (ours), `device` (GPU or None), `seconds`.
    """
    interface = interface_of(request["address"])
    if interface is None:
        raise WorkerError("node", f"{request['address']} is not an address of this node", _PRIVATE)
    os.environ.update({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface})
    import datetime

    try:
        import torch
        import torch.distributed as distributed
    except ImportError as error:
        raise WorkerError("import", f"torch cannot be imported: {error}") from error
    device = torch.device("cpu" if request["device"] is None else f"cuda:{request['device']}")
    try:
        distributed.init_process_group(
            request["backend"],
            init_method=f"tcp://{request['master']}:{request['port']}",
            rank=request["rank"],
            world_size=request["world"],
            timeout=datetime.timedelta(seconds=request["seconds"]),
        )
        values = torch.full((1 << 20,), float(request["rank"] + 1), device=device)
        begun = time.monotonic()
        distributed.all_reduce(values)
        total = float(values[-1])
        taken = time.monotonic() - begun
        distributed.destroy_process_group()
    except RuntimeError as error:
        raise WorkerError("node", f"all-reduce over {interface}: {str(error).splitlines()[0]}") from error
    expected = request["world"] * (request["world"] + 1) / 2
    if total != expected:
        raise WorkerError(
            "node",
            f"all-reduce returned {total} instead of {expected}",
            "replace the node: a GPU or a link gives wrong results",
        )
    return {"interface": interface, "all_reduce_s": taken}
