"""Clean environments on this machine, in which finished wheels are tested."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from builder.box.host import HostPlace
from builder.planning.ground import CleanEnvironment, Ground
from builder.toolchains import host_environment, sandbox_trial
from builder.toolchains.host_tools import HostTools
from gracefarm.files import remove_tree


@dataclass(frozen=True, kw_only=True)
class HostTrialEnvironment:
    """A virtual environment on top of that of the build, on this machine."""

    tools: HostTools
    ground: Ground
    emulated: bool = False
    overlaid = True

    def clean(self, wheel: Path, scratch: Path, files: Path, *, memory: int, with_gpu: bool) -> CleanEnvironment:
        """See `builder.planning.ground.TrialEnvironment`; the machine's GPU is always visible."""
        prefix = host_environment.fresh(self.tools, self.ground.environment, scratch / "env", wheel)
        for name in ("home", "tmp"):
            remove_tree(scratch / name)
            (scratch / name).mkdir()
        own = {"HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp"), "PATH": search_path(self.tools, prefix)}
        place = HostPlace(
            environment=sandbox_trial.variables(self.ground) | own | library_path(),
            workdir=str(files),
            memory=memory,
            network=self.tools.uncut is not None,
        )
        return CleanEnvironment(prefix=str(prefix), files=str(files), place=place)


def search_path(tools: HostTools, site: Path, home: Path | None = None) -> str:
    """PATH: our nvcc, the clean environment, the scripts of the named environment, this machine's programs."""
    places = [*([home / "bin"] if home else []), site / "bin", tools.interpreter.scripts]
    return ":".join([*map(str, places), *dict.fromkeys([*os.environ.get("PATH", os.defpath).split(":"), "/usr/bin", "/bin"])])


def library_path() -> dict[str, str]:
    """LD_LIBRARY_PATH, which the torch of some machines requires."""
    value = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": value} if value else {}
