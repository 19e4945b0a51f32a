"""A mirror of crates.io on this machine. It has real crates, from Debian's source packages."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from builder.fetch import Download, debian_mirror, download
from builder.planning.settings import Settings
from gracefarm.files import sha256_file
from tests import projects

LIST = Path(__file__).parent / "pyo3-debs.txt"
REGISTRY = "usr/share/cargo/registry"
"The folder with the crate in each of these packages."


def fill(mirror: Path, scratch: Path, settings: Settings) -> None:
    """Write the .crate files of the packages in LIST into a folder, as NAME/NAME-VERSION.crate."""
    url = debian_mirror.mirror("bookworm", settings)
    lines = [line.split() for line in LIST.read_text().splitlines()[1:]]
    debs = [Download(url=f"{url}/{path}", sha256=sha256, what=path) for sha256, path in lines]
    for deb in download(debs, settings).values():
        subprocess.run(["dpkg-deb", "--extract", deb, scratch], check=True)
    for crate in sorted((scratch / REGISTRY).iterdir()):
        names = [path for path in crate.rglob("*") if path.is_file() and path.name != ".cargo-checksum.json"]
        write(mirror, crate.name, {str(path.relative_to(crate)): path.read_bytes() for path in names})


def write(mirror: Path, folder: str, files: Mapping[str, str | bytes]) -> Path:
    """Write a .crate of these files; `folder` is NAME-VERSION."""
    place = mirror / folder.rpartition("-")[0] / f"{folder}.crate"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(projects.archive(files, top=folder))
    return place


def locked(lock: str, mirror: Path) -> str:
    """Add the checksums of the mirror's crates to a Cargo.lock without checksums."""
    blocks = lock.split("\n\n")
    return "\n\n".join(_locked(block, mirror) if "\nsource = " in block else block for block in blocks)


def _locked(block: str, mirror: Path) -> str:
    lines = block.split("\n")
    values = dict(line.split(" = ", 1) for line in lines if line.startswith(("name", "version")))
    name, version = (values[key].strip('"') for key in ("name", "version"))
    checksum = sha256_file(mirror / name / f"{name}-{version}.crate")
    place = next(number for number, line in enumerate(lines) if line.startswith("source"))
    return "\n".join([*lines[: place + 1], f'checksum = "{checksum}"', *lines[place + 1 :]])


def text(files: Mapping[str, str | bytes], name: str) -> str:
    """The text of one of a project's files."""
    content = files[name]
    return content.decode() if isinstance(content, bytes) else content
