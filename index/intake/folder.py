"""Import a folder of wheels and sdists, such as the folder of a pypiserver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gracefarm.console import Tick, no_tick
from gracefarm.files import CHUNK, sha256_file
from index.errors import RefusalError
from index.intake import admission
from index.intake.admission import Destination
from index.names import parse_filename
from index.store.catalogue import Catalogue
from index.store.files import Store, disk_errors, flush


@dataclass
class Imported:
    """Result of an import."""

    created: int = 0
    same: int = 0
    refused: list[str] = field(default_factory=list)


def import_folder(
    store: Store, catalogue: Catalogue, actor: str, folder: Path, tick: Tick = no_tick, *, variants: bool = False
) -> Imported:
    """Import every wheel and sdist of a folder, such as the folder of a pypiserver. Upload times are the files' mtimes.

    These files were published elsewhere, so they are accepted as they are. A defect that affects only its own file is shown on
    the file's page. A defect that could harm other files or the machine is refused, as in an upload; the result lists the
    reasons.
    """
    imported = Imported()
    paths = sorted(_distributions(folder))
    destination = Destination(allow_new=True, variants=variants)
    for number, path in enumerate(paths):
        tick(number, len(paths), path.name)
        try:
            distribution = parse_filename(path.name, published=True)
            with store.staged() as staged:
                _copy(store, path, staged)
                candidate = admission.inspect(staged, distribution, sha256_file(staged), uploaded=path.stat().st_mtime)
                outcome = admission.admit(store, catalogue, actor, candidate, destination)
            imported.created += outcome == "created"
            imported.same += outcome == "same"
        except RefusalError as error:
            if error.status == 507:
                raise
            imported.refused.append(f"{path.name}: {error.cause}")
    tick(len(paths), len(paths), "")
    return imported


def _distributions(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name.endswith((".whl", ".tar.gz", ".zip", ".egg", ".tgz", ".tar.bz2")):
            yield path


def _copy(store: Store, source: Path, staged: Path) -> None:
    with disk_errors(store.root), source.open("rb") as reading, staged.open("xb") as writing:
        shutil.copyfileobj(reading, writing, CHUNK)
        flush(writing)
