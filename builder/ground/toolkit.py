"""The CUDA compiler from Debian packages, for releases without wheels, in the layout of the wheels of newer releases."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from builder.ground import debian
from builder.planning.packages import PROFILE, of_toolkit
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from gracefarm.console import Tick, no_tick
from gracefarm.errors import RootError


def unpack(stack: LoadedStack, host: Arch, folder: Path, settings: Settings, tick: Tick = no_tick) -> None:
    """Fetch the packages and arrange the compiler as nvidia/cuN in `folder`.

    Raises:
        FetchError, DigestError: the mirror does not have a package, or it differs from its pin.
        RootError: a package cannot be unpacked, or a part is missing.
        HostError: dpkg-deb is missing.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return
    debs = of_toolkit(stack, host)
    places = debian.fetch(debs, spec.suite, stack.data.name, settings, tick)
    listing = (files("builder") / "data" / "toolkit" / "places.txt").read_text()
    home = folder / "nvidia" / f"cu{stack.data.cuda.split('.')[0]}"
    with TemporaryDirectory(dir=folder, prefix="unpack-") as name:
        for deb in debs:
            debian.unpack(places[deb.sha256], Path(name), deb)
        for line in listing.splitlines()[1:]:
            source, place = line.split()
            (home / place).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.move(Path(name, source), home / place)
            except FileNotFoundError as error:
                titles = ", ".join(deb.title for deb in debs)
                raise RootError(
                    f"the Debian packages of the CUDA compiler ({titles}) do not contain /{source}",
                    remedy="correct [toolchain.debian] in stack.toml",
                ) from error
    (home / "bin" / "nvcc.profile").write_text(PROFILE)
