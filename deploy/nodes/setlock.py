"""The lock of a deployment's set on this machine: beside deploy.toml, or in gracefarm. Nothing here uses the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path

from deploy.nodes.deployment import Deployment
from gracefarm import pins
from gracefarm.errors import ConfigError


def place(deployment: Deployment) -> Path:
    """Where the lock is, or will be stored: the key `lock` of deploy.toml, else SET.lock beside it."""
    return deployment.path.parent / Path(deployment.data.lock or f"{deployment.data.set}.lock").expanduser()


def shipped(name: str) -> Path | None:
    """sets/NAME/requirements.lock of the checkout, or of the installed package (below builder/); None if there is none."""
    base = Path(str(resources.files("deploy"))).parent
    places = (base / "sets" / name, base / "builder" / "project" / "sets" / name)
    return next((place / "requirements.lock" for place in places if (place / "requirements.lock").is_file()), None)


def at_hand(deployment: Deployment) -> str | None:
    """The text of the lock that will be used; None if there is none yet, as before it is fetched from the index."""
    return next(_texts(deployment, ours=deployment.data.index is None), None)


def version_of(deployment: Deployment, distribution: str) -> str | None:
    """The version of a distribution in the lock. Before the lock is fetched: in gracefarm's lock of the same set.

    None: there is no such lock, it is not a lock, or it does not have the distribution.
    """
    for text in _texts(deployment, ours=True):
        with suppress(ConfigError):
            return next((pin.version for pin in pins.parse(text, "the lock") if pin.name == distribution), None)
    return None


def _texts(deployment: Deployment, *, ours: bool) -> Iterator[str]:
    """The texts of the locks that exist. `ours`: if deploy.toml names no lock, also that in gracefarm."""
    own = shipped(deployment.data.set) if ours and deployment.data.lock is None else None
    for path in filter(None, (place(deployment), own)):
        with suppress(OSError, UnicodeDecodeError):
            yield path.read_text()
