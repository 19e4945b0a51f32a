"""Fetch what a recipe pins. The stage `root` fetches what a stack pins, into the same store.

Fetched files are never executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builder.fetch import located
from builder.fetch.git import commit_line, fetch_commit, fetch_git, repository_path
from builder.fetch.sdist import fetch_sdist, pinned
from builder.fetch.store import download, store_path
from builder.fetch.transfer import Download
from builder.fetch.urls import shown
from builder.planning.cargo_lock import REGISTRY
from builder.planning.recipe import Recipe
from builder.planning.settings import Settings
from builder.planning.sources import File, FileSource, GitSource, SdistSource
from gracefarm.console import Say, Tick, no_tick, silent

__all__ = ["Download", "Fetched", "download", "fetch", "fetch_git", "fetch_sdist", "store_path"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Where the pinned files and repositories of a recipe are."""

    source: Path
    "The archive in the store, or the bare repository that holds the pinned commit."
    files: Mapping[str, Path] = field(default_factory=dict)
    "The recipe's other files in the store, by sha256."
    repositories: Mapping[str, Path] = field(default_factory=dict)
    "Bare repositories of submodules and of the recipe's other checkouts, by commit."
    trees: Mapping[str, Path] = field(default_factory=dict)
    "Trees built from other recipes, by their path in the source."


def fetch(recipe: Recipe, settings: Settings, tick: Tick = no_tick, say: Say = silent) -> Fetched:
    """Fetch source and files of a recipe, except those that are already here. Files without a digest are skipped.

    `say` gets one line for each part after its digest was checked.

    Raises:
        FetchError: a file does not exist, was yanked, or cannot be reached.
        DigestError: a file differs from its pin.
        HostError: the source is in git, and git is not installed.
        DiskFullError: no space left in the store.
    """
    source = recipe.source
    further = {file.sha256: file for file in recipe.files if file.sha256}
    wanted = [
        located.locate(file, sha256, settings) for sha256, file in further.items() if not store_path(settings, sha256).exists()
    ]
    commits = [repository.commit for repository in recipe.repositories]
    match source:
        case SdistSource():
            place = fetch_sdist(source, settings, tick)
            say(f"{source.name} {source.version} of the Python index: sha256 {source.sha256}, as pinned")
        case GitSource():
            place = fetch_git(source, settings, tick, say)
            commits += [submodule.commit for submodule in source.submodules.values()]
        case FileSource():
            sha256 = pinned(source)
            place = store_path(settings, sha256)
            wanted.insert(0, Download(url=source.url, sha256=sha256, what=f"source of {recipe.name} {recipe.version}"))
    for repository in recipe.repositories:
        fetch_commit(repository, repository.url, settings)
        say(commit_line(f"repository {repository.path}", repository))
    download(wanted, settings, tick)
    if isinstance(source, FileSource):
        say(f"{shown(source.url)}: sha256 {source.sha256}, as pinned")
    for sha256, file in further.items():
        say(f"file {file.path} from {shown(file.origin)}: sha256 {sha256}, as pinned{_evidence(file)}")
    return Fetched(
        source=place,
        repositories={commit: repository_path(settings, commit) for commit in commits},
        files={sha256: store_path(settings, sha256) for sha256 in further},
    )


def absent(recipe: Recipe, settings: Settings) -> list[str]:
    """As `absent_sources`, and the registry of crates, since crates are known when the source is unpacked."""
    crates = (
        [f"{REGISTRY}/: the crates in the source's Cargo.lock that this machine does not have"] if recipe.build.rust else []
    )
    return absent_sources(recipe, settings) + crates


def absent_sources(recipe: Recipe, settings: Settings) -> list[str]:
    """URLs of what a build would fetch: pinned, and not on this machine yet."""
    source = recipe.source
    checkouts: list[tuple[str, str]] = [(repository.url, repository.commit) for repository in recipe.repositories]
    files = {file.sha256: file.origin for file in recipe.files if file.sha256}
    if isinstance(source, GitSource):
        checkouts += [(source.url, source.commit)]
        checkouts += [(module.url, module.commit) for module in source.submodules.values()]
    elif source.sha256 is not None:
        files[source.sha256] = source.origin
    commits = [f"{shown(url)} commit {commit}" for url, commit in checkouts if not repository_path(settings, commit).is_dir()]
    return commits + [shown(url) for sha256, url in files.items() if not store_path(settings, sha256).exists()]


def _evidence(file: File) -> str:
    if file.unconfirmed is not None:
        return f" at first use on {file.unconfirmed.date}; no other source has confirmed it"
    return f", confirmed by {', '.join(witness.source for witness in file.witness)}" if file.witness else ""
