"""Smoke tests: import the wheel in a clean environment, from another working directory; then test it on a GPU, if any."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from builder.box import gpu, sandbox
from builder.box.sandbox import Outcome
from builder.compiling.pep517 import first_error
from builder.planning.ground import CleanEnvironment, TrialEnvironment
from builder.toolchains.sandbox_trial import WORKDIR
from gracefarm.errors import SmokeError
from gracefarm.files import remove_tree
from gracefarm.tables import Table

MARK = "GRACEFARM"
TRAP = "raise ImportError('the module was imported from the working directory, not from the installed wheel')\n"


class SmokeResult(Table):
    """Result of a smoke test."""

    modules: dict[str, str]
    "Path of each imported module. The key is the name of the module"
    script: str | None = None
    "Output of smoke.py. null: there is no smoke.py"


class ComparedResult(Table):
    """A result that the wheel computed on a GPU, compared with a reference."""

    name: str = Field(min_length=1, max_length=200)
    "Name of the result, for example `forward float16`"
    error: float = Field(ge=0, allow_inf_nan=False)
    "Largest difference from the reference"
    tolerance: float = Field(ge=0, allow_inf_nan=False)
    "Largest difference that is accepted. 0: both results must be equal"


class GpuResult(Table):
    """Result of smoke_gpu.py. If the script fails, the build fails."""

    status: Literal["passed", "not run"]
    "`passed`: the script ran on a GPU and succeeded. `not run`: the script did not run, and `reason` says why"
    reason: str = ""
    "Reason why the script did not run. Empty: the script ran"
    device: str | None = None
    "Name of the GPU. null: the script did not run"
    sm: str | None = None
    "sm value of the GPU, for example `90`. null: the script did not run"
    driver: str = ""
    "Version of NVIDIA's driver. Empty: unknown"
    script: str | None = None
    "Output of smoke_gpu.py. null: the script did not run"
    comparisons: tuple[ComparedResult, ...] = ()
    "Results that the script compared with a reference. Empty: the script did not run, or reported no comparison"
    negative_control: str | None = None
    (
        "Description of a deliberately wrong result, which the script has to refuse. null: the script has no such "
        "description, or did not run"
    )
    wall_s: float | None = None
    "Duration in seconds. null: the script did not run"


class _Answer(SmokeResult):
    """The output of the driver; for smoke_gpu.py also the comparisons."""

    comparisons: tuple[ComparedResult, ...] = ()
    negative_control: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A wheel, its tests, and the place where they run."""

    wheel: Path
    imports: tuple[str, ...]
    script: Path | None
    environment: TrialEnvironment
    folder: Path
    "Folder for temporary files, on the environment's file system."
    memory: int
    log: Path
    repeat: str
    "Command that repeats the test."


def prepare(folder: Path, imports: Sequence[str], script: Path | None) -> None:
    """Fill the working directory: the driver, smoke.py, and for each import a module that must not be imported."""
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
    """The command; modules in `elsewhere` may come from outside of the environment."""
    words = (",".join(imports), f"{folder}/smoke.py" if script else "-", ",".join(elsewhere) or "-")
    return (f"{prefix}/bin/python3", "-P", f"{folder}/driver.py", *words)


def run(trial: Trial) -> tuple[SmokeResult, Outcome, tuple[str, ...]]:
    """Import the wheel in a clean environment.

    Raises:
        SmokeError: an import or smoke.py failed (has the first error of its output), or no imported module is the wheel's.
    """
    with _clean(trial) as clean:
        command = driver(trial.imports, trial.script, clean.prefix, clean.files, _elsewhere(trial))
        answer, outcome = _answer(trial, clean, command, "does not work in a clean environment")
    answered = _Answer.model_validate_json(answer)
    result = SmokeResult(modules=answered.modules, script=answered.script)
    _require_own(trial.wheel, result)
    return result, outcome, command


def _require_own(wheel: Path, result: SmokeResult) -> None:
    """Require that an imported module is from the wheel, since the environment has many other modules."""
    brought = _brought(wheel)
    for place in result.modules.values():
        inside = place.partition("/site-packages/")[2]
        # A namespace package has a folder instead of a file.
        if any(name == inside or name.startswith(f"{inside}/") for name in brought):
            return
    raise SmokeError(
        f"none of the imported modules ({', '.join(result.modules)}) is from {wheel.name}; other packages contain them",
        remedy="name modules of the wheel in `imports` of [smoke]",
    )


def _brought(wheel: Path) -> list[str]:
    """The wheel's files, as paths in site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        return [re.sub(r"^[^/]+\.data/(?:purelib|platlib)/", "", name) for name in archive.namelist()]


def run_gpu(trial: Trial, sm: Sequence[str], ptx: str | None = None) -> GpuResult:
    """Run smoke_gpu.py (the trial's script) if torch finds a GPU with one of the architectures `sm`, or one that can run the
    wheel's PTX; otherwise return the reason.

    Raises:
        SmokeError: it failed.
    """
    if trial.environment.emulated:
        return GpuResult(status="not run", reason="this machine emulates the wheel's architecture, so the test has no GPU")
    if not gpu.devices():
        return GpuResult(status="not run", reason="no GPU")
    with _clean(trial, with_gpu=True) as clean:
        probe = (f"{clean.prefix}/bin/python3", "-P", f"{clean.files}/gpu.py")
        answer, _ = _answer(trial, clean, probe, "cannot be tested on a GPU, because torch fails")
        probed = json.loads(answer)
        if "reason" in probed:
            return GpuResult(status="not run", reason=probed["reason"])
        own = probed["sm"] in [re.sub(r"\D", "", value) for value in sm]
        if not own and (ptx is None or int(probed["sm"]) < int(ptx)):
            reason = (
                f"{probed['device']} is sm_{probed['sm']}, but the wheel is for {', '.join(f'sm_{value}' for value in sm)}"
            )
            return GpuResult(status="not run", reason=reason)
        command = driver(trial.imports, trial.script, clean.prefix, clean.files, _elsewhere(trial))
        answer, outcome = _answer(trial, clean, command, f"failed its test on {probed['device']}")
    return GpuResult(
        status="passed",
        device=probed["device"],
        sm=probed["sm"],
        driver=probed["driver"],
        **_compared(answer, trial),
        wall_s=round(outcome.wall_s, 2),
    )


def _compared(answer: str, trial: Trial) -> dict[str, Any]:
    """The output and the comparisons of smoke_gpu.py.

    Raises:
        SmokeError: the comparisons are invalid, or a difference is greater than its tolerance.
    """
    try:
        answered = _Answer.model_validate_json(answer)
    except ValidationError as error:
        reason = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
        raise SmokeError(
            f"{trial.script} wrote no valid list of comparisons: {reason}",
            remedy="write the list in the format that docs/howto/gpu.md describes",
        ) from error
    for comparison in answered.comparisons:
        if comparison.error > comparison.tolerance:
            raise SmokeError(
                f"{trial.wheel.name} computes {comparison.name} with an error of {comparison.error:.3g}, "
                f"but at most {comparison.tolerance:.3g} is allowed",
                remedy=f"see the complete output in {trial.log}",
            )
    return answered.model_dump(include={"script", "comparisons", "negative_control"})


def sentence(result: GpuResult) -> str:
    """The result in words."""
    if result.status == "not run":
        return f"not run: {result.reason}"
    return f"passed on {result.device} in {result.wall_s:.0f} s: {(result.script or 'no output').strip()}"


def _elsewhere(trial: Trial) -> list[str]:
    """Modules from outside of the wheel: with an environment below, torch comes from there."""
    if not trial.environment.overlaid:
        return []
    own = {name.split("/")[0].split(".")[0] for name in _brought(trial.wheel)}
    return [name for name in trial.imports if name.split(".")[0] not in own]


@contextmanager
def _clean(trial: Trial, *, with_gpu: bool = False) -> Iterator[CleanEnvironment]:
    """A clean environment with the wheel, removed afterwards."""
    prefix, folder = trial.folder / "env", trial.folder / "files"
    remove_tree(prefix)
    prepare(folder, trial.imports, trial.script)
    try:
        yield trial.environment.clean(trial.wheel, trial.folder, folder, memory=trial.memory, with_gpu=with_gpu)
    finally:
        remove_tree(prefix)


def _answer(trial: Trial, clean: CleanEnvironment, command: tuple[str, ...], failure: str) -> tuple[str, Outcome]:
    """Run a command; its last marked line is the answer."""
    own_log = trial.folder / "smoke.log"
    own_log.unlink(missing_ok=True)
    outcome = sandbox.run(clean.place, command, log=own_log)
    output = own_log.read_text(errors="replace")
    with trial.log.open("a") as stream:
        stream.write(output)
    answers = [line for line in output.splitlines() if line.startswith(MARK)]
    if outcome.returncode != 0 or not answers:
        raise SmokeError(
            f"{trial.wheel.name} {failure}: {first_error(own_log)}",
            remedy=f"see the complete output in {trial.log}",
            repeat=trial.repeat,
        )
    return answers[-1].removeprefix(MARK).strip(), outcome
