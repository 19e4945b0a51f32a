"""Finds the lock of the set: in deploy.toml, in the file beside it, on the index of the set, or in gracefarm.

The locks in gracefarm contain only wheels from PyPI. They are for deployments that do not set `index`.
"""

from __future__ import annotations

import netrc
from pathlib import Path

import httpx

from deploy.nodes import template
from deploy.nodes.deployment import Deployment
from deploy.nodes.setlock import place, shipped
from deploy.planning import engines, options
from gracefarm import pins
from gracefarm.console import Console
from gracefarm.errors import ConfigError, FetchError
from gracefarm.files import atomic_write
from gracefarm.process import first_line

APHRODITE = "gh200-cu130-aphrodite"
"The set of aphrodite that can be built completely."


def lock_text(deployment: Deployment, console: Console) -> str:
    """The lock of the set: the key `lock` of deploy.toml, else SET.lock beside it, which is fetched once from the index.

    Raises:
        ConfigError: there is no lock, no index is set, and gracefarm has no lock of this set.
        FetchError: the index has no lock of the set, or cannot be reached.
    """
    data = deployment.data
    path = place(deployment)
    try:
        return path.read_text()
    except FileNotFoundError as error:
        if data.lock is None and data.index is not None:
            return _fetch_lock(data.index, data.set, path, console)
        if data.lock is None and (own := shipped(data.set)) is not None:
            text = own.read_text()
            atomic_write(path, text)
            console.step("environment", f"the lock of {data.set} in gracefarm is copied to {path}")
            return text
        raise ConfigError(
            f"{path}: no lock of the set {data.set}",
            remedy=f"in deploy.toml, set index to the address of the set (http://HOST:8080/{data.set}/simple/) or lock to the"
            f" path of a lock; or build the set with `builder set build {data.set}`",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: the lock cannot be read: {error.strerror}",
            remedy="check that the path is a file and that you have read permission",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: the lock cannot be read: it is not UTF-8",
            remedy="replace the file with the lock that `builder set build` wrote",
        ) from error


def _fetch_lock(index: str, name: str, path: Path, console: Console) -> str:
    # The index of a set, …/SET/simple/, has its lock at …/SET/requirements.lock.
    try:
        whole = httpx.URL(index.rstrip("/") + "/").join("../requirements.lock")
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"index in deploy.toml is not a URL: {error}", remedy="set index to http://HOST:PORT/SET/simple/"
        ) from error
    address = str(whole.copy_with(userinfo=b""))  # for messages, without a password
    by_hand = f"copy a lock of `builder set build {name}` to {path}"
    try:
        auth = httpx.NetRCAuth() if (Path.home() / ".netrc").is_file() else None
        answer = httpx.get(whole, timeout=30, follow_redirects=True, auth=auth)
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        raise ConfigError(f"~/.netrc cannot be read: {error}", remedy="correct the file, then `chmod 600 ~/.netrc`") from error
    except httpx.HTTPError as error:
        raise FetchError(
            f"the lock of the set {name} cannot be fetched from {address}: {error or type(error).__name__}",
            remedy=f"check that the index is running and that `index` in deploy.toml is its address; or {by_hand}",
        ) from error
    if answer.status_code in (401, 403):
        raise FetchError(
            f"the lock of the set {name} cannot be fetched: {address} answered HTTP {answer.status_code}",
            remedy=f"add the user name and password of the index to ~/.netrc; or {by_hand}",
        )
    if answer.status_code == 404:
        plain = answer.headers.get("content-type", "").startswith("text/plain")
        reason = f" ({first_line(answer.text)[:300]})" if plain else ""
        raise FetchError(
            f"the index has no lock of the set {name}: {address} answered HTTP 404{reason}",
            remedy=f"check that the set is published and that `index` in deploy.toml ends with /{name}/simple/; or {by_hand}",
        )
    if answer.status_code != 200 or "--hash=sha256:" not in answer.text:
        what = f"answered HTTP {answer.status_code}" if answer.status_code != 200 else "is not a lock with sha256 hashes"
        raise FetchError(
            f"the lock of the set {name} cannot be fetched: {address} {what}",
            remedy=f"check the index, and its address in `index` of deploy.toml; or {by_hand}",
        )
    atomic_write(path, answer.text)
    console.step("environment", f"the lock from {address} is stored as {path}; later commands use this file")
    return answer.text


def require_engine(deployment: Deployment, lock: str) -> None:
    """Check that the lock has the engine and Ray, except in a rehearsal, whose engine is simulated. Raises ConfigError."""
    data = deployment.data
    if data.options.rehearsal:
        return
    names = {pin.name for pin in pins.parse(lock, f"the lock of the set {data.set}")}
    wanted = (options.table(engines.engine(data.engine).table).distribution, "ray")
    missing = [name for name in wanted if name not in names]
    if missing:
        others = " or ".join(f'"{name}" ({arch} nodes)' for arch, name in template.SETS.items())
        remedies = {
            "vllm": f"change `set` in {deployment.path.name} to {others}",
            "aphrodite": f'in {deployment.path.name}, set `set` to "{APHRODITE}" and `index` to the address of this set on '
            "your index, because aphrodite is not on PyPI; "
            f"if {APHRODITE}.lock is beside {deployment.path.name}, delete it",
        }
        raise ConfigError(
            f"the lock of the set {data.set} has no {' and no '.join(missing)}, which the engine {data.engine} requires",
            remedy=remedies[data.engine],
        )
