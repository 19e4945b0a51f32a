"""The symbols of NVIDIA's driver library: libcuda.so.1 comes with the driver and is in no lock."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

SONAME = "libcuda.so.1"
VIEWS = ((), ("-DCUDA_API_PER_THREAD_DEFAULT_STREAM",), ("-D__CUDA_API_VERSION_INTERNAL",))
"cuda.h renames functions by macros (_v2, _ptsz, _ptds); each view shows the exported names of another set."
HEADERS = ("cuda.h", "cudaProfiler.h")
_DECLARATION = re.compile(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(")


def symbols(cuda: str | None) -> frozenset[str] | None:
    """Functions that the driver of a CUDA release exports, from builder/data; None where there is no list for it."""
    if cuda is None:
        return None
    path = files("builder") / "data" / f"driver-symbols-{cuda}.txt"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def declared(include: Sequence[Path], compiler: str = "cc") -> list[str]:
    """Functions that the driver API's headers in the folders `include` declare, sorted."""
    present = [header for header in HEADERS if any((folder / header).is_file() for folder in include)]
    source = "".join(f"#include <{header}>\n" for header in present)
    folders = [f"-I{folder}" for folder in include]
    found: set[str] = set()
    for view in VIEWS:
        command = [compiler, "-E", "-P", "-x", "c", *folders, *view, "-"]
        text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
        found.update(_DECLARATION.findall(text))
    return sorted(found)
