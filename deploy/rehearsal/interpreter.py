"""Python for the nodes, in the version of the engine: from this machine, else installed by uv in gracefarm's folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gracefarm.errors import HostError
from gracefarm.uv import explain

VERSION = "3.11"
NODE_PATH = "/usr/local/bin:/usr/bin:/bin"
"PATH of a node, which has the programs of this machine."


def find(home: Path, version: str = VERSION) -> Path | None:
    """The folder of the Python that uv installed (with bin/python3.11); None if this machine has the version.

    `home` is gracefarm's folder. uv checks the sha256 of the archive. UV_PYTHON_INSTALL_MIRROR sets a mirror.

    Raises:
        HostError: this machine does not have the version, and uv cannot install it.
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
                f"the rehearsal requires Python {version}, which is not on this machine, and uv cannot install it: "
                f"{explain(process.stderr)[1]}",
                remedy=f"as root, run `apt-get install python{version}` if the distribution has it, let uv reach GitHub, or "
                "set UV_PYTHON_INSTALL_MIRROR to a mirror of python-build-standalone",
            )
    return brought


def _brought(folder: Path, version: str) -> Path | None:
    """The installed Python. A folder without a patch release in its name is a link, and is not used."""
    pythons = [program.parent.parent for program in folder.glob(f"cpython-{version}.*/bin/python{version}")]
    return max(pythons, key=lambda python: python.stat().st_mtime, default=None)
