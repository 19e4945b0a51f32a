"""CUDA's compiler out of Debian's packages, where no wheels hold it: laid out as the wheels of newer releases lay it out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.fetch import Download, download
from builder.ground import debian
from builder.ground.debian import Deb
from builder.planning.stack import Arch, LoadedStack
from gracefarm import tables
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, HostError, RootError
from gracefarm.settings import Settings
from gracefarm.tables import Table

LAYOUT = 1
"Raised when the same packages are laid out in another way; enters the digest."

PROFILE = """\
TOP = $(_HERE_)/..
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
LIBRARIES =+ $(_SPACE_) -L/cuda/lib64/stubs
"""
"""Debian's own names places of an installed system; this one finds all beside nvcc. Headers are our wrapper's business.
LIBRARIES, the sandbox's own place, because CMake knows nvcc's link line by it."""
_OWN = "usr/lib/nvidia-cuda-toolkit"
_PLACES = {
    f"{_OWN}/bin/nvcc": "bin/nvcc",
    f"{_OWN}/bin/crt": "bin/crt",
    f"{_OWN}/bin/cicc": "nvvm/bin/cicc",
    f"{_OWN}/libdevice": "nvvm/libdevice",
}
_TOOLS = (
    "__nvcc_device_query",
    "bin2c",
    "cu++filt",
    "cudafe++",
    "cuobjdump",
    "fatbinary",
    "nvdisasm",
    "nvlink",
    "nvprune",
    "ptxas",
)


class Packages(Table):
    """The packages of one host."""

    packages: tuple[Deb, ...]


class ToolchainLock(Table):
    """toolchain.lock."""

    suite: str
    hosts: dict[Arch, Packages]


def packages(stack: LoadedStack, host: Arch) -> tuple[Deb, ...]:
    """What toolchain.lock pins for that host; nothing where the stack takes no compiler from Debian.

    Raises:
        ConfigError: the lock is absent, damaged or older than stack.toml.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return ()
    found = tables.read(stack.toolchain_lock, ToolchainLock).hosts.get(host, Packages(packages=())).packages
    if sorted(one.name for one in found) != sorted(spec.packages):
        raise ConfigError(
            f"{stack.toolchain_lock} does not hold what stack.toml takes from Debian for a host of {host}",
            remedy="make the lock again",
            repeat=f"builder lock-stack {stack.data.name}",
        )
    return found


def digest(stack: LoadedStack, host: Arch) -> str | None:
    """Hex sha256 of everything that decides the unpacked compiler's bytes; None where none comes from Debian.

    Raises:
        ConfigError: see `packages`.
    """
    found = packages(stack, host)
    if not found:
        return None
    content = [LAYOUT, PROFILE, sorted((one.name, one.arch, one.version, one.sha256) for one in found)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def resolve(stack: LoadedStack, settings: Settings, tick: Tick = no_tick) -> str | None:
    """The text of a new toolchain.lock; None where the stack needs none.

    Raises:
        HostError, FetchError, RootError: as `debian.solver`.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return None
    text = [
        f"# The CUDA compiler of {stack.data.name}; written by `builder lock-stack {stack.data.name}`, not by hand.",
        f'suite = "{spec.suite}"',
    ]
    for number, host in enumerate(hosts := sorted(stack.data.root.hosts)):
        tick(number, len(hosts), f"compiler of {spec.suite} for {host}")
        with debian.solver(spec.suite, host, [], settings, spec.component) as apt:
            found = apt.alone([f"{name}:{host.debian}" for name in spec.packages])
        text += [
            "",
            f"[hosts.{host}]",
            "packages = [",
            *(debian.line(one) for one in sorted(found, key=lambda one: one.name)),
            "]",
        ]
    return "\n".join(text) + "\n"


def unpack(stack: LoadedStack, host: Arch, folder: Path, settings: Settings, tick: Tick = no_tick) -> None:
    """Fetch the packages and lay the compiler out as nvidia/cuN in `folder`.

    Raises:
        FetchError, DigestError: a package cannot be had from the mirror, or is not the pinned one.
        RootError: a package cannot be unpacked, or lacks a part.
        HostError: dpkg-deb is missing.
    """
    found = packages(stack, host)
    if not found:
        return
    spec = stack.data.toolchain.debian
    assert spec is not None
    url = debian.mirror(spec.suite, settings)
    wanted = [Download(url=f"{url}/{one.path}", sha256=one.sha256, what=one.title, size=one.size) for one in found]
    places = download(wanted, settings, tick)
    home = folder / "nvidia" / f"cu{stack.data.cuda.split('.')[0]}"
    with TemporaryDirectory(dir=folder, prefix="unpack-") as name:
        for one in found:
            _unpack(places[one.sha256], Path(name), one)
        for source, place in {**{f"usr/bin/{tool}": f"bin/{tool}" for tool in _TOOLS}, **_PLACES}.items():
            (home / place).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.move(Path(name, source), home / place)
            except FileNotFoundError as error:
                titles = ", ".join(one.title for one in found)
                raise RootError(f"{titles} has no /{source}", remedy="mend [toolchain.debian] in stack.toml") from error
    (home / "bin" / "nvcc.profile").write_text(PROFILE)


def _unpack(archive: Path, into: Path, one: Deb) -> None:
    try:
        done = subprocess.run(["dpkg-deb", "--extract", archive, into], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostError("the program dpkg-deb is not installed", remedy="run `builder doctor --fix`") from error
    if done.returncode:
        raise RootError(f"{one.title} cannot be unpacked: {done.stderr.strip()}", remedy=f"remove {archive} and try again")
