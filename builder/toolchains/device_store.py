"""The store of device code: one folder for each recipe, which the builds of all its cells use.

builder/data/toolchain/device.py reads and writes it while a build runs.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from builder.box.sandbox import BindMount
from builder.planning.ground import Ground
from builder.planning.plan import Plan, wrappers_digest
from builder.planning.settings import Settings
from builder.planning.stack import host_arch
from builder.toolchains.ccache import OFF
from gracefarm.errors import ConfigError
from gracefarm.files import sha256_file
from gracefarm.tables import parse_size

STORE = "/device"
"In a sandbox."
_COMPILERS = ("nvvm/bin/cicc", "bin/ptxas")
_LIBRARIES = ("libc.so.6", "libm.so.6")
"Of the root: cicc computes constants with them."


def enabled(settings: Settings) -> bool:
    """Whether the setting does not say off."""
    return settings.device_store.lower() not in OFF


def folder(settings: Settings, recipe: str) -> Path:
    """Where a recipe's device code is kept. What one package writes there, no other package's build reads."""
    return settings.home / "device" / recipe


def mounts(plan: Plan, settings: Settings) -> tuple[BindMount, ...]:
    """The recipe's own folder, writable.

    Raises:
        ConfigError: see `limit`.
    """
    limit(settings)
    store = folder(settings, plan.recipe.key)
    store.mkdir(parents=True, exist_ok=True)
    return (BindMount(source=store, target=STORE, writable=True),)


def variables(ground: Ground) -> dict[str, str]:
    """What device.py is told; none of it enters the build id."""
    return {"GRACEFARM_DEVICE_STORE": STORE, "GRACEFARM_DEVICE_COMPILERS": compilers_digest(ground)}


def compilers_digest(ground: Ground) -> str:
    """All that decides what the passes make of their input, beside their options: the compilers, the libraries that they use,
    and device.py."""
    assert ground.compiler is not None
    programs = [path for name in _COMPILERS for path in sorted(ground.compiler.glob(f"nvidia/*/{name}"))]
    libraries = [ground.root / "lib" / host_arch().triplet / name for name in _LIBRARIES]
    digests = [sha256_file(path) for path in (*programs, *libraries)]
    return hashlib.sha256("\n".join([*digests, wrappers_digest()]).encode()).hexdigest()


def limit(settings: Settings) -> int:
    """The bytes that the store of a recipe may have.

    Raises:
        ConfigError: the setting is not a size.
    """
    try:
        return parse_size(settings.device_store)
    except ValueError as error:
        raise ConfigError(
            f"setting 'device_store': {settings.device_store!r} is not a size", remedy="say 5GiB, or off"
        ) from error


def trim(settings: Settings, recipe: str) -> None:
    """Remove what was not used for the longest time, until the store of a recipe keeps to its limit, and what killed builds
    left half written. A build that reads such a file at this moment reads it to its end, or compiles."""
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
"After so long a half-written entry belongs to no process that runs."
