"""Translation units: the notes of front.py about each unit of a build, and the input of schedule.py."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from builder.data.toolchain.schedule import named
from builder.planning.recipe import Build
from builder.toolchains.wrappers import UNITS
from gracefarm.tables import Table, parse_size

_NO_UNIT = re.compile(r"^\.\./|(?:^|/)CMakeFiles/")
"Files that configure steps compile as tests: outside of the source, or in folders of CMake."


class Unit(Table):
    """Cost of compiling one source file."""

    wall_s: float
    "Duration in seconds"
    cpu_s: float
    "CPU seconds"
    peak_memory: int
    "Peak memory in bytes"


class CacheStatistics(Table):
    """Use of the compiler cache. The numbers count compilations."""

    hits: int
    "Compilations whose result was in the cache"
    misses: int
    "Compilations whose result was not in the cache"
    uncacheable: int
    "Compilations that ccache cannot cache"
    reasons: dict[str, int] = Field(default_factory=dict)
    "Number of `uncacheable` compilations for each reason. The key is the reason in ccache's words"
    saved_cpu_s: float
    (
        "CPU seconds that the `hits` saved: the time of their earlier compilation, minus the time to read the result. Hits "
        "whose earlier time is unknown count as 0"
    )


class DeviceStatistics(Table):
    """Use of the device store. The numbers count runs of cicc (CUDA C++ to PTX) and of ptxas (PTX to GPU code)."""

    text: int
    "Runs of cicc that the store replaced, because it had a result for the same source text"
    nvvm: int
    (
        "Runs of cicc's optimizer that the store replaced, because it had a result for the same NVVM code. NVVM code is the "
        "input of the optimizer"
    )
    ptx: int
    "Runs of ptxas that the store replaced, because it had a result for the same PTX"
    misses: int
    "Runs that were necessary, because the store had no result. Their results are now in the store"
    not_kept: dict[str, int] = Field(default_factory=dict)
    "Number of runs whose result the store cannot keep. The key is the reason"
    cpu_s: float
    "CPU seconds that this build used for all runs, for the lookups in the store, and for nvcc's program fatbinary"
    saved_cpu_s: float
    "CPU seconds that the store saved: the CPU time of the earlier runs that produced the results"

    @property
    def taken(self) -> int:
        """Passes that were found in the store."""
        return self.text + self.nvvm + self.ptx


class DeviceNote(Table):
    """A device pass of a unit."""

    name: str = Field(alias="pass")
    outcome: str
    "How it was found: `text`, `nvvm` or `ptx`; `miss`; `always runs`; or why its result is not kept"
    cpu_s: float
    wall_s: float
    saved: dict[str, float]
    "`cpu_s`, `wall_s` and `peak_memory` that a compilation took; empty if it ran"


class Note(Table):
    """A note of front.py."""

    unit: str
    outcome: str
    "`hit`, `miss`, `off`, or why the call could not be cached"
    wall_s: float
    cpu_s: float
    peak_memory: int
    device: tuple[DeviceNote, ...] = ()
    "Its device passes; empty for a unit from the compiler cache. The costs above are those without the store"


def read(folder: Path) -> list[Note]:
    """The notes in a work folder. After an interrupted build the last line may be incomplete."""
    try:
        lines = (folder / UNITS).read_bytes().splitlines()
    except OSError:
        return []
    notes = []
    for line in lines:
        try:
            note = Note.model_validate_json(line)
        except ValidationError:
            continue
        if not _NO_UNIT.search(note.unit):
            notes.append(note)
    return notes


def costs(notes: Iterable[Note], known: Mapping[str, Unit]) -> dict[str, Unit]:
    """Costs of compiling each unit: from the notes; for units from the cache, the known costs."""
    units: dict[str, Unit] = {}
    for note in notes:
        if note.outcome == "hit":
            if note.unit in known:
                units.setdefault(note.unit, known[note.unit])
            continue
        before = units.get(note.unit)
        if before is None or before.cpu_s < note.cpu_s:  # compiled for two libraries
            units[note.unit] = Unit(wall_s=note.wall_s, cpu_s=note.cpu_s, peak_memory=note.peak_memory)
    return dict(sorted(units.items()))


def statistics(notes: Sequence[Note], known: Mapping[str, Unit]) -> CacheStatistics | None:
    """Use of the cache; None if it was off."""
    outcomes = Counter(note.outcome for note in notes)
    if not outcomes or set(outcomes) == {"off"}:
        return None
    hits = [note for note in notes if note.outcome == "hit"]
    saved = sum(max(0.0, known[note.unit].cpu_s - note.cpu_s) for note in hits if note.unit in known)
    other = {key: count for key, count in sorted(outcomes.items()) if key not in ("hit", "miss")}
    return CacheStatistics(
        hits=outcomes["hit"],
        misses=outcomes["miss"],
        uncacheable=sum(other.values()),
        reasons=other,
        saved_cpu_s=round(saved, 1),
    )


def title(cache: CacheStatistics) -> str:
    """The statistics in one line, for console and log."""
    reasons = "".join(f"; {count} x {reason}" for reason, count in cache.reasons.items())
    return (
        f"compiler cache: {cache.hits} hits, {cache.misses} misses, {cache.uncacheable} not cacheable{reasons}; "
        f"about {cache.saved_cpu_s:.0f} CPU s saved"
    )


def device_statistics(notes: Iterable[Note]) -> DeviceStatistics | None:
    """Statistics of the device passes; None if there were none."""
    passes = [each for note in notes for each in note.device]
    if not passes:
        return None
    outcomes = Counter(each.outcome for each in passes if each.name != "fatbinary")
    counted = ("text", "nvvm", "ptx", "miss")
    return DeviceStatistics(
        text=outcomes["text"],
        nvvm=outcomes["nvvm"],
        ptx=outcomes["ptx"],
        misses=outcomes["miss"],
        not_kept={reason: count for reason, count in sorted(outcomes.items()) if reason not in counted},
        cpu_s=round(sum(each.cpu_s for each in passes), 1),
        saved_cpu_s=round(sum(each.saved.get("cpu_s", 0.0) for each in passes), 1),
    )


def device_title(device: DeviceStatistics) -> str:
    """The statistics in one line, for console and log."""
    reasons = "".join(f"; {count} x {reason}" for reason, count in device.not_kept.items())
    return (
        f"device code: {device.taken} passes from the store ({device.text} by text, {device.nvvm} by NVVM "
        f"code, {device.ptx} by PTX), {device.misses} compiled{reasons}; {device.cpu_s:.0f} CPU s used, "
        f"about {device.saved_cpu_s:.0f} CPU s saved"
    )


_UNKNOWN_S = 1e9
"Seconds that schedule.py assumes for a unit without measurement: more than for every known unit."


def schedule(known: Mapping[str, Unit], build: Build, tree: Path, *, memory: int, jobs: int) -> str:
    """The input of schedule.py as JSON; `tree` is the source."""
    # Declared units start before unknown ones: they are declared because they take longest.
    declared = {name: _UNKNOWN_S + seconds for name, seconds in _declared_seconds(build, tree) if name not in known}
    return json.dumps(
        {
            "jobs": jobs,
            "memory": memory,
            "per_job": parse_size(build.memory_per_job),
            "declared": {glob: parse_size(size) for glob, size in build.unit_memory.items()},
            "peaks": {name: unit.peak_memory for name, unit in known.items()},
            "seconds": {name: unit.wall_s for name, unit in known.items()} | declared,
        }
    )


def _declared_seconds(build: Build, tree: Path) -> Iterator[tuple[str, float]]:
    """Seconds of the sources that match the recipe's globs, by name of the unit."""
    for glob, seconds in build.unit_seconds.items():
        for place in tree.rglob("*"):
            name = str(place.relative_to(tree))
            if named(name, glob):
                yield name, seconds
