"""Secrets that this machine creates once and keeps: the engine's API key and Ray's token."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gracefarm.files import atomic_write


def kept_secret(path: Path, fresh: str) -> str:
    """Read a secret from the file. If the file does not exist, create it with `fresh` and mode 0600."""
    with suppress(FileNotFoundError):
        return path.read_text().strip()
    atomic_write(path, fresh + "\n")
    path.chmod(0o600)
    return fresh
