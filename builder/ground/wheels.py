"""Install wheels into an environment with uv: the wheels of a lock, with their digests checked, or a single file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.utils import parse_wheel_filename

from builder.fetch.urls import shown
from builder.ground import uv
from builder.planning.pins import LockedWheel
from builder.planning.settings import Settings
from builder.planning.stack import LoadedStack
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, GracefarmError, RootError


def require_digests(stack: LoadedStack, locked: Sequence[LockedWheel]) -> None:
    """Refuse wheels whose digest is unknown.

    Raises:
        ConfigError: a digest is unknown; names its index and the command that fills it in.
    """
    for wheel in locked:
        if not wheel.sha256:
            raise ConfigError(
                f"the digest of {wheel.name} {wheel.version} in stack {stack.data.name} is unknown"
                f" (index: {shown(wheel.index)})",
                remedy=f"run `builder lock {stack.data.name} --digests` on a machine that can reach this index; or run it on"
                f" this machine with the variable GRACEFARM_MIRRORS='{wheel.index}=REPLACEMENT', which names a mirror",
                repeat=f"builder lock {stack.data.name} --digests",
            )


def install(locked: Sequence[LockedWheel], where: Sequence[str], title: str, settings: Settings, tick: Tick = no_tick) -> None:
    """Install locked wheels, with their digests checked, but without dependencies; `where` has uv's options for the place
    (--python, --target).

    Raises:
        FetchError, DigestError, RootError, HostError.
    """
    with TemporaryDirectory(prefix="gracefarm-install-") as name:
        listing = Path(name, "requirements.txt")
        own = _own_wheels(locked, Path(name), settings)
        places = {
            wheel: f" @ {own[wheel.sha256].as_uri()}" if wheel.sha256 in own else f"=={wheel.version}" for wheel in locked
        }
        listing.write_text("".join(f"{wheel.name}{places[wheel]} --hash=sha256:{wheel.sha256}\n" for wheel in locked))
        command = ["pip", "install", *where, "--require-hashes", "--no-deps", "--no-build", "--link-mode=hardlink"]
        command.append(f"--requirements={listing}")
        started: list[str] = []

        def show(line: str) -> None:
            if match := re.match(r"\s*(Downloading|Downloaded|Building) (.+)", line):
                started.extend([match[2]] if match[1] == "Downloaded" else [])
                tick(len(started), None, f"{match[1].lower()} {match[2]}")

        tick(0, None, f"{len(locked)} wheels")
        uv.run(
            command,
            settings,
            lambda message: RootError(f"the wheels of {title} cannot be unpacked: {message}", remedy="run `builder doctor`"),
            show,
        )
        tick(len(locked), len(locked), "wheels unpacked")


def install_file(wheel: Path, where: Sequence[str], failure: Callable[[str], GracefarmError]) -> None:
    """Install one wheel file without its dependencies; `where` has uv's options for the place.

    Raises:
        GracefarmError: the result of `failure` for uv's message.
    """
    with TemporaryDirectory(prefix="gracefarm-install-") as name:
        place = Path(name, _name_for_uv(wheel.name))
        place.symlink_to(wheel.resolve())
        command = ["pip", "install", "--quiet", *where, "--no-deps", "--no-index", "--reinstall", "--no-cache", str(place)]
        uv.run(command, None, failure)


def _name_for_uv(filename: str) -> str:
    """uv 0.13.9 accepts no version such as 3.14t, so a wheel for 3.14t gets the file name of a wheel for 3.14. Only file names
    have tags that uv reads. The callers checked the wheel's own tags."""
    return re.sub(r"-(cp\d+)-\1t-", r"-\1-\1-", filename)


def _own_wheels(locked: Sequence[LockedWheel], folder: Path, settings: Settings) -> dict[str, Path]:
    """Fetch the wheels that uv does not find on the Python index and link them into `folder` by name; paths by sha256.

    These are the wheels of other indexes, and wheels for free-threaded Pythons: uv 0.13.9 accepts no version such as 3.14t.
    """
    places = {}
    for wheel in locked:
        of = parse_wheel_filename(wheel.filename)[3] if wheel.filename else frozenset()
        free_threaded = any(tag.abi.endswith("t") for tag in of)
        if wheel.index or free_threaded:
            # Its clients take longer to import than `builder build` takes to find that a build exists.
            from builder.fetch import own_index, simple

            pinned = wheel if wheel.index else replace(wheel, index=settings.index_url or simple.DEFAULT_INDEX, tags=of)
            file, filename = own_index.fetch_wheel(pinned, settings)
            places[wheel.sha256] = folder / _name_for_uv(filename)
            places[wheel.sha256].symlink_to(file)
    return places
