"""Requirements of compiled files, and what the node has: page size and libstdc++."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

from deploy.remote.wire import Json


def glibcxx() -> str | None:
    """The highest GLIBCXX symbol version of the libstdc++ that the loader finds on this node."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    del library
    path = next((line.split(maxsplit=5)[5] for line in maps.splitlines() if "libstdc++.so" in line), None)
    return highest_glibcxx(Path(path).read_bytes()) if path else None


def highest_glibcxx(content: bytes) -> str | None:
    """The highest GLIBCXX_x.y.z in a file's bytes."""
    versions = [tuple(map(int, text.split(b"."))) for text in re.findall(rb"GLIBCXX_(\d+(?:\.\d+)+)\x00", content)]
    return ".".join(map(str, max(versions))) if versions else None


def requirements(folder: Path) -> Json:
    """Requirements of the compiled files in a folder: their alignment, and the newest libstdc++ symbol that they use."""
    alignment, count = 1 << 20, 0
    needed: tuple[int, ...] = (0,)
    for path in folder.rglob("*.so*"):
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as stream:
            aligned = _alignment(stream.read(1 << 12))
        if aligned is None:
            continue
        count += 1
        alignment = min(alignment, aligned)
        if b"libstdc++" not in path.name.encode() and path.stat().st_size < 1 << 30:
            wanted = highest_glibcxx(path.read_bytes())
            needed = max(needed, tuple(map(int, wanted.split(".")))) if wanted else needed
    return {
        "libraries": count,
        "alignment": alignment if count else None,
        "glibcxx": ".".join(map(str, needed)) if needed != (0,) else None,
    }


def _alignment(head: bytes) -> int | None:
    """The smallest p_align of the PT_LOAD segments of a 64-bit little-endian ELF file; None for anything else."""
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
        return None
    offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
    aligned = [
        struct.unpack_from("<Q", head, offset + index * size + 48)[0]
        for index in range(count)
        if offset + (index + 1) * size <= len(head) and struct.unpack_from("<I", head, offset + index * size)[0] == 1
    ]
    return min(aligned) if aligned else None
