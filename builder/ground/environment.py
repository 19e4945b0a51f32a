"""Environments, the CUDA compiler and build programs, installed from their locks.

An environment is the target's site-packages from requirements.lock, as the virtual environment /env of the sandbox.
uv unpacks the wheels (hard links from its cache); the root's native Python byte-compiles them, once for each wheel. An
environment is read-only and shared by all builds; `fresh` makes a copy of hard links, to which one more wheel can be added.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from builder.ground import bytecode, toolkit, torch_facts, uv, wheels
from builder.ground.interpreters import tree
from builder.planning import pins
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack, host_arch
from builder.planning.tags import tags_of
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, InstallError, RootError
from gracefarm.files import atomic_directory, atomic_write, lock

ELF_MAGIC = b"\x7fELF"
SHEBANG = f"#!{bytecode.INSIDE}/bin/python3\n".encode()


def ensure(
    stack: LoadedStack, target: Arch, root: Path, settings: Settings, tick: Tick = no_tick, *, host: Arch | None = None
) -> Path:
    """The environment's folder; assembled if it does not exist. Several processes may call this: one assembles, others wait.

    `host`: the machine that runs it, since the interpreter's launcher depends on it; None: this machine.

    Raises:
        ConfigError: see `wheels`.
        FetchError, DigestError: a wheel cannot be fetched, or differs from its pin.
        RootError: a wheel cannot be unpacked, or torch is for another CUDA than the stack.
        HostError, DiskFullError.
    """
    host = host or host_arch()
    locked = pins.wheels(stack, target)
    wheels.require_digests(stack, locked)
    name = pins.environment_digest(stack, target)
    final = settings.home / "environments" / name
    if final.is_dir():
        # The digest does not contain the stack's CUDA: another stack may have assembled the same wheels.
        torch_facts.check(stack, final / "lib" / f"python{stack.python}" / "site-packages")
        return final
    with lock(final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process is assembling this environment")):
        if not final.is_dir():
            python = bytecode.ROOTS_OWN
            with atomic_directory(final) as folder:
                if stack.interpreter is not None:
                    own = tree.ensure(stack.interpreter, host, target, root, settings, tick)
                    native = tree.ensure(stack.interpreter, host, host, root, settings, tick)
                    python = tree.native_python(stack.interpreter, host, native)
                    _copy_links(own, folder / "python")
                site = folder / "lib" / f"python{stack.python}" / "site-packages"
                wheels.install(locked, place_of(stack, target, site), stack.data.name, settings, tick)
                torch_facts.check(stack, site)
                _lay_out(folder, stack, target)
                _relocate_scripts(folder, site)
                bytecode.fill_in(folder, site, locked, root, stack, settings, tick, python)
                _date_headers(site)
                _make_read_only(folder)
    return final


def ensure_toolchain(stack: LoadedStack, host: Arch, settings: Settings, tick: Tick = no_tick) -> Path:
    """The folder with the CUDA compiler of the host: nvidia/cu13/bin/nvcc and its parts.

    Raises:
        ConfigError: see `wheels`; or the stack does not name a compiler.
        FetchError, DigestError, RootError, HostError, DiskFullError: see `ensure`.
    """
    stack = stack.base  # the same compilers for every Python
    locked = pins.toolchain_wheels(stack, host)
    if not locked and stack.data.toolchain.debian is None:
        raise ConfigError(
            f"stack {stack.data.name} has no CUDA compiler",
            remedy="in stack.toml, list the wheels of the compiler in `requirements` of [toolchain]",
        )
    name = pins.toolchain_digest(stack, host)
    final = settings.home / "toolchains" / name
    if final.is_dir():
        return final
    with lock(final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process is assembling this CUDA compiler")):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                if locked:
                    wheels.install(locked, place_of(stack, host, folder), stack.data.name, settings, tick)
                toolkit.unpack(stack, host, folder, settings, tick)
                if not any(os.access(nvcc, os.X_OK) for nvcc in folder.glob("nvidia/cu*/bin/nvcc")):
                    raise RootError(
                        "the wheels and packages of [toolchain] contain no nvcc", remedy="correct [toolchain] in stack.toml"
                    )
                _date_headers(folder)
                _make_read_only(folder)
    return final


def ensure_tools(stack: LoadedStack, host: Arch, settings: Settings, tick: Tick = no_tick) -> Path | None:
    """The folder with programs of the host that a recipe requires for its build; None: it requires no programs.

    Raises:
        ConfigError, FetchError, DigestError, RootError, HostError, DiskFullError: see `ensure`.
    """
    locked = pins.tool_wheels(stack, host)
    if not locked:
        return None
    name = pins.digest_of("tools", stack.python, host, locked)
    final = settings.home / "toolchains" / name
    with lock(
        final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process is assembling this folder of build programs")
    ):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                wheels.install(locked, place_of(stack, host, folder), stack.data.name, settings, tick)
                # Python scripts of a wheel would run with the interpreter of this program.
                for script in sorted((folder / "bin").glob("*")):
                    if script.read_bytes()[:4] != ELF_MAGIC:
                        script.unlink()
                _make_read_only(folder)
    return final


def programs(tools: Path) -> list[str]:
    """The folders with programs below a folder of `ensure_tools`, relative: where wheels of CMake have them, then scripts."""
    places = [*sorted(tools.glob("*/data/bin")), tools / "bin"]
    return [str(place.relative_to(tools)) for place in places if place.is_dir()]


def fresh(environment: Path, into: Path) -> Path:
    """A copy of an environment, to which wheels can be added.

    Its files are hard links, so `into` must be on the environment's file system. Installing replaces files and never writes
    into a linked file.

    Raises:
        RootError: the copy cannot be made.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    _copy_links(environment, into)
    return into


def _copy_links(folder: Path, into: Path) -> None:
    """A copy of a folder whose files are hard links.

    Raises:
        RootError: the copy cannot be made.
    """
    copied = subprocess.run(
        ["cp", "--archive", "--link", "--no-target-directory", folder, into], capture_output=True, text=True, check=False
    )
    if copied.returncode:
        if os.strerror(errno.ENOSPC) in copied.stderr:
            raise OSError(errno.ENOSPC, copied.stderr)
        raise RootError(f"{folder} cannot be copied to {into}: {copied.stderr.strip()[:500]}", remedy="run `builder doctor`")


def add(into: Path, wheel: Path, glibc: str) -> None:
    """Install one more wheel in a copy that `fresh` made, without its dependencies.

    `glibc` is the highest manylinux level that the stack allows, as 2_34: stacks with different levels share environments.

    Raises:
        InstallError: the wheel does not fit the environment's Python or architecture, or is damaged.
    """
    facts = dict(line.split(" = ", 1) for line in (into / "pyvenv.cfg").read_text().splitlines())
    python, target = facts["gracefarm-python"], facts["gracefarm-platform"].partition("-manylinux_")[0]
    platform = f"{target}-manylinux_{glibc}"
    _check_tags(wheel, python, glibc, Arch(target))
    site = into / "lib" / f"python{python}" / "site-packages"
    wheels.install_file(
        wheel,
        [
            *("--python", sys.executable, f"--target={site}"),
            *(f"--python-version={python.rstrip('t')}", f"--python-platform={platform}"),
        ],
        lambda message: InstallError(
            f"{wheel.name} cannot be installed: {message}", remedy="check the wheel with `builder audit WHEEL --stack NAME`"
        ),
    )
    _relocate_scripts(into, site)


def _check_tags(wheel: Path, python: str, glibc: str, arch: Arch) -> None:
    """Check a wheel's tags, since uv installs any wheel that is given by path."""
    try:
        _, _, _, has = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise InstallError(
            f"{wheel.name} is not a valid file name of a wheel: {error}", remedy="rename it as the wheel format requires"
        ) from error
    if has.isdisjoint(tags_of(python, glibc, arch)):
        raise InstallError(
            f"{wheel.name} is not for Python {python} on {arch} with glibc {glibc.replace('_', '.')}",
            remedy="use a stack whose Python and glibc fit the wheel",
        )


def place_of(stack: LoadedStack, arch: Arch, site: Path) -> list[str]:
    return ["--python", sys.executable, f"--target={site}", *uv.platform(stack, arch)]


def _lay_out(folder: Path, stack: LoadedStack, target: Arch) -> None:
    """Write the files that make it a virtual environment. Python ignores the keys gracefarm-*, which are for `fresh`."""
    (folder / "bin").mkdir()
    home = "/usr/bin" if stack.interpreter is None else f"{tree.PREFIX}/bin"
    (folder / "pyvenv.cfg").write_text(
        f"home = {home}\n"
        "include-system-site-packages = false\n"
        f"version = {stack.python.rstrip('t')}\n"
        f"gracefarm-python = {stack.python}\n"
        f"gracefarm-platform = {target}-manylinux_{stack.data.glibc[target]}\n"
    )
    (folder / "bin" / "python3").symlink_to(f"{home}/python{stack.python}")
    for name in ("python", f"python{stack.python}"):
        (folder / "bin" / name).symlink_to("python3")


def _relocate_scripts(folder: Path, site: Path) -> None:
    """Move scripts from where `uv pip install --target` puts them to bin/, with the Python of /env, and update RECORD."""
    if not (site / "bin").is_dir():
        return
    moved: dict[str, list[str]] = {}
    for script in sorted((site / "bin").iterdir()):
        data = script.read_bytes()
        # uv wrote the path of the Python that runs this program; a long path is written as a shell script of two lines.
        text = re.sub(rb"\A#!(?:[^\n]*python[^\n]*\n|/bin/sh\n'''exec' [^\n]*\n' '''\n)", SHEBANG, data, count=1)
        place = folder / "bin" / script.name
        place.unlink(missing_ok=True)
        place.write_bytes(text)
        place.chmod(script.stat().st_mode)
        script.unlink()
        secure = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        moved[f"bin/{script.name}"] = [f"../../../bin/{script.name}", f"sha256={secure}", str(len(text))]
    (site / "bin").rmdir()
    for record in site.glob("*.dist-info/RECORD"):
        rows = list(csv.reader(io.StringIO(record.read_text())))
        if any(row and row[0] in moved for row in rows):
            output = io.StringIO()
            csv.writer(output, lineterminator="\n").writerows(moved.get(row[0], row) for row in rows if row)
            atomic_write(record, output.getvalue())


def _date_headers(site: Path) -> None:
    """Give each header a date that depends only on its path below `site`.

    gcc omits a header with `#pragma once` if it has read a header with the same content, size and date (in seconds). uv dates
    files by the time at which it unpacks them. So without this function, the preprocessed text depends on the speed of the
    machine, and the caches on other machines do not find it.
    """
    for parent, _, names in os.walk(site):
        inside = Path(parent).relative_to(site)
        if "include" not in inside.parts:
            continue
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 tens of thousands of files
            if stat.S_ISREG(os.lstat(path).st_mode):
                number = int.from_bytes(hashlib.sha256(os.fsencode(inside / name)).digest()[:8], "big")
                date = _FIRST_DATE + number % _DATES
                os.utime(path, (date, date))


_FIRST_DATE, _DATES = 315_532_800, 1 << 29
"From 1980-01-01 on, for 17 years: a compiler cache does not keep results of headers that are newer than the compilation."


def _make_read_only(folder: Path) -> None:
    """Make the shared files read-only; folders stay writable, so that the environment can be removed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 tens of thousands of files
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and mode & 0o222:
                os.chmod(path, stat.S_IMODE(mode) & ~0o222)  # noqa: PTH101
