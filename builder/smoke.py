"""Does the wheel load? A fresh environment from the lock plus the wheel, another working directory, imports by name."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from builder import environment as environments
from builder import sandbox
from builder.compile import first_error
from builder.record import SmokeResult
from builder.sandbox import Mount, Outcome, Sandbox
from gracefarm.errors import SmokeError
from gracefarm.files import remove_tree

MARK = "GRACEFARM"
TRAP = "raise ImportError('imported from the working directory: the import did not reach the installed wheel')\n"
WORKDIR = "/smoke"
"Also the driver's folder, so that a Python that looks in either finds the decoys first."


def prepare(folder: Path, imports: Sequence[str], script: Path | None) -> None:
    """Lay out the working directory: the driver, smoke.py and, under each import's name, a decoy that must not be found."""
    remove_tree(folder)
    folder.mkdir(parents=True)
    for top in {name.split(".")[0] for name in imports}:
        (folder / f"{top}.py").write_text(TRAP)
    (folder / "driver.py").write_bytes((files("builder") / "data" / "smoke_driver.py").read_bytes())
    if script is not None:
        shutil.copy(script, folder / "smoke.py")


def driver(imports: Sequence[str], script: Path | None) -> tuple[str, ...]:
    """The command inside the sandbox."""
    return ("/env/bin/python3", "-P", f"{WORKDIR}/driver.py", ",".join(imports), f"{WORKDIR}/smoke.py" if script else "-")


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


def run(
    wheel: Path,
    *,
    imports: Sequence[str],
    script: Path | None,
    environment: Path,
    root: Path,
    folder: Path,
    memory: int,
    log: Path,
) -> tuple[SmokeResult, Outcome, tuple[str, ...]]:
    """Import the wheel in a fresh copy of the environment; `folder` is scratch space on the environment's file system.

    Raises:
        SmokeError: an import or smoke.py failed; carries the first error of its output. Or nothing imported is the wheel's.
    """
    clean = folder / "env"
    remove_tree(clean)
    environments.fresh(environment, clean, wheel)
    prepare(folder / "files", imports, script)
    box = Sandbox(
        root=root,
        mounts=(Mount(source=clean, target="/env"), Mount(source=folder / "files", target=WORKDIR)),
        environment=variables(),
        workdir=WORKDIR,
        memory=memory,
    )
    command = driver(imports, script)
    found: list[str] = []
    own_log = folder / "smoke.log"
    own_log.unlink(missing_ok=True)
    outcome = sandbox.run(
        box, command, log=own_log, on_line=lambda line: found.append(line) if line.startswith(MARK) else None
    )
    with log.open("a") as stream:
        stream.write(own_log.read_text(errors="replace"))
    remove_tree(clean)
    if outcome.returncode != 0 or not found:
        raise SmokeError(
            f"{wheel.name} does not work in a clean environment: {first_error(own_log)}",
            remedy=f"the whole output is in {log}",
            repeat=f"builder smoke {wheel} --import {' --import '.join(imports)}",
        )
    result = SmokeResult.model_validate_json(found[-1].removeprefix(MARK).strip())
    _require_own(wheel, result)
    return result, outcome, command


def _require_own(wheel: Path, result: SmokeResult) -> None:
    """The environment has many modules: one that imports proves nothing of a wheel that does not bring it."""
    with zipfile.ZipFile(wheel) as archive:
        brought = [re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", name) for name in archive.namelist()]
    for place in result.modules.values():
        inside = place.partition("/site-packages/")[2]
        # A namespace package has no file of its own; its place is a folder.
        if any(name == inside or name.startswith(f"{inside}/") for name in brought):
            return
    raise SmokeError(
        f"none of {', '.join(result.modules)} comes from {wheel.name}: they are the environment's own",
        remedy="name the wheel's own modules in [smoke] imports",
    )
