"""The nodes as input of the planner, and which GPUs a layout uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.nodes.facts import Gpu
from deploy.planning.engines import Engine
from deploy.planning.hardware import NodeKind
from deploy.planning.shards import GIB
from gracefarm.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node as input of the planner."""

    name: str
    private: str
    gpus: tuple[Gpu, ...]
    host: int
    "Bytes of host memory."


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A GPU with its global rank."""

    machine: Machine
    gpu: Gpu


def place(machines: Sequence[Machine], world: int) -> tuple[Slot, ...]:
    """The first `world` GPUs, in the order in which the engine ranks its workers.

    The driver's node comes first, then nodes with fewer workers, then by address as text (ray_gpu_executor.py).
    """
    taken: list[tuple[Machine, int]] = []
    for machine in machines:
        left = world - sum(count for _, count in taken)
        if left > 0:
            taken.append((machine, min(left, len(machine.gpus))))
    ordered = taken[:1] + sorted(taken[1:], key=lambda entry: (entry[1], entry[0].private))
    return tuple(Slot(machine=machine, gpu=gpu) for machine, count in ordered for gpu in machine.gpus[:count])


def check_replicas(engine: Engine, world: int, dp: int, slots: Sequence[Slot]) -> None:
    """Check that vLLM places the replicas of `world` GPUs on these GPUs (0.26.0 and 0.33.0, v1/engine/utils.py).

    A node may have fewer replicas than the others. Nodes with different numbers of GPUs, and replicas that fill neither whole
    nodes nor an equal part of one, are not planned, although vLLM can place some of them.

    Raises:
        LayoutError: with the requirement that is not met.
    """
    if dp == 1:
        return
    if not engine.replicas:
        raise LayoutError(
            f"dp {dp}: {engine.name} does not support replicas",
            remedy='set engine = "vllm", or remove data_parallel from [layout]',
        )
    have = sorted({len(slot.machine.gpus) for slot in slots})
    if len(have) > 1:
        raise LayoutError(
            f"dp {dp}: replicas require the same number of GPUs on every node, but nodes have {' and '.join(map(str, have))}",
            remedy="use only nodes with the same number of GPUs, or remove data_parallel from [layout]",
        )
    if have[0] % world and world % have[0]:
        raise LayoutError(
            f"data_parallel = {dp}: a replica has {world} GPUs, and each node has {have[0]} GPUs; one of these numbers must "
            "be a multiple of the other",
            remedy="set tensor_parallel and pipeline_parallel so that their product divides the number of GPUs of a "
            "node, or is a multiple of that number",
        )


def check_native(name: str, dp: int, slots: Sequence[Slot]) -> None:
    """Check that vLLM connects the nodes of these GPUs without Ray. On one node it always does.

    Raises:
        LayoutError: with the requirement that is not met.
    """
    if len({slot.machine.name for slot in slots}) == 1:
        return
    if dp > 1:
        raise LayoutError(
            f"{name}: replicas on several nodes require Ray",
            remedy='set launcher = "ray", or use one deployment for each replica',
        )
    if not even(slots):
        each = ", ".join(f"{machine} {count}" for machine, count in Counter(slot.machine.name for slot in slots).items())
        raise LayoutError(
            f"{name}: without Ray, the plan must use the same number of GPUs on all nodes, but it uses {each}",
            remedy='set launcher = "ray", or change tensor_parallel and pipeline_parallel in [layout] so that all nodes use '
            "the same number of GPUs",
        )


def even(slots: Sequence[Slot]) -> bool:
    """Whether all nodes have the same number of these GPUs."""
    return len(set(Counter(slot.machine.name for slot in slots).values())) == 1


def machines_of(kind: NodeKind, count: int) -> tuple[Machine, ...]:
    """Assumed nodes of this kind."""
    gpu = Gpu(name=kind.match, total=kind.mib << 20, free=kind.mib << 20)
    return tuple(
        Machine(name=f"k{index}", private=f"10.0.0.{index + 1}", gpus=(gpu,) * kind.gpus, host=kind.host_gib * GIB)
        for index in range(count)
    )
