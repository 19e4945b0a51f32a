"""Read the device code of an object with NVIDIA's cuobjdump."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gracefarm.errors import HostError
from gracefarm.process import last_line

_CODE = re.compile(r"^Fatbin (elf|ptx) code:\n=+\narch = sm_(\d+[af]?)$", re.MULTILINE)
_EXTRACTED = re.compile(r"^Extracting ELF file +\d+: (.+)$", re.MULTILINE)


class UnreadableError(ValueError):
    """cuobjdump cannot read the device code of an object."""


def architectures(cuobjdump: Path, name: str, path: Path) -> tuple[list[str], list[str]]:
    """The sm values of the cubins and of the PTX in an object, in the file's order.

    `--list-elf` would print sm_100 for the cubin of a family; the option used here prints sm_100f.

    Raises:
        UnreadableError, HostError: as in `run`.
    """
    codes = _CODE.findall(run(cuobjdump, name, ["--dump-resource-usage", path]))
    return [sm for kind, sm in codes if kind == "elf"], [sm for kind, sm in codes if kind == "ptx"]


@contextmanager
def extracted(cuobjdump: Path, name: str, path: Path) -> Iterator[list[tuple[str, Path]]]:
    """Each cubin of an object as a file, with its sm value; the files are deleted at the end of the `with` block.

    Raises:
        UnreadableError, HostError: as in `run`.
    """
    values, _ptx = architectures(cuobjdump, name, path)
    with TemporaryDirectory(prefix="gracefarm-cubins-") as folder:
        output = run(cuobjdump, name, ["--extract-elf", "all", path], Path(folder)) if values else ""
        files = [Path(folder) / file for file in _EXTRACTED.findall(output)]
        if len(files) != len(values):
            raise UnreadableError(f"{name}: cuobjdump lists {len(values)} cubins, but extracts {len(files)}")
        yield list(zip(values, files, strict=True))


def run(cuobjdump: Path, name: str, arguments: list[str | Path], folder: Path | None = None) -> str:
    """The output of cuobjdump for the object `name` of the wheel.

    Raises:
        UnreadableError: cuobjdump cannot read the object.
        HostError: cuobjdump does not run.
    """
    try:
        process = subprocess.run([cuobjdump, *arguments], capture_output=True, text=True, check=False, cwd=folder)
    except OSError as error:
        raise HostError(
            f"{cuobjdump} does not run: {error}", remedy=f"run `{cuobjdump} --version`, and fix the error that it prints"
        ) from error
    # The exit code is also 255 if the object has no code of the requested kind.
    if process.returncode and "does not contain device code" not in process.stdout + process.stderr:
        reason = last_line(process.stdout + process.stderr).removeprefix("cuobjdump fatal   : ")
        raise UnreadableError(f"{name}: cuobjdump cannot read its device code ({reason})")
    return process.stdout
