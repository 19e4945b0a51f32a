"""Makes wheels from the installed packages of this Python, and an index and a lock with these wheels and with carried wheels.

    python -m bench._serving.wheels ENGINE OTHERS NAMES INDEX

ENGINE is a folder with carried wheels for the lock. OTHERS is a folder with carried wheels that only the index gets. NAMES is
a file with the names of installed distributions. INDEX is the folder to write. The program uses only the standard library.

`deploy` builds environments from wheels with a sha256. A machine without a network may have torch installed, but no wheel.
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
    """The name as the simple API writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def repacked(name: str, folder: Path) -> Path:
    """Write the wheel of an installed distribution, without the files of the installer: scripts, byte code, and OURS."""
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
    """Name, version and sha256 of a wheel. Also write its METADATA to a file, which clients read instead of the wheel."""
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
    """Write FOLDER/simple/NAME/index.html for the wheels in FOLDER/wheels. Return the lines of a lock with all wheels."""
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
    """Write the wheels, the index and the lock (see the module)."""
    engine, others, names, folder = (Path(word) for word in sys.argv[1:])
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    chosen = names.read_text().split()
    with ProcessPoolExecutor() as pool:
        packed = list(pool.map(repacked, chosen, [wheels] * len(chosen)))
    for path in packed:  # use the carried wheel if there is one, since other locks have its sha256
        if (others / path.name).exists():
            path.unlink()
            linked(others / path.name, wheels)
    serving = [*packed, *(linked(path, wheels) for path in sorted(engine.glob("*.whl")))]
    more = [linked(path, wheels) for path in sorted(others.glob("*.whl")) if not (wheels / path.name).exists()]
    lines = write_index(folder, [*serving, *more])[: len(serving)]
    (folder / "requirements.lock").write_text("".join(f"{line}\n" for line in sorted(lines)))
    sys.stdout.write(
        f"{len(packed)} wheels from this Python's distributions, {len(serving) - len(packed)} carried wheels for the lock\n"
    )


def linked(path: Path, folder: Path) -> Path:
    """Create a hard link to the file in the folder."""
    place = folder / path.name
    place.hardlink_to(path)
    return place


if __name__ == "__main__":
    main()
