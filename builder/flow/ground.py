"""The stage `root`: what a build stands on, laid with progress; and the place of an earlier compile, opened again."""

from __future__ import annotations

from pathlib import Path

from builder import fetch
from builder.box.place import Place
from builder.compiling import pep517
from builder.fetch import source
from builder.flow import compile, tree
from builder.planning.ground import Ground
from builder.planning.plan import Caches, Plan
from builder.planning.settings import Settings
from gracefarm.console import Console


def lay_ground(plan: Plan, settings: Settings, console: Console) -> Ground:
    """Root, environment and compilers of a plan, assembled where they are not there yet."""
    cuda = plan.recipe.data.build.cuda
    with console.progress("root") as tick:
        ground = plan.toolchain.lay(plan.stack, plan.host, plan.target, settings, tick, cuda=cuda)
    console.step("root", ground.title)
    return ground


def reopen(plan: Plan, folder: Path, settings: Settings, console: Console) -> Place:
    """The place of a compile once more, its source unpacked where a success has removed it; what is compiled there by hand
    takes as many jobs as a build, and goes into its cache.

    Raises:
        GracefarmError: the source or the ground cannot be had.
    """
    fetched = tree.with_trees(fetch.fetch(plan.recipe.data, settings), plan, settings)
    epoch = source.source_date_epoch(plan.recipe.data, fetched)
    if not (folder / "source").is_dir():
        for name in ("out", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        source.unpack(plan.recipe, fetched, folder / "source", epoch)
    memory = pep517.bound(settings)
    ground = lay_ground(plan, settings, console)
    jobs = compile.count_jobs(plan, settings, memory).count
    return plan.toolchain.place(plan, ground, settings, folder, jobs=jobs, epoch=epoch, memory=memory, caches=Caches())
