"""Starts the ranks with Ray: placement group, the driver's GPU, and the order of ranks, as in the engine."""

from __future__ import annotations

import os
import socket
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from aphrodite.log import say
from aphrodite.worker import RayWorkerWrapper, get_ip

PLACEMENT_SECONDS = 1800


def local_gpus() -> int:
    """Number of declared GPUs of this machine."""
    return int(os.environ.get("GRACEFARM_STANDIN_GPUS", "1"))


def open_port() -> int:
    """APHRODITE_PORT, or the next free port after it; without the variable, any free port."""
    port = int(os.environ.get("APHRODITE_PORT", "0"))
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                port += 1
                continue
            return int(probe.getsockname()[1])


class Executor:
    """All ranks. Rank 0 is this process; an actor reserves its GPU."""

    def __init__(self, *, tp: int, pp: int, model: str, backend: str | None, options: dict[str, Any]) -> None:
        world = tp * pp
        if backend is None and world > 1:
            backend = "mp" if local_gpus() >= world else "ray"
            say(f"Defaulting to use {backend} for distributed inference.")
        self.driver = RayWorkerWrapper()
        self.workers: list[Any] = []
        self.ray: Any = None
        ids: list[tuple[str, list[str]]] = [("", ["0"])]
        if backend == "ray":
            ids = self._start_ray(world)
        elif backend == "mp" and world > 1:
            raise RuntimeError("the stand-in has no multiprocessing executor: use Ray")
        self._set_environment(ids)
        address = "127.0.0.1" if len({node for node, _ in ids}) == 1 else get_ip()
        method = f"tcp://{address}:{open_port()}"
        common = {"tp": tp, "pp": pp, "model": model, "method": method, "options": options}
        self.run("init_worker", [{"rank": rank, **common} for rank in range(world)])
        self.run("init_device")
        self.run("load_model")
        self.blocks = min(self.run("determine_num_available_blocks"))

    def _start_ray(self, world: int) -> list[tuple[str, list[str]]]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.ray = ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=None, ignore_reinit_error=True)
        if world > ray.cluster_resources().get("GPU", 0):
            raise ValueError("The number of required GPUs exceeds the total number of available GPUs in the placement group.")
        group = ray.util.placement_group([{"GPU": 1}] * world)
        ray.get(group.ready(), timeout=PLACEMENT_SECONDS)
        say("use_ray_spmd_worker: False")
        driver_ip = get_ip()
        say(f"driver_ip: {driver_ip}")
        self.dummy = None
        for bundle in range(world):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_capture_child_tasks=True, placement_group_bundle_index=bundle
            )
            worker = ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=strategy)(RayWorkerWrapper).remote()
            if self.dummy is None and ray.get(worker.get_node_ip.remote()) == driver_ip:
                self.dummy = worker
            else:
                self.workers.append(worker)
        if self.dummy is None:
            raise ValueError(
                "Ray does not allocate any GPUs on the driver node. Consider adjusting the Ray placement group or running the "
                "driver on a GPU node."
            )
        ips = {worker: ray.get(worker.get_node_ip.remote()) for worker in self.workers}
        counts = Counter(ips.values())
        self.workers.sort(key=lambda worker: (ips[worker] != driver_ip, counts[ips[worker]], ips[worker]))
        found: list[tuple[str, list[str]]] = ray.get(
            [worker.get_node_and_gpu_ids.remote() for worker in [self.dummy, *self.workers]]
        )
        return found

    def _set_environment(self, ids: Sequence[tuple[str, list[str]]]) -> None:
        gpus: dict[str, list[int]] = defaultdict(list)
        for node, own in ids:
            gpus[node] += [int(identifier) for identifier in own]
        instance = uuid.uuid4().hex
        values = [
            {
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(gpus[node]))),
                "APHRODITE_INSTANCE_ID": instance,
                "APHRODITE_TRACE_FUNCTION": "0",
            }
            for node, _ in ids
        ]
        self.run("update_environment_variables", [{"values": environment} for environment in values])

    def run(self, method: str, arguments: Sequence[dict[str, Any]] | None = None) -> list[Any]:
        """Call a method on every rank in parallel. Raises the first error."""
        given = arguments or [{}] * (len(self.workers) + 1)
        pending = [getattr(worker, method).remote(**words) for worker, words in zip(self.workers, given[1:], strict=True)]
        mine = getattr(self.driver, method)(**given[0])
        return [mine, *(self.ray.get(pending) if pending else [])]

    def stop(self) -> None:
        """Release the GPUs in Ray."""
        if self.ray is not None:
            self.ray.shutdown()
