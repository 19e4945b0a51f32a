"""A node with another architecture: logins run in Debian's arm64 userland, which qemu-user emulates.

qemu is registered in a user namespace of the node (Linux 6.7 and newer), not in this machine's binfmt_misc.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from deploy.rehearsal.rig import NodeSpec, RigNode
from gracefarm.errors import HostError
from gracefarm.files import atomic_directory, lock
from gracefarm.process import last_line

PACKAGES = (
    *("bash", "coreutils", "dash", "findutils", "grep", "gzip", "hostname", "libc-bin", "procps", "sed", "tar", "util-linux"),
    *("libpython3.11-stdlib", "python3", "python3-minimal", "python3.11"),
)
SUITE = "bookworm"
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
"They match an ELF file for aarch64, executable or position-independent."


def arm64(home: Path) -> NodeSpec:
    """A node with Debian's arm64 userland and Python 3.11. The userland is made once, and kept in gracefarm's folder.

    Raises:
        HostError: mmdebstrap or apt fail. The error has their last line.
    """
    folder = home / "rehearsal" / f"arm64-{SUITE}"
    with lock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            with atomic_directory(folder) as userland:
                _fill(userland)
    variables = {
        "RIG_ROOT": str(folder / "root"),
        "RIG_QEMU": str(folder / "qemu-aarch64-static"),
        # F: the kernel opens qemu at registration, since the node's root does not have it.
        "RIG_BINFMT": f":rig-aarch64:M::{MAGIC}:{MASK}:/run/rig-qemu:F",
    }
    # Debian's qemu must not hang in forked children, see builder.box.sandbox.
    return NodeSpec(env={"G_SLICE": "always-malloc"}, variables=variables, change=_chroot)


def _chroot(node: RigNode) -> None:
    """Let sshd start sessions in the userland."""
    with (node.folder / "etc" / "sshd_config").open("a") as config:
        config.write("ChrootDirectory /run/rig-root\n")


def _fill(folder: Path) -> None:
    root = folder / "root"
    # The packages are unpacked, but not configured, so that no program of the other architecture has to run now.
    _run(["mmdebstrap", "--quiet", "--arch=arm64", "--variant=extract", f"--include={','.join(PACKAGES)}", SUITE, str(root)])
    (root / "bin" / "sh").unlink(missing_ok=True)
    (root / "bin" / "sh").symlink_to("dash")
    for name in ("passwd", "group", "shadow", "hosts", "hostname", "nsswitch.conf"):
        (root / "etc" / name).touch()
    for name in ("proc", "dev", "tmp", "mnt", "home", "run"):
        (root / name).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        _run(["apt-get", "download", "-q", "qemu-user-static"], cwd=name)
        for package in Path(name).glob("*.deb"):
            _run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=name)
        (Path(name) / "unpacked/usr/bin/qemu-aarch64-static").replace(folder / "qemu-aarch64-static")


def _run(argv: list[str], cwd: str | None = None) -> None:
    try:
        process = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise HostError(f"there is no {argv[0]}", remedy=f"as root: apt-get install {argv[0]}") from error
    if process.returncode:
        last = last_line(process.stderr)
        raise HostError(f"{argv[0]}: {last}", remedy="as root: apt-get update, then repeat")
