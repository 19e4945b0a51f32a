"""What a build stands on, and where its finished wheel is tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from builder.box.place import Place


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a build stands on."""

    root: Path
    environment: Path
    packages: Path
    "The folder that has torch."
    compiler: Path | None
    "The CUDA compiler's folder; None: the recipe needs none."
    title: str
    "One sentence for people."
    folders: tuple[str, ...] = ()
    "Folders of the root that its loader searches beside Debian's own."
    interpreter: Path | None = None
    "The Python that exports the C API, where it is not the root's."
    tools: Path | None = None
    "Programs of this machine that the recipe requires to build; None: it requires none."
    sm: tuple[str, ...] = ()
    "Architectures of the stack's device code."
    emulator: str | None = None
    "Inside the root: what runs programs of the target where this machine's kernel does not."
    glibc: str = ""
    "Highest manylinux level that the stack allows for the target, as 2_34."
    cuobjdump: Path | None = None
    "NVIDIA's reader of device code."


@dataclass(frozen=True, kw_only=True)
class CleanEnvironment:
    """A clean environment with a wheel, and where commands run that try it."""

    prefix: str
    "The environment, and below it the files, as the command sees them."
    files: str
    place: Place


class TrialEnvironment(Protocol):
    """Where finished wheels are tried."""

    @property
    def emulated(self) -> bool:
        """The wheel's architecture is not this machine's."""

    @property
    def overlaid(self) -> bool:
        """The clean environment lies over another one, which may bring modules that are asked for."""

    def clean(self, wheel: Path, scratch: Path, files: Path, *, memory: int, with_gpu: bool) -> CleanEnvironment:
        """A fresh environment with the wheel in `scratch`/env, which the caller removes; the command sees `files`.

        Raises:
            InstallError: the wheel does not fit the environment, or is damaged.
        """
