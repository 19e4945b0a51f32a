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
INTEROP = ("cudaGL.h", "cudaEGL.h", "cudaVDPAU.h")
"Headers that include those of other projects, so they are read as text: declarations, and macros that rename."
_DECLARATION = re.compile(r"\bCUresult\s+(?:CUDAAPI\s+)?(cu[A-Z]\w*)\s*\(")
_RENAME = re.compile(r"^\s*#\s*define\s+cu[A-Z]\w*\s+(?:__CUDA_API_PT[SD]Z?\()?(cu[A-Z]\w*)", re.MULTILINE)
_PROFILER = re.compile(r"\bPFN_(cuProfiler\w+)_v\d+\)")


def symbols(cuda: str | None) -> frozenset[str] | None:
    """Functions that the driver of a CUDA release exports, from builder/data; None where there is no list for it."""
    if cuda is None:
        return None
    path = files("builder") / "data" / f"driver-symbols-{cuda}.txt"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def declared(include: Path, compiler: str = "cc") -> list[str]:
    """Functions that the driver API's headers in the folder `include` declare, sorted.

    Raises:
        OSError, subprocess.CalledProcessError: there is no such compiler, or no cuda.h.
    """
    found: set[str] = set()
    for view in VIEWS:
        command = [compiler, "-E", "-P", "-x", "c", f"-I{include}", *view, str(include / "cuda.h")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.update(_DECLARATION.findall(text))
    for header in INTEROP:
        text = _text(include / header)
        found.update(_DECLARATION.findall(text), _RENAME.findall(text))
    # cudaProfiler.h comes in a wheel of its own; the types of its three functions are here.
    found.update(_PROFILER.findall(_text(include / "cudaProfilerTypedefs.h")))
    # Windows' driver has these, and the text of cudaGL.h does not tell.
    return sorted(name for name in found if not name.startswith("cuWGL"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def render(cuda: str, source: str, names: Sequence[str]) -> str:
    """The committed list of a CUDA release; `source` says where the headers came from."""
    call = f'd.render("{cuda}", "{source}", d.declared(Path(sys.argv[1])))'
    script = f'import sys; from pathlib import Path; from builder.audit import driver as d; print({call}, end="")'
    head = (
        f"# Functions that NVIDIA's driver library libcuda.so.1 exports, as the driver API of CUDA {cuda} declares them.",
        f"# Source: the headers of {source}.",
        "# Regenerate (INCLUDE is that wheel's folder of headers, cc any C preprocessor):",
        f"#   python -c '{script}' INCLUDE",
    )
    return "\n".join([*head, *names]) + "\n"
