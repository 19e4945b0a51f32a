"""Debian's archive: the mirror, the packages that a request requires (apt decides), and their lines in a lock."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from builder.fetch import Download, debian_mirror, download
from builder.planning.packages import Deb
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from gracefarm.console import Tick
from gracefarm.errors import FetchError, HostError, RootError
from gracefarm.process import die_with_us

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_REMEDY = "set GRACEFARM_DEBIAN_MIRROR to the URL of a Debian mirror that this machine can reach"


def table(name: str, debs: Iterable[Deb]) -> list[str]:
    """The lines of a lock's table of packages, after an empty line."""
    lines = [
        f'    {{ name = "{deb.name}", arch = "{deb.arch}", version = "{deb.version}", size = {deb.size}, '
        f'sha256 = "{deb.sha256}", path = "{deb.path}" }},'
        for deb in sorted(debs, key=lambda deb: (deb.name, deb.arch))
    ]
    return ["", f"[{name}]", "packages = [", *lines, "]"]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An isolated apt: one suite, no installed packages, without this machine's configuration."""

    folder: Path
    url: str

    def solve(self, requests: Sequence[str]) -> list[Deb]:
        """The packages of `requests` (NAME:ARCH) and all their dependencies.

        Raises:
            RootError: apt finds no solution.
        """
        return self._listed("install", "--yes", *requests)

    def alone(self, requests: Sequence[str]) -> list[Deb]:
        """The packages of `requests` without their dependencies.

        Raises:
            RootError: the suite does not have one of them.
        """
        return self._listed("download", *requests) if requests else []

    def _listed(self, *arguments: str) -> list[Deb]:
        listing = self.run_apt(*arguments, "--print-uris", "--quiet=2")
        return [self._parse(line) for line in listing.splitlines() if line.startswith("'")]

    def _parse(self, line: str) -> Deb:
        """A line such as `'URL' NAME_VERSION_ARCH.deb SIZE SHA256:DIGEST`."""
        match = re.fullmatch(r"'([^']+)' ([^_]+)_([^_]+)_([^_]+)\.deb (\d+) SHA256:([0-9a-f]{64})", line.strip())
        if match is None or not match[1].startswith(f"{self.url}/"):
            raise RootError(
                f"apt printed a line that cannot be parsed: {line!r}",
                remedy="run the command on a Debian or Ubuntu machine with a different version of apt",
            )
        return Deb(
            name=match[2],
            arch=match[4],
            version=unquote(match[3]),
            sha256=match[6],
            size=int(match[5]),
            path=unquote(match[1][len(self.url) + 1 :]),
        )

    def run_apt(self, *arguments: str) -> str:
        """The output of `apt-get ARGUMENTS`.

        Raises:
            RootError: apt-get failed.
        """
        process = subprocess.run(
            ["apt-get", *arguments],
            env={"APT_CONFIG": str(self.folder / "apt.conf"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            errors = [line for line in (process.stdout + process.stderr).splitlines() if line.startswith(("E:", " "))]
            raise RootError(
                f"apt-get {arguments[0]} failed: {' '.join(' '.join(errors).split())}",
                remedy="correct the names of the packages and the suite in stack.toml or interpreter.toml",
            )
        return process.stdout


@contextmanager
def solver(
    suite: str, architecture: Arch, foreign: Sequence[Arch], settings: Settings, component: str = "main"
) -> Iterator[Solver]:
    """A Solver for one suite, in a temporary folder. Its package lists are fetched and checked with Debian's signature.

    Raises:
        HostError: apt or Debian's keyring is not installed.
        FetchError: the lists cannot be fetched.
    """
    if shutil.which("apt-get") is None or not KEYRING.exists():
        raise HostError(
            f"a lock of Debian packages requires apt-get and Debian's keyring {KEYRING}, but one of them is not installed",
            remedy="on Debian or Ubuntu, run `apt-get install debian-archive-keyring` as root; on a different system, run "
            "the command on a Debian or Ubuntu machine",
        )
    url = debian_mirror.mirror(suite, settings)
    with TemporaryDirectory(prefix="gracefarm-apt-") as name:
        folder = Path(name)
        for needed in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (folder / needed).mkdir(parents=True)
        (folder / "status").touch()
        # Only the suite: packages of -updates and -security are replaced often, and a lock would name missing files.
        (folder / "etc" / "sources.list").write_text(f"deb [signed-by={KEYRING}] {url} {suite} {component}\n")
        architectures = " ".join(f'"{arch.debian}";' for arch in (architecture, *foreign))
        configuration = (files("builder") / "data" / "apt.conf").read_text()
        (folder / "apt.conf").write_text(
            configuration.format(folder=folder, architecture=architecture.debian, architectures=architectures)
        )
        apt = Solver(folder=folder, url=url)
        try:
            apt.run_apt("update", "--error-on=any")
        except RootError as error:
            raise FetchError(f"the package lists of {suite} cannot be fetched: {error.cause}", remedy=MIRROR_REMEDY) from error
        yield apt


def fetch(debs: Sequence[Deb], suite: str, stack: str, settings: Settings, tick: Tick) -> dict[str, Path]:
    """Fetch the packages of a lock into the store; paths by sha256.

    Raises:
        FetchError: the mirror does not have a package.
        DigestError: a package of the mirror differs from its pin.
        HostError: no mirror is known.
    """
    url = debian_mirror.mirror(suite, settings)
    wanted = [Download(url=f"{url}/{deb.path}", sha256=deb.sha256, what=deb.title, size=deb.size) for deb in debs]
    try:
        return download(wanted, settings, tick)
    except FetchError as error:
        raise FetchError(
            error.cause,
            remedy=f"{MIRROR_REMEDY}; if Debian has replaced the package, use a snapshot mirror or write the lock again "
            f"with `builder lock {stack}`",
            repeat=error.repeat,
        ) from error


def unpack(archive: Path, into: Path, deb: Deb, options: Sequence[str] = ()) -> None:
    """Unpack a package into a folder; `options` are additional options of tar, and members if not all are wanted.

    Raises:
        RootError: the package cannot be unpacked.
        HostError: dpkg-deb or tar is missing.
    """
    # Permissions are not restored, and so no set-user-id bits.
    command = ["tar", "--extract", "--file=-", f"--directory={into}", "--keep-directory-symlink", "--no-same-owner"]
    command += ["--no-same-permissions", "--warning=no-timestamp", *options]
    try:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as source:
            unpacked = subprocess.run(die_with_us(command), stdin=source.stdout, capture_output=True, check=False)
            assert source.stdout is not None
            assert source.stderr is not None
            source.stdout.close()
            message = (source.stderr.read() + unpacked.stderr).decode(errors="replace").strip()
    except FileNotFoundError as error:
        raise HostError(f"the program {error.filename} is not installed", remedy="run `builder doctor --fix`") from error
    if os.strerror(errno.ENOSPC) in message:
        raise OSError(errno.ENOSPC, message)
    if source.returncode or unpacked.returncode:
        raise RootError(f"{deb.title} cannot be unpacked: {message}", remedy=f"remove {archive}, then repeat the command")
