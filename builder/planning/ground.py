"""The ground of a build (root, environment, compiler), and the place where its finished wheel is tested.

Data only; `builder/ground` assembles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from builder.box.place import Place


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Root, environment and compiler of a build."""

    root: Path
    environment: Path
    packages: Path
    "The folder with torch."
    compiler: Path | None
    "The CUDA compiler's folder; None: the recipe does not require it."
    title: str
    "A description in one sentence."
    folders: tuple[str, ...] = ()
    "Folders of the root that its loader searches in addition to those of Debian."
    interpreter: Path | None = None
    "The Python that exports the C API, if it is not the root's."
    tools: Path | None = None
    "The folder with programs for this machine that the recipe requires to build; None: it requires no programs."
    sm: tuple[str, ...] = ()
    "Architectures of the stack's device code."
    emulator: str | None = None
    "Path in the root of the emulator for programs of the target; None: the kernel of this machine can run them."
    glibc: str = ""
    "Highest manylinux level that the stack allows for the target, as 2_34."
    cuobjdump: Path | None = None
    "NVIDIA's program that prints device code."


@dataclass(frozen=True, kw_only=True)
class CleanEnvironment:
    """A clean environment with a wheel, and the place where commands test it."""

    prefix: str
    "Path of the environment for the command; the files are below it."
    files: str
    place: Place


class TrialEnvironment(Protocol):
    """The environment in which finished wheels are tested."""

    @property
    def emulated(self) -> bool:
        """Whether the wheel's architecture is not that of this machine."""

    @property
    def overlaid(self) -> bool:
        """Whether the clean environment is on top of another one, whose modules can be imported."""

    def clean(self, wheel: Path, scratch: Path, files: Path, *, memory: int, with_gpu: bool) -> CleanEnvironment:
        """Create an environment with the wheel in `scratch`/env, which the caller removes; the command can read `files`.

        Raises:
            InstallError: the wheel does not fit the environment, or is damaged.
        """
