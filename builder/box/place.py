"""The interface of places in which untrusted commands run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Place(Protocol):
    """The interface that `builder.box.sandbox` requires; implemented by `sandbox.Sandbox` and `host.HostPlace`."""

    @property
    def memory(self) -> int:
        """Maximum bytes of memory of the whole process tree."""

    @property
    def network(self) -> bool:
        """Whether the command shares the machine's network."""

    @property
    def hostname(self) -> str:
        """The host name that the command sees. A query for it is not a network attempt."""

    @property
    def hears_every_name(self) -> bool:
        """Whether all DNS queries reach the recorder."""

    @property
    def reads(self) -> tuple[Path, ...]:
        """The builder's folders and files that a command there reads and cannot change."""

    def command(self, argv: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The complete command line that runs `argv` there; `terminal`: keep our terminal."""
