"""Settings of this machine: environment variables GRACEFARM_*, then settings.toml, then what pip, uv and apt are told."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated

from platformdirs import user_cache_path, user_config_path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.tables import Size

PREFIX = "GRACEFARM_"
PARTS = ("recipes", "stacks", "sets")
"The folders of a project."
PACKAGED = Path(__file__).resolve().parent.parent / "builder" / "project"
"The project that an installed wheel carries."


# A relative one would be another place for each program that is started elsewhere.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Settings(BaseModel):
    """What differs between machines. Nothing here enters a build id.

    Every field can be set as GRACEFARM_<NAME> or in settings.toml (`builder doctor` prints its place).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: AbsolutePath = Field(default_factory=lambda: user_cache_path("gracefarm"))
    "Where sources, roots, environments, builds and records are kept."
    project: AbsolutePath = Field(default_factory=lambda: find_project())
    "The folder that holds recipes/, stacks/ and sets/; unset: see `find_project`."
    python_index: str | None = None
    "Simple API to fetch sdists and wheels from; unset: uv's, then pip's configuration, then their default."
    debian_mirror: str | None = None
    "Debian mirror for the root's packages; unset: apt's sources on Debian, mmdebstrap's default elsewhere."
    mirrors: dict[str, str] = Field(default_factory=dict)
    "URL prefix to replacement, for git repositories and files; the longest wins. In the environment: OLD=NEW OLD=NEW …"
    memory: Size | None = None
    "Bound on a build's memory, as 20GiB; unset: what this machine or its cgroup has free."
    jobs: int | None = None
    "Bound on parallel compilations; unset: from cores and memory."
    compiler_cache: str = "5GiB"
    "Size of each recipe's compiler cache, or `off`."

    @cached_property
    def index_url(self) -> str | None:
        """The Python index to use, or None for the client's own default (the Python Package Index)."""
        return self.python_index or _uv_index() or _pip_index()

    def redirect(self, url: str) -> str:
        """`url` with the longest matching prefix of `mirrors` replaced."""
        for prefix in sorted(self.mirrors, key=len, reverse=True):
            if url.startswith(prefix):
                return self.mirrors[prefix] + url[len(prefix) :]
        return url


def find_project() -> Path:
    """The nearest folder with recipes/ and stacks/: the working directory or above, else what this program came with."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "recipes").is_dir() and (folder / "stacks").is_dir():
            return folder
    return given_project()


def given_project() -> Path:
    """The recipes, stacks and sets that this program came with: of the checkout that it runs from, else of its wheel."""
    checkout = Path(__file__).resolve().parent.parent
    return PACKAGED if PACKAGED.is_dir() else checkout


def config_path() -> Path:
    """Where settings.toml is looked for."""
    return Path(os.environ.get("GRACEFARM_SETTINGS", user_config_path("gracefarm") / "settings.toml"))


def load() -> Settings:
    """Settings of this process.

    Raises:
        ConfigError: settings.toml is not TOML, or a key or value is not known; names file and key.
    """
    path = config_path()
    values: dict[str, object] = {}
    if path.is_file():
        try:
            values = tomllib.loads(tables.read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: {error}", remedy="mend or remove the file") from error
    for name in Settings.model_fields:
        text = os.environ.get(PREFIX + name.upper())
        if text:
            values[name] = _mirrors(text) if name == "mirrors" else text
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"setting {key!r}: {first['msg']}",
            remedy=f"known settings: {', '.join(Settings.model_fields)} (in {path} or as {PREFIX}NAME)",
        ) from error


def _mirrors(text: str) -> dict[str, str]:
    """OLD=NEW pairs.

    Raises:
        ConfigError: one is no pair.
    """
    found = {}
    for pair in text.split():
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ConfigError(
                f"{PREFIX}MIRRORS: {pair!r} is not OLD=NEW", remedy="give pairs of URL prefixes: OLD=NEW OLD=NEW"
            )
        found[old] = new
    return found


def _uv_index() -> str | None:
    """What uv's environment names as its default index."""
    return os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")


def _pip_index() -> str | None:
    """What pip's configuration (files and environment) names as index-url."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
