"""Settings of this machine: environment variables GRACEFARM_*, then settings.toml, then what pip, uv and apt are told."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeVar

from platformdirs import user_cache_path, user_config_path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gracefarm import tables
from gracefarm.errors import ConfigError

PREFIX = "GRACEFARM_"
BUILDER_KEYS = ("project", "debian_mirror", "mirrors", "memory", "jobs", "compiler_cache")
"What settings.toml may tell the builder alone (builder.planning.settings): no other program reads it, or refuses it."

# A relative one would be another place for each program that is started elsewhere.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class SharedSettings(BaseModel):
    """What differs between machines, as far as every program has to know it; builder.planning.settings has the builder's.

    Every field can be set as GRACEFARM_<NAME> or in settings.toml (`builder doctor` prints its place).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    home: AbsolutePath = Field(default_factory=lambda: user_cache_path("gracefarm"))
    "Where sources, roots, environments, builds, records and the index are kept."
    python_index: str | None = None
    "Simple API to fetch sdists and wheels from; unset: uv's, then pip's configuration, then their default."

    @cached_property
    def index_url(self) -> str | None:
        """The Python index to use, or None for the client's own default (the Python Package Index)."""
        return self.python_index or _uv_index() or _pip_index()


S = TypeVar("S", bound=SharedSettings)


def config_path() -> Path:
    """Where settings.toml is looked for."""
    return Path(os.environ.get("GRACEFARM_SETTINGS", user_config_path("gracefarm") / "settings.toml"))


def load() -> SharedSettings:
    """Settings of this process; see `read`."""
    return read(SharedSettings)


def read(kind: type[S]) -> S:
    """Settings of this process, of a program's own kind.

    Raises:
        ConfigError: settings.toml is not TOML, no program knows a key, or a value is not known; names file and key.
    """
    path = config_path()
    known = (*SharedSettings.model_fields, *BUILDER_KEYS)
    values: dict[str, object] = {}
    if path.is_file():
        try:
            values = tomllib.loads(tables.read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}", remedy="mend or remove the file") from error
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown setting {key!r}", remedy=tables.nearest(key, known, "known settings"))
    for name in kind.model_fields:
        if text := os.environ.get(PREFIX + name.upper()):
            values[name] = text
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"setting {key!r}: {first['msg']}",
            remedy=f"known settings: {', '.join(known)} (in {path} or as {PREFIX}NAME)",
        ) from error


def _uv_index() -> str | None:
    """What uv's environment names as its default index."""
    return os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")


def _pip_index() -> str | None:
    """What pip's configuration (files and environment) names as index-url."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
