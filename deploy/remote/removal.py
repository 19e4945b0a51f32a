"""Removes folders in which processes may still write."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0
"Seconds for which a process that was told to end may still write to the folder."


def size_of(path: Path) -> int:
    """Bytes of the files below a path. Files that others remove meanwhile are not counted."""
    total = 0
    walked = () if path.is_symlink() else os.walk(path)  # without errors for folders that vanish, unlike rglob
    for place in (path, *(Path(folder, name) for folder, folders, files in walked for name in (*folders, *files))):
        with suppress(OSError):
            total += place.lstat().st_size
    return total


def remove_all(path: Path) -> None:
    """Remove a file, link or folder, even if a process that is about to end still writes to it. Raises OSError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if path.is_symlink() or path.is_file():
                path.unlink(missing_ok=True)
            elif path.is_dir():
                shutil.rmtree(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
