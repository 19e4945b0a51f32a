"""Settings of this machine for the builder; they do not enter a build id."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from gracefarm.errors import ConfigError
from gracefarm.settings import PREFIX, AbsolutePath, SharedSettings, read
from gracefarm.tables import Size

PARTS = ("recipes", "stacks", "interpreters", "sets")
"The folders of a project."
PACKAGED = Path(__file__).resolve().parents[1] / "project"
"The project in an installed wheel of gracefarm."


def _mirrors(value: object) -> object:
    """OLD=NEW pairs of the environment variable, as a table like that of settings.toml.

    Raises:
        ConfigError: an entry is not a pair.
    """
    if not isinstance(value, str):
        return value
    mirrors = {}
    for pair in value.split():
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ConfigError(
                f"{PREFIX}MIRRORS: {pair!r} does not have the form OLD=NEW",
                remedy="give pairs of URL prefixes: OLD=NEW OLD=NEW",
            )
        mirrors[old] = new
    return mirrors


def _places(value: object) -> object:
    return value.split() if isinstance(value, str) else value


class Settings(SharedSettings):
    """Settings of the builder; an unknown key in settings.toml is an error."""

    model_config = ConfigDict(extra="forbid")

    project: AbsolutePath = Field(default_factory=lambda: find_project())
    "The folder with recipes/, stacks/ and sets/; unset: see `find_project`"
    debian_mirror: str | None = None
    "Debian mirror for the root's packages; unset: apt's sources on Debian, mmdebstrap's default elsewhere"
    mirrors: Annotated[dict[str, str], BeforeValidator(_mirrors)] = Field(default_factory=dict)
    "URL prefixes and their replacements, for git and files; the longest applies; as a variable: OLD=NEW …"
    memory: Size | None = None
    "Limit of a build's memory, such as 20GiB; unset: nine tenths of the free memory of this machine or its cgroup"
    jobs: int | None = None
    "Limit of parallel compilations; unset: from cores and memory"
    compiler_cache: str = "5GiB"
    "Size of each recipe's compiler cache, or `off`"
    device_store: str = "5GiB"
    "Size of each recipe's store of device code, or `off`"

    shared_cache: str | None = None
    "URL of an index with a compiler cache that several machines share, as http://index:8080/"
    shared_cache_keys: Annotated[tuple[AbsolutePath, ...], BeforeValidator(_places)] = ()
    "Public keys (PEM) of other machines whose cache entries are trusted; in the environment: PATH PATH …"

    def redirect(self, url: str) -> str:
        """`url` with the longest matching prefix of `mirrors` replaced."""
        for prefix in sorted(self.mirrors, key=len, reverse=True):
            if url.startswith(prefix):
                return self.mirrors[prefix] + url[len(prefix) :]
        return url


def find_project() -> Path:
    """The nearest folder with recipes/ and stacks/: the working directory or a parent, else the project of this program."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "recipes").is_dir() and (folder / "stacks").is_dir():
            return folder
    return given_project()


def given_project() -> Path:
    """The project of this program: the checkout that it runs from, else the project in its wheel."""
    return PACKAGED if PACKAGED.is_dir() else Path(__file__).resolve().parents[2]


def load() -> Settings:
    """Settings of this process.

    Raises:
        ConfigError: see `read`; or the project folder has no recipes/.
    """
    settings = read(Settings)
    if not (settings.project / "recipes").is_dir():
        raise ConfigError(
            f"setting 'project': {settings.project} has no folder recipes/",
            remedy=f"correct {PREFIX}PROJECT, or create a project folder with `builder init DIR`",
        )
    return settings
