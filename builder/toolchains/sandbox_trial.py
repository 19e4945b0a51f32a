"""Clean environments in a sandbox, in which finished wheels are tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.box import gpu
from builder.box.sandbox import BindMount, Sandbox
from builder.ground import environment
from builder.planning.ground import CleanEnvironment, Ground

WORKDIR = "/smoke"
"Also the folder of the driver script, so that a Python that searches either of them finds the decoys first."


def variables(ground: Ground | None = None) -> dict[str, str]:
    """The variables of a smoke test; with a ground also those for architectures and emulator."""
    own = {"GRACEFARM_SM": " ".join(ground.sm), "GRACEFARM_EMULATOR": ground.emulator or ""} if ground is not None else {}
    return own | {
        "PATH": "/env/bin:/opt/gracefarm/bin:/usr/bin:/bin",
        "HOME": "/home/build",
        "LC_ALL": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": "/tmp",  # noqa: S108 the sandbox's own
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True, kw_only=True)
class SandboxTrialEnvironment:
    """A copy of the stack's environment, in its root."""

    ground: Ground
    emulated: bool = False
    overlaid = False

    def clean(self, wheel: Path, scratch: Path, files: Path, *, memory: int, with_gpu: bool) -> CleanEnvironment:
        """See `builder.planning.ground.TrialEnvironment`."""
        prefix = scratch / "env"
        environment.add(environment.fresh(self.ground.environment, prefix), wheel, self.ground.glibc)
        mounts = (BindMount(source=prefix, target="/env"), BindMount(source=files, target=WORKDIR))
        box = Sandbox(
            root=self.ground.root,
            mounts=(*mounts, *(gpu.driver_libraries(gpu.loaders_cache()) if with_gpu else ())),
            environment=variables(self.ground) | (dict(gpu.VARIABLES) if with_gpu else {}),
            workdir=WORKDIR,
            memory=memory,
            devices=tuple(map(str, gpu.devices())) if with_gpu else (),
        )
        return CleanEnvironment(prefix="/env", files=WORKDIR, place=box)
