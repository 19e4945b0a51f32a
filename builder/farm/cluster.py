"""A Ray cluster for the machine that uses it: its address, its workers, and the foreman on its head."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from builder.compiling import jobs
from builder.farm import code, remote
from builder.planning.plan import Plan
from builder.planning.stack import Arch, host_arch
from gracefarm import extras, process
from gracefarm.errors import FarmError, UsageError
from gracefarm.process import first_line, last_line
from gracefarm.tables import parse_size

LOCAL = "local"
NAMESPACE = "gracefarm"
CONNECT = 10.0
"Seconds that an address may take to answer."
HEAD_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"A call that the head of a cluster answers."
CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"
"A call that the port for ray:// answers."
ATTEMPTS = 3
"A head gives a new client's process 30 s to start, which a busy head exceeds."
ANSWER = 60.0
"Seconds that the foreman may take to answer."
_REPEAT = "then repeat the command: finished builds are kept"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A machine of the cluster with a resource for its architecture."""

    arch: Arch
    cpus: int
    memory: int
    "Bytes."


@dataclass(frozen=True, kw_only=True)
class Share:
    """Resources that a cell requires of a worker."""

    cpus: int
    memory: int
    "Bytes."


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster with which this process is connected."""

    address: str
    workers: Sequence[Worker]
    foreman: Any

    @property
    def hosts(self) -> Mapping[Arch, Arch]:
        """The architecture of the machines that build for a target: this one's, where the cluster has it, so that build ids
        are those that `builder plan` prints here; else the target's own; else one that builds for it."""
        builds_for = {Arch.AARCH64: (host_arch(), Arch.AARCH64, Arch.X86_64), Arch.X86_64: (Arch.X86_64,)}
        there = {worker.arch for worker in self.workers}
        chosen = {target: next((arch for arch in archs if arch in there), None) for target, archs in builds_for.items()}
        return {target: arch for target, arch in chosen.items() if arch is not None}

    def share(self, plan: Plan, wanted: int | None) -> Share:
        """CPUs and memory of a cell: all of the smallest worker that may take it, or `wanted` CPUs, and the memory that the
        recipe says that as many jobs need.

        Raises:
            FarmError: no worker builds for the target.
        """
        fit = [worker for worker in self.workers if worker.arch is plan.host and plan.target in self.hosts]
        if not fit:
            there = ", ".join(sorted({worker.arch.value for worker in self.workers}))
            why = f"its workers are {there}" if there else "no worker states its architecture"
            raise FarmError(
                f"no worker of the Ray cluster can build for {plan.target.value}: {why}",
                remedy=f"start such a worker: ray start --address HEAD:6379 --resources '{{\"{plan.host.value}\": 1}}'",
            )
        cpus = min(worker.cpus for worker in fit)
        cpus = min(cpus, wanted) if wanted else cpus
        needed = cpus * parse_size(plan.recipe.data.build.memory_per_job) + jobs.OTHERS
        return Share(cpus=cpus, memory=min(needed, *(worker.memory for worker in fit)))

    def call(self, method: str, *arguments: object) -> Any:
        """What the foreman answers.

        Raises:
            FarmError: the cluster has ended, or does not answer.
        """
        import ray

        with _ended(self.address):
            return ray.get(getattr(self.foreman, method).remote(*arguments), timeout=ANSWER)

    def fetch(self, reference: Any) -> Any:
        """Wait for an object of the cluster, without a time limit.

        Raises:
            FarmError: as `call`.
        """
        import ray

        with _ended(self.address):
            return ray.get(reference)


@contextmanager
def _ended(address: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except Exception as error:
        # Ray's client raises a plain Exception once it has lost the head.
        if not isinstance(error, (RayError, ConnectionError, RuntimeError, TimeoutError)) and type(error) is not Exception:
            raise
        reason = f"has ended or does not answer: {first_line(str(error), type(error).__name__)}"
        if address == LOCAL:  # the command itself starts it
            raise FarmError(
                f"the local Ray cluster {reason}", remedy="repeat the command: finished builds are kept"
            ) from error
        raise FarmError(
            f"the Ray cluster at {address} {reason}", remedy=f"start its head and its workers again, {_REPEAT}"
        ) from error


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster at an address: `local` (started here, only for this run), `auto`, HOST:PORT, ray://HOST:PORT.

    Raises:
        UsageError: the address of a Jobs API.
        HostError: Ray is not installed.
        FarmError: nothing answers there, or another Ray or Python.
    """
    _check(address)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise extras.missing("ray", "farm") from error
    _init(ray, address)
    try:
        with _ended(address):
            workers = _workers(ray)
            foreman = _foreman(ray)
        yield Cluster(address=address, workers=workers, foreman=foreman)
    finally:
        with suppress(RuntimeError, ConnectionError):
            ray.shutdown()


def _check(address: str) -> None:
    if address.startswith(("http://", "https://")):
        host = re.sub(r"^https?://([^:/]*).*$", r"\1", address)
        raise UsageError(
            f"--farm {address}: this is the address of Ray's Jobs API, which cannot return wheels",
            remedy=f"use --farm ray://{host}:10001",
        )
    match = re.fullmatch(r"(?:ray://)?(\[[^]]+\]|[^:/]+):(\d+)", address)
    if match is None and address not in (LOCAL, "auto"):
        raise UsageError(
            f"--farm {address}: not an address of a Ray cluster", remedy="use ray://HOST:10001, HOST:6379, auto or local"
        )
    if match is not None:
        host, port = match[1].strip("[]"), int(match[2])
        try:
            socket.create_connection((host, port), timeout=CONNECT).close()
        except (OSError, OverflowError) as error:
            raise _silent(address, str(getattr(error, "strerror", None) or error)) from error
        _require_ray(address, f"{host}:{port}" if ":" not in host else f"[{host}]:{port}")


def _require_ray(address: str, port: str) -> None:
    """Require that Ray answers at a port. Ray itself would try for minutes, and print each attempt.

    Raises:
        FarmError: it does not answer, or a different program does.
    """
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # only Ray has the certificates
    method = CLIENT_METHOD if address.startswith("ray://") else HEAD_METHOD
    with grpc.insecure_channel(port, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=CONNECT)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _silent(address, f"the port does not answer within {CONNECT:.0f} s") from error
            # Any other code is an answer of Ray, such as a refused token, for which Ray has a message.
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
                raise _silent(address, "this port belongs to a different program, or to a different service of Ray") from error


def _silent(address: str, reason: str) -> FarmError:
    return FarmError(
        f"no Ray cluster answers at {address}: {reason}",
        remedy="start the cluster (`ray start --head`), give this machine the cluster's token (`ray get-auth-token`), or "
        "correct the address: ray://HOST:10001, or HOST:6379 on a machine of the cluster",
    )


def _init(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"num_cpus": jobs.cores(), "resources": {host_arch().value: 1.0}, "include_dashboard": False}
    for attempt in reversed(range(ATTEMPTS)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=address, **options)
            return
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            text = str(error)
            late = text.startswith("Initialization failure")
            if late and attempt:
                continue
            # The head's own traceback ends with the reason.
            raise _silent(address, last_line(text) if late else first_line(text, type(error).__name__)) from error


def _workers(ray: Any) -> list[Worker]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    return [
        Worker(arch=arch, cpus=int(has["CPU"]), memory=int(has.get("memory", 0)))
        for has in nodes
        for arch in Arch
        if has.get(arch.value, 0) > 0
    ]


def _foreman(ray: Any) -> Any:
    """The foreman of this gracefarm on the cluster's head, started where there is none."""
    for module in (remote, process):
        ray.cloudpickle.register_pickle_by_value(module)
    options = {
        "name": f"foreman-{code.digest()[:16]}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_concurrency": 1000,
        "resources": {"node:__internal_head__": 0.001},
    }
    return ray.remote(remote.Foreman).options(**options).remote(ray.remote(remote.build_cell))
