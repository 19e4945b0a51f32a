"""Clean virtual environments with this machine's Python."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from builder.ground import torch_facts, wheels
from builder.planning import pins
from builder.planning.settings import Settings
from builder.toolchains.host_tools import HostTools
from builder.toolchains.wrappers import site_packages
from gracefarm.console import Tick, no_tick
from gracefarm.errors import HostError, InstallError
from gracefarm.files import atomic_write, lock, remove_tree
from gracefarm.process import tail

_WHOLE = "complete"
"File that marks a complete environment."


def ensure(tools: HostTools, settings: Settings, tick: Tick = no_tick) -> Path:
    """The clean virtual environment of a build: from the stack's lock, or on top of the named environment.

    Raises:
        HostError: the interpreter cannot create it.
        ConfigError, FetchError, DigestError, RootError, DiskFullError: as in `environment.ensure`.
    """
    final = folder(tools, settings)
    with lock(final.with_name(f"{final.name}.lock"), lambda: tick(0, None, "another process is assembling this environment")):
        if not (final / _WHOLE).is_file():
            remove_tree(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            _venv(tools, final)
            if tools.locked:
                locked = pins.wheels(tools.base, tools.arch)
                wheels.require_digests(tools.base, locked)
                where = ["--python", str(final / "bin" / "python3")]
                wheels.install(locked, where, tools.base.data.name, settings, tick)
            atomic_write(final / _WHOLE, "")
        if tools.locked:  # as in environment.ensure: another stack may have assembled the same wheels
            torch_facts.check(tools.base, site_packages(final, tools.interpreter.minor))
    return final


def folder(tools: HostTools, settings: Settings) -> Path:
    """The folder that `ensure` creates."""
    name = hashlib.sha256(f"{_kind(tools)} {tools.interpreter.executable} {tools.interpreter.version}".encode()).hexdigest()
    return settings.home / "host" / "environments" / name[:32]


def _kind(tools: HostTools) -> str:
    return pins.environment_digest(tools.base, tools.arch) if tools.locked else " ".join(map(str, tools.interpreter.sites))


def _venv(tools: HostTools, into: Path, *besides: Path) -> None:
    """Create an empty virtual environment of the machine's Python, with access to `besides` and to a named environment."""
    command = [str(tools.interpreter.executable), "-m", "venv", "--without-pip", str(into)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=kept, cwd="/")
    if process.returncode:
        raise HostError(
            f"{tools.interpreter.executable} cannot create a virtual environment: {tail(process.stdout + process.stderr)}",
            remedy="install the module venv of this Python, or give another Python with --python",
        )
    others = [*besides, *(() if tools.locked else tools.interpreter.sites)]
    if others:
        lines = "".join(f"import site; site.addsitedir({str(site)!r})\n" for site in others)
        (site_packages(into, tools.interpreter.minor) / "gracefarm.pth").write_text(lines)


def fresh(tools: HostTools, base: Path, into: Path, wheel: Path) -> Path:
    """Another clean environment on top of that of the build, which contains only `wheel`.

    Raises:
        InstallError: the wheel does not fit this Python, or is damaged.
    """
    remove_tree(into)
    into.parent.mkdir(parents=True, exist_ok=True)
    _venv(tools, into, *([site_packages(base, tools.interpreter.minor)] if tools.locked else []))
    wheels.install_file(
        wheel,
        ["--python", str(into / "bin" / "python3")],
        lambda message: InstallError(
            f"{wheel.name} cannot be installed: {message}", remedy="check the wheel with `builder audit WHEEL --stack NAME`"
        ),
    )
    return into
