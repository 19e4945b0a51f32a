"""An interpreter in the sandbox: at /env/python, started by a native launcher if host and target differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from builder.ground.bytecode import INSIDE, NativePython, compile_files
from builder.planning.settings import Settings
from builder.planning.stack import Arch, Interpreter
from gracefarm.console import Tick
from gracefarm.files import atomic_directory, lock

PREFIX = f"{INSIDE}/python"
PROGRAM = "libexec/python"
"The executable; bin/ may have a launcher for it."


def ensure(interpreter: Interpreter, host: Arch, target: Arch, root: Path, settings: Settings, tick: Tick) -> Path:
    """The interpreter's folder; assembled if it does not exist. Several processes may call this: one assembles, others wait.

    Raises:
        ConfigError, FetchError, DigestError, RootError: see Interpreter.
        HostError, DiskFullError.
    """
    final = _place(interpreter, host, target, settings)
    if final.is_dir():
        return final / "python"
    with lock(final.with_name(f"{final.name}.lock"), lambda: tick(0, None, "another process is assembling this interpreter")):
        if not final.is_dir():
            native = None if host is target else ensure(interpreter, host, host, root, settings, tick)
            with atomic_directory(final) as environment:
                folder = environment / "python"
                folder.mkdir()
                interpreter.unpack(target, folder, settings, tick)
                _launch(interpreter, host, target, folder)
                tick(0, None, f"byte-compiling Python {interpreter.python}")
                compile_files(root, INSIDE, environment, python=native_python(interpreter, host, native or folder))
    return final / "python"


def absent(interpreter: Interpreter, host: Arch, target: Arch, settings: Settings) -> list[str]:
    """URLs of the files that `ensure` would fetch for the build of a cell."""
    wanted = [arch for arch in sorted({host, target}) if not _place(interpreter, host, arch, settings).is_dir()]
    return [url for arch in wanted for url in interpreter.absent(arch, settings)]


def _place(interpreter: Interpreter, host: Arch, target: Arch, settings: Settings) -> Path:
    content = [host.value, interpreter.digest(target)]
    return settings.home / "interpreters" / hashlib.sha256(json.dumps(content).encode()).hexdigest()


def native_python(interpreter: Interpreter, host: Arch, folder: Path) -> NativePython:
    """The host's interpreter, which byte-compiles for the target's interpreter."""
    name = f"/build/bin/python{interpreter.python}"
    command = interpreter.command(host, "/build", PROGRAM)
    return NativePython(folder=folder, command=tuple(part.replace('"$0"', name) for part in command))


def executable(folder: Path) -> Path:
    """The file of an assembled interpreter that exports Python's C API."""
    return next(iter(sorted(folder.glob("lib/libpython3*.so.1.0"))), folder / PROGRAM)


def _launch(interpreter: Interpreter, host: Arch, target: Arch, folder: Path) -> None:
    """Write bin/pythonX.Y, which starts the executable with the interpreter's loader, and with qemu if host and target
    differ, so that binfmt_misc is not required."""
    launcher = folder / "bin" / f"python{interpreter.python}"
    (folder / "libexec").mkdir(exist_ok=True)
    launcher.rename(folder / PROGRAM)
    command = interpreter.command(target, PREFIX, PROGRAM)
    if host is not target:
        # -0 sets argv[0], from which Python finds its virtual environment; a loader has its own option for it.
        called = () if '"$0"' in command else ("-0", '"$0"')
        command = (f"/usr/bin/qemu-{target}-static", *called, *command)
    if command == (f"{PREFIX}/{PROGRAM}",):
        # A link: the executable finds its files relative to its own path.
        (folder / PROGRAM).rename(launcher)
        (folder / PROGRAM).symlink_to(f"../bin/{launcher.name}")
    else:
        launcher.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        launcher.chmod(0o755)
    for name in ("python3", "python"):
        link = folder / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(launcher.name)
