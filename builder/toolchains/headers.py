"""Which headers of the C library CUDA's compiler cannot read."""

from __future__ import annotations

from packaging.version import Version

from builder.planning.stack import Arch

_BARE_VECTORS = Version("2.38")
"The first glibc whose headers have vector types of gcc's in them on aarch64, which CUDA's front end has to know."
_LAST_WITHOUT_VECTORS = Version("12.4")
"Of CUDA: does not know them (__Float32x4_t; tried: 12.4.131 fails with glibc 2.41, 13.0.88 does not)."


def unread_headers(arch: Arch, cuda: str, glibc: str) -> str | None:
    """Why CUDA's compiler fails in each unit with the headers of that C library; None where it is not known to."""
    if arch is Arch.AARCH64 and Version(cuda) <= _LAST_WITHOUT_VECTORS and Version(glibc) >= _BARE_VECTORS:
        return f"CUDA {cuda} cannot read the headers of glibc {glibc} on aarch64, only those before {_BARE_VECTORS}"
    return None
