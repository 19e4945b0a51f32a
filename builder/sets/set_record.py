"""The document about a built set: which wheels, and what worked when they were in one environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from builder.planning.settings import Settings
from builder.smoke import SmokeResult
from gracefarm.tables import Table


class Locked(Table):
    """One wheel of the lock."""

    name: str
    "Name of the distribution."
    version: str
    "Version of the distribution."
    filename: str
    "File name of the wheel."
    sha256: str
    "sha256 of the wheel."
    own: bool = Field(default=False, description="Built by this farm")
    index: str = Field(default="", description="Address of the wheel's index; empty: the farm's index, or the Python index")


class Command(Table):
    """A program of the environment that ended well."""

    command: tuple[str, ...]
    "The command."
    wall_s: float
    "Duration in seconds."
    output: str
    "End of its output."


class Tested(Table):
    """What worked together."""

    smoke: SmokeResult
    "Result of the imports and of smoke.py."
    wall_s: float
    "Duration in seconds."
    commands: tuple[Command, ...] = ()
    "Commands that succeeded."


class SetRecord(Table):
    """set.json."""

    format: Literal[1] = 1
    "Version of the format."
    set_id: str
    "Digest of all inputs of the set."
    name: str
    "Name of the set."
    stack: str
    "Name of the stack."
    target: str
    "Architecture of the wheels."
    builds: dict[str, str] = Field(description="Recipe to build id")
    wheels: tuple[Locked, ...]
    "All wheels of the set's environment."
    tested: Tested
    "Result of the common test."
    finished: str = Field(description="UTC, ISO 8601")


def folder(settings: Settings, set_id: str) -> Path:
    """Everything about one set: set.json, requirements.lock, pylock.toml, together/log.txt."""
    return settings.home / "sets" / set_id


def read(settings: Settings, set_id: str) -> SetRecord | None:
    """The record of a set that was built and tested here; one of another format counts as none."""
    try:
        return SetRecord.model_validate_json((folder(settings, set_id) / "set.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
