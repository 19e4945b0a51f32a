"""Fetch the crates that the source's Cargo.lock pins, and unpack them as cargo's directory source.

https://doc.rust-lang.org/cargo/reference/source-replacement.html
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from builder.fetch import archive
from builder.fetch.store import download
from builder.fetch.transfer import Download
from builder.planning import cargo_lock
from builder.planning.cargo_lock import Crate
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from gracefarm.console import Say, Tick, no_tick, silent
from gracefarm.errors import SourceError
from gracefarm.files import full_disk, remove_tree

LOCK = "Cargo.lock"


def vendor(
    recipe: LoadedRecipe, tree: Path, into: Path, settings: Settings, tick: Tick = no_tick, say: Say = silent
) -> tuple[Crate, ...]:
    """Fetch the crates of a source tree into the store, and unpack them into the folder `into`; () without `rust = true`.

    Each crate gets its own folder with .cargo-checksum.json. Cargo compares the checksum in it with Cargo.lock.

    Raises:
        SourceError: there is no Cargo.lock, or it pins other packages than crates of crates.io; or a crate cannot be unpacked.
        FetchError: a crate does not exist or cannot be reached.
        DigestError: a crate differs from its checksum in Cargo.lock; names the crate.
        DiskFullError: no space left.
    """
    if not recipe.data.build.rust:
        return ()
    locks = find(recipe, tree)
    pinned: dict[str, Crate] = {}
    for lock in locks:
        pinned |= {crate.folder: crate for crate in cargo_lock.read(lock, f"{lock.relative_to(tree)} of {recipe.key}")}
    wanted = [Download(url=crate.url, sha256=crate.sha256, what=f"crate {crate.title}") for crate in pinned.values()]
    places = download(wanted, settings, tick)
    count = "1 crate" if len(pinned) == 1 else f"{len(pinned)} crates"
    say(f"{count} of crates.io: each sha256 matches {' and '.join(str(lock.relative_to(tree)) for lock in locks)}")
    remove_tree(into)
    with full_disk(into.parent):
        into.mkdir()
        return tuple(_unpack(crate, places[crate.sha256], into) for _, crate in sorted(pinned.items()))


def find(recipe: LoadedRecipe, tree: Path) -> list[Path]:
    """The Cargo.lock of the project: in the folder of its Cargo.toml or in a parent; else every Cargo.lock of the project.

    Raises:
        SourceError: there is none.
    """
    project = tree / recipe.data.build.subdirectory
    start = project / _manifest(project / "pyproject.toml")
    for folder in (start, *start.parents):
        if not folder.resolve().is_relative_to(tree.resolve()):
            break
        if (folder / LOCK).is_file():
            return [folder / LOCK]
    if locks := sorted(project.rglob(LOCK)):
        return locks
    raise SourceError(
        f"the source of {recipe.key} has no {LOCK}, which would pin the versions of its crates",
        remedy=f"write this file with `cargo generate-lockfile`, and add it with a patch in recipes/{recipe.key}/patches",
    )


def _manifest(pyproject: Path) -> str:
    """The folder of the Cargo.toml that maturin builds, relative to the project."""
    try:
        path = tomllib.loads(pyproject.read_text())["tool"]["maturin"]["manifest-path"]
    except (OSError, ValueError, KeyError, TypeError):
        return "."
    return str(Path(str(path)).parent)


def _unpack(crate: Crate, file: Path, into: Path) -> Crate:
    """Unpack a crate; return it with its licence."""
    folder = into / crate.folder
    folder.mkdir()
    archive.extract(file, folder, f"crate {crate.title}", strip=True)
    (folder / ".cargo-checksum.json").write_text(json.dumps({"files": {}, "package": crate.sha256}))
    return crate.model_copy(update={"license": _license(folder / "Cargo.toml")})


def _license(manifest: Path) -> str | None:
    """The licence in a Cargo.toml as an SPDX expression. Old crates write `/` instead of OR."""
    try:
        package: Any = tomllib.loads(manifest.read_text())["package"]
        return str(canonicalize_license_expression(package["license"].replace("/", " OR ")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidLicenseExpression):
        return None
