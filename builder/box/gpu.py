"""A GPU in a sandbox: its device files and the libraries of NVIDIA's driver."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from builder.box.sandbox import BindMount

DRIVER_FOLDER = "/run/driver"
"Folder in the sandbox of NVIDIA's user-space driver, which belongs to the kernel driver and cannot be locked."


VARIABLES: Mapping[str, str] = {
    "LD_LIBRARY_PATH": DRIVER_FOLDER,
    # Else triton runs `ldconfig -p`, which fails in a root: no maintainer script has run, so /etc/ld.so.cache does not exist.
    "TRITON_LIBCUDA_PATH": DRIVER_FOLDER,
}


def devices() -> list[Path]:
    """The device files of NVIDIA's driver on this machine; empty without a GPU."""
    files = sorted(Path("/dev").glob("nvidia*"))
    return files if any(re.fullmatch(r"nvidia\d+", file.name) for file in files) else []


def loaders_cache() -> str:
    """The libraries that this machine's loader finds by name, from `ldconfig -p`."""
    process = subprocess.run(
        ["ldconfig", "-p"], capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/sbin:/usr/bin"}
    )
    return process.stdout


def driver_libraries(listing: str) -> Iterator[BindMount]:
    """The driver's libraries in a loader's cache, each mapped to a separate folder in the sandbox, and libcuda.so for linking.

    JIT compilers link with `-lcuda`, but the name libcuda.so belongs to a developer package that may not be installed.
    """
    library = r"^\s*(lib(?:cuda|nvidia-[\w-]+)\.so\.\S+) \(libc6,(?:x86-64|AArch64)\b.* => (\S+)$"  # others are for 32 bits
    places: dict[str, str] = {}
    for name, place in re.findall(library, listing, re.MULTILINE):
        places.setdefault(name, place)
    if "libcuda.so.1" in places:
        places["libcuda.so"] = places["libcuda.so.1"]
    for name, place in places.items():
        yield BindMount(source=Path(os.path.realpath(place)), target=f"{DRIVER_FOLDER}/{name}")
