"""The record of a built set: its wheels, and the result of their common test."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from builder.planning.settings import Settings
from builder.smoke import SmokeResult
from gracefarm.tables import Table


class Locked(Table):
    """One wheel of the lock."""

    name: str = Field(description="Name of the distribution")
    version: str = Field(description="Version of the distribution")
    filename: str = Field(description="File name of the wheel")
    sha256: str = Field(description="sha256 of the wheel")
    own: bool = Field(default=False, description="Built by this farm")
    index: str = Field(default="", description="URL of the wheel's index; empty: the farm's index, or the Python index")


class Command(Table):
    """A command that succeeded."""

    command: tuple[str, ...] = Field(description="The command")
    wall_s: float = Field(description="Duration in seconds")
    output: str = Field(description="End of its output")


class Tested(Table):
    """The result of the common test."""

    smoke: SmokeResult = Field(description="Result of the imports and of smoke.py")
    wall_s: float = Field(description="Duration in seconds")
    commands: tuple[Command, ...] = Field(default=(), description="Commands that succeeded")


class SetRecord(Table):
    """set.json."""

    format: Literal[1] = Field(default=1, description="Version of the format")
    set_id: str = Field(description="Digest of all inputs of the set")
    name: str = Field(description="Name of the set")
    stack: str = Field(description="Name of the stack")
    target: str = Field(description="Architecture of the wheels")
    builds: dict[str, str] = Field(description="Build ids by recipe")
    wheels: tuple[Locked, ...] = Field(description="All wheels of the set's environment")
    tested: Tested = Field(description="Result of the common test")
    finished: str = Field(description="UTC, ISO 8601")


def folder(settings: Settings, set_id: str) -> Path:
    """Folder of one set: set.json, requirements.lock, pylock.toml, together/log.txt."""
    return settings.home / "sets" / set_id


def read(settings: Settings, set_id: str) -> SetRecord | None:
    """The record of a set that was built and tested on this machine; records of other formats are ignored."""
    try:
        return SetRecord.model_validate_json((folder(settings, set_id) / "set.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
