"""A wheel, opened once for all gates: its file names and its unpacked ELF objects."""

from __future__ import annotations

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from builder import elf
from builder.planning.stack import Arch
from gracefarm.variants import split_label

UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"Exceptions of zipfile for damaged, encrypted and unknown archives."

MACHINES = {"EM_AARCH64": Arch.AARCH64, "EM_X86_64": Arch.X86_64}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a wheel."""

    wheel: Path
    "Path with the name without variant label; for a variant wheel this is a link."
    label: str = ""
    "Label of a variant wheel."
    names: tuple[str, ...]
    "Files in the archive's order."
    objects: dict[str, elf.Object]
    "ELF objects by name, including those for other machines and those that no loader loads."
    damaged: dict[str, str]
    "Files that begin like ELF objects but cannot be read, with the reason."

    def loadable(self, target: Arch) -> dict[str, elf.Object]:
        """The objects that the target's loader could load; the gate `elf-machine` judges the others."""
        return {name: binary for name, binary in self.objects.items() if is_for(binary, target)}


def is_for(binary: elf.Object, target: Arch) -> bool:
    """Whether it is a shared object or executable for the target."""
    return (
        binary.kind in elf.LOADABLE and binary.bits == 64 and binary.little_endian and MACHINES.get(binary.machine) == target
    )


@contextmanager
def plainly_named(wheel: Path) -> Iterator[tuple[Path, str]]:
    """A wheel under the name without variant label, which every tool can read, and its label. The name is temporary."""
    plain, label = split_label(wheel.name)
    if not label:
        yield wheel, ""
        return
    with TemporaryDirectory(prefix="gracefarm-plain-") as folder:
        link = Path(folder) / plain
        link.symlink_to(wheel.resolve())
        yield link, label


@contextmanager
def opened(wheel: Path) -> Iterator[Contents]:
    """The contents of a wheel; the unpacked objects are deleted at the end of the `with` block.

    Raises:
        one of UNREADABLE, OSError: the file is not a wheel.
    """
    with (
        plainly_named(wheel) as (plain, label),
        TemporaryDirectory(prefix="gracefarm-audit-") as folder,
        zipfile.ZipFile(plain) as archive,
    ):
        names = tuple(info.filename for info in archive.infolist() if not info.is_dir())
        objects: dict[str, elf.Object] = {}
        damaged: dict[str, str] = {}
        for number, name in enumerate(names):
            path = _unpack_elf(archive, name, Path(folder) / f"{number}.so")
            if path is None:
                continue
            try:
                objects[name] = elf.read(path)
            except elf.NotElfError as error:
                damaged[name] = str(error)
        yield Contents(wheel=plain, label=label, names=names, objects=objects, damaged=damaged)


def _unpack_elf(archive: zipfile.ZipFile, name: str, path: Path) -> Path | None:
    """Unpack the file if it is an ELF object; under another name, since names in a wheel are not trusted."""
    with archive.open(name) as stream:
        head = stream.read(len(elf.MAGIC))
        if head != elf.MAGIC:
            return None
        with path.open("wb") as out:
            out.write(head)
            shutil.copyfileobj(stream, out, 1 << 20)
    return path
