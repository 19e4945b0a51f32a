"""The mirror of Debian's archive that this machine uses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from builder.planning.settings import Settings
from gracefarm.errors import HostError

OS_RELEASE = Path("/etc/os-release")


def mirror(suite: str, settings: Settings) -> str:
    """Base URL of the archive: from the setting, else from apt on Debian, else mmdebstrap's default.

    Raises:
        HostError: none of the three names a mirror.
    """
    url = settings.debian_mirror or _apt_mirror(suite) or _mmdebstrap_mirror()
    if url is None:
        raise HostError(
            "no Debian mirror is known: the sources of apt name no mirror, and mmdebstrap, which has a default mirror, "
            "is not installed",
            remedy="set GRACEFARM_DEBIAN_MIRROR to a mirror's URL, or install mmdebstrap",
        )
    return url.rstrip("/")


def parse_sources(listing: str, suites: Sequence[str]) -> str | None:
    """URL of the Debian archive in the output of `apt-get update --print-uris`; `suites` in order of preference.

    The listing names a Release file for each configured suite, even if apt has never fetched it.
    """
    sources = re.findall(r"^'((?:https?|file):[^']+?)/dists/([^/']+)/(?:In)?Release'", listing, flags=re.MULTILINE)
    for suite in suites:
        urls = [unquote(url) for url, name in sources if name == suite]
        # Other archives have suites with the same name; by convention Debian's archive is in a folder /debian.
        urls.sort(key=lambda url: not url.rstrip("/").endswith("/debian"))
        if urls:
            return urls[0]
    return None


def parse_manual(text: str) -> str | None:
    """The default mirror that the manual of mmdebstrap states (as POD, in the program's file)."""
    match = re.search(r"If no I<MIRROR> option is provided,\s+L<(https?://[^>\s]+)>\s+is\s+used", text)
    return match[1] if match else None


def _apt_mirror(suite: str) -> str | None:
    """The mirror in apt's configuration, if this machine runs Debian."""
    release = (
        dict(re.findall(r'^(\w+)="?([^"\n]*)', OS_RELEASE.read_text(), flags=re.MULTILINE)) if OS_RELEASE.exists() else {}
    )
    if release.get("ID") != "debian" or shutil.which("apt-get") is None:
        return None
    listing = subprocess.run(["apt-get", "update", "--print-uris"], capture_output=True, text=True, check=False).stdout
    return parse_sources(listing, (suite, release.get("VERSION_CODENAME", ""), "stable", "oldstable", "testing", "sid"))


def _mmdebstrap_mirror() -> str | None:
    program = shutil.which("mmdebstrap")
    return parse_manual(Path(program).read_text(errors="replace")) if program else None
