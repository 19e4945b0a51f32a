"""Write the rehearsal's locks. For each package, they have the sha256 of the wheels for x86_64 and for aarch64.

    python tools/rehearsal_lock.py ray[default]==2.60.0 > deploy/data/rehearsal.lock
    python tools/rehearsal_lock.py --requirements deploy/data/download.lock > deploy/data/rehearsal-download.lock

These commands resolve the packages again with uv and the configured index. If the locks had the files of all platforms, the
mirror would download gigabytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from deploy.rehearsal.locks import MACHINES, PYTHON, environment
from gracefarm import settings
from gracefarm.errors import FetchError

GLIBC = range(35, 16, -1)
"Minor versions of glibc: that of Ubuntu 22.04 and older ones."
HEADER = "# Every wheel of the rehearsal's nodes, one for each machine. Made by: python tools/rehearsal_lock.py {arguments}\n"


def tags(machine: str) -> dict[Tag, int]:
    """The wheel tags that a node's Python accepts, with their ranks. The best tag has rank 0."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    platforms += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    accepted = [*cpython_tags(PYTHON, platforms=platforms), *compatible_tags(PYTHON, "cp311", platforms)]
    return {tag: rank for rank, tag in enumerate(accepted)}


def best(wheels: Sequence[Mapping[str, Any]], machine: str) -> Mapping[str, Any] | None:
    """The wheel that an installer on `machine` chooses."""
    ranks = tags(machine)
    rated = []
    for wheel in wheels:
        name = wheel["url"].rpartition("/")[2]
        rank = min((ranks[tag] for tag in parse_wheel_filename(name)[3] if tag in ranks), default=None)
        if rank is not None:
            rated.append((rank, name, wheel))
    return min(rated, key=lambda entry: entry[:2])[2] if rated else None


def lines(package: Mapping[str, Any]) -> list[str]:
    """The lines of the lock for one package of a pylock.toml (PEP 751).

    Raises:
        FetchError: there is no wheel for a machine that needs it.
    """
    name, version = package["name"], package["version"]
    hashes: dict[str, list[str]] = {}
    for machine in MACHINES:
        if (marker := package.get("marker")) and not Marker(marker).evaluate(environment(machine)):
            continue
        wheel = best(package.get("wheels", []), machine)
        if wheel is None:
            raise FetchError(f"{name} {version} has no wheel for Python 3.11 on {machine}", remedy="pin another version")
        hashes.setdefault(wheel["hashes"]["sha256"], []).append(machine)
    pins = []
    for digest, machines in hashes.items():
        marker = "" if len(machines) == len(MACHINES) else f" ; platform_machine == '{machines[0]}'"
        pins.append(f"{name}=={version}{marker} \\\n    --hash=sha256:{digest}\n")
    return pins


def main() -> None:
    """Resolve the packages, and print the lock."""
    parser = argparse.ArgumentParser(prog="python tools/rehearsal_lock.py")
    parser.add_argument("pins", nargs="*")
    parser.add_argument("--requirements", type=Path, action="append", default=[])
    given = parser.parse_args()
    index = settings.load().index_url
    with tempfile.TemporaryDirectory() as folder:
        wanted, resolved = Path(folder) / "wanted.in", Path(folder) / "pylock.toml"
        wanted.write_text("\n".join(given.pins) + "\n")
        options = ["--universal", "--python-version", "3.11", "--format", "pylock.toml", "--no-config", "--quiet"]
        options += ["--default-index", index] if index else []
        sources = [str(wanted), *map(str, given.requirements)]
        subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", *options, *sources, "--output-file", str(resolved)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        packages = tomllib.loads(resolved.read_text())["packages"]
    sys.stdout.write(HEADER.format(arguments=" ".join(sys.argv[1:])))
    for package in packages:
        sys.stdout.writelines(lines(package))


if __name__ == "__main__":
    main()
