"""Newer upstream releases of what a project pins: recipes, torch and Pythons, as changes to review."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

import uv
from packaging.version import InvalidVersion, Version

from builder.fetch.urls import split_credentials
from builder.ground.interpreters import catalogue
from builder.ground.interpreters.tables import InterpreterTable
from builder.planning import recipe, stack
from builder.planning.settings import Settings
from builder.planning.sources import GitSource, SdistSource
from gracefarm import tables
from gracefarm.console import Tick
from gracefarm.errors import FetchError, HostError, UsageError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

Kind = Literal["recipe", "torch", "python"]
_AGE = re.compile(r"(\d+)\s*([dh])")
_TAG = re.compile(r"refs/tags/v?(\d+(?:\.\d+)+\S*)$")
_RELEASE = re.compile(r"/download/(\d{8})/")
"The day of a release of python-build-standalone."
GIT_TIMEOUT = 60
"Seconds for the list of a repository's tags."


@dataclass(frozen=True, kw_only=True)
class Release:
    """A version that an upstream offers."""

    version: str
    at: datetime | None
    "Time of its upload; None: the upstream does not say."


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A pin of the project, and where to look for newer releases."""

    kind: Kind
    name: str
    current: str
    releases: Callable[[], Iterable[Release]]
    "Asks the upstream."
    change: str
    "What to do in this project; {version} is the new one."


@dataclass(frozen=True, kw_only=True)
class Update:
    """A pin, and the newest release that is old enough to take."""

    kind: Kind
    name: str
    current: str
    newest: str | None = None
    "None: there is no newer release that is old enough."
    age_days: int | None = None
    "Of `newest`; None: the upstream does not say."
    change: str = ""
    "What to do in this project, for a person to review."
    waiting: str | None = None
    "A still newer release, which is too young."
    error: str = ""
    "Why the upstream could not be asked."


def parse_age(text: str) -> timedelta:
    """The time of `7d` or `12h`.

    Raises:
        UsageError: the text is not such a time.
    """
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"--min-age: {text!r} is not an age", remedy="give days or hours, such as 7d or 12h")
    return timedelta(days=int(match[1])) if match[2] == "d" else timedelta(hours=int(match[1]))


def find(settings: Settings, min_age: timedelta, now: datetime, tick: Tick) -> list[Update]:
    """Every pin of the project. If an upstream does not answer, its entry has the reason, and the others follow.

    Raises:
        ConfigError: a file of the project does not fit its schema.
    """
    pins = list(_pins(settings))
    updates = []
    for number, pin in enumerate(pins):
        tick(number, len(pins), f"releases of {pin.name}")
        try:
            updates.append(_compared(pin, pin.releases(), now - min_age, now))
        except (FetchError, HostError) as error:
            updates.append(Update(kind=pin.kind, name=pin.name, current=pin.current, error=error.cause))
    return updates


def _pins(settings: Settings) -> Iterator[Upstream]:
    for key in recipe.names(settings.project / "recipes"):
        loaded = recipe.load(settings.project / "recipes", key)
        source = loaded.data.source
        releases: Callable[[], Iterable[Release]]
        if isinstance(source, SdistSource):
            current, releases = source.version, _of_index(source.name, settings, sdist=True)
        elif isinstance(source, GitSource):
            current, releases = loaded.data.version, _of_tags(source.url, settings)
        else:
            continue  # An archive's address does not say where newer ones are.
        change = f"in recipes/{key}/recipe.toml, set version to {{version}} and update the pin of [source]"
        yield Upstream(kind="recipe", name=key, current=current, releases=releases, change=change)
    stacks = [stack.load(settings.project / "stacks", name).data for name in stack.names(settings.project / "stacks")]
    versions = [entry.torch.version for entry in stacks if entry.torch is not None]
    if versions:
        newest, change = max(versions, key=Version), "builder stack new NAME --torch {version}"
        yield Upstream(kind="torch", name="torch", current=newest, releases=_of_index("torch", settings), change=change)
    folder = settings.project / "interpreters"
    for name in catalogue.names(folder):
        table = tables.read(folder / name / "interpreter.toml", InterpreterTable)
        if table.source.kind == "archive":
            change = f"in interpreters/{name}/interpreter.toml, set version to {{version}} and update url and sha256"
            yield Upstream(kind="python", name=name, current=table.version, releases=_of_uv(table.python), change=change)


def _compared(pin: Upstream, releases: Iterable[Release], before: datetime, now: datetime) -> Update:
    """The newest release that is old enough. One without a date counts as old enough."""
    current = Version(pin.current)
    newer = {
        number: release
        for release in releases
        if (number := _number(release.version)) is not None and number > current and not number.is_prerelease
    }
    ripe = [number for number, release in newer.items() if release.at is None or release.at <= before]
    update = Update(kind=pin.kind, name=pin.name, current=pin.current)
    if newer and max(newer) not in ripe:
        update = replace(update, waiting=newer[max(newer)].version)
    if not ripe:
        return update
    chosen = newer[max(ripe)]
    age = (now - chosen.at).days if chosen.at is not None else None
    return replace(update, newest=chosen.version, age_days=age, change=pin.change.format(version=chosen.version))


def _number(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def _of_index(project: str, settings: Settings, *, sdist: bool = False) -> Callable[[], list[Release]]:
    """Releases on the Python index; `sdist`: only those with one."""

    def ask() -> list[Release]:
        from builder.fetch import simple  # imports requests

        index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
        times: dict[str, list[datetime | None]] = {}
        for package in simple.project_page(project, index, credentials).packages:
            if package.version and not package.is_yanked and (not sdist or package.package_type == "sdist"):
                times.setdefault(package.version, []).append(_uploaded(package))
        # A release is as old as its last file.
        return [
            Release(version=version, at=None if None in uploads else max(at for at in uploads if at is not None))
            for version, uploads in times.items()
        ]

    return ask


def _uploaded(package: DistributionPackage) -> datetime | None:
    at = package.upload_time
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def _of_tags(url: str, settings: Settings) -> Callable[[], list[Release]]:
    """Tags of a git repository that are versions. The date of a tag is whatever its maker wrote, so it does not count."""

    def ask() -> list[Release]:
        command = ["git", "-c", "credential.helper=", "ls-remote", "--tags", "--refs", "--", settings.redirect(url)]
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        try:
            process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT, env=environment)
        except FileNotFoundError as error:
            raise HostError(
                "git is not installed", remedy="install git with `builder doctor --fix`, as root or with sudo"
            ) from error
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise FetchError(
                f"the tags of {url} cannot be listed",
                remedy="check the network to this repository, or set GRACEFARM_MIRRORS to a mirror",
            ) from error
        matches = map(_TAG.search, process.stdout.splitlines())
        return [Release(version=match[1], at=None) for match in matches if match is not None]

    return ask


def _of_uv(python: str) -> Callable[[], list[Release]]:
    """Standalone archives in the list that comes with the installed uv."""

    def ask() -> list[Release]:
        variant = "freethreaded" if python.endswith("t") else "default"
        command = [uv.find_uv_bin(), "python", "list", python, "--no-config", "--output-format=json", "--all-versions"]
        process = subprocess.run([*command, "--only-downloads", "--all-arches"], capture_output=True, text=True, check=False)
        try:
            rows = json.loads(process.stdout)
        except json.JSONDecodeError as error:
            raise HostError(
                "the installed uv lists no Pythons",
                remedy="run `pip install --upgrade 'gracefarm[builder]' uv`, which installs a newer uv",
            ) from error
        return [
            Release(version=row["version"], at=datetime.strptime(day[1], "%Y%m%d").replace(tzinfo=UTC))
            for row in rows
            if (row["implementation"], row["os"], row["libc"]) == ("cpython", "linux", "gnu")
            and row.get("variant", "default") == variant
            and (day := _RELEASE.search(row["url"] or ""))
        ]

    return ask
