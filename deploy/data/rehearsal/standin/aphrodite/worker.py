"""One rank: an actor on its node, or the driver itself for rank 0."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from aphrodite import shape, trouble
from aphrodite.log import say
from aphrodite.rendezvous import meet

KEPT = ("APHRODITE_", "NCCL_", "GLOO_", "HOST_IP", "CUDA_VISIBLE_DEVICES", "GRACEFARM_STANDIN", "RAY_AUTH", "LD_LIBRARY_PATH")
SECRET = ("KEY", "TOKEN")
WEIGHTS = "*.safetensors"


def get_ip() -> str:
    """HOST_IP, else the source address of the default route."""
    if os.environ.get("HOST_IP"):
        return os.environ["HOST_IP"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("8.8.8.8", 80))
        return str(probe.getsockname()[0])


def interface_address(name: str) -> str | None:
    """IPv4 address of a network interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(packed[20:24])


def check_nccl() -> None:
    """Check the interfaces like NCCL, which selects them by prefix."""
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if wanted and not wanted.startswith("^"):
        names = [link.name for link in Path("/sys/class/net").iterdir()]
        if not any(name.startswith(each.lstrip("=")) for name in names for each in wanted.split(",")):
            raise RuntimeError(
                "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, internal error - please report this issue "
                f"to the NCCL developers, NCCL version 2.20.5\nLast error:\nBootstrap : no socket interface found ({wanted})"
            )


def gloo_address() -> str:
    """The address that gloo binds to: of the given interface, else of this machine's host name."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if not name:
        return socket.gethostbyname(socket.gethostname())
    found = interface_address(name.split(",")[0])
    if found is None:
        raise RuntimeError(
            "[enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:83] ifa != nullptr. "
            f"Unable to find address for: {name}"
        )
    return found


class RayWorkerWrapper:
    """A worker. It has the engine's name, which Ray shows in logs and process lists."""

    def __init__(self) -> None:
        self.rank = -1
        self.garbage = False

    def get_node_ip(self) -> str:
        """The address by the engine's rule, with this process's environment."""
        return get_ip()

    def get_node_and_gpu_ids(self) -> tuple[str, list[str]]:
        """The ids of node and GPUs in Ray."""
        import ray

        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids().get("GPU", [])

    def update_environment_variables(self, values: dict[str, str]) -> None:
        """Set the three variables that the driver passes on. Its other variables are not passed on."""
        os.environ.update(values)

    def init_worker(self, *, rank: int, tp: int, pp: int, model: str, method: str, options: dict[str, Any]) -> None:
        """Set rank and layout."""
        trouble.happen("init")
        self.rank, self.tp, self.pp, self.method, self.options = rank, tp, pp, method, options
        self.folder = Path(model)
        self.model = shape.read(self.folder)
        env = {key: "(set)" if any(word in key for word in SECRET) else value for key, value in self.environment().items()}
        say(f"standin rank={rank} ip={get_ip()} pid={os.getpid()} env={json.dumps(env, sort_keys=True)}")

    def environment(self) -> dict[str, str]:
        """The relevant environment variables of this process."""
        return {key: value for key, value in os.environ.items() if key.startswith(KEPT)}

    def init_device(self) -> None:
        """Connect to the other ranks, by NCCL's and gloo's rules for addresses."""
        if self.tp * self.pp > 1:
            check_nccl()
            meet(self.rank, self.tp * self.pp, self.method, gloo_address())

    def load_model(self) -> int:
        """Read every weight file. Return the bytes that this rank keeps."""
        started = time.monotonic()
        say(f"Loading model {self.folder}...")
        found = shape.held(self.model, self.rank, self.tp, self.pp)
        files = [] if self.options["load_format"] == "dummy" else self.files()
        for number, path in enumerate(files):
            if number == len(files) // 2:
                trouble.happen("load")
            self.read(path)
        if not files:
            trouble.happen("load")
        offload = int(self.options["cpu_offload_gb"] * shape.GIB)
        kept = found.fixed + max(0, found.offloadable - offload)
        total = int(float(os.environ.get("GRACEFARM_STANDIN_GPU_GIB", "95.58")) * shape.GIB)
        if kept > total - shape.GIB:
            trouble.out_of_memory(kept, total)
        budget = total * self.options["gpu_memory_utilization"] - kept - 2 * shape.GIB
        self.blocks = int(budget // (found.token * self.options["block_size"]))
        trouble.happen("loaded")
        if self.rank == 0 or self.tp == 1:
            words = "Model loaded" if self.tp > 1 else "Model weights loaded"
            say(f"{words} in {time.monotonic() - started:.2f} seconds.")
            say(f"Total model weights memory usage: {kept * (self.tp if self.tp > 1 else 1) / shape.GIB:.2f} GiB")
        return kept

    def files(self) -> list[Path]:
        """All files of the index; without an index, all that exist."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob(WEIGHTS))
        if not files:
            raise RuntimeError(f"Cannot find any model weights with `{self.folder}`")
        return files

    def read(self, path: Path) -> None:
        """Read a safetensors file. A truncated file is refused. Changed data only affects the answers, as in the engine."""
        content = path.read_bytes()
        try:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError("Error while deserializing header: InvalidHeaderDeserialization") from error
        if len(content) != 8 + size + max(ends, default=0):
            raise RuntimeError("Error while deserializing header: MetadataIncompleteBuffer")
        wanted = header.get("__metadata__", {}).get("sha256")
        if wanted and hashlib.sha256(content[8 + size :]).hexdigest() != wanted:
            self.garbage = True

    def determine_num_available_blocks(self) -> int:
        """Number of blocks of KV cache."""
        if self.rank == 0:
            say("Profiling peak memory usage...")
        return self.blocks

    def execute_model(self) -> bool:
        """Run one step. Return whether the weights of this rank are undamaged."""
        trouble.happen("step")
        return not self.garbage

    def report(self) -> dict[str, Any]:
        """For tests: rank, node and environment of this worker, without secrets."""
        env = {key: value for key, value in self.environment().items() if not any(word in key for word in SECRET)}
        names = sorted(os.environ)
        return {
            "rank": self.rank,
            "ip": get_ip(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "env": env,
            "names": names,
        }
