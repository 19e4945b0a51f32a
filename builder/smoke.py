"""Does the wheel load? A fresh environment plus the wheel, another working directory, imports by name; then a GPU, if any."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from builder.box import sandbox
from builder.box.plain import Plain
from builder.box.sandbox import Mount, Outcome, Sandbox
from builder.compiling.pep517 import first_error
from builder.ground import environment as environments
from builder.proof.record import GpuResult, SmokeResult
from builder.toolchains import hosted
from builder.toolchains.machine import Machine
from gracefarm.errors import SmokeError
from gracefarm.files import remove_tree

MARK = "GRACEFARM"
TRAP = "raise ImportError('imported from the working directory: the import did not reach the installed wheel')\n"
WORKDIR = "/smoke"
"Also the driver's folder, so that a Python that looks in either finds the decoys first."
DRIVER_FOLDER = "/run/driver"
"Of the sandbox: NVIDIA's user-space driver, which comes with the kernel's and is in no lock."
GPU_VARIABLES: Mapping[str, str] = {
    "LD_LIBRARY_PATH": DRIVER_FOLDER,
    # triton else asks `ldconfig -p`, which fails in a root: no maintainer script has run, so there is no /etc/ld.so.cache.
    "TRITON_LIBCUDA_PATH": DRIVER_FOLDER,
}


@dataclass(frozen=True, kw_only=True)
class Bed:
    """Where wheels are tried: an environment of the stack in its root, or over this machine's own Python."""

    environment: Path
    root: Path
    machine: Machine | None = None
    emulated: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One wheel, what is asked of it, and where."""

    wheel: Path
    imports: tuple[str, ...]
    script: Path | None
    bed: Bed
    folder: Path
    "Scratch space, on the environment's file system."
    memory: int
    log: Path


@dataclass(frozen=True, kw_only=True)
class Clean:
    """A clean environment with the wheel, and how to run the driver in it."""

    prefix: str
    "The environment, and below it the files, as the command sees them."
    files: str
    place: Sandbox | Plain


def prepare(folder: Path, imports: Sequence[str], script: Path | None) -> None:
    """Lay out the working directory: the driver, smoke.py and, under each import's name, a decoy that must not be found."""
    remove_tree(folder)
    folder.mkdir(parents=True)
    for top in {name.split(".")[0] for name in imports}:
        (folder / f"{top}.py").write_text(TRAP)
    for name, source in (("driver.py", "smoke_driver.py"), ("gpu.py", "gpu_probe.py")):
        (folder / name).write_bytes((files("builder") / "data" / source).read_bytes())
    if script is not None:
        shutil.copy(script, folder / "smoke.py")


def driver(
    imports: Sequence[str], script: Path | None, prefix: str = "/env", folder: str = WORKDIR, elsewhere: Sequence[str] = ()
) -> tuple[str, ...]:
    """The command inside; modules of `elsewhere` may come from outside the environment."""
    words = (",".join(imports), f"{folder}/smoke.py" if script else "-", ",".join(elsewhere) or "-")
    return (f"{prefix}/bin/python3", "-P", f"{folder}/driver.py", *words)


def variables() -> dict[str, str]:
    """The environment of a smoke test."""
    return {
        "PATH": "/env/bin:/opt/gracefarm/bin:/usr/bin:/bin",
        "HOME": "/home/build",
        "LC_ALL": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": "/tmp",  # noqa: S108 the sandbox's own
        "OMP_NUM_THREADS": "1",
    }


def run(trial: Trial) -> tuple[SmokeResult, Outcome, tuple[str, ...]]:
    """Import the wheel in a fresh environment.

    Raises:
        SmokeError: an import or smoke.py failed; carries the first error of its output. Or nothing imported is the wheel's.
    """
    with _clean(trial) as clean:
        command = driver(trial.imports, trial.script, clean.prefix, clean.files, _elsewhere(trial))
        said, outcome = _said(trial, clean, command, "does not work in a clean environment")
    result = SmokeResult.model_validate_json(said)
    _require_own(trial.wheel, result)
    return result, outcome, command


def _require_own(wheel: Path, result: SmokeResult) -> None:
    """The environment has many modules: one that imports proves nothing of a wheel that does not bring it."""
    brought = _brought(wheel)
    for place in result.modules.values():
        inside = place.partition("/site-packages/")[2]
        # A namespace package has no file of its own; its place is a folder.
        if any(name == inside or name.startswith(f"{inside}/") for name in brought):
            return
    raise SmokeError(
        f"none of {', '.join(result.modules)} comes from {wheel.name}: they are the environment's own",
        remedy="name the wheel's own modules in [smoke] imports",
    )


def _brought(wheel: Path) -> list[str]:
    """The wheel's files, as they lie in site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        return [re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", name) for name in archive.namelist()]


def run_gpu(trial: Trial, sm: Sequence[str]) -> GpuResult:
    """Run smoke_gpu.py (the trial's script) where torch sees a GPU of the architectures `sm`; else say why it was not run.

    Raises:
        SmokeError: it ran and failed.
    """
    if trial.bed.emulated:
        return GpuResult(status="not run", reason="no GPU: the wheel's architecture is emulated here")
    if not devices():
        return GpuResult(status="not run", reason="no GPU")
    with _clean(trial, gpu=True) as clean:
        probe = (f"{clean.prefix}/bin/python3", "-P", f"{clean.files}/gpu.py")
        said, _ = _said(trial, clean, probe, "is not tried on a GPU: torch fails")
        found = json.loads(said)
        if "reason" in found:
            return GpuResult(status="not run", reason=found["reason"])
        if found["sm"] not in [re.sub(r"\D", "", one) for one in sm]:
            reason = f"{found['device']} is sm_{found['sm']}, the wheel is for {', '.join(f'sm_{one}' for one in sm)}"
            return GpuResult(status="not run", reason=reason)
        command = driver(trial.imports, trial.script, clean.prefix, clean.files, _elsewhere(trial))
        said, outcome = _said(trial, clean, command, f"is wrong on {found['device']}")
    script = SmokeResult.model_validate_json(said).script
    return GpuResult(status="passed", device=found["device"], script=script, wall_s=round(outcome.wall_s, 2))


def sentence(result: GpuResult) -> str:
    """What the console says of it."""
    if result.status == "not run":
        return f"not run: {result.reason}"
    return f"passed on {result.device} in {result.wall_s:.0f} s: {(result.script or 'no output').strip()}"


def devices() -> list[Path]:
    """The device files of NVIDIA's driver on this machine; empty without a GPU."""
    found = sorted(Path("/dev").glob("nvidia*"))
    return found if any(re.fullmatch(r"nvidia\d+", one.name) for one in found) else []


def _elsewhere(trial: Trial) -> list[str]:
    """Modules that are not the wheel's own: over this machine's Python, torch comes from there."""
    if trial.bed.machine is None:
        return []
    own = {name.split("/")[0].split(".")[0] for name in _brought(trial.wheel)}
    return [name for name in trial.imports if name.split(".")[0] not in own]


@contextmanager
def _clean(trial: Trial, *, gpu: bool = False) -> Iterator[Clean]:
    """A clean environment with the wheel, removed afterwards."""
    prefix, folder = trial.folder / "env", trial.folder / "files"
    remove_tree(prefix)
    prepare(folder, trial.imports, trial.script)
    try:
        if trial.bed.machine is None:
            environments.fresh(trial.bed.environment, prefix, trial.wheel)
            mounts = (Mount(source=prefix, target="/env"), Mount(source=folder, target=WORKDIR))
            box = Sandbox(
                root=trial.bed.root,
                mounts=(*mounts, *(driver_libraries(_loaders_cache()) if gpu else ())),
                environment=variables() | (dict(GPU_VARIABLES) if gpu else {}),
                workdir=WORKDIR,
                memory=trial.memory,
                devices=tuple(map(str, devices())) if gpu else (),
            )
            yield Clean(prefix="/env", files=WORKDIR, place=box)
        else:
            hosted.fresh(trial.bed.machine, trial.bed.environment, prefix, trial.wheel)
            yield Clean(prefix=str(prefix), files=str(folder), place=_on_machine(trial, trial.bed.machine, prefix, folder))
    finally:
        remove_tree(prefix)


def _on_machine(trial: Trial, machine: Machine, prefix: Path, folder: Path) -> Plain:
    for name in ("home", "tmp"):
        remove_tree(trial.folder / name)
        (trial.folder / name).mkdir()
    own = {"HOME": str(trial.folder / "home"), "TMPDIR": str(trial.folder / "tmp")}
    own["PATH"] = hosted.search_path(machine, prefix)
    return Plain(
        environment=variables() | own | hosted.library_path(),
        workdir=str(folder),
        memory=trial.memory,
        network=machine.uncut is not None,
    )


def _loaders_cache() -> str:
    """What this machine's loader finds by name, as `ldconfig -p` lists it."""
    done = subprocess.run(
        ["ldconfig", "-p"], capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/sbin:/usr/bin"}
    )
    return done.stdout


def driver_libraries(listing: str) -> Iterator[Mount]:
    """The driver's libraries of a loader's cache, each to a folder of its own in the sandbox; and libcuda.so, to link with.

    That name is of a package for developers which a driver need not have brought, and a JIT compiler links with `-lcuda`.
    """
    library = r"^\s*(lib(?:cuda|nvidia-[\w-]+)\.so\.\S+) \(libc6,(?:x86-64|AArch64)\b.* => (\S+)$"  # else: for 32 bits
    found: dict[str, str] = {}
    for name, place in re.findall(library, listing, re.MULTILINE):
        found.setdefault(name, place)
    if "libcuda.so.1" in found:
        found["libcuda.so"] = found["libcuda.so.1"]
    for name, place in found.items():
        yield Mount(source=Path(os.path.realpath(place)), target=f"{DRIVER_FOLDER}/{name}")


def _said(trial: Trial, clean: Clean, command: tuple[str, ...], failure: str) -> tuple[str, Outcome]:
    """Run a command whose last marked line is its answer."""
    found: list[str] = []
    own_log = trial.folder / "smoke.log"
    own_log.unlink(missing_ok=True)
    keep: Callable[[str], None] = lambda line: found.append(line) if line.startswith(MARK) else None  # noqa: E731
    outcome = sandbox.run(clean.place, command, log=own_log, on_line=keep)
    with trial.log.open("a") as stream:
        stream.write(own_log.read_text(errors="replace"))
    if outcome.returncode != 0 or not found:
        raise SmokeError(
            f"{trial.wheel.name} {failure}: {first_error(own_log)}",
            remedy=f"the whole output is in {trial.log}",
            repeat=f"builder smoke {trial.wheel} --import {' --import '.join(trial.imports)}",
        )
    return found[-1].removeprefix(MARK).strip(), outcome
