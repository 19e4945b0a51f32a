"""Check that a set is closed: it contains what its wheels require, on each of its Pythons and architectures.

Requirements of sdists are unknown before the build, and installers ignore lines that are not requirements (PEP 508): both are
skipped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from packaging.markers import UndefinedComparison, UndefinedEnvironmentName
from packaging.metadata import parse_email
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from index.errors import DamagedError
from index.names import wheel_tags
from index.sets.machines import PYTHONS, InstallTarget, arch_of_tag, python_of_tag
from index.store.files import Store

ARCHES = ("aarch64", "x86_64")
"Defaults if nothing in a set names one."


@dataclass(frozen=True, kw_only=True)
class SetFile:
    """A file of a set, with its requirements."""

    filename: str
    project: str
    version: str
    own: bool
    "Built here, not mirrored."
    requires_python: str | None
    requires: tuple[Requirement, ...]


def read(store: Store, row: sqlite3.Row, *, own: bool) -> SetFile:
    """A row of the table `file`, or of `mirrored`.

    Raises:
        DamagedError: its METADATA is missing from the store.
    """
    raw = b""
    if row["metadata_sha256"] is not None:
        try:
            raw = store.path(row["metadata_sha256"]).read_bytes()
        except FileNotFoundError:
            if own or row["url"] is None:
                raise DamagedError(
                    f"the store has lost the METADATA of {row['filename']}",
                    remedy="upload or mirror this file again; `index fsck` lists all lost files",
                ) from None
    return SetFile(
        filename=row["filename"],
        project=row["project"],
        version=row["version"],
        own=own,
        requires_python=row["requires_python"],
        requires=tuple(_requirements(raw)),
    )


def _requirements(raw: bytes) -> Iterator[Requirement]:
    for line in parse_email(raw)[0].get("requires_dist", []):
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue


def unmet(
    files: Sequence[SetFile], pythons: Sequence[str], arches: Sequence[str], *, without: Container[str] = ()
) -> list[str]:
    """Requirements of the set's wheels that the set lacks, one line each; projects in `without` are ignored.

    `pythons` (3.11) and `arches` are those of the set's matrix. If it names none, those of the uploaded wheels count, but not
    those of mirrored wheels. If these name none either, it is sufficient that one machine finds everything.
    """
    own = {tag for file in files if file.own and file.filename.endswith(".whl") for tag in wheel_tags(file.filename)}
    known_pythons = set(pythons) or {python for tag in own if (python := python_of_tag(tag))}
    known_arches = set(arches) or {arch for tag in own if (arch := arch_of_tag(tag))}
    groups: dict[tuple[str, str], list[_Shortfall]] = {}
    for python, arch in product(sorted(known_pythons) or PYTHONS, sorted(known_arches) or ARCHES):
        key = (python if known_pythons else "", arch if known_arches else "")
        groups.setdefault(key, []).append(_shortfall(files, InstallTarget(python=python, arch=arch), without))
    best = {key: min(choices, key=lambda each: (-each.installable, len(each.lines))) for key, choices in groups.items()}
    lines_of = {key: each.lines for key, each in best.items()}
    return [_where(line, lines_of) for line in sorted(frozenset().union(*lines_of.values()))]


@dataclass(frozen=True, kw_only=True)
class _Shortfall:
    """Requirements that one machine does not find."""

    installable: int
    "Files of the set that the machine can install."
    lines: frozenset[str]


def _shortfall(files: Sequence[SetFile], machine: InstallTarget, without: Container[str]) -> _Shortfall:
    here = [file for file in files if machine.takes(file.filename, file.requires_python)]
    return _Shortfall(installable=len(here), lines=frozenset(_lacking(files, here, machine, without)))


def _where(line: str, lines_of: Mapping[tuple[str, str], frozenset[str]]) -> str:
    """The line, with the machines that lack it unless all do."""
    places = [" on ".join(part for part in (python and f"Python {python}", arch) if part) for python, arch in lines_of]
    lacking = [place for place, lines in zip(places, lines_of.values(), strict=True) if line in lines]
    return line if len(lacking) == len(places) else f"{line}, for {', '.join(lacking)}"


def _lacking(
    files: Sequence[SetFile], here: Sequence[SetFile], machine: InstallTarget, without: Container[str]
) -> Iterator[str]:
    """Requirements of the installable wheels (`here`) that the machine does not find."""
    by_project: dict[str, list[SetFile]] = {}
    for file in here:
        by_project.setdefault(file.project, []).append(file)
    todo = [(file, "") for file in here]
    seen = {(file.filename, extra) for file, extra in todo}
    while todo:
        file, extra = todo.pop()
        for requirement in file.requires:
            if not _applies(requirement, machine, extra):
                continue
            name = str(canonicalize_name(requirement.name))
            if name in without:
                continue
            candidates = [each for each in by_project.get(name, []) if _satisfies(each.version, requirement)]
            if not candidates:
                others = [each for each in files if each.project == name]
                yield f"{_text(requirement)} (required by {file.project} {file.version}{_instead(others, requirement)})"
            for each, wanted in product(candidates, map(canonicalize_name, requirement.extras)):
                if (each.filename, wanted) not in seen:
                    seen.add((each.filename, wanted))
                    todo.append((each, wanted))


def _instead(others: Sequence[SetFile], requirement: Requirement) -> str:
    if any(_satisfies(each.version, requirement) for each in others):
        return "; the set has this project only for other machines"
    versions = sorted({each.version for each in others})
    return f"; the set has {', '.join(versions)}" if versions else ""


def _text(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _applies(requirement: Requirement, machine: InstallTarget, extra: str) -> bool:
    """Whether the machine requires it. With an extra, only requirements that the extra adds."""
    if requirement.marker is None:
        return not extra
    try:
        with_extra = requirement.marker.evaluate(machine.environment(extra))
        return with_extra and (not extra or not requirement.marker.evaluate(machine.environment()))
    except (UndefinedComparison, UndefinedEnvironmentName, InvalidVersion):
        return False


def _satisfies(version: str, requirement: Requirement) -> bool:
    return bool(requirement.url) or requirement.specifier.contains(Version(version), prereleases=True)
