"""`builder set run`: build, test and publish a set on one machine, install it by hash from the index, and import it."""

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
from gracefarm.console import Console, counted
from gracefarm.errors import InstallError, PublishError
from gracefarm.files import lock, remove_tree
from gracefarm.process import first_line
from gracefarm.uv import explain


@dataclass(frozen=True, kw_only=True)
class SetRun:
    """The result of a run: paths and durations."""

    lock: str
    pylock: str
    files: int
    "Number of files of the set at the index."
    size: int
    "Their bytes."
    mirror_s: float
    install_s: float
    tested: Tested


def run_set(plan: SetPlan, jobs: int | None, settings: Settings, console: Console) -> SetRun:
    """Build and test the set, stage it, mirror third-party wheels, publish; install by hash only from the set's view; import.

    Each run publishes the set under a new name, since a published set never changes. The index keeps each file once.

    Raises:
        GracefarmError: a step failed.
    """
    built = build.build_set(plan, jobs, settings, console)
    with lock(settings.home / "locks" / "run"), run.local_index(settings) as (url, token):
        at = locks.served(url, f"{plan.set.data.name}-{time.strftime('%Y%m%d-%H%M%S')}", ("__token__", token))
        console.step("index", f"serving {url} from {settings.home / 'index'}")
        named, mirror_s = _published(built, at, settings, console)
        pylock = build.render(built, at, named)
        files, size = _holds(at)
        others = counted(sum(not wheel.own for wheel in built.record.wheels), "other wheel")
        console.step(
            "mirror", f"mirrored {others} in {mirror_s:.0f} s; the set has {counted(files, 'file')}, {size / 1e9:.2f} GB"
        )
        start = time.monotonic()
        with _scratch(built, settings) as home:
            clean, base = _installed(built, _only(at, home, settings), console)
            install_s = time.monotonic() - start
            console.step(
                "install", f"installed {len(built.record.wheels)} wheels by hash from {at.simple} in {install_s:.0f} s"
            )
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
    """Stage, mirror with the index's own command, stage again; return the wheels there, and the seconds of the mirror."""
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
            raise PublishError(
                f"the index cannot mirror the wheels of the lock {own}: {words}",
                remedy="fix this error, then repeat the command",
                repeat=f"builder set run {built.plan.set.words}",
            )
    took = time.monotonic() - start
    return build.stage(built, at, settings, console), took


def _holds(at: SetAddress) -> tuple[int, int]:
    """Number of files and bytes of the published set, from its pages."""
    with PyPISimple(at.simple) as client:
        pages = [client.get_project_page(name, timeout=60) for name in client.get_index_page(timeout=60).projects]
    sizes = [file.size or 0 for page in pages for file in page.packages]
    return len(sizes), sum(sizes)


@contextmanager
def _scratch(built: BuiltSet, settings: Settings) -> Iterator[Path]:
    """A home without caches, on the file system of the real one, so that installed files can only come from the index."""
    home = built.folder / "run"
    remove_tree(home)  # left by a killed run
    try:
        home.mkdir()
        (home / "roots").symlink_to((settings.home / "roots").resolve())
        yield home
    finally:
        remove_tree(home)


def _only(at: SetAddress, home: Path, settings: Settings) -> Settings:
    """Settings of a machine without caches and other indexes."""
    # Not `model_copy`, which would keep the cached index.
    return Settings.model_validate(settings.model_dump() | {"home": home, "python_index": at.simple})


def _installed(built: BuiltSet, settings: Settings, console: Console) -> tuple[Path, Path]:
    """An environment with every wheel of the set's lock, and its root."""
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
    """Check with uv that pylock.toml can be read and that its files exist."""
    of = plan.set
    command = [uv.find_uv_bin(), "pip", "install", "--dry-run", "--preview-features", "pylock", "--no-config"]
    command += ["--requirements", str(pylock), f"--target={home / 'pylock'}", f"--python={sys.executable}"]
    command += [*platform(of.stack, of.data.target), f"--cache-dir={home / 'uv'}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise InstallError(
            f"uv cannot install from {pylock}: {explain(process.stderr)[1]}",
            remedy=f"lock the set again with `builder lock {of.data.name}`, then repeat `builder set run {of.words}`",
            repeat=" ".join(command),
        )
    lines = process.stderr.splitlines()
    outcome = next((line for line in lines if line.startswith("Would install")), "nothing to install")
    console.step("pylock", f"uv can read {pylock}: {outcome.lower()}")
