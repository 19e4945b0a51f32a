"""A build with the machine's own compilers in a clean virtual environment: `--toolchain host`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from builder.box.plain import Plain
from builder.ground import environment
from builder.planning.plan import CUDA_LAYOUT, Plan
from builder.toolchains import locked
from builder.toolchains.machine import Machine
from gracefarm.console import Tick, no_tick
from gracefarm.errors import HostError, InstallError
from gracefarm.files import atomic_directory, atomic_write, lock, remove_tree
from gracefarm.settings import Settings

_WHOLE = "complete"
"File of an environment that was assembled to its end."


def ensure(machine: Machine, settings: Settings, tick: Tick = no_tick) -> Path:
    """The clean virtual environment of a build: from the stack's lock, or over the environment that was named.

    Raises:
        HostError: the interpreter cannot make one.
        ConfigError, FetchError, DigestError, RootError, DiskFullError: as `environment.ensure`.
    """
    final = environment_place(machine, settings)
    with lock(final.with_name(f"{final.name}.lock"), lambda: tick(0, None, "another process assembles this")):
        if (final / _WHOLE).is_file():
            if machine.locked:  # as environment.ensure does: another stack may have assembled the same wheels
                environment.check_torch(machine.base, locked.site_packages(final, machine.interpreter.minor))
            return final
        remove_tree(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        _venv(machine, final)
        if machine.locked:
            found = environment.wheels(machine.base, machine.arch)
            environment.require_digests(machine.base, found)
            where = ["--python", str(final / "bin" / "python3")]
            environment.install(found, where, machine.base.data.name, settings, tick)
            environment.check_torch(machine.base, locked.site_packages(final, machine.interpreter.minor))
        atomic_write(final / _WHOLE, "")
    return final


def environment_place(machine: Machine, settings: Settings) -> Path:
    """Where `ensure` puts it."""
    name = hashlib.sha256(
        f"{_kind(machine)} {machine.interpreter.executable} {machine.interpreter.version}".encode()
    ).hexdigest()
    return settings.home / "host" / "environments" / name[:32]


def _kind(machine: Machine) -> str:
    return environment.digest(machine.base, machine.arch) if machine.locked else " ".join(map(str, machine.interpreter.sites))


def _venv(machine: Machine, into: Path, *besides: Path) -> None:
    """An empty virtual environment of the machine's Python, which also sees `besides` and a named environment's packages."""
    command = [str(machine.interpreter.executable), "-m", "venv", "--without-pip", str(into)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept, cwd="/")
    if done.returncode:
        raise HostError(
            f"{machine.interpreter.executable} makes no virtual environment: {(done.stdout + done.stderr).strip()[-300:]}",
            remedy="install its module venv, or name another Python",
        )
    others = [*besides, *(() if machine.locked else machine.interpreter.sites)]
    if others:
        lines = "".join(f"import site; site.addsitedir({str(one)!r})\n" for one in others)
        (locked.site_packages(into, machine.interpreter.minor) / "gracefarm.pth").write_text(lines)


def fresh(machine: Machine, base: Path, into: Path, wheel: Path) -> Path:
    """Another clean environment, over that of the build, with `wheel` in it alone.

    Raises:
        InstallError: the wheel does not fit this Python, or is damaged.
    """
    remove_tree(into)
    into.parent.mkdir(parents=True, exist_ok=True)
    _venv(machine, into, *([locked.site_packages(base, machine.interpreter.minor)] if machine.locked else []))
    environment.install_wheel(
        wheel,
        ["--python", str(into / "bin" / "python3")],
        lambda message: InstallError(
            f"{wheel.name} cannot be installed: {message}", remedy="run `builder audit` on the wheel"
        ),
    )
    return into


def cuda_home(machine: Machine, settings: Settings) -> Path | None:
    """A CUDA_HOME of links into the machine's toolkit with our nvcc in front, whatever its layout; None without CUDA."""
    top = machine.cuda_home
    if top is None:
        return None
    digest = hashlib.sha256(f"{CUDA_LAYOUT} {top} {machine.digest()}".encode()).hexdigest()
    final = settings.home / "host" / "cuda" / digest[:32]
    with lock(final.with_name(f"{final.name}.lock")):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                _link_toolkit(top, folder)
    return final


def _link_toolkit(top: Path, folder: Path) -> None:
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir()
    for name in ("bin", "include"):
        for entry in sorted((top / name).iterdir()):
            if entry.name != "nvcc":
                (folder / name / entry.name).symlink_to(entry)
    with as_file(files("builder") / "data" / "toolchain" / "nvcc") as wrapper:
        (folder / "bin" / "nvcc").write_bytes(wrapper.read_bytes())
    (folder / "bin" / "nvcc").chmod(0o755)
    for entry in sorted(one for part in ("lib64", "lib") for one in (top / part).glob("*")):
        short = entry.name.split(".so")[0] + ".so" if ".so." in entry.name else entry.name
        # A toolkit out of wheels has libcudart.so.13 and no name to link with.
        for name in {entry.name, short}:
            if not (folder / "lib64" / name).is_symlink() and not ((top / "lib64" / name).exists() and name != entry.name):
                (folder / "lib64" / name).symlink_to(entry)
    (folder / "lib").symlink_to("lib64")
    for name in ("nvvm", "targets", "extras"):
        if (top / name).exists():
            (folder / name).symlink_to(top / name)


def variables(plan: Plan, site: Path, settings: Settings, folder: Path, *, jobs: int, epoch: int) -> dict[str, str]:
    """The environment of a build: a sandbox's, with this machine's places in it; and the loader's path, where one is set."""
    machine = plan.machine
    assert machine is not None
    found = locked.variables(plan, jobs=jobs, epoch=epoch)
    found = {name: value.replace("/build/", f"{folder}/") for name, value in found.items()}
    home = cuda_home(machine, settings)
    with as_file(files("builder") / "data" / "host" / "host.cmake") as place:
        cmake = settings.home / "host" / "host.cmake"
        atomic_write(cmake, place.read_bytes())
    front = settings.home / "host" / "front.py"
    with as_file(files("builder") / "data" / "toolchain" / "front.py") as place:
        atomic_write(front, place.read_bytes())
    found |= {
        "PATH": f"{folder / 'bin'}:{search_path(machine, site, home)}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "CC": os.environ.get("CC") or "gcc",
        "CXX": os.environ.get("CXX") or "g++",
        "CMAKE_TOOLCHAIN_FILE": str(cmake),
        "GRACEFARM_FRONT": f"{sys.executable} -I -S {front}",
        "GRACEFARM_SCHEDULER": f"{sys.executable} -I -S {locked.wrappers(settings)}/lib/schedule.py",
        "GRACEFARM_PYTHON": str(site / "bin" / "python3"),
        "GRACEFARM_PYTHON_INCLUDE": str(machine.interpreter.header.parent),
    }
    if home is not None and machine.cuda_home is not None:
        found |= {"CUDA_HOME": str(home), "CUDA_PATH": str(home), "CUDACXX": str(home / "bin" / "nvcc")}
        found |= {"GRACEFARM_NVCC": str(machine.cuda_home / "bin" / "nvcc"), "GRACEFARM_CCBIN": ""}
    if machine.cxx_runtime is not None:
        # Before the objects: what is found in it is not looked for in libstdc++.a, which the compiler adds at the end.
        found["LDFLAGS"] = (
            f"{found.get('LDFLAGS', '')} -Wl,--push-state,--no-as-needed,{machine.cxx_runtime},--pop-state".strip()
        )
    return found | library_path()


def search_path(machine: Machine, site: Path, home: Path | None = None) -> str:
    """PATH: our nvcc, the clean environment, the scripts of the named one, this machine's programs."""
    places = [*([home / "bin"] if home else []), site / "bin", machine.interpreter.scripts]
    return ":".join([*map(str, places), *dict.fromkeys([*os.environ.get("PATH", os.defpath).split(":"), "/usr/bin", "/bin"])])


def library_path() -> dict[str, str]:
    """LD_LIBRARY_PATH, without which the torch of some machines does not load."""
    value = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": value} if value else {}


def place(plan: Plan, site: Path, settings: Settings, folder: Path, *, jobs: int, epoch: int, memory: int) -> Plain:
    """Where a host build compiles: the folder itself, without network where that can be had."""
    machine = plan.machine
    assert machine is not None
    (folder / "home").mkdir(parents=True, exist_ok=True)
    _ninja(folder / "bin", settings)
    return Plain(
        environment=variables(plan, site, settings, folder, jobs=jobs, epoch=epoch),
        workdir=str(folder),
        memory=memory,
        network=machine.uncut is not None,
    )


def _ninja(folder: Path, settings: Settings) -> None:
    """A folder for the front of PATH with our ninja alone, under each name that CMake finds the machine's by."""
    remove_tree(folder)
    folder.mkdir()
    for name in ("ninja", *(["ninja-build"] if shutil.which("ninja-build") else [])):
        (folder / name).symlink_to(locked.wrappers(settings) / "bin" / "ninja")


def cuobjdump(machine: Machine, packages: Path) -> Path | None:
    """NVIDIA's reader of device code: the toolkit's, one of the environment's wheels, or one on PATH."""
    own = [machine.cuda_home / "bin" / "cuobjdump"] if machine.cuda_home else []
    sites = [packages] if machine.locked else machine.interpreter.sites
    for place in (*own, *(one for site in sites for one in sorted(site.glob("nvidia/*/bin/cuobjdump")))):
        if os.access(place, os.X_OK):
            return place
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def clear_products(tree: Path, epoch: int) -> Sequence[Path]:
    """Remove what a cut-off build may have left half written and would take for whole: libraries. Objects are ninja's affair.

    The files of the source all have the time `epoch`.
    """
    stale = [one for one in tree.rglob("*.so") if one.is_file() and int(one.stat().st_mtime) != epoch]
    for one in stale:
        one.unlink()
    return stale
