"""A GPU in a sandbox: its device files, and the libraries of NVIDIA's driver."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from builder.box.sandbox import BindMount

DRIVER_FOLDER = "/run/driver"
"Of the sandbox: NVIDIA's user-space driver, which comes with the kernel's and is in no lock."


VARIABLES: Mapping[str, str] = {
    "LD_LIBRARY_PATH": DRIVER_FOLDER,
    # triton else asks `ldconfig -p`, which fails in a root: no maintainer script has run, so there is no /etc/ld.so.cache.
    "TRITON_LIBCUDA_PATH": DRIVER_FOLDER,
}


def devices() -> list[Path]:
    """The device files of NVIDIA's driver on this machine; empty without a GPU."""
    files = sorted(Path("/dev").glob("nvidia*"))
    return files if any(re.fullmatch(r"nvidia\d+", file.name) for file in files) else []


def loaders_cache() -> str:
    """What this machine's loader finds by name, as `ldconfig -p` lists it."""
    process = subprocess.run(
        ["ldconfig", "-p"], capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/sbin:/usr/bin"}
    )
    return process.stdout


def driver_libraries(listing: str) -> Iterator[BindMount]:
    """The driver's libraries of a loader's cache, each to a folder of its own in the sandbox; and libcuda.so, to link with.

    That name is of a package for developers which a driver need not have brought, and a JIT compiler links with `-lcuda`.
    """
    library = r"^\s*(lib(?:cuda|nvidia-[\w-]+)\.so\.\S+) \(libc6,(?:x86-64|AArch64)\b.* => (\S+)$"  # else: for 32 bits
    places: dict[str, str] = {}
    for name, place in re.findall(library, listing, re.MULTILINE):
        places.setdefault(name, place)
    if "libcuda.so.1" in places:
        places["libcuda.so"] = places["libcuda.so.1"]
    for name, place in places.items():
        yield BindMount(source=Path(os.path.realpath(place)), target=f"{DRIVER_FOLDER}/{name}")
