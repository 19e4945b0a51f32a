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
    version: str
    filename: str
    sha256: str
    own: bool = Field(default=False, description="Built by this farm")
    index: str = Field(default="", description="The index of its own that has it; empty: the farm's, or the Python index")


class Command(Table):
    """A program of the environment that ended well."""

    command: tuple[str, ...]
    wall_s: float
    output: str


class Tested(Table):
    """What worked together."""

    smoke: SmokeResult
    wall_s: float
    commands: tuple[Command, ...] = ()


class SetRecord(Table):
    """set.json."""

    format: Literal[1] = 1
    set_id: str
    name: str
    stack: str
    target: str
    builds: dict[str, str] = Field(description="Recipe to build id")
    wheels: tuple[Locked, ...]
    tested: Tested
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
