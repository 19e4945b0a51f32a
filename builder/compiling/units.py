"""Translation units: what front.py noted of each while a build ran, and what the records say of earlier builds."""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from builder.planning.recipe import Build
from builder.proof.record import CompilerCache, Record, Unit
from gracefarm.tables import parse_size

NAME, SCHEDULE = "units.jsonl", "schedule.json"
"In a build's working folder: what front.py writes, what schedule.py reads."
_NO_UNIT = re.compile(r"^\.\./|(?:^|/)CMakeFiles/")
"What configure steps compile to find something out: outside the source, or in CMake's own folders."


class Note(BaseModel):
    """A line of front.py's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str
    outcome: str
    "`hit`, `miss`, `off`, or why the cache only passed the call on."
    wall_s: float
    cpu_s: float
    peak_memory: int


def read(folder: Path) -> list[Note]:
    """The notes in a working folder; of a build that was cut off, the last may be half a line."""
    try:
        lines = (folder / NAME).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            note = Note.model_validate_json(line)
        except ValidationError:
            continue
        if not _NO_UNIT.search(note.unit):
            found.append(note)
    return found


def costs(notes: Iterable[Note], known: Mapping[str, Unit]) -> dict[str, Unit]:
    """What each unit costs when it is compiled: as noted, and for what came from the cache as it was known before."""
    found: dict[str, Unit] = {}
    for note in notes:
        if note.outcome == "hit":
            if note.unit in known:
                found.setdefault(note.unit, known[note.unit])
            continue
        before = found.get(note.unit)
        if before is None or before.cpu_s < note.cpu_s:  # compiled for two libraries
            found[note.unit] = Unit(wall_s=note.wall_s, cpu_s=note.cpu_s, peak_memory=note.peak_memory)
    return dict(sorted(found.items()))


def learned(records: Iterable[Record], *, stack: str, target: str) -> dict[str, Unit]:
    """What units cost in earlier builds of one recipe, failed ones too; `records` newest first, and the newest word counts."""
    found: dict[str, Unit] = {}
    for one in records:
        if one.stack == stack and one.inputs.get("target") == target:
            found = dict(one.units) | found
    return found


def statistics(notes: Sequence[Note], known: Mapping[str, Unit]) -> CompilerCache | None:
    """What the cache did; None where it was off."""
    said = Counter(note.outcome for note in notes)
    if not said or set(said) == {"off"}:
        return None
    hits = [note for note in notes if note.outcome == "hit"]
    saved = sum(max(0.0, known[note.unit].cpu_s - note.cpu_s) for note in hits if note.unit in known)
    other = {key: count for key, count in sorted(said.items()) if key not in ("hit", "miss")}
    return CompilerCache(
        hits=said["hit"],
        misses=said["miss"],
        uncacheable=sum(other.values()),
        reasons=other,
        saved_cpu_s=round(saved, 1),
    )


def title(found: CompilerCache) -> str:
    """One line for console and log."""
    reasons = "".join(f"; {count} x {reason}" for reason, count in found.reasons.items())
    return (
        f"compiler cache: {found.hits} hits, {found.misses} misses, {found.uncacheable} not cacheable{reasons}; "
        f"about {found.saved_cpu_s:.0f} CPU s saved"
    )


_UNKNOWN_S = 1e9
"What schedule.py takes a unit for of which it knows no seconds: for longer than any that it knows."


def schedule(known: Mapping[str, Unit], build: Build, tree: Path, *, memory: int, jobs: int) -> str:
    """What schedule.py goes by, as JSON; `tree` is the source."""
    # Before all of which nothing is known, whatever that takes: a long pole is declared because it is the longest.
    declared = {name: _UNKNOWN_S + seconds for name, seconds in _declared_seconds(build, tree) if name not in known}
    return json.dumps(
        {
            "jobs": jobs,
            "memory": memory,
            "per_job": parse_size(build.memory_per_job),
            "declared": {glob: parse_size(size) for glob, size in build.unit_memory.items()},
            "peaks": {name: one.peak_memory for name, one in known.items()},
            "seconds": {name: one.wall_s for name, one in known.items()} | declared,
        }
    )


def _declared_seconds(build: Build, tree: Path) -> Iterator[tuple[str, float]]:
    """Seconds of the sources that the recipe's globs name, by the unit's name."""
    for glob, seconds in build.unit_seconds.items():
        for place in tree.rglob("*"):
            name = str(place.relative_to(tree))
            if fnmatch.fnmatchcase(f"/{name}", f"*/{glob}"):  # as schedule.py matches unit_memory
                yield name, seconds
