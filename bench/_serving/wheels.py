"""Wheels of what a machine's Python has installed, an index of them and of those that were brought, and a lock over both.

    python -m bench._serving.wheels ENGINE OTHERS NAMES INDEX     run by that Python; needs nothing else

ENGINE: a folder of wheels for the lock; OTHERS: of wheels that the index has beside them; NAMES: a file with the names of
distributions that are installed here; INDEX: written. A machine without a network has torch installed and no wheel of it;
an environment that `deploy` builds takes wheels with a sha256.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import importlib.metadata
import io
import re
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

OURS = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
"Files of a dist-info folder that the installer wrote."


def normalized(name: str) -> str:
    """As the simple API has names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def repacked(name: str, folder: Path) -> Path:
    """The wheel of an installed distribution, without what its installer made of it: scripts, bytecode, its own notes."""
    installed = importlib.metadata.distribution(name)
    root = Path(str(installed.locate_file("")))
    info = next(file.parent for file in installed.files or () if file.name == "METADATA" and ".dist-info" in str(file.parent))
    about = (root / info / "WHEEL").read_text()
    tags = [line.split(": ", 1)[1].split("-") for line in about.splitlines() if line.startswith("Tag: ")]
    tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags, strict=True))
    stem = str(info).removesuffix(".dist-info")
    path = folder / f"{stem}-{tag}.whl"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for file in installed.files or ():
            place = root / file
            if ".." in file.parts or file.suffix == ".pyc" or (file.parent == info and file.name in OURS):
                continue
            if place.is_file():
                content = place.read_bytes()
                entry = zipfile.ZipInfo(file.as_posix(), (2020, 1, 1, 0, 0, 0))
                entry.external_attr = (place.stat().st_mode & 0o777) << 16
                wheel.writestr(entry, content)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                rows.writerow([file.as_posix(), f"sha256={digest}", len(content)])
        rows.writerow([f"{info}/RECORD", "", ""])
        wheel.writestr(f"{info}/RECORD", record.getvalue())
    return path


def described(path: Path) -> tuple[str, str, str]:
    """Name, version and sha256 of a wheel; its METADATA goes beside it, so that no client needs the wheel for it."""
    with zipfile.ZipFile(path) as wheel:
        inside = next(name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = wheel.read(inside)
    path.with_name(f"{path.name}.metadata").write_bytes(metadata)
    headers = {key: re.search(rf"^{key}: *(\S+)", metadata.decode(), re.MULTILINE) for key in ("Name", "Version")}
    name, version = (str(header[1]) if header else "?" for header in headers.values())
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return normalized(name), version, digest


def write_index(folder: Path, wheels: list[Path]) -> list[str]:
    """FOLDER/simple/NAME/index.html for each wheel in FOLDER/wheels; the lines of a lock over all of them."""
    lines = []
    pages: dict[str, list[str]] = {}
    with ProcessPoolExecutor() as pool:
        for path, (name, version, digest) in zip(wheels, pool.map(described, wheels), strict=True):
            beside = hashlib.sha256(path.with_name(f"{path.name}.metadata").read_bytes()).hexdigest()
            address = html.escape(f"../../wheels/{path.name}#sha256={digest}")
            more = f'data-dist-info-metadata="sha256={beside}" data-core-metadata="sha256={beside}"'
            pages.setdefault(name, []).append(f'<a href="{address}" {more}>{path.name}</a>')
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    for name, links in pages.items():
        page = folder / "simple" / name / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>")
    return lines


def main() -> None:
    """See the module."""
    engine, others, names, folder = (Path(word) for word in sys.argv[1:])
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    chosen = names.read_text().split()
    with ProcessPoolExecutor() as pool:
        packed = list(pool.map(repacked, chosen, [wheels] * len(chosen)))
    for path in packed:  # what was brought has the sha256 that another lock names
        if (others / path.name).exists():
            path.unlink()
            linked(others / path.name, wheels)
    serving = [*packed, *(linked(path, wheels) for path in sorted(engine.glob("*.whl")))]
    more = [linked(path, wheels) for path in sorted(others.glob("*.whl")) if not (wheels / path.name).exists()]
    lines = write_index(folder, [*serving, *more])[: len(serving)]
    (folder / "requirements.lock").write_text("".join(f"{line}\n" for line in sorted(lines)))
    sys.stdout.write(
        f"{len(packed)} wheels of this Python's distributions, {len(serving) - len(packed)} brought for the lock\n"
    )


def linked(path: Path, folder: Path) -> Path:
    """The same file there."""
    place = folder / path.name
    place.hardlink_to(path)
    return place


if __name__ == "__main__":
    main()
