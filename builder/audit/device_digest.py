"""The device digest: a hash of a wheel's device code for one sm.

Two wheels with the same digest run the same code on that GPU, even if they are for different host architectures, Pythons or
torch versions. So a test of one wheel on a GPU is valid for the other. The digest covers the instructions, the constants, the
initial values of variables and the references to symbols. It does not cover debug data, which contains a process id, the
ids that nvcc derives from a source's path, and the folder in a text that is such a path, as `assert` has it for its message.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Section, SymbolTableSection

from builder import elf
from builder.audit import cuobjdump
from builder.audit.contents import UNREADABLE, opened
from builder.audit.cuobjdump import UnreadableError

_CODE = (".text.", ".nv.constant", ".nv.global", ".nv.shared.", ".nv.capmerc.text.")
"""Prefixes of sections that determine what a kernel computes. From sm_100 on, the driver may read a kernel's code from the
last of these, which differs between compiles with and without -lineinfo."""
_UNIT = re.compile(r"(\d+)(_GLOBAL__N__|_INTERNAL_)[0-9a-f]{8}_(\d+)_")
"""nvcc's id of a translation unit in a mangled name, after its length: a hash of the source's absolute path, the length of the
file name, the file name, and a part that differs between hosts: 54_INTERNAL_8e4a7fd3_20_causal_conv1d_bwd_cu_feceb7dc_65."""
_STATIC = re.compile(r"(__nv_static_)\d+(__)[0-9a-f]{8}(_\d+_\w+?_)[0-9a-f]{8}(?:_\d+)?(?=_)")
"The same in the name of a static variable."
_VALUES = ".nv.global.init"
"The section with the initial values of variables and with texts."
_TEXT = re.compile(r"\$str(?:\$\d+)?")
"nvcc's name for a text without a variable, such as __FILE__ in an assert."
_SOURCE = re.compile(rb"/[^\0\n]*/([^/\0\n]+\.(?:cuh?|cc|cpp|cxx|c|hh|hpp|hxx|h|inl|inc|ipp)\0)")
"A text that is the absolute path of a source or header, and nothing else."
_DAMAGE = (ELFError, ConstructError, struct.error, ValueError, KeyError, IndexError, AttributeError, TypeError)


def of_wheel(wheel: Path, reader: Path) -> dict[str, str]:
    """Digests by sm, as {"90": 64 hexadecimal digits}; empty if the wheel has no cubins. `reader` is NVIDIA's cuobjdump.

    Raises:
        UnreadableError: the wheel, or its device code, cannot be read.
        HostError: cuobjdump does not run.
    """
    try:
        with opened(wheel) as contents:
            return of_objects({name: binary for name, binary in contents.objects.items() if binary.fatbin}, reader)
    except UNREADABLE as error:
        raise UnreadableError(f"{wheel.name}: the archive cannot be read: {error}") from error


def of_objects(objects: Mapping[str, elf.Object], reader: Path) -> dict[str, str]:
    """Digests by sm of objects by their names in the wheel; names and order do not change the digests.

    Raises:
        UnreadableError, HostError: as in `of_wheel`.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name, binary in objects.items():
        with cuobjdump.extracted(reader, name, binary.path) as cubins:
            for sm, cubin in cubins:
                parts[sm] += _parts(name, cubin)
    return {sm: hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() for sm, lines in sorted(parts.items())}


def _parts(name: str, cubin: Path) -> list[str]:
    """A line for each part of a cubin that the digest covers."""
    try:
        with cubin.open("rb") as stream:
            sections = list(ELFFile(stream).iter_sections())
            return [line for index, section in enumerate(sections) for line in _lines(index, section, sections)]
    except _DAMAGE as error:
        raise UnreadableError(f"{name}: a cubin is damaged: {error}") from error


def _lines(index: int, section: Section, sections: list[Section]) -> Iterator[str]:
    if section.name == _VALUES and (values := _without_folders(index, section, sections)):
        yield f"{section.name} aligned {section['sh_addralign']}"
        for name, content in values:
            yield f"{section.name} {stable_name(name)} {len(content)} {hashlib.sha256(content).hexdigest()}"
    elif section.name.startswith(_CODE):
        # Memory without initial values has only a size.
        content = b"" if section["sh_type"] == "SHT_NOBITS" else section.data()
        yield f"{stable_name(section.name)} {section['sh_size']} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(section, RelocationSection):
        target = sections[section["sh_info"]].name
        if target.startswith(_CODE):
            symbols = sections[section["sh_link"]]
            for relocation in section.iter_relocations():
                symbol = symbols.get_symbol(relocation["r_info_sym"]).name
                place = f"{relocation['r_offset']:x} {relocation['r_info_type']} {relocation.entry.get('r_addend', 0)}"
                yield f"{stable_name(target)} {place} {stable_name(symbol)}"


def _without_folders(index: int, section: Section, sections: list[Section]) -> list[tuple[str, bytes]]:
    """Name and content of each variable of a section that holds paths of sources, and of these paths only the file names.

    The length of a path moves the variables after it, so they are not compared by their place. The list is empty if there is
    no such path, or if the section is not made of named variables that code and data refer to only by their symbols.
    """
    whole, values, end = section.data(), [], 0
    tables = [table for table in sections if isinstance(table, SymbolTableSection)]
    symbols = [symbol for table in tables for symbol in table.iter_symbols() if symbol["st_shndx"] == index]
    for symbol in sorted((each for each in symbols if each["st_info"]["type"] == "STT_OBJECT"), key=itemgetter("st_value")):
        begin = symbol["st_value"]
        if begin < end or any(whole[end:begin]):
            return []
        end = begin + symbol["st_size"]
        values.append((symbol.name, whole[begin:end]))
    if end > len(whole) or any(whole[end:]) or _by_place(index, sections):
        return []
    short = [(name, _SOURCE.sub(rb"\1", value) if _is_path(name, value) else value) for name, value in values]
    return short if short != values else []


def _is_path(name: str, value: bytes) -> bool:
    return _TEXT.fullmatch(name) is not None and _SOURCE.fullmatch(value) is not None


def _by_place(index: int, sections: list[Section]) -> bool:
    """Whether a relocation refers to a place in a section, and not to a variable in it, or is itself in the section."""
    for section in sections:
        if isinstance(section, RelocationSection):
            symbols = sections[section["sh_link"]]
            for relocation in section.iter_relocations():
                symbol = symbols.get_symbol(relocation["r_info_sym"])
                if section["sh_info"] == index or (symbol["st_shndx"] == index and symbol["st_info"]["type"] != "STT_OBJECT"):
                    return True
    return False


def stable_name(name: str) -> str:
    """A symbol's name without the parts that nvcc derives from the source's path and from the host."""
    parts, at = [], 0
    for match in _UNIT.finditer(name):
        begin, least = match.start(2), match.end() - match.start(2) + int(match[3])
        # The digits before the id may be the end of another name: use the shortest length that the id fits into.
        lengths = (match[1][-count:] for count in range(1, len(match[1]) + 1))
        length = next((text for text in lengths if int(text) >= least), None)
        if length is None or match.start() < at:
            continue
        parts += [name[at : begin - len(length)], match[2], name[match.end() : match.end() + int(match[3])]]
        at = min(begin + int(length), len(name))
    return _STATIC.sub(r"\1\2\3", "".join(parts) + name[at:])
