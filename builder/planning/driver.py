"""The symbols of NVIDIA's driver library: libcuda.so.1 comes with the driver and is in no lock."""

from __future__ import annotations

from importlib.resources import files

SONAME = "libcuda.so.1"


def symbols(cuda: str | None) -> frozenset[str] | None:
    """Functions that the driver of a CUDA release exports, from builder/data; None where there is no list for it."""
    if cuda is None:
        return None
    path = files("builder") / "data" / f"driver-symbols-{cuda}.txt"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))
