"""Headers of glibc that the CUDA compiler cannot read."""

from __future__ import annotations

from packaging.version import Version

from builder.planning.stack import Arch

_BARE_VECTORS = Version("2.38")
"The first glibc whose headers use vector types of gcc on aarch64, which CUDA's front end must know."
_LAST_WITHOUT_VECTORS = Version("12.4")
"Last CUDA release without these types (__Float32x4_t). Tested: 12.4.131 fails with glibc 2.41, 13.0.88 does not."


def unread_headers(arch: Arch, cuda: str, glibc: str) -> str | None:
    """Why the CUDA compiler fails in every unit with the headers of that C library; None: it is not known to fail."""
    if arch is Arch.AARCH64 and Version(cuda) <= _LAST_WITHOUT_VECTORS and Version(glibc) >= _BARE_VECTORS:
        return (
            f"CUDA {cuda} cannot read the headers of glibc {glibc} on aarch64; "
            f"it can read those of releases before {_BARE_VECTORS}"
        )
    return None
