"""Bring what a recipe pins to this machine: the only part of a build that has the network. Nothing that comes is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder.fetch.git import fetch_commit, fetch_git, repository_path
from builder.fetch.sdist import fetch_sdist
from builder.fetch.store import download, store_path
from builder.fetch.transfer import Download
from builder.planning.recipe import FileSource, GitSource, Recipe, SdistSource
from builder.planning.settings import Settings
from gracefarm.console import Tick, no_tick

__all__ = ["Download", "Fetched", "download", "fetch", "fetch_git", "fetch_sdist", "store_path"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Where everything is that a recipe pins."""

    source: Path
    "The archive in the store, or the bare repository that holds the pinned commit."
    files: Mapping[str, Path] = field(default_factory=dict)
    "The recipe's further files in the store, by sha256."
    repositories: Mapping[str, Path] = field(default_factory=dict)
    "Bare repositories of submodules and of the recipe's further checkouts, by their commit."


def fetch(recipe: Recipe, settings: Settings, tick: Tick = no_tick) -> Fetched:
    """Source and files of a recipe; what is here already costs no network.

    Raises:
        FetchError: something is absent, yanked or unreachable.
        DigestError: something is not what was pinned.
        HostError: the source is in git and there is no git.
        DiskFullError: no space in the store.
    """
    source = recipe.source
    wanted = [Download(url=file.url, sha256=file.sha256, what=file.path) for file in recipe.files if file.url and file.sha256]
    commits = [repository.commit for repository in recipe.repositories]
    match source:
        case SdistSource():
            place = fetch_sdist(source, settings, tick)
        case GitSource():
            place = fetch_git(source, settings, tick)
            commits += [submodule.commit for submodule in source.submodules.values()]
        case FileSource():
            place = store_path(settings, source.sha256)
            wanted.insert(0, Download(url=source.url, sha256=source.sha256, what=f"source of {recipe.name} {recipe.version}"))
    for repository in recipe.repositories:
        fetch_commit(repository, repository.url, settings)
    places = download(wanted, settings, tick)
    return Fetched(
        source=place,
        repositories={commit: repository_path(settings, commit) for commit in commits},
        files={file.sha256: places[file.sha256] for file in wanted},
    )
