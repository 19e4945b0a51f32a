"""Options of an engine's server as a table of facts; what a plan says on the command line is checked against it.

    pip download --no-deps --platform manylinux1_x86_64 --python-version 3.8 aphrodite-engine==0.6.4.post1
    python -m deploy.planning.options aphrodite_engine-*.whl > deploy/data/aphrodite-0.6.4.post1-options.json
    python -m deploy.planning.options vllm-*.whl > deploy/data/vllm-0.26.0-options.json       # the wheel of set gh200-cu130

writes the table from a wheel, whose Python is read as syntax (ast) and never run: names, types, defaults and choices, no help
text and no code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.parser import Parser
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gracefarm.errors import ConfigError

SOURCES = {"aphrodite/endpoints/openai/args.py": "make_arg_parser", "aphrodite/engine/args_tools.py": "add_cli_args"}
"The server's options, then its engine's: file and function."
ENUMS = ("aphrodite/common/config.py", "aphrodite/transformers_utils/config.py")
"Where the enumerations are that args_tools.py names as choices."

Value = str | int | float | bool | None | list[Any]
Kind = Literal["str", "int", "float", "bool", "json", "pairs"]


class Option(BaseModel):
    """One option. `kind` pairs: KEY=INT, comma-separated; action: argparse's, `boolean` for `true`/`false` as a word, or
    `switch` for --x and --no-x."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: tuple[str, ...]
    kind: Kind = "str"
    default: Value = None
    choices: tuple[Value, ...] | None = None
    nargs: str | int | None = None
    action: Literal["store", "store_true", "append", "boolean", "pairs", "switch"] = "store"
    nullable: bool = False
    "`None` is a value too."

    @property
    def name(self) -> str:
        """The long name without dashes."""
        return next((one for one in self.flags if one.startswith("--")), self.flags[0]).lstrip("-")


class Table(BaseModel):
    """All options of one version of an engine's `run` or `serve`, and what its METADATA requires."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: str
    version: str
    wheel: str
    sha256: str
    requires_python: str
    requires: tuple[str, ...]
    dotted: bool = False
    "--x.key sets one entry of a JSON option."
    options: tuple[Option, ...]

    def find(self, flag: str) -> Option | None:
        """By any of its spellings; underscores are dashes, as the engine's parser has it."""
        whole, dot, _ = flag.partition(".") if self.dotted else (flag, "", "")
        wanted = "--" + whole[2:].replace("_", "-") if flag.startswith("--") else flag
        found = next((one for one in self.options if wanted in one.flags), None)
        if found and dot:
            json_ = found.kind in ("str", "json") and not found.choices
            return found.model_copy(update={"kind": "str", "nargs": None}) if json_ else None
        return found

    def check(self, arguments: Sequence[str]) -> None:
        """Every option is there and takes its value.

        Raises:
            ConfigError: names the first that does not.
        """
        rest = list(arguments)
        while rest:
            flag, separator, value = rest.pop(0).partition("=")
            option = self.find(flag) if flag.startswith("-") else None
            if option is None:
                raise ConfigError(
                    f"{self.distribution} {self.version} has no option {flag}",
                    remedy="[engine_options] takes what its --help lists",
                )
            values = [value] if separator else list(_values(option, rest))
            del rest[: 0 if separator else len(values)]
            _check_count(option, values)
            for one in values:
                _check_value(option, one)


def _values(option: Option, rest: Sequence[str]) -> Iterator[str]:
    if option.action in ("store_true", "switch"):
        return
    most = {None: 1, "?": 1}.get(option.nargs, len(rest)) if not isinstance(option.nargs, int) else option.nargs
    for one in rest[:most]:
        if one.startswith("-") and not _number(one):
            return
        yield one


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_count(option: Option, values: Sequence[str]) -> None:
    bare = option.action in ("store_true", "switch")
    if bare and values:
        raise ConfigError(f"--{option.name} takes no value", remedy="say true or leave it out")
    if not bare and not values and option.nargs not in ("?", "*"):
        raise ConfigError(f"--{option.name} needs a value", remedy="give one")


def _check_value(option: Option, text: str) -> None:
    if option.nullable and text in ("", "None"):
        return
    try:
        value = _parse(option, text)
    except ValueError as error:
        raise ConfigError(f"--{option.name} {text}: not {_article(option.kind)}", remedy="mend the value") from error
    if option.choices is not None and value not in option.choices:
        known = ", ".join(str(one) for one in option.choices if one is not None)
        raise ConfigError(f"--{option.name} {text} is none of its values", remedy=f"it takes {known}")


def _article(kind: Kind) -> str:
    return {"int": "an integer", "float": "a number", "bool": "true or false", "json": "JSON", "pairs": "KEY=INTEGER,…"}.get(
        kind, f"a {kind}"
    )


def _parse(option: Option, text: str) -> Value:
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
def table(name: str) -> Table:
    """The committed table of an engine and version, as `aphrodite-0.6.4.post1`."""
    return Table.model_validate_json((resources.files("deploy") / "data" / f"{name}-options.json").read_bytes())


# from a wheel


def read_wheel(path: Path) -> Table:
    """The table of a wheel's server.

    Raises:
        ConfigError: the wheel's code has another shape than the one that this was written for.
    """
    with zipfile.ZipFile(path) as wheel:
        metadata = Parser().parsestr(
            wheel.read(next(one for one in wheel.namelist() if one.endswith(".dist-info/METADATA"))).decode()
        )
        vllm = metadata["Name"] == "vllm"
        if vllm:
            from deploy.planning import vllm_options  # which needs Option

            options = list(vllm_options.read(wheel))
        else:
            options = _of_aphrodite(wheel)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return Table(
        distribution=metadata["Name"],
        version=metadata["Version"],
        wheel=path.name,
        sha256=sha256,
        requires_python=metadata["Requires-Python"],
        requires=tuple(metadata.get_all("Requires-Dist", [])),
        dotted=vllm,
        options=tuple(options),
    )


def _of_aphrodite(wheel: zipfile.ZipFile) -> list[Option]:
    trees = {name: ast.parse(wheel.read(name)) for name in (*SOURCES, *ENUMS, "aphrodite/quantization/__init__.py")}
    names = _known_names(trees)
    return [one for source, function in SOURCES.items() for one in _options(trees[source], function, names)]


def _known_names(trees: Mapping[str, ast.Module]) -> dict[str, Value]:
    """What defaults and choices refer to: fields of the argument classes, members of enumerations, keys of the methods."""
    names: dict[str, Value] = {"ssl.CERT_NONE": 0}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                        names.setdefault(f"{node.name}.{item.target.id}", _literal(item.value))
                if any(ast.unparse(base) == "enum.Enum" for base in node.bases):
                    names[node.name] = [_literal(item.value) for item in node.body if isinstance(item, ast.Assign)]
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]).isupper():
                names.setdefault(ast.unparse(node.targets[0]), [_literal(key) for key in node.value.keys if key])
    return names


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _options(tree: ast.Module, function: str, names: Mapping[str, Value]) -> Iterator[Option]:
    """The add_argument calls of every function of that name, in order."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.FunctionDef) and node.name == function):
            continue
        calls = [
            one
            for one in ast.walk(node)
            if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "add_argument"
        ]
        for call in sorted(calls, key=lambda one: one.lineno):
            yield _option(call, names)


def _option(call: ast.Call, names: Mapping[str, Value]) -> Option:
    words = {one.arg: one.value for one in call.keywords if one.arg}
    action = _action(words.get("action"))
    return Option(
        flags=tuple(_literal(one) for one in call.args),
        kind="bool" if action in ("store_true", "boolean") else _kind(words.get("type")),
        default=False if action == "store_true" and "default" not in words else _value(words.get("default"), names),
        choices=tuple(_choices(words["choices"], names)) if "choices" in words else None,
        nargs=_literal(words["nargs"]) if "nargs" in words else None,
        action=action,
    )


def _action(node: ast.expr | None) -> Any:
    text = "store" if node is None else str(_literal(node))
    return {"StoreBoolean": "boolean", "LoRAParserAction": "pairs", "PromptAdapterParserAction": "pairs"}.get(text, text)


def _kind(node: ast.expr | None) -> Any:
    text = "str" if node is None else ast.unparse(node)
    return {"json.loads": "json", "nullable_kvs": "pairs"}.get(text, text)


def _value(node: ast.expr | None, names: Mapping[str, Value]) -> Value:
    if node is None:
        return None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "int":
        return _value(node.args[0], names)
    text = ast.unparse(node)
    for owner in ("", "Async"):  # AsyncEngineArgs inherits the fields of EngineArgs
        if text.removeprefix(owner) in names:
            return names[text.removeprefix(owner)]
    try:
        value: Value = ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(
            f"line {node.lineno}: default {text} is not understood", remedy="extend deploy/planning/options.py"
        ) from error
    return value


def _choices(node: ast.expr, names: Mapping[str, Value]) -> Iterator[Value]:
    """A list of literals, `[*NAMES, None]`, or `[one.value for one in Enumeration]`."""
    if isinstance(node, ast.ListComp):
        members = names[ast.unparse(node.generators[0].iter)]
        assert isinstance(members, list)
        yield from members
        return
    assert isinstance(node, ast.List)
    for one in node.elts:
        if isinstance(one, ast.Starred):
            members = names[ast.unparse(one.value)]
            assert isinstance(members, list)
            yield from members
        else:
            yield ast.literal_eval(one)


def render(table_: Table) -> str:
    """As it is committed: one option a line."""
    head = table_.model_dump(mode="json", exclude={"options"}, exclude_defaults=True)
    rows = [json.dumps(one.model_dump(mode="json", exclude_defaults=True)) for one in table_.options]
    return json.dumps(head, indent=1)[:-2] + ',\n "options": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


if __name__ == "__main__":
    from deploy.planning import options as own  # vllm_options makes Options of that module, not of __main__

    sys.stdout.write(own.render(own.read_wheel(Path(sys.argv[1]))))
