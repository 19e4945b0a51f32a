"""Write the list of the functions that NVIDIA's driver library exports, from the headers of a CUDA release, for builder/data.

python tools/driver_symbols.py 13.0 nvidia-cuda-runtime==13.0.96 INCLUDE > builder/data/driver-symbols-13.0.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VIEWS = ((), ("-DCUDA_API_PER_THREAD_DEFAULT_STREAM",), ("-D__CUDA_API_VERSION_INTERNAL",))
"cuda.h renames functions by macros (_v2, _ptsz, _ptds); each view shows the exported names of another set."
INTEROP = ("cudaGL.h", "cudaEGL.h", "cudaVDPAU.h")
"Headers that include those of other projects, so they are read as text: declarations, and macros that rename."
_DECLARATION = re.compile(r"\bCUresult\s+(?:CUDAAPI\s+)?(cu[A-Z]\w*)\s*\(")
_RENAME = re.compile(r"^\s*#\s*define\s+cu[A-Z]\w*\s+(?:__CUDA_API_PT[SD]Z?\()?(cu[A-Z]\w*)", re.MULTILINE)
_PROFILER = re.compile(r"\bPFN_(cuProfiler\w+)_v\d+\)")


def declared(include: Path, compiler: str = "cc") -> list[str]:
    """Functions that the driver API's headers in the folder `include` declare, sorted.

    Raises:
        OSError, subprocess.CalledProcessError: there is no such compiler, or no cuda.h.
    """
    names: set[str] = set()
    for view in VIEWS:
        command = [compiler, "-E", "-P", "-x", "c", f"-I{include}", *view, str(include / "cuda.h")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names.update(_DECLARATION.findall(text))
    for header in INTEROP:
        text = _text(include / header)
        names.update(_DECLARATION.findall(text), _RENAME.findall(text))
    # cudaProfiler.h comes in a wheel of its own; the types of its three functions are here.
    names.update(_PROFILER.findall(_text(include / "cudaProfilerTypedefs.h")))
    # Windows' driver has these, and the text of cudaGL.h does not tell.
    return sorted(name for name in names if not name.startswith("cuWGL"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def render(cuda: str, source: str, names: Sequence[str]) -> str:
    """The committed list of a CUDA release; `source` says where the headers came from."""
    head = (
        f"# Functions that NVIDIA's driver library libcuda.so.1 exports, as the driver API of CUDA {cuda} declares them.",
        f"# Source: the headers of {source}.",
        "# Regenerate (INCLUDE is that wheel's folder of headers, cc any C preprocessor):",
        f"#   python tools/driver_symbols.py {cuda} {source} INCLUDE",
    )
    return "\n".join([*head, *names]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(sys.argv[1], sys.argv[2], declared(Path(sys.argv[3]))))
