"""The store of device code: a folder for each recipe, which the builds of all its cells use.

builder/data/toolchain/device.py reads and writes it during a build.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from builder.box.sandbox import BindMount
from builder.planning.ground import Ground
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import host_arch
from builder.toolchains.ccache import OFF, SOCKET
from builder.toolchains.wrappers import DEVICE_MODULES
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file
from gracefarm.tables import parse_size

STORE = "/device"
"Path in a sandbox."
_COMPILERS = ("nvvm/bin/cicc", "bin/ptxas")
_LIBRARIES = ("libc.so.6", "libm.so.6")
"Libraries of the root with which cicc computes constants."


def enabled(settings: Settings) -> bool:
    """Whether the setting is not `off`."""
    return settings.device_store.lower() not in OFF


def folder(settings: Settings, recipe: str) -> Path:
    """The folder of a recipe's device code. Builds of other packages cannot read it."""
    return settings.home / "device" / recipe


def mounts(plan: Plan, settings: Settings) -> tuple[BindMount, ...]:
    """The mount of the recipe's folder, which is writable.

    Raises:
        ConfigError: see `limit`.
    """
    limit(settings)
    store = folder(settings, plan.recipe.key)
    store.mkdir(parents=True, exist_ok=True)
    return (BindMount(source=store, target=STORE, writable=True),)


def variables(ground: Ground, *, shared: bool = False) -> dict[str, str]:
    """Variables for device.py; they do not enter the build id. `shared`: ccache.SOCKET is in the build's folder."""
    values = {"GRACEFARM_DEVICE_STORE": STORE, "GRACEFARM_DEVICE_COMPILERS": compilers_digest(ground)}
    return values | ({"GRACEFARM_DEVICE_SOCKET": f"/build/{SOCKET}"} if shared else {})


def compilers_digest(ground: Ground, scripts: Traversable | None = None) -> str:
    """Digest of everything that determines the output of the passes, except their input and options: the compilers, the
    libraries that they use, device.py and the modules that it imports.

    The other compiler scripts, for example `nvcc`, can only change the input and the options. The keys contain both.

    `scripts`: the folder with the compiler scripts; None: the builder's own.
    """
    assert ground.compiler is not None
    programs = [path for name in _COMPILERS for path in sorted(ground.compiler.glob(f"nvidia/*/{name}"))]
    libraries = [ground.root / "lib" / host_arch().triplet / name for name in _LIBRARIES]
    digests = [sha256_file(path) for path in (*programs, *libraries)]
    source = scripts or files("builder") / "data" / "toolchain"
    digests += [hashlib.sha256((source / name).read_bytes()).hexdigest() for name in ("device.py", *DEVICE_MODULES)]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def limit(settings: Settings) -> int:
    """The size limit of a recipe's store, in bytes.

    Raises:
        ConfigError: the setting is not a size.
    """
    try:
        return parse_size(settings.device_store)
    except ValueError as error:
        raise ConfigError(
            f"setting 'device_store': {settings.device_store!r} is not a size",
            remedy="set device_store to a size such as 5GiB, or to off",
        ) from error


def trim(settings: Settings, recipe: str) -> None:
    """Remove the least recently used entries until the store of a recipe is within its limit, and incomplete files of killed
    builds. A build that is reading a removed file can read it to its end, or compiles."""
    if not enabled(settings):
        return
    bound, total = limit(settings), 0
    entries = []
    for path in folder(settings, recipe).glob("*/*"):
        with suppress(FileNotFoundError):
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    newest = max((used for used, _, _ in entries), default=0.0)
    for used, size, path in sorted(entries, reverse=True):
        total += size
        stale = path.name.startswith(".") and newest - used > _STALE_S
        if total > bound or stale:
            total -= size
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108


_STALE_S = 3600.0
"An incomplete entry of this age does not belong to a running process."
