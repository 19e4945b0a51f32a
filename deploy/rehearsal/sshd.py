"""OpenSSH's sshd for the nodes: the machine's own, else the one of Debian's package, unpacked and not installed.

Installing openssh-server would start a server on this machine that nobody asked for.
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
    """How a node starts it."""

    program: str
    "As the node sees it."
    libraries: Path | None = None
    "A folder of this machine that the node sees as /run/rig-sshd."
    session: str | None = None
    "From OpenSSH 9.8 on the session is a program of its own."


def find(home: Path) -> Sshd:
    """The sshd to use; `home` is gracefarm's folder, where an unpacked one is kept.

    Raises:
        HostError: neither installed nor to be had from apt.
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
    """Fetch the packages as apt is configured and keep the two or three files that matter."""
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
                remedy="as root: apt-get update; or install openssh-server",
            )
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", package.name, "root"], cwd=scratch, check=True)
        with atomic_directory(folder) as unpacked:
            programs = [*scratch.glob("root/usr/sbin/sshd"), *scratch.glob("root/usr/lib/openssh/sshd-*")]
            for file in [*programs, *scratch.glob("root/usr/lib/*/libwrap.so.0")]:
                shutil.copy(file, unpacked / file.name)
            unpacked.chmod(0o755)
