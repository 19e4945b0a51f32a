"""What `pip install 'gracefarm[EXTRA]'` brings: each program has the extra of its name, and says so where it is missing."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from gracefarm.errors import HostError

PACKAGES = frozenset({"gracefarm", "builder", "index", "deploy"})
"Ours: that one of their modules is missing is a defect."


def missing(package: str, extra: str) -> HostError:
    """The error for a package that `extra` would bring."""
    return HostError(f"{package} is not installed, which {extra} needs", remedy=f"pip install 'gracefarm[{extra}]'")


def require(extra: str) -> None:
    """See that everything of an extra is installed, before work begins that ends with another program of ours.

    Raises:
        HostError: something is not.
    """
    for text in metadata.requires("gracefarm") or ():
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError as error:
            raise missing(requirement.name, extra) from error
