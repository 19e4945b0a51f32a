"""The materials of a wheel, read from a build's inputs: for the SBOM, the provenance and the plan of a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from packaging.utils import canonicalize_name

from builder.planning.cargo_lock import Crate
from builder.planning.sources import origin_of


@dataclass(frozen=True, kw_only=True)
class Material:
    """One fetched file or commit."""

    what: str
    "A name, or the path in the source tree."
    version: str | None
    uri: str
    algorithm: str
    "`sha256` or `gitCommit`, as in in-toto."
    digest: str | None
    "None: the digest is unknown."
    license: str | None = None
    "Licence in the recipe; None: not declared, or the inputs are from a version without this key."


def of(inputs: Mapping[str, Any]) -> list[Material]:
    """Source, submodules, repositories, files and patches of a build, in the recipe's order."""
    recipe = inputs["recipe"]
    return [
        *_source(recipe["source"], recipe),
        *(_git(repository["path"], repository) for repository in recipe["repositories"]),
        *(material for file in recipe["files"] if (material := _download(file)) is not None),
        *(material for tree in recipe.get("trees", ()) for material in _tree(tree)),
        *(_file(f"patch {number}", f"urn:sha256:{sha256}", sha256) for number, sha256 in enumerate(recipe["patches"], 1)),
    ]


def _source(source: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[Material]:
    if source["kind"] == "git":
        yield _git(recipe["name"], source)
        for path, submodule in sorted(source["submodules"].items()):
            yield _git(path, submodule)
    elif source["kind"] == "sdist":
        yield wheel(source["name"], source["version"], source["sha256"])
    else:
        yield _file(recipe["name"], source["url"], source["sha256"])


def _tree(taken: Mapping[str, Any]) -> Iterator[Material]:
    """A tree that was built first, and its materials, since its code is in the wheel."""
    recipe, build_id = taken["inputs"]["recipe"], taken["build_id"]
    uri = f"urn:gracefarm:build:{build_id}"
    yield Material(
        what=taken["path"], version=recipe["version"], uri=uri, algorithm="sha256", digest=build_id, license=recipe["license"]
    )
    source, *others = of(taken["inputs"])
    yield from (replace(source, license=recipe["license"]), *others)


def wheel(name: str, version: str, sha256: str | None) -> Material:
    """A file of the Python index."""
    uri = f"pkg:pypi/{canonicalize_name(name)}@{version}"
    return Material(what=name, version=version, uri=uri, algorithm="sha256", digest=sha256 or None)


def crate(pinned: Crate) -> Material:
    """A crate of crates.io."""
    return Material(
        what=pinned.name,
        version=pinned.version,
        uri=pinned.purl,
        algorithm="sha256",
        digest=pinned.sha256,
        license=pinned.license,
    )


def _git(what: str, pinned: Mapping[str, Any]) -> Material:
    commit = pinned["commit"]
    uri = f"git+{pinned['url']}@{commit}"
    return Material(what=what, version=commit, uri=uri, algorithm="gitCommit", digest=commit, license=pinned.get("license"))


def _download(file: Mapping[str, Any]) -> Material | None:
    """The download of an entry in the recipe's files; None: the recipe has its text."""
    origin = origin_of(file)
    return _file(file["path"], origin, file["sha256"], file.get("license")) if origin else None


def _file(what: str, url: str, sha256: str | None, license: str | None = None) -> Material:  # noqa: A002 SPDX's word
    return Material(what=what, version=None, uri=url, algorithm="sha256", digest=sha256, license=license)
