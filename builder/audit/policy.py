"""What a wheel is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder.planning.recipe import Bundled
from builder.planning.stack import Arch

DEFAULT_MAX_SIZE = 500 << 20


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The demands of stack and recipe, and where the stack's files are."""

    target: Arch
    glibc: str
    "Highest manylinux level accepted, as '2_34'."
    python: str = "3.11"
    name: str | None = None
    "Distribution name that the recipe promises; None for anybody's wheel."
    version: str | None = None
    cuda: str | None = None
    "CUDA of the stack, as '13.0': its list of driver symbols stands for libcuda.so.1."
    sm: tuple[str, ...] | None = None
    "Exactly these cubins, as ('90',); None: the wheel must hold no CUDA code."
    needs_cubins: bool = False
    "The recipe compiles CUDA code: a wheel without any cubin is refused."
    sm_extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    "Further sm values by source glob, as the recipe declares them."
    bundled: tuple[Bundled, ...] = ()
    "Third-party files that the recipe declares."
    max_size: int = DEFAULT_MAX_SIZE
    "Bytes."
    build_paths: tuple[str, ...] = ()
    "Prefixes of the build that must not stand in an RPATH, even behind $ORIGIN."
    site_packages: Path | None = None
    "The stack's environment: torch/lib, nvidia/*/lib and whatever else the lock installs."
    root: Path | None = None
    "The Debian root: libc, libstdc++, loader and the target's Python."
    folders: tuple[str, ...] = ()
    "Further folders of the root that its loader searches."
    interpreter: Path | None = None
    "The Python that exports the C API, where it is known; else it is looked for in the root."
    cuobjdump: Path | None = None
    "NVIDIA's cuobjdump for this host."
