"""The Debian packages that root.lock and toolchain.lock pin, and the digests of root and compiler made from them."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files

from pydantic import Field

from builder.planning.stack import Arch, LoadedStack, RustPackages
from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.tables import InsidePath, Sha256, Table

ROOT_LAYOUT = 1
"Raised when the layout changes for the same packages; enters the digest, as the texts of our scripts do."
TOOLKIT_LAYOUT = 1
"The same for the CUDA compiler."
PROFILE = (files("builder") / "data" / "toolkit" / "nvcc.profile").read_text()
"""Debian's profile names paths of an installed system; this one finds everything relative to nvcc. Our wrapper adds the
headers. LIBRARIES is a path of the sandbox, because CMake recognizes nvcc's link line by it."""


class Deb(Table):
    """One binary package of the archive."""

    name: str
    arch: str
    "Debian's name: amd64, arm64 or all"
    version: str
    sha256: Sha256
    size: int
    "Size in bytes"
    path: InsidePath
    "Path in the archive, below the mirror's URL"

    @property
    def title(self) -> str:
        """Name and version as apt writes them."""
        return f"{self.name}:{self.arch} {self.version}"

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """The fields that enter a digest; the path in the archive does not."""
        return self.name, self.arch, self.version, self.sha256


class Packages(Table):
    """The packages of one root, or of one host's compiler."""

    packages: tuple[Deb, ...]


class RootLock(Table):
    """root.lock."""

    suite: str
    roots: dict[str, Packages]
    "By HOST-TARGET"
    rust: dict[str, Packages] = Field(default_factory=dict)
    "Additional packages of roots with Rust"


class ToolchainLock(Table):
    """toolchain.lock."""

    suite: str
    hosts: dict[Arch, Packages]


def of_root(stack: LoadedStack, host: Arch, target: Arch) -> tuple[Deb, ...]:
    """The packages that root.lock pins for that host and target; with those of Rust if the recipe requires Rust.

    Raises:
        ConfigError: the lock is missing or damaged, has no such root, or does not match stack.toml; or the stack has no Rust.
    """
    locked = tables.read(stack.root_lock, RootLock)
    key = f"{host}-{target}"
    again = stack.root_lock_command
    if key not in locked.roots:
        raise ConfigError(
            f"{stack.root_lock} has no root for target {target} on an {host} host",
            remedy=f"add {target} to {host} in [root.hosts] of stack.toml, then write the lock again with `{again}`; the lock "
            f"has roots for these pairs of host and target: {', '.join(sorted(locked.roots))}",
            repeat=again,
        )
    debs = locked.roots[key].packages
    wanted = [*requests(stack, host, target), *alone(stack, host, target)]
    if stack.uses_rust:
        debs = (*debs, *locked.rust.get(key, Packages(packages=())).packages)
        wanted += [*rust_requests(stack, host), *rust_alone(stack, host, target)]
    have = {f"{deb.name}:{deb.arch}" for deb in debs} | {deb.name for deb in debs if deb.arch == "all"}
    for request in wanted:
        if request not in have and request.partition(":")[0] not in have:
            raise ConfigError(
                f"{stack.root_lock} has no package {request} for {key} (host-target), but stack.toml requires it",
                remedy=f"write the lock again with `{again}`",
                repeat=again,
            )
    return debs


def requests(stack: LoadedStack, host: Arch, target: Arch) -> list[str]:
    """The packages that stack.toml requests from apt, as NAME:ARCH."""
    spec = stack.root
    extra = spec.native if host is target else spec.cross
    # {triplet} in a package's name has '-': names of Debian packages have no underscore.
    triplet = target.triplet.replace("_", "-")
    wanted = [f"{name.format(triplet=triplet)}:{host.debian}" for name in (*spec.host, *extra)]
    return [*wanted, *(f"{name}:{target.debian}" for name in spec.target)]


def alone(stack: LoadedStack, host: Arch, target: Arch) -> list[str]:
    """Packages to unpack without dependencies, such as the host's Python, which cannot be installed next to the target's."""
    native = [] if host is target else [f"{native_python(stack)}:{host.debian}"]
    return [*stack.root.alone, *native]


def rust_requests(stack: LoadedStack, host: Arch) -> list[str]:
    """The packages with cargo and rustc that stack.toml requests from apt, as NAME:ARCH.

    Raises:
        ConfigError: the stack has no Rust.
    """
    return [f"{name}:{host.debian}" for name in _rust(stack).host]


def rust_alone(stack: LoadedStack, host: Arch, target: Arch) -> list[str]:
    """The packages with the target's standard library. On the target itself, rustc's dependencies have them.

    Raises:
        ConfigError: the stack has no Rust.
    """
    return [] if host is target else [f"{name}:{target.debian}" for name in _rust(stack).target]


def _rust(stack: LoadedStack) -> RustPackages:
    if stack.root.rust is None:
        raise ConfigError(
            f"the recipe requires Rust, but stack {stack.data.name} has no Rust",
            remedy="add [root.rust] to the stack.toml that defines the root of this stack, then run "
            f"`{stack.root_lock_command}`",
            repeat=stack.root_lock_command,
        )
    return stack.root.rust


def native_python(stack: LoadedStack) -> str:
    """The package with the host's Python."""
    return f"python{stack.data.python}-minimal"


def root_digest(stack: LoadedStack, host: Arch, target: Arch) -> str:
    """Hex sha256 of everything that determines the root's bytes: packages, our scripts, the layout.

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
    """The packages that toolchain.lock pins for that host; empty if the stack's compiler is not from Debian.

    Raises:
        ConfigError: the lock is missing or damaged, or does not match stack.toml.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return ()
    debs = tables.read(stack.toolchain_lock, ToolchainLock).hosts.get(host, Packages(packages=())).packages
    if sorted(deb.name for deb in debs) != sorted(spec.packages):
        raise ConfigError(
            f"{stack.toolchain_lock} does not pin the Debian packages that stack.toml requires for an {host} host",
            remedy=f"write the lock again with `builder lock {stack.data.name}`",
            repeat=f"builder lock {stack.data.name}",
        )
    return debs


def toolkit_digest(stack: LoadedStack, host: Arch) -> str | None:
    """Hex sha256 of everything that determines the unpacked compiler's bytes; None if it is not from Debian.

    Raises:
        ConfigError: see `of_toolkit`.
    """
    debs = of_toolkit(stack, host)
    if not debs:
        return None
    content = [TOOLKIT_LAYOUT, PROFILE, sorted(deb.identity for deb in debs)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
