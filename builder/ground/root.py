"""The root: the read-only Debian tree of the sandbox, assembled from root.lock without maintainer scripts.

If host and target differ, the compilers are the host's and Python is the target's: /usr/bin/python3.11 is a native launcher
that starts the target's Python with qemu-user. /opt/gracefarm/bin is first on PATH in a build and has the stack's compilers
under their plain names. docs/reference/stacks.md describes the layout.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.resources import files
from pathlib import Path

from builder.ground import debian
from builder.ground.bytecode import NATIVE_PYTHON, compile_files
from builder.planning import packages
from builder.planning.packages import Deb
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from gracefarm.console import Tick, no_tick
from gracefarm.errors import RootError
from gracefarm.files import atomic_directory, lock

OWN = Path("usr/libexec/gracefarm")
BIN = Path("opt/gracefarm/bin")

_MERGED = ("bin", "sbin", "lib", "lib64")
_FOLDERS = ("etc", "dev", "proc", "sys", "tmp", "run", "home", "env", "build")
"etc and mount points."
_LEFT_OUT = ("doc", "man", "info", "locale", "lintian", "bug", "doc-base", "icons", "applications", "bash-completion", "zsh")
"Folders of usr/share that builds do not read."
_PLAIN = {
    "usr/bin/awk": "mawk",
    "usr/bin/which": "which.debianutils",
    "usr/bin/sh": "dash",
}
"Links that maintainer scripts would have made."
_COMPILERS = {"cc": "gcc", "gcc": "gcc", "c++": "g++", "g++": "g++", "cpp": "cpp", "gcov": "gcov"}
_COMPILERS |= {f"gcc-{tool}": f"gcc-{tool}" for tool in ("ar", "nm", "ranlib")}


def ensure(stack: LoadedStack, host: Arch, target: Arch, settings: Settings, tick: Tick = no_tick) -> Path:
    """The root's folder; assembled if it does not exist. Several processes may call this: one assembles, the others wait.

    Raises:
        ConfigError: see `packages`.
        FetchError: the mirror does not have a package.
        DigestError: a package of the mirror differs from its pin.
        RootError: a package cannot be unpacked, or qemu, Python or the compiler was removed from an assembled root.
        HostError: dpkg-deb, tar or the sandbox is missing.
        DiskFullError: no space left.
    """
    name = packages.root_digest(stack, host, target)
    final = settings.home / "roots" / name
    if final.is_dir():
        if (program := lost(final, stack, host, target)) is not None:
            raise RootError(
                f"{program} is missing in the root file system {final}",
                remedy="remove this root file system with `builder doctor --fix`; the next build assembles it again from the "
                "downloaded packages",
                repeat="builder doctor --fix",
            )
        return final
    with lock(final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process is assembling this root")):
        if not final.is_dir():
            pinned = packages.of_root(stack, host, target)
            places = debian.fetch(pinned, stack.root.suite, stack.data.name, settings, tick)
            with atomic_directory(final) as folder:
                _unpack_all(folder, pinned, places, stack, host, target, tick)
                _lay_out(folder, stack, host, target)
                compile_files(folder, f"/usr/lib/python{stack.data.python}", folder / "usr/lib" / f"python{stack.data.python}")
    return final


def lost(folder: Path, stack: LoadedStack, host: Arch, target: Arch) -> str | None:
    """The first required program that is missing in an assembled root; None if all exist."""
    gcc = f"{target.triplet}-gcc-{stack.data.toolchain.gcc}"
    programs = [f"/usr/bin/python{stack.data.python}", NATIVE_PYTHON, f"/usr/bin/{gcc}"]
    if stack.uses_rust:
        programs += ["/usr/bin/cargo", "/usr/bin/rustc"]
    if host is not target:
        programs.insert(0, f"/usr/bin/qemu-{target}-static")
    return next((program for program in programs if not os.path.lexists(folder / program[1:])), None)


def _unpack_all(
    folder: Path,
    pinned: Sequence[Deb],
    places: dict[str, Path],
    stack: LoadedStack,
    host: Arch,
    target: Arch,
    tick: Tick,
) -> None:
    """Unpack in parallel, largest first; the target's packages last, since packages of both architectures share files."""
    for name in _MERGED:
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    foreign = [deb for deb in pinned if deb.arch == target.debian and host is not target]
    count = 0
    for group in ([deb for deb in pinned if deb not in foreign], foreign):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            futures = [
                pool.submit(_unpack, places[deb.sha256], folder, deb, _wanted(deb, stack, host, target))
                for deb in sorted(group, key=lambda deb: -deb.size)
            ]
            try:
                for future in as_completed(futures):
                    future.result()
                    count += 1
                    tick(count, len(pinned), "packages unpacked")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _wanted(deb: Deb, stack: LoadedStack, host: Arch, target: Arch) -> tuple[str, ...]:
    """The files to unpack, for a package of which only a few are needed; () for all."""
    if host is not target and deb.name == "qemu-user-static":
        return (f"./usr/bin/qemu-{target}-static", f"./usr/lib/binfmt.d/qemu-{target}.conf")
    if host is not target and deb.name == packages.native_python(stack) and deb.arch == host.debian:
        return (f"./usr/bin/python{stack.data.python}",)
    return ()


def _unpack(archive: Path, folder: Path, deb: Deb, wanted: tuple[str, ...]) -> None:
    into = folder
    if wanted and deb.name.startswith("python"):
        into = folder / OWN / "native-python"
        into.mkdir(parents=True)
    debian.unpack(archive, into, deb, [*(f"--exclude=./usr/share/{name}" for name in _LEFT_OUT), *wanted])


def _lay_out(folder: Path, stack: LoadedStack, host: Arch, target: Arch) -> None:
    """Do what maintainer scripts would have done, as far as a build requires it, and add our files."""
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    for source in (files("builder") / "data" / "root" / "etc").iterdir():
        (folder / "etc" / source.name).write_bytes(source.read_bytes())
    for link, to in _PLAIN.items():
        if not (folder / link).exists():
            (folder / link).symlink_to(to)
    (folder / OWN).mkdir(parents=True, exist_ok=True)
    (folder / BIN).mkdir(parents=True, exist_ok=True)
    _link_compilers(folder, stack.data.toolchain.gcc, target)
    if host is not target:
        _link_host_compilers(folder, stack.data.toolchain.gcc, host)
    _lay_out_python(folder, stack.data.python, host, target)
    if host is not target:
        _pretend(folder, host, target)


def _link_compilers(folder: Path, gcc: int, target: Arch) -> None:
    """Link gcc of one version and binutils under their plain names and their names with the target's triplet.

    gcc finds its parts relative to the target of the link, so copies would not work.
    """
    tools, links = folder / "usr/bin", folder / BIN
    prefix = f"{target.triplet}-"
    for path in sorted(tools.glob(f"{prefix}*")):
        _link(links / path.name.removeprefix(prefix), f"/usr/bin/{path.name}")
    for plain, versioned in _COMPILERS.items():
        own = f"{prefix}{versioned}-{gcc}"
        if not (tools / own).exists():
            raise RootError(
                f"the root file system of the stack has no /usr/bin/{own}",
                remedy="in stack.toml, correct [root] or the key gcc of [toolchain]; then run `builder lock STACK`",
            )
        for name in (plain, f"{prefix}{plain}"):
            _link(links / name, f"/usr/bin/{own}")


def _link_host_compilers(folder: Path, gcc: int, host: Arch) -> None:
    """Link the host's compilers under names with the host's triplet, if the root has them, for programs that a build runs.

    Plain `as` and `ld` are the target's, so each compiler gets -B with the folder of the host's.
    """
    for plain, versioned in _COMPILERS.items():
        program = f"usr/bin/{host.triplet}-{versioned}-{gcc}"
        if (folder / program).exists():
            place = folder / BIN / f"{host.triplet}-{plain}"
            place.write_text(f'#!/bin/sh\nexec /{program} -B/usr/bin/ "$@"\n')
            place.chmod(0o755)


def _link(place: Path, program: str) -> None:
    place.unlink(missing_ok=True)
    place.symlink_to(program)


def _lay_out_python(folder: Path, python: str, host: Arch, target: Arch) -> None:
    interpreter = folder / f"usr/bin/python{python}"
    native = folder / NATIVE_PYTHON[1:]
    if not interpreter.is_file():
        raise RootError(
            f"the root file system of the stack has no /usr/bin/python{python}",
            remedy="correct [root] in stack.toml, then run `builder lock STACK`",
        )
    if host is target:
        native.symlink_to(f"/usr/bin/python{python}")
    else:
        interpreter.rename(folder / OWN / f"python{python}-{target}")
        (folder / OWN / "native-python" / f"usr/bin/python{python}").rename(native)
        shutil.rmtree(folder / OWN / "native-python")
        _install("python", interpreter, host, target, python)
    for name in ("python3", "python"):
        _link(folder / "usr/bin" / name, f"python{python}")


def _pretend(folder: Path, host: Arch, target: Arch) -> None:
    """Make uname and arch name the target, and pkg-config find its libraries."""
    (folder / OWN / "native").mkdir()
    for name in ("uname", "arch"):
        program = folder / "usr/bin" / name
        program.rename(folder / OWN / "native" / name)
        _install("machine", program, host, target)
    for name in ("pkg-config", f"{target.triplet}-pkg-config"):
        _install("pkg-config", folder / BIN / name, host, target)


def _install(script: str, place: Path, host: Arch, target: Arch, python: str = "") -> None:
    """Install one of our scripts with its @WORDS@ replaced."""
    text = (files("builder") / "data" / "root" / script).read_text()
    for word, value in {"HOST": host, "TARGET": target, "PYTHON": python, "TRIPLET": target.triplet}.items():
        text = text.replace(f"@{word}@", value)
    place.write_text(text)
    place.chmod(0o755)
