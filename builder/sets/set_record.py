"""The record of a built set: its wheels, and the result of their common test."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from builder.planning.settings import Settings
from builder.smoke import SmokeResult
from gracefarm.tables import Table


class Locked(Table):
    """One wheel that the set installs."""

    name: str
    "Name of the package"
    version: str
    "Version of the package"
    filename: str
    "File name of the wheel"
    sha256: str
    "sha256 of the wheel"
    own: bool = False
    "`true`: a recipe of the set built the wheel"
    index: str = ""
    (
        "URL of the index that has the wheel, if this is not the Python index. Empty: the wheel is on the Python index, or a "
        "recipe of the set built it"
    )


class Command(Table):
    """A command of the test. Each command succeeded: if one fails, `builder set build` writes no record."""

    command: tuple[str, ...]
    "The command"
    wall_s: float
    "Duration in seconds"
    output: str
    "Output of the command. The record has at most the first 1 MiB"


class Tested(Table):
    """Result of the test of all wheels together."""

    smoke: SmokeResult
    "Result of the imports and of smoke.py"
    wall_s: float
    "Duration in seconds"
    commands: tuple[Command, ...] = ()
    "Results of the commands in set.toml"


class SetRecord(Table):
    """set.json."""

    format: Literal[1] = 1
    "Version of the format of this document"
    set_id: str
    "Set id: the digest of all inputs of the set"
    name: str
    "Name of the set"
    stack: str
    "Name of the stack"
    target: str
    "Architecture of the wheels"
    builds: dict[str, str]
    "Build id of each wheel that a recipe of the set built. The key is the name of the recipe"
    wheels: tuple[Locked, ...]
    "All wheels that the set installs, including those from the Python index"
    tested: Tested
    "Result of the test of all wheels together"
    finished: str
    "Time at which the test ended (UTC, ISO 8601)"


def folder(settings: Settings, set_id: str) -> Path:
    """Folder of one set: set.json, requirements.lock, pylock.toml, together/log.txt."""
    return settings.home / "sets" / set_id


def read(settings: Settings, set_id: str) -> SetRecord | None:
    """The record of a set that was built and tested on this machine; records of other formats are ignored."""
    try:
        return SetRecord.model_validate_json((folder(settings, set_id) / "set.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
