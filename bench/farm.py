"""Measures `builder build --farm`: two workers compared with one, a rebuild by a new worker, and the loss of a killed worker.

    python -m bench farm          as root

The workers are network namespaces of this machine (tests/integration/farm_kit.py). CPU affinity gives each worker one core.
The cells are six C++ projects of equal size without CUDA and torch, so that the compiler takes almost all of a cell's time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builder.planning.settings import load
from builder.planning.stack import host_arch
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm, new_farm
from tests.index.index_kit import make_token
from tests.integration.farm_kit import Machine, Room, open_room, wait_for

TWO_WORKERS, HITS = 1.8, 0.95
"Lower bounds: time with one worker / time with two workers; share of cache hits."
CELLS, UNITS, WEIGHT = 6, 4, 60
UNIT = """
#include <map>
#include <string>
#include <vector>
template <int N> struct Node { std::map<std::string, std::vector<Node<N - 1>>> below; int count() const; };
template <> struct Node<0> { int count() const { return 1; } };
template <int N> int Node<N>::count() const {
    int sum = N;
    for (const auto &entry : below) for (const auto &node : entry.second) sum += node.count();
    return sum;
}
int NAME() { return Node<WEIGHT>().count(); }
"""
BUILD = """
units = sorted(name for name in os.listdir('.') if name.endswith('.cpp'))
for name in units:
    subprocess.run(['g++', '-O2', '-c', name, '-o', name[:-4] + '.o'], check=True)
return wheel(wheel_directory, name=os.path.basename(units[0])[:-6], files={})
"""


def write(farm: Farm, name: str, units: int = UNITS) -> None:
    """Write a recipe with this number of units."""
    text = UNIT.replace("WEIGHT", str(WEIGHT))
    sources = {f"{name}_{number}.cpp": text.replace("NAME", f"{name}_{number}") for number in range(units)}
    farm.recipe(name, projects.backend(BUILD) | sources)


@contextmanager
def cluster(workers: int, **variables: str) -> Iterator[tuple[Farm, Room, Machine, list[Machine]]]:
    """A cluster of a head that does not build, and workers with one core each."""
    with new_farm(load().home) as farm:
        # The machines of the room cannot reach a mirror. This build puts all required files into the shared folders.
        write(farm, "first", 1)
        first = farm.run("build", "first", "--target", host_arch().value)
        assert first.code == 0, first.said
        yield from _cluster(farm, workers, variables)


def _cluster(farm: Farm, workers: int, variables: Mapping[str, str]) -> Iterator[tuple[Farm, Room, Machine, list[Machine]]]:
    with open_room(farm) as room:
        head = room.head()
        machines = [room.worker(head, f"w{number}", core=number, **variables) for number in range(workers)]
        probe = "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
        probe += "print('alive', sum(node['Resources'].get('CPU', 0) for node in ray.nodes()))"
        while f"alive {float(workers)}" not in head.run(sys.executable, "-c", probe).out:
            time.sleep(1)
        yield farm, room, head, machines


def command(head: Machine, *names: str) -> list[str]:
    """The command `builder build` for recipes on the cluster."""
    target = ["--matrix", f"target={host_arch().value}"]
    return [sys.executable, "-m", "builder", "build", *names, *target, "--farm", f"{head.address}:6379"]


def seconds(workers: int) -> float:
    """Seconds of a run with all cells."""
    with cluster(workers) as (farm, _, head, _):
        for number in range(CELLS):
            write(farm, f"cell{number}")
        head.run(*command(head, "first"))  # the first cell of a worker takes longer
        start = time.monotonic()
        result = head.run(*command(head, *[f"cell{number}" for number in range(CELLS)]), timeout=3600)
        assert result.code == 0, result.said
        return time.monotonic() - start


def scaling() -> None:
    """Compare two workers with one."""
    single, double = seconds(1), seconds(2)
    print(f"{CELLS} cells of {UNITS} units, load {os.getloadavg()[0]:.1f}")
    print(f"  one worker {single:.1f} s, two {double:.1f} s: {single / double:.2f} times (wanted: {TWO_WORKERS})")


@contextmanager
def shared_cluster() -> Iterator[tuple[Farm, Room, Machine, list[Machine]]]:
    """A cluster with one worker, and an index on the head. The worker writes to its shared cache. All workers have one key."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with TemporaryDirectory() as folder:
        root = Path(folder) / "index"
        variables = {
            "GRACEFARM_SIGNING_KEY": pem.decode(),
            "GRACEFARM_SHARED_CACHE": "http://10.77.0.1:8080",
            "GRACEFARM_CACHE_TOKEN": make_token(root, "--cache"),
        }
        with cluster(1, **variables) as (farm, room, head, workers):
            store = head.home / "index"
            shutil.copytree(root, store)
            head.start([sys.executable, "-m", "index", "serve", "--host", "0.0.0.0", "--port", "8080", "--root", str(store)])
            wait_for(head, 8080)
            yield farm, room, head, workers


def join(room: Room, head: Machine, first: Machine) -> Machine:
    """Start a second worker with empty caches."""
    shared = {name: value for name, value in first.variables.items() if "CACHE" in name or "KEY" in name}
    return room.worker(head, "second", core=1, **shared)


def records(machine: Machine) -> dict[str, dict[str, Any]]:
    """The records on a machine, by recipe."""
    documents = [json.loads(path.read_text()) for path in machine.home.glob("builds/*/record.json")]
    return {document["recipe"]: document for document in documents}


def rebuild() -> None:
    """Measure the cache hits of a second worker that repeats the builds of the first worker."""
    names = [f"cell{number}" for number in range(4)]
    with shared_cluster() as (farm, room, head, workers):
        for name in names:
            write(farm, name)
        line = [*command(head, *names), "--shared-cache", "write"]
        first = head.run(*line, timeout=3600)
        assert first.code == 0, first.said
        workers[0].power_off()
        second = join(room, head, workers[0])
        remove_tree(head.home / "builds")
        again = head.run(*line, timeout=3600)
        assert again.code == 0, again.said
        caches = [record["compiler_cache"] for record in records(second).values()]
        hits, misses = sum(cache["hits"] for cache in caches), sum(cache["misses"] for cache in caches)
        share = hits / (hits + misses)
        print(f"  second worker, cold: {hits} hits, {misses} misses: {share:.1%} (wanted: {HITS:.0%})")


def killed() -> None:
    """Switch a worker off during a cell. Then another worker builds the cell."""
    with shared_cluster() as (farm, room, head, workers):
        write(farm, "cell", 12)
        running = head.start([*command(head, "cell"), "--shared-cache", "write"])
        while len(compiled(workers[0])) < 6:
            time.sleep(0.2)
        workers[0].power_off()
        before = len(compiled(workers[0]))
        second = join(room, head, workers[0])
        assert running.wait(900) == 0, head.output(len(head.started) - 1)
        cache = records(second)["cell"]["compiler_cache"]
        lost = before - cache["hits"]
        print(
            f"  worker killed after {before} of 12 units; the next one found {cache['hits']} in the cache, and compiled {lost}"
        )


def compiled(machine: Machine) -> list[str]:
    """The units that a machine has compiled in the running build."""
    return [line for path in machine.home.glob("builds/*/work/units.jsonl") for line in path.read_text().splitlines()]


def main() -> None:
    """Run all three measurements."""
    scaling()
    rebuild()
    killed()


if __name__ == "__main__":
    main()
