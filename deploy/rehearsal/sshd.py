"""OpenSSH's sshd for the nodes: that of this machine, else the one in Debian's package, which is unpacked but not installed.

Installing openssh-server would start a server on this machine.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gracefarm.errors import HostError
from gracefarm.files import atomic_directory, lock
from gracefarm.process import last_line

PACKAGES = ("openssh-server", "libwrap0")


@dataclass(frozen=True, kw_only=True)
class Sshd:
    """The sshd of the nodes."""

    program: str
    "Path on the node."
    libraries: Path | None = None
    "Folder of this machine that is mounted on the node as /run/rig-sshd."
    session: str | None = None
    "Path of the session program. Since OpenSSH 9.8 it is a separate program."


def find(home: Path) -> Sshd:
    """Find sshd, or unpack one to gracefarm's folder `home`.

    Raises:
        HostError: sshd is not installed, and apt cannot fetch it.
    """
    installed = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
    if installed:
        return Sshd(program=installed)
    folder = home / "rehearsal" / "sshd"
    with lock(folder.with_name("sshd.lock")):
        if not folder.is_dir():
            _unpack(folder)
    session = next((program for program in folder.glob("sshd-session")), None)
    return Sshd(
        program="/run/rig-sshd/sshd", libraries=folder, session="/run/rig-sshd/sshd-session" if session is not None else None
    )


def _unpack(folder: Path) -> None:
    """Fetch the packages with apt, and keep the few files that are necessary."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        download = (
            subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=scratch, capture_output=True, text=True, check=False)
            if shutil.which("apt-get")
            else None
        )
        packages = list(scratch.glob("*.deb"))
        if download is None or download.returncode or not packages:
            reason = last_line(download.stderr, "") if download else "this is not Debian"
            raise HostError(
                f"no sshd on this machine, and the package openssh-server cannot be fetched: {reason}",
                remedy="as root, run `apt-get update`, or install openssh-server",
            )
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package.name, "root"], cwd=scratch, check=True)
        with atomic_directory(folder) as unpacked:
            programs = [*scratch.glob("root/usr/sbin/sshd"), *scratch.glob("root/usr/lib/openssh/sshd-*")]
            for file in [*programs, *scratch.glob("root/usr/lib/*/libwrap.so.0")]:
                shutil.copy(file, unpacked / file.name)
            unpacked.chmod(0o755)
