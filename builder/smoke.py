"""Does the wheel load? A fresh environment from the lock plus the wheel, another working directory, imports by name."""

from __future__ import annotations

import shutil
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


def prepare(folder: Path, imports: Sequence[str], script: Path | None) -> None:
    """Lay out the working directory: the driver, smoke.py and, under each import's name, a trap that must not be found."""
    remove_tree(folder)
    (folder / "work").mkdir(parents=True)
    for top in {name.split(".")[0] for name in imports}:
        (folder / "work" / f"{top}.py").write_text(TRAP)
    (folder / "driver.py").write_bytes((files("builder") / "data" / "smoke_driver.py").read_bytes())
    if script is not None:
        shutil.copy(script, folder / "smoke.py")


def driver(imports: Sequence[str], script: Path | None) -> tuple[str, ...]:
    """The command inside the sandbox."""
    return ("/env/bin/python3", "-P", "/smoke/driver.py", ",".join(imports), "/smoke/smoke.py" if script else "-")


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
        SmokeError: an import or smoke.py failed; carries the first error of its output.
    """
    clean = folder / "env"
    remove_tree(clean)
    environments.fresh(environment, clean, wheel)
    prepare(folder / "files", imports, script)
    box = Sandbox(
        root=root,
        mounts=(Mount(source=clean, target="/env"), Mount(source=folder / "files", target="/smoke")),
        environment=variables(),
        workdir="/smoke/work",
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
    return SmokeResult.model_validate_json(found[-1].removeprefix(MARK).strip()), outcome, command
