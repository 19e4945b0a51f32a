"""The stage `root`: assemble the ground of a build, and show the progress. `reopen` opens the place of an earlier compile."""

from __future__ import annotations

from pathlib import Path

from builder import fetch
from builder.box.place import Place
from builder.compiling import pep517
from builder.fetch import crates, source
from builder.flow import compile, tree
from builder.planning.ground import Ground
from builder.planning.plan import Caches, Plan
from builder.planning.settings import Settings
from builder.toolchains import rust
from gracefarm.console import Console


def lay_ground(plan: Plan, settings: Settings, console: Console) -> Ground:
    """Root, environment and compilers of a plan; assembled if they do not exist."""
    cuda = plan.recipe.data.build.cuda
    with console.progress("root") as tick:
        ground = plan.toolchain.lay(plan.stack, plan.host, plan.target, settings, tick, cuda=cuda)
    for place in (ground.root, ground.environment, ground.compiler, ground.tools):
        if place is not None and place.is_relative_to(settings.home):
            # `builder clean --keep` removes the least recently used grounds first.
            place.with_name(f"{place.name}.lock").touch()
    console.step("root", ground.title)
    return ground


def reopen(plan: Plan, folder: Path, settings: Settings, console: Console) -> Place:
    """The place of a compile, for manual use. The source is unpacked again if a successful build has removed it. Manual
    compiles use the build's number of jobs and its caches.

    Raises:
        GracefarmError: the source or the ground cannot be fetched or assembled.
    """
    fetched = tree.with_trees(fetch.fetch(plan.recipe.data, settings), plan, settings)
    epoch = source.source_date_epoch(plan.recipe.data, fetched)
    if not (folder / "source").is_dir():
        for name in ("out", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        source.unpack(plan.recipe, fetched, folder / "source", epoch)
        crates.vendor(plan.recipe, folder / "source", folder / rust.CRATES, settings)
    memory = pep517.bound(settings)
    ground = lay_ground(plan, settings, console)
    jobs = compile.count_jobs(plan, settings, memory).count
    return plan.toolchain.place(plan, ground, settings, folder, jobs=jobs, epoch=epoch, memory=memory, caches=Caches())
