"""A place where a command of somebody else's runs, whatever shuts it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Place(Protocol):
    """What `builder.box.sandbox` needs of a place; its kinds are `sandbox.Sandbox` and `host.HostPlace`."""

    @property
    def memory(self) -> int:
        """Bytes that the whole tree of processes may use."""

    @property
    def network(self) -> bool:
        """The command has the machine's network."""

    @property
    def hostname(self) -> str:
        """The machine's name as the command knows it: no attempt to reach another."""

    @property
    def hears_every_name(self) -> bool:
        """Each question for a name comes to the recorder."""

    def command(self, argv: Sequence[str], *, terminal: bool = False) -> list[str]:
        """The complete command line that runs `argv` there; `terminal`: it keeps the terminal that we have."""
