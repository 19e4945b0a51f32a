"""Python for the nodes, as the engine needs it: the machine's own, else one that uv brings into gracefarm's folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gracefarm.errors import HostError
from gracefarm.uv import explain

VERSION = "3.11"
NODE_PATH = "/usr/local/bin:/usr/bin:/bin"
"Where programs of this machine are found on a node."


def find(home: Path, version: str = VERSION) -> Path | None:
    """The folder of the one that uv brought (its `bin` has python3.11); None: the nodes find the machine's own.

    `home` is gracefarm's folder. uv checks the archive's sha256, and is told of a mirror by UV_PYTHON_INSTALL_MIRROR.
    Raises:
        HostError: neither is to be had.
    """
    if shutil.which(f"python{version}", path=NODE_PATH):
        return None
    folder = home / "rehearsal" / "python"
    brought = _brought(folder, version)
    if brought is None:
        command = [sys.executable, "-m", "uv", "--no-config", "python", "install", "--no-progress", "--no-bin"]
        command += ["--install-dir", str(folder), version]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        brought = _brought(folder, version)
        if process.returncode or brought is None:
            raise HostError(
                f"the rehearsal's nodes need Python {version}, which is not on this machine, and uv cannot bring it: "
                f"{explain(process.stderr)[1]}",
                remedy=f"as root: apt-get install python{version}, where the distribution has it; or let uv reach GitHub, or "
                "name a mirror of python-build-standalone by UV_PYTHON_INSTALL_MIRROR",
            )
    return brought


def _brought(folder: Path, version: str) -> Path | None:
    """uv unpacks beside it and renames; a folder without a patch release in its name is a link to one that has it."""
    pythons = [program.parent.parent for program in folder.glob(f"cpython-{version}.*/bin/python{version}")]
    return max(pythons, key=lambda python: python.stat().st_mtime, default=None)
