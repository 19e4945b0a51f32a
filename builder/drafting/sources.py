"""The source of a new recipe: the sdist that the Python index has, or a commit with its submodules."""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from packaging.version import InvalidVersion, Version

from builder import fetch
from builder.fetch import source
from builder.fetch.git import fetch_commit, git_config, repository_path, run_git
from builder.fetch.urls import shown, split_credentials
from builder.planning.recipe import LoadedRecipe, Recipe, Smoke
from builder.planning.settings import Settings
from builder.planning.sources import GitSource, Repository, SdistSource, Submodule
from gracefarm.console import Tick
from gracefarm.errors import FetchError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

GIT_REMEDY = "give the git repository of the package: --git URL --commit COMMIT"
PinnedSource = SdistSource | GitSource


def of_index(project: str, version: str | None, settings: Settings) -> tuple[SdistSource, str]:
    """The sdist of a version, or of the newest release, and its file name.

    Raises:
        FetchError: the index has no such project or version, or no sdist of it.
    """
    # Its clients and parsers take long to import.
    from builder.fetch import simple

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    try:
        page = simple.project_page(project, index, credentials)
    except simple.AbsentProjectError as error:
        raise FetchError(error.cause, remedy=f"correct the name, or {GIT_REMEDY}") from error
    package, number = _newest(project, version, page.packages, shown(index))
    sha256 = package.digests.get("sha256")
    if sha256 is None:
        raise FetchError(
            f"{package.filename}: the index {shown(index)} lists no sha256",
            remedy="set GRACEFARM_PYTHON_INDEX to an index that lists digests",
        )
    return SdistSource(kind="sdist", name=project, version=str(number), sha256=sha256), package.filename


def _newest(
    project: str, version: str | None, packages: list[DistributionPackage], index: str
) -> tuple[DistributionPackage, Version]:
    files: dict[Version, list[DistributionPackage]] = {}
    for package in packages:
        try:
            number = Version(package.version or "")
        except InvalidVersion:
            continue
        if not package.is_yanked:
            files.setdefault(number, []).append(package)
    if not files:
        raise FetchError(f"{project}: the index {index} has no files of this project", remedy=GIT_REMEDY)
    releases = [number for number in files if not number.is_prerelease] or list(files)
    wanted = Version(version) if version else max(releases)
    if wanted not in files:
        known = ", ".join(map(str, sorted(files)[-5:]))
        raise FetchError(
            f"{project} {wanted}: the index {index} does not have this version", remedy=f"give one of these versions: {known}"
        )
    sdist = next((package for package in files[wanted] if package.package_type == "sdist"), None)
    if sdist is None:
        older = [number for number in releases if any(package.package_type == "sdist" for package in files[number])]
        names = ", ".join(package.filename for package in files[wanted][:2])
        other = f"give the newest version that has an sdist: --version {max(older)}; or " if older else ""
        raise FetchError(
            f"{project} {wanted} cannot be built from the index {index}: it has no sdist, only {names}",
            remedy=f"{other}{GIT_REMEDY}",
        )
    return sdist, wanted


def of_git(url: str, commit: str, settings: Settings, tick: Tick) -> GitSource:
    """A commit with its tree and all of its submodules, each at the commit that its parent names.

    Raises:
        FetchError, HostError, DiskFullError: one cannot be fetched.
    """
    fetch_commit(Repository(url=url, commit=commit, path="."), url, settings)
    submodules: dict[str, Submodule] = {}
    waiting = list(_submodules(url, commit, "", settings))
    while waiting:
        path, module = waiting.pop(0)
        tick(len(submodules), len(submodules) + len(waiting) + 1, path)
        fetch_commit(module, f"submodule {path}", settings)
        submodules[path] = module
        waiting += _submodules(module.url, module.commit, f"{path}/", settings)
    return GitSource(kind="git", url=url, commit=commit, tree=_tree(commit, settings), submodules=submodules)


def _git(commit: str, settings: Settings, *arguments: str) -> str:
    return run_git(arguments, cwd=repository_path(settings, commit), config=git_config(settings.home))


def _tree(commit: str, settings: Settings) -> str:
    return _git(commit, settings, "rev-parse", f"{commit}^{{tree}}").strip()


def _submodules(url: str, commit: str, prefix: str, settings: Settings) -> Iterator[tuple[str, Submodule]]:
    """Those of one commit, by path in the outermost tree."""
    listed = _git(commit, settings, "ls-tree", "-r", "-z", commit).split("\0")
    links = {entry.partition("\t")[2]: entry.split()[2] for entry in listed if entry.startswith("160000 ")}
    if not links:
        return
    # configparser reads .gitmodules once the leading white space is gone.
    text = _git(commit, settings, "show", f"{commit}:.gitmodules")
    parsed = configparser.ConfigParser(interpolation=None, strict=False)
    parsed.read_string("\n".join(line.strip() for line in text.splitlines()))
    addresses = {parsed[section]["path"]: parsed[section]["url"] for section in parsed.sections() if "url" in parsed[section]}
    for path, pinned in sorted(links.items()):
        if path not in addresses:
            raise FetchError(
                f"{shown(url)}: commit {commit} has a submodule at {path!r} that .gitmodules of this commit does not list",
                remedy="give a different commit with --commit",
            )
        address = addresses[path]
        if address.startswith(("./", "../")):
            address = urljoin(f"{url.removesuffix('/')}/", address)
        yield f"{prefix}{path}", Submodule(url=address, commit=pinned)


def unpack(pinned: PinnedSource, name: str, into: Path, settings: Settings, tick: Tick) -> Path:
    """The source tree at `into`.

    Raises:
        FetchError, DigestError, SourceError, HostError, DiskFullError: it cannot be fetched or unpacked.
    """
    data = Recipe(name=name, version="0", license="MIT", source=pinned, smoke=Smoke(imports=(name,)))
    fetched = fetch.fetch(data, settings, tick)
    recipe = LoadedRecipe(folder=into, data=data, patches=(), smoke_script=None)
    return source.unpack(recipe, fetched, into, source.source_date_epoch(data, fetched))
