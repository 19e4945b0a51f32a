"""ELF objects as the dynamic loader sees them: read through the program headers and the dynamic table.

pyelftools reads headers, segments and the dynamic table. The symbol tables are decoded here with struct: libtorch_cpu
has some 10^5 dynamic symbols, and an object per symbol would cost minutes where the closure must take seconds.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.hash import GNUHashTable

MAGIC = b"\x7fELF"
LOADABLE = ("ET_DYN", "ET_EXEC")

_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym: name, info, other, shndx, value, size
_WEAK = 2
_BOUND = (1, 2, 10)  # STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE
_HIDDEN_BIT = 0x8000
_FLAG_WEAK = 2  # VER_FLG_WEAK
_FLAG_BASE = 1  # VER_FLG_BASE


_DAMAGE = (
    ELFError, ConstructError, struct.error, ValueError, KeyError, IndexError, OverflowError, AssertionError, TypeError,
    AttributeError,
)  # fmt: skip
"What pyelftools and struct raise on objects whose headers lie; found by the fuzz test."


class NotElfError(ValueError):
    """Not an ELF object that a 64-bit little-endian loader could read."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A PT_LOAD; all in bytes."""

    align: int
    address: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """A version that a needed library must define, from .gnu.version_r."""

    file: str
    version: str
    weak: bool


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An undefined dynamic symbol."""

    name: str
    version: str | None
    weak: bool

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, kw_only=True)
class Exports:
    """What an object defines, with glibc's rules for versions (do_lookup_x and check_match in elf/dl-lookup.c)."""

    symbols: dict[str, tuple[int, ...]]
    "By name, the .gnu.version entries of its definitions: index of the version, with the hidden bit."
    versions: dict[int, str]
    "Version names by index, the base version left out."
    versioned: bool
    "Has a .gnu.version table at all; without one every reference by name is met."

    def meet(self, name: str, version: str | None) -> bool:
        """Whether the loader would take a definition from here for that reference."""
        entries = self.symbols.get(name)
        if entries is None:
            return False
        if not self.versioned:
            return True
        if version is not None:
            return any(self._is(entry, version) for entry in entries)
        # A reference without a version takes the base definition, else the only default one.
        if any(entry & ~_HIDDEN_BIT < 3 for entry in entries):
            return True
        return sum(1 for entry in entries if not entry & _HIDDEN_BIT) == 1

    def _is(self, entry: int, version: str) -> bool:
        index = entry & ~_HIDDEN_BIT
        return self.versions.get(index) == version or (index < 2 and not entry & _HIDDEN_BIT)


@dataclass(frozen=True, kw_only=True)
class Object:
    """What the gates ask of an ELF object."""

    path: Path
    machine: str
    "As pyelftools names it: EM_AARCH64."
    bits: int
    little_endian: bool
    kind: str
    "ET_DYN, ET_EXEC, ET_REL …"
    interpreter: bool
    "Names a loader (PT_INTERP): an executable."
    segments: tuple[Segment, ...]
    soname: str | None
    needed: tuple[str, ...]
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]
    fatbin: bool
    "Has a section with CUDA device code."
    needs: tuple[Need, ...]
    references: tuple[Reference, ...]
    exports: Exports

    @property
    def search(self) -> tuple[str, ...]:
        """Folders that the object itself names; the loader ignores DT_RPATH where there is a DT_RUNPATH."""
        return self.runpath or self.rpath


def read(path: Path) -> Object:
    """The object in a file.

    Raises:
        NotElfError: not an ELF object, or a damaged one.
    """
    with path.open("rb") as stream:
        try:
            return _read(path, stream)
        except _DAMAGE as error:
            raise NotElfError(f"not a readable ELF object ({error or type(error).__name__})") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a table at an offset that no file reaches
                raise
            raise NotElfError("not a readable ELF object (a table lies outside the file)") from error


def _read(path: Path, stream: BinaryIO) -> Object:
    elf = ELFFile(stream)
    dynamic = next((segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment)), None)
    tags = list(dynamic.iter_tags()) if dynamic is not None else []
    tables = _Tables(elf, stream, dynamic)

    def texts(kind: str, attribute: str) -> tuple[str, ...]:
        return tuple(str(getattr(tag, attribute)) for tag in tags if tag.entry.d_tag == kind)

    references, exports = tables.symbols()
    return Object(
        path=path,
        machine=str(elf["e_machine"]),
        bits=elf.elfclass,
        little_endian=elf.little_endian,
        kind=str(elf["e_type"]),
        interpreter=any(segment["p_type"] == "PT_INTERP" for segment in elf.iter_segments()),
        segments=tuple(
            Segment(align=segment["p_align"], address=segment["p_vaddr"], offset=segment["p_offset"])
            for segment in elf.iter_segments()
            if segment["p_type"] == "PT_LOAD"
        ),
        soname=next(iter(texts("DT_SONAME", "soname")), None),
        needed=texts("DT_NEEDED", "needed"),
        rpath=_paths(texts("DT_RPATH", "rpath")),
        runpath=_paths(texts("DT_RUNPATH", "runpath")),
        fatbin=any(section.name in (".nv_fatbin", "__nv_relfatbin") for section in elf.iter_sections()),
        needs=tuple(need for _index, need in tables.needs()),
        references=references,
        exports=exports,
    )


def _paths(entries: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for entry in entries for part in entry.split(":"))


def _next(at: int, step: int, data: memoryview) -> int:
    """The next entry of a chain; the last one has a step of 0, and a damaged chain must not be walked forever."""
    return at + step if step else len(data)


class _Tables:
    """The tables behind the dynamic table's addresses."""

    def __init__(self, elf: ELFFile, stream: BinaryIO, dynamic: DynamicSegment | None) -> None:
        self._elf = elf
        self._dynamic = dynamic
        self._tags: dict[str, int] = {tag.entry.d_tag: tag.entry.d_val for tag in dynamic.iter_tags()} if dynamic else {}
        # Mapped, not read: the segment that holds the tables of a CUDA library also holds its hundreds of MB of kernels.
        self._map = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        plain = elf.elfclass == 64 and elf.little_endian
        self._strings = self._bytes("DT_STRTAB", self._tags.get("DT_STRSZ", 0)) if plain else b""

    def _bytes(self, tag: str, size: int) -> bytes:
        return bytes(self._map[self._offset(tag) :][:size]) if size and tag in self._tags else b""

    def _offset(self, tag: str) -> int:
        offset = next(iter(self._elf.address_offsets(self._tags[tag])), None)
        if offset is None:
            raise NotElfError(f"{tag} points outside the file")
        return int(offset)

    def _text(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode("utf-8", "surrogateescape")

    def needs(self) -> Iterator[tuple[int, Need]]:
        """Versions demanded, with the index that .gnu.version uses for each."""
        data = self._rest("DT_VERNEED")
        at = 0
        for _ in range(self._tags.get("DT_VERNEEDNUM", 0) if data else 0):
            _version, count, file, first, following = struct.unpack_from("<HHIII", data, at)
            entry = at + first
            for _ in range(count):
                _hash, flags, other, name, next_entry = struct.unpack_from("<IHHII", data, entry)
                need = Need(file=self._text(file), version=self._text(name), weak=bool(flags & _FLAG_WEAK))
                yield other & ~_HIDDEN_BIT, need
                entry = _next(entry, next_entry, data)
            at = _next(at, following, data)

    def definitions(self) -> dict[int, str]:
        """Versions defined, by index."""
        data = self._rest("DT_VERDEF")
        at, versions = 0, {}
        for _ in range(self._tags.get("DT_VERDEFNUM", 0) if data else 0):
            _version, flags, index, _count, _hash, first, following = struct.unpack_from("<HHHHIII", data, at)
            if not flags & _FLAG_BASE:
                versions[index & ~_HIDDEN_BIT] = self._text(struct.unpack_from("<I", data, at + first)[0])
            at = _next(at, following, data)
        return versions

    def _rest(self, tag: str) -> memoryview:
        """From a table's start to the end of the file, since the dynamic table has no size for version tables."""
        return self._map[self._offset(tag) :] if tag in self._tags and self._strings else self._map[:0]

    def symbols(self) -> tuple[tuple[Reference, ...], Exports]:
        """References and definitions of .dynsym."""
        count = self._count() if self._strings else 0
        data = self._bytes("DT_SYMTAB", count * _SYMBOL.size)
        versym = struct.unpack(f"<{count}H", self._bytes("DT_VERSYM", count * 2)) if "DT_VERSYM" in self._tags else ()
        demanded = {index: need.version for index, need in self.needs()}
        references: list[Reference] = []
        symbols: dict[str, tuple[int, ...]] = {}
        for number, (offset, info, _other, section, _value, _size) in enumerate(_SYMBOL.iter_unpack(data)):
            if not offset or info >> 4 not in _BOUND:
                continue
            entry = versym[number] if versym else 1
            name = self._text(offset)
            if section == 0:
                version = demanded.get(entry & ~_HIDDEN_BIT)
                references.append(Reference(name=name, version=version, weak=info >> 4 == _WEAK))
            else:
                symbols[name] = (*symbols.get(name, ()), entry)
        return tuple(references), Exports(symbols=symbols, versions=self.definitions(), versioned=bool(versym))

    def _count(self) -> int:
        """Number of entries in .dynsym, from its section; without sections, from the hash tables."""
        address = self._tags.get("DT_SYMTAB")
        for section in self._elf.iter_sections():
            if section["sh_type"] == "SHT_DYNSYM" and section["sh_addr"] == address:
                return int(section["sh_size"]) // _SYMBOL.size
        if "DT_HASH" in self._tags:
            return int(struct.unpack_from("<II", self._bytes("DT_HASH", 8))[1])
        if self._dynamic is not None and "DT_GNU_HASH" in self._tags:
            return int(GNUHashTable(self._elf, self._offset("DT_GNU_HASH"), self._dynamic).get_number_of_symbols())
        return 0
