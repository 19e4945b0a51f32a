"""Build a wheel again in another folder, and compare: identical, only device code differs, or files and sections differ.

nvcc may write different bytes for equal input; everything else is reproducible.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from builder.audit.contents import UNREADABLE
from builder.flow import build
from builder.flow.attempt import BuildOptions
from builder.planning.plan import NO_CACHES, Plan
from builder.planning.settings import Settings
from builder.proof import record
from gracefarm.console import Console
from gracefarm.errors import VerifyError
from gracefarm.files import lock, remove_tree
from gracefarm.tables import Table

SHARED = ("roots", "environments", "toolchains", "cuda", "wrappers", "store", "git", "uv", "trees")
"Folders of GRACEFARM_HOME whose content is pinned by digest; everything else, such as compiler caches, is not shared."

DEVICE_SECTIONS = (".nv_fatbin", "__nv_relfatbin", ".nvFatBinSegment", ".nv_module_id", "__nv_module_id")
"Sections with cubins and PTX, and with the random id that nvcc gives each translation unit."
DEVICE_FILES = (".cubin", ".fatbin", ".ptx")
NVCC_NAMES = re.compile(rb"tmpxft_[0-9a-f]{8}_[0-9a-f]{8}")
"Names of nvcc's temporary files, which contain its process id and stay in the object's symbol table."
DERIVED_SECTIONS = (".note.gnu.build-id", ".gnu_debuglink")
"Hashes of the object's content, which differ if something else differs."


class Difference(Table):
    """One difference between two wheels."""

    file: str
    where: str
    "A section, `only in the first`, `only in the second`, or a description of the difference"
    device: bool = False
    "It is device code, or follows from device code"


class Comparison(Table):
    """The comparison of two builds."""

    verdict: Literal["identical", "device code only", "differs"]
    differences: tuple[Difference, ...] = ()

    @property
    def sentence(self) -> str:
        """The result in one line."""
        if self.verdict == "identical":
            return "identical: all bytes are the same"
        places = ", ".join(f"{difference.file} ({difference.where})" for difference in self.differences[:6])
        more = f", and {len(self.differences) - 6} more" if len(self.differences) > 6 else ""
        return f"{self.verdict}: {places}{more}"


def compare(first: Path, second: Path) -> Comparison:
    """Compare two wheels file by file, and ELF files section by section.

    Raises:
        VerifyError: one of them cannot be read.
    """
    try:
        if first.read_bytes() == second.read_bytes():
            return Comparison(verdict="identical")
        with zipfile.ZipFile(first) as archive, zipfile.ZipFile(second) as other:
            differences = tuple(_wheels(archive, other))
    except UNREADABLE as error:
        raise VerifyError(f"{first.name} and {second.name} cannot be compared: {error}") from error
    if first.name != second.name:
        differences = (Difference(file=second.name, where="different file name"), *differences)
    only_device = bool(differences) and all(difference.device for difference in differences)
    return Comparison(verdict="device code only" if only_device else "differs", differences=differences)


def _wheels(archive: zipfile.ZipFile, other: zipfile.ZipFile) -> Iterator[Difference]:
    names, others = archive.namelist(), other.namelist()
    yield from (Difference(file=name, where="only in the first") for name in names if name not in others)
    yield from (Difference(file=name, where="only in the second") for name in others if name not in names)
    both = [name for name in names if name in others]
    if both != [name for name in others if name in names]:
        yield Difference(file="the archive", where="order of the files")
    changed = [name for name in both if archive.read(name) != other.read(name)]
    records = [name for name in changed if name.endswith(".dist-info/RECORD")]
    contents = [
        difference
        for name in changed
        if name not in records
        for difference in _files(name, archive.read(name), other.read(name))
    ]
    yield from contents
    if not contents and not records:
        # The content is equal, but the bytes of the archive differ.
        yield Difference(file="the archive", where="times, modes or compression")
    # RECORD has the digests of other files and differs with them; it counts only if no other file differs.
    yield from (Difference(file=name, where="content") for name in records if not contents and names == others)


def _files(name: str, first: bytes, second: bytes) -> Iterator[Difference]:
    if name.endswith(DEVICE_FILES):
        yield Difference(file=name, where="the whole file", device=True)
        return
    sections, other = _parts(first), _parts(second)
    if sections is None or other is None:
        yield Difference(file=name, where=f"content, from byte {_first_difference(first, second)}")
        return
    differences = list(_objects(name, sections, other))
    hashes = [difference for difference in differences if difference.where in DERIVED_SECTIONS]
    rest = [difference for difference in differences if difference not in hashes]
    yield from rest
    if not rest:
        yield from hashes or [Difference(file=name, where="bytes between the sections")]


def _objects(name: str, sections: Mapping[str, bytes], other: Mapping[str, bytes]) -> Iterator[Difference]:
    for part in dict.fromkeys([*sections, *other]):
        first, second = sections.get(part), other.get(part)
        if first != second:
            by_name = first is not None and second is not None and _unnamed(first) == _unnamed(second)
            where = f"{part}: names of nvcc's temporary files" if by_name else part
            yield Difference(file=name, where=where, device=by_name or part in DEVICE_SECTIONS)


def _unnamed(section: bytes) -> bytes:
    return NVCC_NAMES.sub(b"tmpxft", section)


def _parts(content: bytes) -> dict[str, bytes] | None:
    """Header and sections of an ELF file; None for other files. Offsets, which depend on section sizes, are left out."""
    if not content.startswith(b"\x7fELF"):
        return None
    try:
        elf = ELFFile(io.BytesIO(content))
        header = [elf[name] for name in ("e_type", "e_machine", "e_flags", "e_shnum")]
        parts = {"ELF header": repr(header).encode()}
        for number, section in enumerate(elf.iter_sections()):
            name = section.name or f"section {number}"
            # Several sections may have one name.
            key = name if name not in parts else f"{name} ({number})"
            parts[key] = b"" if section["sh_type"] == "SHT_NOBITS" else section.data()
    except (ELFError, ValueError, OSError, AttributeError):
        return None
    return parts


def _first_difference(first: bytes, second: bytes) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


@contextmanager
def again(plan: Plan, settings: Settings, console: Console, jobs: int | None = None) -> Iterator[Path]:
    """The wheel of the plan, built again in another folder, which is deleted at the end of the `with` block.

    Raises:
        GracefarmError: a stage failed.
    """
    home = record.folder(settings, plan.build_id) / "rebuild"
    with lock(
        settings.home / "locks" / f"rebuild-{plan.build_id}",
        lambda: console.step("wait", "waiting for another process, which is rebuilding this wheel"),
    ):
        remove_tree(home)  # left by a killed run
        try:
            home.mkdir(parents=True)
            for name in SHARED:
                (settings.home / name).mkdir(exist_ok=True)
                (home / name).symlink_to((settings.home / name).resolve())
            elsewhere = Settings.model_validate(settings.model_dump() | {"home": home})
            built = build.build(plan, BuildOptions(jobs=jobs, caches=NO_CACHES), elsewhere, console)
            wheel = record.wheel_path(elsewhere, built)
            assert wheel is not None
            yield wheel
        finally:
            remove_tree(home)
