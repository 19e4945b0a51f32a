"""The disk space that builds need, compared with the free space before the first of them starts.

The estimate is low, so that no build is refused that would succeed. It has the sizes that are known: packages and files of a
missing root, torch and NVIDIA's libraries of a missing environment, and the working folder of a similar, earlier build. It
does not have sources, caches, and the working folder of a recipe that was never built here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shutil import disk_usage

from builder.fetch.store import store_path
from builder.flow import history
from builder.planning import packages, pins
from builder.planning.pins import LockedWheel
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import record
from builder.proof.record import Record
from gracefarm.errors import DiskFullError
from gracefarm.files import disk_used

UNPACKED = 2.5
"A root takes at least this many times the size of its packages: 2.9 and 3.9 times were measured for the stack cu130."
TORCH = 900 << 20
"Bytes of torch in an environment. 913 to 1182 MiB were measured for torch 2.11 and 2.14."
LIBRARIES = 2900 << 20
"Bytes of NVIDIA's libraries that torch requires. 2971 to 3587 MiB were measured. Environments share them by hard links."

Needs = Counter[Path]
"Bytes by folder of the home."


def require(plans: Sequence[Plan], settings: Settings, *, keep: bool) -> None:
    """Refuse builds that need more disk space than there is; `keep`: working folders stay after the builds.

    Raises:
        DiskFullError: names the file system, the free space and the needed space.
    """
    settings.home.mkdir(parents=True, exist_ok=True)  # a home that cannot be written is another error than a full disk
    by_device: dict[int, Needs] = {}
    for folder, size in needed(plans, settings, keep=keep).items():
        there = _existing(folder)
        by_device.setdefault(there.stat().st_dev, Counter())[there] += size
    for needs in by_device.values():
        place = min(needs, key=lambda folder: len(folder.parts))
        size, free = needs.total(), disk_usage(place).free
        if size > free:
            raise DiskFullError(
                f"the build needs at least {_title(size)} on the file system that holds {place}, but only {_title(free)} are "
                "free",
                remedy="free space there (`builder clean` removes temporary files, and `builder clean --keep SIZE` also "
                "environments and caches), build fewer wheels at a time, or set GRACEFARM_HOME to a folder on a larger disk",
            )


def needed(plans: Sequence[Plan], settings: Settings, *, keep: bool) -> Needs:
    """The bytes that builds add to folders of the home, at least. Builds run one after the other."""
    records = record.all_of(settings)
    waiting = list(_waiting(plans, records, settings))
    return _roots(waiting, settings) + _environments(waiting, settings) + _builds(waiting, records, settings, keep=keep)


def _waiting(plans: Iterable[Plan], records: Sequence[Record], settings: Settings) -> Iterator[Plan]:
    """The plans that are not built yet, with those of their trees. One wheel with the stable ABI serves several Pythons."""
    stable: set[tuple[object, ...]] = set()
    for plan in plans:
        if record.existing(plan, settings) is not None:
            continue
        if history.stable(plan.recipe.key, records):
            alike = history.but_python(plan)
            if alike in stable:
                continue
            stable.add(alike)
        yield from _waiting(plan.trees, records, settings)
        yield plan


def _roots(plans: Iterable[Plan], settings: Settings) -> Needs:
    """Missing roots, and their packages that are not in the store."""
    needs, missing = Needs(), {}
    for plan in plans:
        if plan.toolchain.pinned:
            name = packages.root_digest(plan.stack, plan.host, plan.target)
            if not (settings.home / "roots" / name).is_dir():
                missing[name] = packages.of_root(plan.stack, plan.host, plan.target)
    for debs in missing.values():
        needs[settings.home / "roots"] += int(UNPACKED * sum(deb.size for deb in debs))
    absent = {deb for debs in missing.values() for deb in debs if not store_path(settings, deb.sha256).exists()}
    needs[settings.home / "store"] += sum(deb.size for deb in absent)
    return needs


def _environments(plans: Iterable[Plan], settings: Settings) -> Needs:
    """Missing environments with torch."""
    missing: dict[str, tuple[LockedWheel, Arch]] = {}
    libraries: dict[str, int] = {}
    for plan in plans:
        name = pins.environment_digest(plan.stack, plan.target) if plan.toolchain.pinned else ""
        if not name or (settings.home / "environments" / name).is_dir():
            continue
        wheels = {wheel.name: wheel for wheel in pins.wheels(plan.stack, plan.target)}
        if "torch" in wheels:
            missing[name] = wheels["torch"], plan.target
            required = next((wheel for wheel in wheels.values() if wheel.name.startswith("nvidia-cublas")), None)
            if required is not None and not _unpacked(required, plan.target, settings):
                libraries[required.sha256] = LIBRARIES
    return Needs({settings.home / "environments": TORCH * len(missing) + sum(libraries.values())})


def _unpacked(wheel: LockedWheel, arch: Arch, settings: Settings) -> bool:
    """Whether an environment has this wheel, so that another one gets its files as hard links."""
    name = f"{wheel.name.replace('-', '_')}-{wheel.version}.dist-info"
    places = (settings.home / "environments").glob(f"*/lib/python*/site-packages/{name}/WHEEL")
    return any(arch.value in place.read_text() for place in places)


def _builds(plans: Iterable[Plan], records: Sequence[Record], settings: Settings, *, keep: bool) -> Needs:
    """Working folders and wheels, as large as those of similar builds. Builds remove their working folders one by one."""
    working: list[int] = []
    wheels = 0
    for plan in plans:
        like = history.like(plan)
        alike = (build for build in records if build.recipe == plan.recipe.key and build.like == like)
        past = next((build for build in alike if build.work_bytes is not None), None)
        if past is not None and past.work_bytes is not None:
            present = disk_used(record.folder(settings, plan.build_id) / "work")
            working.append(max(past.work_bytes - present, 0))
            wheels += past.wheel.size if past.wheel is not None else 0
    return Needs({settings.home / "builds": wheels + (sum(working) if keep else max(working, default=0))})


def _existing(folder: Path) -> Path:
    """The folder, or its first parent that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _title(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"
