"""Options of an engine's server, as a table. The command line of a plan is checked against it.

tools/engine_options.py generates the tables from the engines' wheels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gracefarm.errors import ConfigError

OptionValue = str | int | float | bool | None | list[Any]
OptionKind = Literal["str", "int", "float", "bool", "json", "pairs"]


class Option(BaseModel):
    """One option. The kind `pairs` is a comma-separated list of KEY=INT.

    The action is one of argparse, or `boolean` for an option with the value `true` or `false`, or `switch` for --x and --no-x.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: tuple[str, ...]
    kind: OptionKind = "str"
    default: OptionValue = None
    choices: tuple[OptionValue, ...] | None = None
    nargs: str | int | None = None
    action: Literal["store", "store_true", "append", "boolean", "pairs", "switch"] = "store"
    nullable: bool = False
    "`None` is an allowed value."

    @property
    def name(self) -> str:
        """The long name without leading dashes."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.flags[0]).lstrip("-")


class OptionTable(BaseModel):
    """All options of `run` or `serve` of an engine's version, and the requirements in its METADATA."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: str
    version: str
    wheel: str
    sha256: str
    requires_python: str
    requires: tuple[str, ...]
    dotted: bool = False
    "The parser accepts --x.key, which sets one entry of a JSON option."
    options: tuple[Option, ...]

    def find(self, flag: str) -> Option | None:
        """Find an option by any of its spellings. Underscores count as dashes, as in the engine's parser."""
        whole, dot, _ = flag.partition(".") if self.dotted else (flag, "", "")
        wanted = "--" + whole[2:].replace("_", "-") if flag.startswith("--") else flag
        option = next((option for option in self.options if wanted in option.flags), None)
        if option and dot:
            json_ = option.kind in ("str", "json") and not option.choices
            return option.model_copy(update={"kind": "str", "nargs": None}) if json_ else None
        return option

    def check(self, arguments: Sequence[str]) -> None:
        """Check that every option exists and its value is allowed.

        Raises:
            ConfigError: for the first option that is wrong.
        """
        rest = list(arguments)
        while rest:
            flag, separator, value = rest.pop(0).partition("=")
            option = self.find(flag) if flag.startswith("-") else None
            if option is None:
                raise ConfigError(
                    f"{self.distribution} {self.version} has no option {flag}",
                    remedy="correct [engine_options]; the engine's --help lists all options",
                )
            values = [value] if separator else list(_values(option, rest))
            del rest[: 0 if separator else len(values)]
            _check_count(option, values)
            for text in values:
                _check_value(option, text)


def _values(option: Option, rest: Sequence[str]) -> Iterator[str]:
    if option.action in ("store_true", "switch"):
        return
    most = {None: 1, "?": 1}.get(option.nargs, len(rest)) if not isinstance(option.nargs, int) else option.nargs
    for word in rest[:most]:
        if word.startswith("-") and not _number(word):
            return
        yield word


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_count(option: Option, values: Sequence[str]) -> None:
    bare = option.action in ("store_true", "switch")
    if bare and values:
        raise ConfigError(
            f"--{option.name} does not accept a value",
            remedy=f"set {option.name} = true in [engine_options], or remove the option",
        )
    if not bare and not values and option.nargs not in ("?", "*"):
        raise ConfigError(f"--{option.name} requires a value", remedy=f"give {option.name} a value in [engine_options]")


def _check_value(option: Option, text: str) -> None:
    if option.nullable and text in ("", "None"):
        return
    try:
        value = _parse(option, text)
    except ValueError as error:
        raise ConfigError(
            f"--{option.name} {text}: the value is not {_article(option.kind)}", remedy="correct the value in [engine_options]"
        ) from error
    if option.choices is not None and value not in option.choices:
        known = ", ".join(str(choice) for choice in option.choices if choice is not None)
        raise ConfigError(f"--{option.name} {text}: the value is not allowed", remedy=f"use one of {known}")


def _article(kind: OptionKind) -> str:
    return {"int": "an integer", "float": "a number", "bool": "true or false", "json": "JSON", "pairs": "KEY=INTEGER,…"}.get(
        kind, f"a {kind}"
    )


def _parse(option: Option, text: str) -> OptionValue:
    if option.action == "boolean" or option.kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if option.kind == "int":
        return int(text)
    if option.kind == "float":
        return float(text)
    if option.kind == "json":
        json.loads(text)
    if option.kind == "pairs":
        for pair in text.split(","):
            int(pair.partition("=")[2])
    return text


@cache
def table(name: str) -> OptionTable:
    """The table of an engine and version, such as `aphrodite-0.6.4.post1`."""
    return OptionTable.model_validate_json((resources.files("deploy") / "data" / f"{name}-options.json").read_bytes())
