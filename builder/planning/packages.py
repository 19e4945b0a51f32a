"""What root.lock and toolchain.lock pin: Debian packages, and the digests of what is unpacked from them."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

from builder.planning.stack import Arch, LoadedStack
from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.tables import InsidePath, Sha256, Table

ROOT_LAYOUT = 1
"Raised when the same packages are laid out in another way; enters the digest, as the texts of our scripts do."
TOOLKIT_LAYOUT = 1
"The same of CUDA's compiler."
PROFILE = (files("builder") / "data" / "toolkit" / "nvcc.profile").read_text()
"""Debian's own names places of an installed system; this one finds all beside nvcc. Headers are our wrapper's business.
LIBRARIES, the sandbox's own place, because CMake knows nvcc's link line by it."""


class Deb(Table):
    """One binary package of the archive."""

    name: str
    arch: str
    "Debian's name: amd64, arm64 or all."
    version: str
    sha256: Sha256
    size: int
    "Bytes."
    path: InsidePath
    "In the archive, below the mirror's URL."

    @property
    def title(self) -> str:
        """As apt writes it."""
        return f"{self.name}:{self.arch} {self.version}"

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What enters a digest: where it lies in the archive changes nothing."""
        return self.name, self.arch, self.version, self.sha256


class Packages(Table):
    """The packages of one root, or of one host's compiler."""

    packages: tuple[Deb, ...]


class RootLock(Table):
    """root.lock."""

    suite: str
    roots: dict[str, Packages]
    "By HOST-TARGET."


class ToolchainLock(Table):
    """toolchain.lock."""

    suite: str
    hosts: dict[Arch, Packages]


def of_root(stack: LoadedStack, host: Arch, target: Arch) -> tuple[Deb, ...]:
    """What root.lock pins for that host and target.

    Raises:
        ConfigError: the lock is absent or damaged, has no such root, or is older than stack.toml.
    """
    locked = tables.read(stack.root_lock, RootLock)
    key = f"{host}-{target}"
    again = stack.root_lock_command
    if key not in locked.roots:
        raise ConfigError(
            f"{stack.root_lock}: no root for target {target} on a host of {host}",
            remedy=f"it has {', '.join(sorted(locked.roots))}; add the pair to [root] hosts in stack.toml and lock it",
            repeat=again,
        )
    debs = locked.roots[key].packages
    have = {f"{deb.name}:{deb.arch}" for deb in debs} | {deb.name for deb in debs if deb.arch == "all"}
    for request in (*requests(stack, host, target), *alone(stack, host, target)):
        if request not in have and request.partition(":")[0] not in have:
            raise ConfigError(
                f"{stack.root_lock}: {request} of stack.toml is not among its packages for {key}",
                remedy="make the lock again",
                repeat=again,
            )
    return debs


def requests(stack: LoadedStack, host: Arch, target: Arch) -> list[str]:
    """What stack.toml asks apt for, as NAME:ARCH."""
    spec = stack.root
    extra = spec.native if host is target else spec.cross
    # {triplet} in a package's name: Debian's names have no underscore.
    triplet = target.triplet.replace("_", "-")
    wanted = [f"{name.format(triplet=triplet)}:{host.debian}" for name in (*spec.host, *extra)]
    return [*wanted, *(f"{name}:{target.debian}" for name in spec.target)]


def alone(stack: LoadedStack, host: Arch, target: Arch) -> list[str]:
    """What is taken without what it depends on; the host's Python among it, which cannot be installed beside the target's."""
    native = [] if host is target else [f"{native_python(stack)}:{host.debian}"]
    return [*stack.root.alone, *native]


def native_python(stack: LoadedStack) -> str:
    """The package that has the host's own Python."""
    return f"python{stack.data.python}-minimal"


def root_digest(stack: LoadedStack, host: Arch, target: Arch) -> str:
    """Hex sha256 of everything that decides the root's bytes: packages, our scripts, the layout.

    Raises:
        ConfigError: see `of_root`.
    """
    scripts = files("builder") / "data" / "root"
    content = {
        "layout": ROOT_LAYOUT,
        "host": host.value,
        "target": target.value,
        "python": stack.data.python,
        "gcc": stack.data.toolchain.gcc,
        "packages": sorted(deb.identity for deb in of_root(stack, host, target)),
        "scripts": {name: (scripts / name).read_text() for name in ("python", "machine", "pkg-config", "bytecode.py")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_toolkit(stack: LoadedStack, host: Arch) -> tuple[Deb, ...]:
    """What toolchain.lock pins for that host; nothing where the stack takes no compiler from Debian.

    Raises:
        ConfigError: the lock is absent, damaged or older than stack.toml.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return ()
    debs = tables.read(stack.toolchain_lock, ToolchainLock).hosts.get(host, Packages(packages=())).packages
    if sorted(deb.name for deb in debs) != sorted(spec.packages):
        raise ConfigError(
            f"{stack.toolchain_lock} does not hold what stack.toml takes from Debian for a host of {host}",
            remedy="make the lock again",
            repeat=f"builder lock {stack.data.name}",
        )
    return debs


def toolkit_digest(stack: LoadedStack, host: Arch) -> str | None:
    """Hex sha256 of everything that decides the unpacked compiler's bytes; None where none comes from Debian.

    Raises:
        ConfigError: see `of_toolkit`.
    """
    debs = of_toolkit(stack, host)
    if not debs:
        return None
    content = [TOOLKIT_LAYOUT, PROFILE, sorted(deb.identity for deb in debs)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
