"""`builder set run`: the whole way of a set on one machine, to an import of what was installed by hash from an index alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uv
from pypi_simple import PyPISimple

from builder.compiling import pep517
from builder.flow import run
from builder.ground import environment, root
from builder.ground.uv import platform
from builder.planning import stack
from builder.planning.settings import Settings
from builder.sets import build, locks, together
from builder.sets.build import BuiltSet
from builder.sets.locks import SetAddress
from builder.sets.plan import SetPlan
from builder.sets.set_record import Locked, Tested
from gracefarm.console import Console
from gracefarm.errors import InstallError, PublishError
from gracefarm.files import lock, remove_tree
from gracefarm.process import first_line
from gracefarm.uv import explain


@dataclass(frozen=True, kw_only=True)
class SetRun:
    """Where everything is, and how long it took."""

    lock: str
    pylock: str
    files: int
    "Files of the set at the index."
    size: int
    "Their bytes."
    mirror_s: float
    install_s: float
    tested: Tested


def run_set(plan: SetPlan, jobs: int | None, settings: Settings, console: Console) -> SetRun:
    """Build and test the set, stage it, mirror what is not ours, publish; install by hash from the set's view alone; import.

    Each run shows the set under a name of its own, since a published one never changes; the index keeps files once.

    Raises:
        GracefarmError: of the step that failed.
    """
    built = build.build_set(plan, jobs, settings, console)
    with lock(settings.home / "locks" / "run"), run.local_index(settings) as (url, token):
        at = locks.served(url, f"{plan.set.data.name}-{time.strftime('%Y%m%d-%H%M%S')}", ("__token__", token))
        console.step("index", f"serving {url} from {settings.home / 'index'}")
        named, mirror_s = _published(built, at, settings, console)
        pylock = build.render(built, at, named)
        files, size = _holds(at)
        console.step("mirror", f"{files} files, {size / 1e9:.2f} GB, in {mirror_s:.0f} s")
        start = time.monotonic()
        with _scratch(built, settings) as home:
            clean, base = _installed(built, _only(at, home, settings), console)
            install_s = time.monotonic() - start
            console.step("install", f"{len(built.record.wheels)} wheels by hash from {at.simple} alone in {install_s:.0f} s")
            _dry_run(plan, pylock, home, console)
            tested = together.tried(plan.set, clean, base, home, pep517.bound(settings))
        console.step("import", f"imported {', '.join(tested.smoke.modules)} in {tested.wall_s:.0f} s")
    return SetRun(
        lock=str(built.lock),
        pylock=str(pylock),
        files=files,
        size=size,
        mirror_s=round(mirror_s, 1),
        install_s=round(install_s, 1),
        tested=tested,
    )


def _published(built: BuiltSet, at: SetAddress, settings: Settings, console: Console) -> tuple[tuple[Locked, ...], float]:
    """Stage, mirror on the index's side as its owner would, stage again; the wheels there, and the mirror's seconds."""
    try:
        build.stage(built, at, settings, console)
    except build.IncompleteError as error:
        console.step("stage", error.cause)
    start = time.monotonic()
    for index, own in [*built.own_locks.items(), (None, built.lock)]:
        command = [sys.executable, "-m", "index", "mirror", str(own), "--set", at.name, "--root", str(settings.home / "index")]
        index_url = index or settings.index_url
        variables = {"GRACEFARM_PYTHON_INDEX": index_url} if index_url else {}
        process = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        if process.returncode:
            words = first_line(process.stderr)
            raise PublishError(f"the index cannot mirror {own}: {words}", repeat=" ".join(command[2:]))
    took = time.monotonic() - start
    return build.stage(built, at, settings, console), took


def _holds(at: SetAddress) -> tuple[int, int]:
    """Files and bytes of the published set, as its own pages say."""
    with PyPISimple(at.simple) as client:
        pages = [client.get_project_page(name, timeout=60) for name in client.get_index_page(timeout=60).projects]
    sizes = [file.size or 0 for page in pages for file in page.packages]
    return len(sizes), sum(sizes)


@contextmanager
def _scratch(built: BuiltSet, settings: Settings) -> Iterator[Path]:
    """A home without any cache, on the file system of the real one: what is installed there can only be from the index."""
    home = built.folder / "run"
    remove_tree(home)  # of a run that was killed
    try:
        home.mkdir()
        (home / "roots").symlink_to((settings.home / "roots").resolve())
        yield home
    finally:
        remove_tree(home)


def _only(at: SetAddress, home: Path, settings: Settings) -> Settings:
    """Settings of a machine that has nothing yet and knows no other index."""
    # No copy: that would keep the index that was asked for before.
    return Settings.model_validate(settings.model_dump() | {"home": home, "python_index": at.simple})


def _installed(built: BuiltSet, settings: Settings, console: Console) -> tuple[Path, Path]:
    """An environment of every wheel of the set's lock, and the root to run it in."""
    plan, target = built.plan, built.plan.set.data.target
    base = root.ensure(plan.set.stack, stack.host_arch(), target, settings)
    data = plan.set.runtime.data
    whole = replace(
        plan.set.runtime,
        folder=built.folder,
        kind="set",
        data=data.model_copy(
            update={
                "environment": data.environment.model_copy(update={"requirements": (), "wheels": ()}),
                "toolchain": data.toolchain.model_copy(update={"requirements": ()}),
            }
        ),
    )
    with console.progress("install") as tick:
        return environment.ensure(whole, target, base, settings, tick), base


def _dry_run(plan: SetPlan, pylock: Path, home: Path, console: Console) -> None:
    """pylock.toml is read by uv, and what it names is there."""
    of = plan.set
    command = [uv.find_uv_bin(), "pip", "install", "--dry-run", "--preview-features", "pylock", "--no-config"]
    command += ["--requirements", str(pylock), f"--target={home / 'pylock'}", f"--python={sys.executable}"]
    command += [*platform(of.stack, of.data.target), f"--cache-dir={home / 'uv'}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise InstallError(f"uv does not install from {pylock}: {explain(process.stderr)[1]}", repeat=" ".join(command))
    lines = process.stderr.splitlines()
    outcome = next((line for line in lines if line.startswith("Would install")), "nothing to install")
    console.step("pylock", f"{pylock}, as uv reads it: {outcome.lower()}")
