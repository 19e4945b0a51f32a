"""Settings of this machine: environment variables GRACEFARM_*, then settings.toml, then the settings of pip, uv and apt."""

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
BUILDER_KEYS = (
    *("project", "debian_mirror", "mirrors", "memory", "jobs"),
    *("compiler_cache", "device_store", "shared_cache", "shared_cache_keys"),
)
"Keys of settings.toml for the builder (builder.planning.settings). Other programs ignore them."

# A relative path would name another folder for each working directory.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class SharedSettings(BaseModel):
    """Properties of this machine that every program requires; builder.planning.settings has those of the builder.

    Every field can be set as GRACEFARM_<NAME> or in settings.toml (`builder doctor` prints its path).
    """

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    home: AbsolutePath = Field(default_factory=lambda: user_cache_path("gracefarm"))
    "Folder of sources, roots, environments, builds, records and the index"
    python_index: str | None = None
    "Simple API for sdists and wheels. Default: UV_DEFAULT_INDEX, UV_INDEX_URL, pip's configuration, the Python Package Index"

    @cached_property
    def index_url(self) -> str | None:
        """The Python index to use, or None for the default of the client (the Python Package Index)."""
        return self.python_index or _uv_index() or _pip_index()


S = TypeVar("S", bound=SharedSettings)


def config_path() -> Path:
    """Folder of settings.toml."""
    return Path(os.environ.get("GRACEFARM_SETTINGS", user_config_path("gracefarm") / "settings.toml"))


def load() -> SharedSettings:
    """Settings of this process; see `read`."""
    return read(SharedSettings)


def read(kind: type[S]) -> S:
    """Read the settings of this process, for a program's settings class.

    Raises:
        ConfigError: settings.toml is not TOML, a key is unknown, or a value is invalid; the error names file and key.
    """
    path = config_path()
    known = (*SharedSettings.model_fields, *BUILDER_KEYS)
    values: dict[str, object] = {}
    if path.is_file():
        try:
            values = tomllib.loads(tables.read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}", remedy="correct or remove the file") from error
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
            f"setting {key!r}: {tables.message(first)}",
            remedy=f"correct the variable {PREFIX}{key.partition('.')[0].upper()}, or the setting in {path}",
        ) from error


def _uv_index() -> str | None:
    """The default index in uv's environment."""
    return os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")


def _pip_index() -> str | None:
    """The index-url of pip's configuration (files and environment)."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
