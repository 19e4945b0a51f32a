"""`bench/gpu.sh`, as far as a machine without a GPU runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY


def test_setup_takes_repositories_along_as_it_takes_files(tmp_path: Path) -> None:
    # A recipe whose source is a git repository has nothing in the store.
    for part in ("store/sha256/00/file", "git/config"):
        place = tmp_path / "carried/home" / part
        place.parent.mkdir(parents=True)
        place.write_text(part)
    variables = {"CARRIED": str(tmp_path / "carried"), "WORK": str(tmp_path / "work"), "PYTHON": "false"}
    ended = subprocess.run([REPOSITORY / "bench/gpu.sh", "setup"], env=os.environ | variables, check=False)
    assert ended.returncode != 0, "`false` is not a Python: it ends after the copy"
    assert (tmp_path / "work/home/store/sha256/00/file").read_text() == "store/sha256/00/file"
    assert (tmp_path / "work/home/git/config").read_text() == "git/config"
