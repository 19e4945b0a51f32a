"""Packages of `pip install 'gracefarm[EXTRA]'`: each program has an extra with its name, and an error names a missing one."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from gracefarm.errors import HostError

PACKAGES = frozenset({"gracefarm", "builder", "index", "deploy"})
"Our own packages. A missing module of theirs is a defect."


def missing(package: str, extra: str) -> HostError:
    """The error for a missing package that `extra` installs."""
    return HostError(f"{extra} requires {package}, which is not installed", remedy=f"run `pip install 'gracefarm[{extra}]'`")


def require(extra: str) -> None:
    """Check that all packages of an extra are installed, before a command starts work that ends with another program.

    Raises:
        HostError: a package is missing.
    """
    for text in metadata.requires("gracefarm") or ():
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError as error:
            raise missing(requirement.name, extra) from error
