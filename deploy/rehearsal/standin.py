"""Builds the wheel of the simulated engine. Its name is `aphrodite-engine 0.6.4.post1`, and it says that it is a stand-in."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gracefarm import pins
from gracefarm.files import atomic_write

NAME, VERSION = "aphrodite-engine", "0.6.4.post1"
OPTIONS = f"aphrodite-{VERSION}-options.json"
METADATA = f"""Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: STAND-IN made by gracefarm's rehearsal; not the engine of this name: no GPU, no mathematics
Requires-Python: >=3.11
Requires-Dist: ray[default]
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: gracefarm-rehearsal\nRoot-Is-Purelib: true\nBuild: {build}\nTag: py3-none-any\n"


@dataclass(frozen=True, kw_only=True)
class StandinWheel:
    """A built wheel of the simulated engine."""

    path: Path
    sha256: str

    @property
    def pin(self) -> str:
        """Its line in a lock."""
        return pins.render(NAME, VERSION, [self.sha256])


def build(folder: Path) -> StandinWheel:
    """Write the wheel to `folder`. The same sources give the same bytes; other sources give another build tag and name."""
    here = resources.files("deploy") / "data"
    package = here / "rehearsal" / "standin" / "aphrodite"
    files = {f"aphrodite/{file.name}": file.read_bytes() for file in package.iterdir() if file.name.endswith(".py")}
    files["aphrodite/options.json"] = (here / OPTIONS).read_bytes()
    tag = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]
    info = f"aphrodite_engine-{VERSION}.dist-info"
    files[f"{info}/METADATA"] = METADATA.encode()
    files[f"{info}/WHEEL"] = WHEEL.format(build=f"0_{tag}").encode()
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\naphrodite = aphrodite.cli:main\n"
    rows = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in sorted(files.items())]
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in sorted(files.items(), key=lambda item: (".dist-info/" in item[0], item[0])):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            zipped.writestr(entry, content, zipfile.ZIP_DEFLATED)
    path = folder / f"aphrodite_engine-{VERSION}-0_{tag}-py3-none-any.whl"
    atomic_write(path, target.getvalue())
    return StandinWheel(path=path, sha256=hashlib.sha256(target.getvalue()).hexdigest())


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
