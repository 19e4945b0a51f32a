"""Directories that appear whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from gracefarm import files


def test_a_directory_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be tested here; the order of the calls can."""
    seen = []

    def flush(path: Path) -> None:
        seen.append(([entry.name for entry in path.iterdir()], (tmp_path / "whole").exists()))

    monkeypatch.setattr(files, "flush", flush)
    with files.atomic_directory(tmp_path / "whole") as folder:
        (folder / "file").write_text("bytes")
    assert seen == [(["file"], False)]
    assert (tmp_path / "whole" / "file").read_text() == "bytes"


def test_what_cannot_be_flushed_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "flush", refuse)
    with pytest.raises(OSError, match="Input/output"), files.atomic_directory(tmp_path / "whole"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_flush_is_the_kernels(tmp_path: Path) -> None:
    files.flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.flush(tmp_path / "absent")
