"""What one node can say about itself, and what it finds when it talks to the others. Facts only; the asker judges."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.remote import mounts
from deploy.remote.wire import WorkerError, event
from gracefarm.process import last_line

Json = dict[str, Any]
STALE = 86400.0
"Seconds after which nobody is at work with a preflight's nonces any more."

_DRIVER = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
def text(code):
    name = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(name))
    return (name.value or b"unknown error").decode()
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        print(json.dumps({"error": f"{name}: {text(code)} ({code})"}))
        raise SystemExit
call("cuInit", 0)
version, count = ctypes.c_int(), ctypes.c_int()
call("cuDriverGetVersion", ctypes.byref(version))
call("cuDeviceGetCount", ctypes.byref(count))
gpus = []
for index in range(count.value):
    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(100)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDeviceGetName", name, 100, device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    call("cuDevicePrimaryCtxRelease_v2", device)
    gpus.append({"name": name.value.decode(), "free": free.value, "total": total.value})
print(json.dumps({"version": version.value, "gpus": gpus}))
"""
"In a process of its own, for a sick driver hangs in cuInit; a context proves more than nvidia-smi does."


def survey(request: Json) -> Json:
    """`share`: the shared folder or None; `run`: this preflight's name; `me`: the node's; `environment`: the active link."""
    share = request["share"]
    return {
        "hostname": socket.gethostname(),
        "resolves": _resolve(socket.gethostname()),
        "share": _share(Path(share), request["run"], request["me"], request["nonce"]) if share else None,
        "python": _python(sys.executable),
        "environment": _environment(Path(request["environment"])) if request["environment"] else None,
        "page": resource.getpagesize(),
        "glibcxx": glibcxx(),
        "shm": space("/dev/shm"),  # noqa: S108 - asked about, not used
        "limits": {
            name: resource.getrlimit(getattr(resource, "RLIMIT_" + name.upper())) for name in ("nofile", "memlock", "nproc")
        },
        "cuda": cuda(),
        "time": time.time(),
    }


def cuda() -> Json:
    """Driver version, memory of each GPU in bytes, or the driver's own words for why not; `absent` without a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"absent": True, "device": Path("/dev/nvidiactl").exists()}
    try:
        done = subprocess.run([sys.executable, "-c", _DRIVER], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "cuInit did not come back within 60 s"}
    try:
        found: Json = json.loads(done.stdout)
    except ValueError:
        return {"error": last_line(done.stderr, "the driver ended the process")}
    return found


def _resolve(name: str) -> list[str]:
    try:
        return sorted({str(one[4][0]) for one in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError:
        return []


def _share(share: Path, run: str, me: str, nonce: str) -> Json:
    """Leave this node's nonce for the others to read, and say on what it lies."""
    if not share.is_dir():
        return {"error": f"{share} is no folder on this node"}
    folder = share / ".gracefarm" / "preflight" / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / me).open("w") as stream:
            stream.write(nonce)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return {"error": f"{share} cannot be written: {os.strerror(error.errno or 0).lower()}"}
    mount = mounts.mount_of(os.path.realpath(share), mounts.parse_mounts(Path("/proc/mounts").read_text()))
    return {
        "kind": mount.kind if mount else "?",
        "source": mount.source if mount else "?",
        "network": mount is not None and mount.network,
        "free": os.statvfs(share).f_bavail * os.statvfs(share).f_frsize,
    }


def _python(executable: str) -> Json:
    code = (
        "import sys, json, sysconfig\n"
        "print(json.dumps([sys.version.split()[0], sys.implementation.name, sysconfig.get_platform()]))"
    )
    try:
        done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        version, implementation, platform = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"error": f"{executable} does not start: {error}"}
    return {"version": version, "implementation": implementation, "platform": platform}


def _environment(link: Path) -> Json | None:
    """The active environment's own description (deploy.remote.environment writes it), and its Python as it runs here."""
    try:
        described: Json = json.loads((link / "environment.json").read_text())
    except (OSError, ValueError):
        return None
    return {**described, "python": _python(str(link / "bin" / "python")), "ray": _ray(link)}


def _ray(link: Path) -> str | None:
    """Ray's version there, by its metadata: importing it takes seconds."""
    found = [
        one.name.removeprefix("ray-").removesuffix(".dist-info")
        for one in link.glob("lib/python3*/site-packages/ray-*.dist-info")
    ]
    return found[0] if found else None


def glibcxx() -> str | None:
    """The highest GLIBCXX symbol version of the libstdc++ that the loader finds here."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    del library
    path = next((line.split(maxsplit=5)[5] for line in maps.splitlines() if "libstdc++.so" in line), None)
    return highest_glibcxx(Path(path).read_bytes()) if path else None


def highest_glibcxx(content: bytes) -> str | None:
    """The highest GLIBCXX_x.y.z in a file's bytes."""
    found = [tuple(map(int, one.split(b"."))) for one in re.findall(rb"GLIBCXX_(\d+(?:\.\d+)+)\x00", content)]
    return ".".join(map(str, max(found))) if found else None


def space(path: str) -> Json | None:
    """Bytes of the file system that holds `path`, all and free for this user."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def pairs(request: Json) -> Json:
    """Listen on every needed port of the private address, connect to every peer's, read every peer's nonce.

    `me`, `address`, `ports`, `loopback` (ports that must be free there alone), `peers` ([{name, address}]), `share`, `run`,
    `seconds` (how long to wait for the slowest peer).
    All nodes run this at the same time; it ends when all peers have been heard and reached, or after `seconds`.
    """
    deadline = time.monotonic() + float(request["seconds"])
    listeners, taken = _listen(request["address"], request["ports"])
    own, held = _listen("127.0.0.1", request["loopback"])
    for one in own:
        one.close()
    heard: set[str] = set()
    done = threading.Event()
    server = threading.Thread(target=_answer, args=(listeners, heard, done), daemon=True)
    server.start()
    reached = {one["name"]: _reach(request, one, deadline) for one in request["peers"]}
    for one in request["peers"]:
        _part(request["me"], one["address"], reached[one["name"]]["ports"])
    expected = {one["name"] for one in request["peers"]}
    free = [one for one in request["ports"] if str(one) not in taken]
    while free and not expected <= heard and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    server.join()
    for one in listeners:
        one.close()
    return {
        "taken": taken | held,
        "reached": reached,
        "heard": sorted(heard),
        "nonces": _nonces(request, expected | {request["me"]}, deadline),
    }


def outside(request: Json) -> Json:
    """Listen on every address on `ports` for `seconds`, as Ray does, and answer with `nonce`; the ports that are in use.

    It ends early when each port was asked. Whoever asks does so from outside of the nodes' network.
    """
    deadline = time.monotonic() + float(request["seconds"])
    listeners, taken = _listen("::" if socket.has_dualstack_ipv6() else "0.0.0.0", request["ports"])  # noqa: S104 - the point
    event("listening", taken=sorted(taken))
    left = set(listeners)
    while left and time.monotonic() < deadline:
        ready, _, _ = select.select(listeners, [], [], 0.1)
        for one in ready:
            connection, _ = one.accept()
            with connection, suppress(OSError):
                connection.settimeout(2)
                if connection.recv(200) == b"gracefarm outside\n":
                    connection.sendall(request["nonce"].encode())
                    left.discard(one)
    for one in listeners:
        one.close()
    return {"taken": sorted(taken)}


def _part(me: str, address: str, ports: dict[str, Json]) -> None:
    """Tell a peer that it need not listen for us any longer."""
    for port, found in ports.items():
        if "offset" in found:
            try:
                with socket.create_connection((address, int(port)), timeout=2) as one:
                    one.sendall(f"gracefarm {me} bye\n".encode())
            except OSError:
                continue
            return


def clean(request: Json) -> Json:
    """Remove this preflight's nonces, and those of runs that were killed more than a day ago."""
    folder = Path(request["share"]) / ".gracefarm" / "preflight"
    for run in folder.glob("*"):
        with suppress(OSError):  # another preflight sweeps too
            if run.name == request["run"] or time.time() - run.stat().st_mtime > STALE:
                for one in run.glob("*"):
                    one.unlink(missing_ok=True)
                run.rmdir()
    return {}


def _listen(address: str, ports: list[int]) -> tuple[list[socket.socket], dict[str, str]]:
    listeners, taken = [], {}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in ports:
        one = socket.socket(family)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address == "::":
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            one.bind((address, port))
        except OSError as error:
            one.close()
            if error.errno == 99:  # EADDRNOTAVAIL
                raise WorkerError(
                    "node", f"{address} is no address of this node", "correct `private` in deploy.toml"
                ) from error
            taken[str(port)] = holder(port)
        else:
            one.listen(64)
            listeners.append(one)
    return listeners, taken


def holder(port: int) -> str:
    """Who listens on a TCP port here: the command line as far as this user may see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text().splitlines()[1:] if Path(table).exists() else []
        for line in lines:
            row = line.split()
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{row[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(one.readlink()) in inodes for one in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().split(b"\0")
                return f"{b' '.join(command[:2]).decode(errors='replace')} (process {process.name})"
        except OSError:
            continue
    return "a process of another user"


def _answer(listeners: list[socket.socket], heard: set[str], done: threading.Event) -> None:
    """A greeting is a line with the peer's name; the answer is this node's clock. Peers without a word only test the port."""
    while not done.is_set():
        ready, _, _ = select.select(listeners, [], [], 0.1)
        for one in ready:
            connection, _ = one.accept()
            with connection:
                connection.settimeout(2)
                try:
                    word = connection.recv(200).decode(errors="replace").split()
                    if word[2:] == ["bye"]:
                        heard.add(word[1])
                    elif word[:1] == ["gracefarm"]:
                        connection.sendall(f"{time.time()}\n".encode())
                except OSError:
                    continue


def _reach(request: Json, peer: Json, deadline: float) -> Json:
    """Per port: round trip in seconds or the error; and how far the peer's clock is ahead, from the shortest round trip."""
    ports: dict[str, Json] = {}
    best = None
    for port in request["ports"]:
        found = _connect(peer["address"], port, request["me"], deadline)
        ports[str(port)] = found
        if "offset" in found and (best is None or found["rtt"] < best["rtt"]):
            best = found
    return {"ports": ports, "rtt": best["rtt"] if best else None, "offset": best["offset"] if best else None}


def _connect(address: str, port: int, me: str, deadline: float) -> Json:
    while True:
        try:
            with socket.create_connection((address, port), timeout=min(3.0, max(0.2, deadline - time.monotonic()))) as one:
                one.settimeout(2)
                before = time.time()
                one.sendall(f"gracefarm {me}\n".encode())
                try:
                    answer = float(one.recv(64) or b"nan")
                except (OSError, ValueError):
                    return {"foreign": True}  # connected, but somebody else's service: the route is proven
                after = time.time()
                if answer != answer:
                    return {"foreign": True}
                return {"rtt": after - before, "offset": answer - (before + after) / 2}
        except OSError as error:
            if time.monotonic() >= deadline:
                return {"error": os.strerror(error.errno) if error.errno else str(error)}
            time.sleep(0.1)


def _nonces(request: Json, names: set[str], deadline: float) -> Json:
    if not request["share"]:
        return {}
    folder = Path(request["share"]) / ".gracefarm" / "preflight" / request["run"]
    found: Json = {}
    while len(found) < len(names):
        for name in names - set(found):
            try:
                found[name] = (folder / name).read_text()
            except OSError:
                continue
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return found


def collective(request: Json) -> Json:
    """One rank of an all-reduce; run by the environment's Python, for it needs its torch.

    `backend` (gloo, nccl), `rank`, `world`, `master` (address), `port`, `address` (ours), `device` (GPU or None), `seconds`.
    """
    interface = interface_of(request["address"])
    if interface is None:
        raise WorkerError("node", f"{request['address']} is no address of this node", "correct `private` in deploy.toml")
    os.environ.update({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface})
    import datetime

    try:
        import torch
        import torch.distributed as distributed
    except ImportError as error:
        raise WorkerError("import", f"torch does not import: {error}") from error
    started = time.monotonic()
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
            "node", f"all-reduce gave {total}, not {expected}", "a GPU or a link computes wrongly: replace the node"
        )
    return {"interface": interface, "all_reduce_s": taken, "total_s": time.monotonic() - started, "torch": torch.__version__}


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 or IPv6 address (RTM_GETADDR would do too; `ip` is on every node)."""
    done = subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=False)
    for one in json.loads(done.stdout or "[]"):
        if any(each.get("local") == address for each in one.get("addr_info", [])):
            return str(one["ifname"])
    return None
