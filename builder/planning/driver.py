"""The functions of NVIDIA's driver library, libcuda.so.1, which is part of the driver. They are read from CUDA's headers."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

SONAME = "libcuda.so.1"
HEADERS = ("cuda.h", "cudaGL.h", "cudaEGL.h", "cudaVDPAU.h")
_DECLARATION = re.compile(r"\bCUresult\s+(?:CUDAAPI\s+)?(cu[A-Z]\w*)\s*\(")
_RENAME = re.compile(r"^\s*#\s*define\s+cu[A-Z]\w*\s+(?:__CUDA_API_(PTDS|PTSZ)\()?(cu[A-Z]\w*)", re.MULTILINE)
"cuda.h renames functions with macros: cuMemAlloc is cuMemAlloc_v2, or cuMemAlloc_v2_ptds with a default stream per thread."
_PROFILER = re.compile(r"\bPFN_(cuProfiler\w+)_v\d+\)")


def headers(packages: Path, compiler: Path | None = None) -> Path | None:
    """The folder of cuda.h in a CUDA toolkit, else in NVIDIA's wheels in `packages`; None: it does not exist."""
    own = [compiler / "include"] if compiler is not None else []
    folders = [*own, *sorted(packages.glob("nvidia/*/include"))]
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


@cache
def symbols(include: Path) -> frozenset[str]:
    """Functions that the headers in a folder declare, with the names that the library exports."""
    names: set[str] = set()
    for header in HEADERS:
        text = _text(include / header)
        names.update(_DECLARATION.findall(text))
        for stream, name in _RENAME.findall(text):
            names |= {name, f"{name}_{stream.lower()}"} if stream else {name}
    # cudaProfiler.h is in another wheel; the types of its three functions are here.
    names.update(_PROFILER.findall(_text(include / "cudaProfilerTypedefs.h")))
    # Only the driver for Windows has these, which cudaGL.h does not show.
    return frozenset(name for name in names if not name.startswith("cuWGL"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
