"""A running build: its options, and its record so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from builder.audit.verdict import Verdict
from builder.box import meter
from builder.compiling.jobs import Jobs
from builder.compiling.units import CacheStatistics, DeviceStatistics, Unit
from builder.planning.cargo_lock import Crate
from builder.planning.plan import Caches, Plan
from builder.planning.settings import Settings
from builder.proof import judges, record
from builder.proof.record import Record, Stage
from builder.proof.shared_cache import Mode, SharedCacheUse
from builder.smoke import GpuResult, SmokeResult
from gracefarm.console import Console
from gracefarm.errors import GracefarmError

Until = Literal["root", "compile"]
"The last step of a build that ends early."


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of the user in addition to the plan; they do not enter the build id."""

    jobs: int | None = None
    publish: str | None = None
    keep: bool = False
    caches: Caches = field(default_factory=Caches)
    shared_cache: Mode = "read"
    "How to use the shared cache, if the settings name one."
    until: Until | None = None
    "End after this step; None: build the wheel."


@dataclass(kw_only=True)
class Attempt:
    """A running build."""

    plan: Plan
    options: BuildOptions
    settings: Settings
    console: Console
    folder: Path
    stages: list[Stage] = field(default_factory=list)
    jobs: Jobs | None = None
    crates: tuple[Crate, ...] = ()
    known: dict[str, Unit] = field(default_factory=dict)
    "Costs of translation units from earlier runs."
    units: dict[str, Unit] = field(default_factory=dict)
    compiler_cache: CacheStatistics | None = None
    device_code: DeviceStatistics | None = None
    shared_cache: SharedCacheUse | None = None
    torch_cxx11_abi: bool | None = None
    verdicts: tuple[Verdict, ...] = ()
    device_digests: dict[str, str] = field(default_factory=dict)
    smoke: SmokeResult | None = None
    gpu: GpuResult | None = None
    work_bytes: int | None = None
    "Disk space of the working folder of a finished build."
    tree: str | None = None
    "Digest of the finished tree, for a recipe of a tree."

    @property
    def log(self) -> Path:
        """The complete output of compile and smoke test."""
        return self.folder / "log.txt"

    @property
    def work(self) -> Path:
        """The folder of the source and the compile."""
        return self.folder / "work"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the time of a stage that runs in this process."""
        start, usage = time.monotonic(), meter.Usage()
        try:
            with meter.watch() as usage:
                yield
        finally:
            wall, cpu = round(time.monotonic() - start, 2), round(usage.cpu_s, 2)
            self.stages.append(Stage(name=name, wall_s=wall, cpu_s=cpu, peak_memory=usage.peak_memory))

    def record(self, wheel: Path | None, error: GracefarmError | None) -> Record:
        """The record so far: a finished build has a wheel, a failed one an error, a running one neither."""
        data = self.plan.recipe.data
        return Record(
            build_id=self.plan.build_id,
            recipe=self.plan.recipe.key,
            name=data.name,
            version=wheel.name.split("-")[1] if wheel else data.version,
            stack=self.plan.stack.data.name,
            interpreter=interpreter.name if (interpreter := self.plan.stack.interpreter) is not None else None,
            asked_sm=self.plan.stack.asked_sm,
            asked_ptx=self.plan.stack.asked_ptx,
            from_source=self.plan.recipe.from_source,
            asked_variant=self.plan.stack.asked_variant,
            asked_twin=self.plan.stack.asked_twin,
            inputs=self.plan.inputs,
            toolchain=self.plan.toolchain.kind,
            unconfirmed=tuple(
                f"{known.what} {known.sha256}: {known.sentence}" for known in self.plan.evidence if not known.confirmed
            ),
            outcome="built" if wheel or self.tree else "failed",
            failure=record.failure(error) if error else None,
            wheel=record.product(wheel) if wheel else None,
            tree=self.tree,
            source=next(map(record.product, sorted(wheel.parent.glob("*.tar.gz"))), None) if wheel else None,
            torch_cxx11_abi=self.torch_cxx11_abi,
            crates=self.crates,
            jobs=self.jobs,
            stages=tuple(self.stages),
            work_bytes=self.work_bytes,
            units=self.units,
            compiler_cache=self.compiler_cache,
            device_code=self.device_code,
            shared_cache=self.shared_cache,
            verdicts=self.verdicts,
            device_digests=self.device_digests,
            judged_by=judges.digest(self.plan),
            smoke=self.smoke,
            gpu=self.gpu,
            finished=record.now(),
        )
