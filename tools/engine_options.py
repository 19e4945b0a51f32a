"""Write the table of an engine's options from its wheel, for deploy/data.

    pip download --no-deps --platform manylinux1_x86_64 --python-version 3.8 aphrodite-engine==0.6.4.post1
    python tools/engine_options.py aphrodite_engine-*.whl > deploy/data/aphrodite-0.6.4.post1-options.json
    python tools/engine_options.py vllm-0.26.0-*.whl > deploy/data/vllm-0.26.0-options.json    # the wheel of set gh200-cu130

The program parses the wheel's Python files (ast), but does not run them. The table has names, types, defaults and choices of
the options. It has no help texts and no code.

Most options of vllm are fields of configuration classes. vllm derives argparse's arguments from their annotations. If a type
is computed, or comes from a file that is not read, the table permits any text, since it must permit all accepted values.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import Parser
from pathlib import Path
from typing import Any

from deploy.planning.options import Option, OptionKind, OptionTable, OptionValue
from gracefarm.errors import ConfigError


def read_wheel(path: Path) -> OptionTable:
    """The table of a wheel's server.

    Raises:
        ConfigError: the structure of the wheel's code is not supported.
    """
    with zipfile.ZipFile(path) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(member).decode())
        vllm = metadata["Name"] == "vllm"
        options = tuple(vllm_options(wheel) if vllm else aphrodite_options(wheel))
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return OptionTable(
        distribution=metadata["Name"],
        version=metadata["Version"],
        wheel=path.name,
        sha256=sha256,
        requires_python=metadata["Requires-Python"],
        requires=tuple(metadata.get_all("Requires-Dist", [])),
        dotted=vllm,
        options=options,
    )


def render(table: OptionTable) -> str:
    """The text of the committed file, with one option per line."""
    head = table.model_dump(mode="json", exclude={"options"}, exclude_defaults=True)
    rows = [json.dumps(option.model_dump(mode="json", exclude_defaults=True)) for option in table.options]
    return json.dumps(head, indent=1)[:-2] + ',\n "options": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def argument_calls(function: ast.FunctionDef) -> list[ast.Call]:
    """The add_argument calls of a function, in order."""
    calls = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
    ]
    return sorted(calls, key=lambda call: call.lineno)


# aphrodite

APHRODITE_SOURCES = {"aphrodite/endpoints/openai/args.py": "make_arg_parser", "aphrodite/engine/args_tools.py": "add_cli_args"}
"File and function of the server's options, then of the engine's options."
APHRODITE_ENUMS = ("aphrodite/common/config.py", "aphrodite/transformers_utils/config.py")
"The files with the enumerations that args_tools.py uses as choices."


def aphrodite_options(wheel: zipfile.ZipFile) -> Iterator[Option]:
    """The options of `aphrodite run`."""
    files = (*APHRODITE_SOURCES, *APHRODITE_ENUMS, "aphrodite/quantization/__init__.py")
    trees = {name: ast.parse(wheel.read(name)) for name in files}
    names = _known_names(trees)
    for source, function in APHRODITE_SOURCES.items():
        for node in ast.walk(trees[source]):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                yield from (_aphrodite_option(call, names) for call in argument_calls(node))


def _known_names(trees: Mapping[str, ast.Module]) -> dict[str, OptionValue]:
    """Values of names in defaults and choices: fields of argument classes, members of enumerations, keys of the methods."""
    names: dict[str, OptionValue] = {"ssl.CERT_NONE": 0}
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


def _aphrodite_option(call: ast.Call, names: Mapping[str, OptionValue]) -> Option:
    words = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    action = _aphrodite_action(words.get("action"))
    return Option(
        flags=tuple(_literal(argument) for argument in call.args),
        kind="bool" if action in ("store_true", "boolean") else _aphrodite_kind(words.get("type")),
        default=False if action == "store_true" and "default" not in words else _aphrodite_value(words.get("default"), names),
        choices=tuple(_aphrodite_choices(words["choices"], names)) if "choices" in words else None,
        nargs=_literal(words["nargs"]) if "nargs" in words else None,
        action=action,
    )


def _aphrodite_action(node: ast.expr | None) -> Any:
    text = "store" if node is None else str(_literal(node))
    return {"StoreBoolean": "boolean", "LoRAParserAction": "pairs", "PromptAdapterParserAction": "pairs"}.get(text, text)


def _aphrodite_kind(node: ast.expr | None) -> Any:
    text = "str" if node is None else ast.unparse(node)
    return {"json.loads": "json", "nullable_kvs": "pairs"}.get(text, text)


def _aphrodite_value(node: ast.expr | None, names: Mapping[str, OptionValue]) -> OptionValue:
    if node is None:
        return None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "int":
        return _aphrodite_value(node.args[0], names)
    text = ast.unparse(node)
    for owner in ("", "Async"):  # AsyncEngineArgs inherits the fields of EngineArgs
        if text.removeprefix(owner) in names:
            return names[text.removeprefix(owner)]
    try:
        value: OptionValue = ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(
            f"line {node.lineno}: default {text} is not supported", remedy="extend tools/engine_options.py"
        ) from error
    return value


def _aphrodite_choices(node: ast.expr, names: Mapping[str, OptionValue]) -> Iterator[OptionValue]:
    """The choices in a list of literals, in `[*NAMES, None]`, or in `[member.value for member in Enumeration]`."""
    if isinstance(node, ast.ListComp):
        members = names[ast.unparse(node.generators[0].iter)]
        assert isinstance(members, list)
        yield from members
        return
    assert isinstance(node, ast.List)
    for element in node.elts:
        if isinstance(element, ast.Starred):
            members = names[ast.unparse(element.value)]
            assert isinstance(members, list)
            yield from members
        else:
            yield ast.literal_eval(element)


# vllm

SERVERS = ("vllm/entrypoints/common/cli_args.py", "vllm/entrypoints/openai/cli_args.py")
"The file with the server's options: since 0.33, and before."
ENGINE, CONFIG, PARSER = "vllm/engine/arg_utils.py", "vllm/config/", "vllm/utils/argparse_utils.py"
HUMAN_INTEGERS = (
    *("max_model_len", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_queued_tokens"),
    *("kv_cache_memory_bytes", "safetensors_prefetch_block_size"),
)
"Integers that can be written as 8k or 2G."


@dataclass(frozen=True)
class Hint:
    """A member of a union of types: its name and the content of its brackets."""

    name: str
    inside: tuple[ast.expr, ...] = ()


@dataclass(frozen=True)
class Code:
    """The classes and the aliases of types in the files that were read."""

    classes: Mapping[str, ast.ClassDef]
    aliases: Mapping[str, ast.expr]

    def hints(self, node: ast.expr) -> list[Hint]:
        """The members of a type."""
        if isinstance(node, ast.BinOp):
            return [*self.hints(node.left), *self.hints(node.right)]
        if isinstance(node, ast.Constant):
            return [Hint("None")] if node.value is None else self.hints(ast.parse(str(node.value), mode="eval").body)
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value).rpartition(".")[2]
            inside = tuple(node.slice.elts) if isinstance(node.slice, ast.Tuple) else (node.slice,)
            if name in ("Annotated", "Optional", "Union"):
                members = inside[:1] if name == "Annotated" else inside
                hints = [hint for member in members for hint in self.hints(member)]
                return [*hints, *([Hint("None")] if name == "Optional" else [])]
            return [Hint(name, inside)]
        name = ast.unparse(node).rpartition(".")[2]
        return self.hints(self.aliases[name]) if name in self.aliases else [Hint(name)]

    def values(self, literal: Hint) -> tuple[Any, ...] | None:
        """The values of a Literal, including nested ones; None if a value cannot be read."""
        values: list[Any] = []
        for member in literal.inside:
            if isinstance(member, ast.Constant):
                values.append(member.value)
                continue
            hints = self.hints(member)
            inner = self.values(hints[0]) if len(hints) == 1 and hints[0].name == "Literal" else None
            if inner is None:
                return None
            values += inner
        return tuple(values)

    def fields(self, name: str) -> dict[str, tuple[ast.expr, ast.expr | None]]:
        """The fields of a class and of its base classes: name to annotation and default."""
        fields: dict[str, tuple[ast.expr, ast.expr | None]] = {}
        for base in self.classes[name].bases:
            if ast.unparse(base) in self.classes:
                fields |= self.fields(ast.unparse(base))
        for node in self.classes[name].body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and "ClassVar" not in ast.unparse(node.annotation)
            ):
                fields[node.target.id] = (node.annotation, node.value)
        return fields


@dataclass
class Scope:
    """The names in one function for the arguments of a class or of a field, and the function's changes of these arguments."""

    classes: dict[str, str] = field(default_factory=dict)
    fields: dict[str, tuple[str, str]] = field(default_factory=dict)
    changes: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def place(self, node: ast.expr) -> tuple[str, str] | None:
        """Class and field of X_kwargs["field"], or of a name for it."""
        if isinstance(node, ast.Name):
            return self.fields.get(node.id)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant):
            owner = self.classes.get(node.value.id)
            return (owner, str(node.slice.value)) if owner else None
        return None

    def scan(self, function: ast.FunctionDef, classes: Mapping[str, str]) -> None:
        """Add the names and the changes of a function, in the order of its lines."""
        self.classes |= classes
        statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
        for statement in sorted(statements, key=lambda node: node.lineno):
            targets: list[ast.expr] = []
            if isinstance(statement, ast.Assign):
                targets = statement.targets
                self._name(targets[0], statement.value)
            elif isinstance(statement, ast.Delete):
                targets = statement.targets
            elif isinstance(statement, ast.AugAssign):
                targets = [statement.target]
            for target in targets:
                if (
                    isinstance(target, ast.Subscript)
                    and isinstance(target.slice, ast.Constant)
                    and (place := self.place(target.value))
                ):
                    text = ast.unparse(statement.value) if isinstance(statement, ast.Assign) else ""
                    self.changes.setdefault(place, {})[str(target.slice.value)] = text

    def _name(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name):
            return
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "get_kwargs":
            self.classes[target.id] = ast.unparse(value.args[0])
        elif (place := self.place(value)) is not None:
            self.fields[target.id] = place


def vllm_options(wheel: zipfile.ZipFile) -> Iterator[Option]:
    """The options of `vllm serve`. Since 0.33, its parser pairs --enable-x with --disable-x."""
    paired = "class EnableDisableAction(" in wheel.read(PARSER).decode()
    for option in _vllm_options(wheel):
        yield option.model_copy(update={"flags": (*option.flags, *_inverses(option))}) if paired else option


def _inverses(option: Option) -> Iterator[str]:
    """--disable-x of a switch --enable-x, and the reverse."""
    pairs = (("--enable-", "--disable-"), ("--disable-", "--enable-"))
    for flag in option.flags if option.action == "switch" else ():
        yield from (inverse + flag.removeprefix(prefix) for prefix, inverse in pairs if flag.startswith(prefix))


def _vllm_options(wheel: zipfile.ZipFile) -> Iterator[Option]:
    members = wheel.namelist()
    server = next(name for name in SERVERS if name in members)
    names = [name for name in members if name in (server, ENGINE) or (name.startswith(CONFIG) and name.endswith(".py"))]
    trees = {name: ast.parse(wheel.read(name)) for name in names}
    code = Code(
        classes={node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)},
        aliases={name: value for tree in trees.values() for name, value in _aliases(tree)},
    )
    yield from _vllm_calls(_function(trees[server].body, "make_arg_parser"), code, Scope())
    frontend = Scope()
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        for node in ast.walk(code.classes[name]):
            if isinstance(node, ast.FunctionDef) and node.name == "_customize_cli_kwargs":
                frontend.scan(node, {"frontend_kwargs": "FrontendArgs"})
    for key, (annotation, default) in code.fields("FrontendArgs").items():
        changes = frontend.changes.get(("FrontendArgs", key), {})
        yield _vllm_field((f"--{key.replace('_', '-')}",), key, annotation, default, code, changes)
    for name in ("EngineArgs", "AsyncEngineArgs"):
        function = _function(code.classes[name].body, "add_cli_args")
        scope = Scope()
        scope.scan(function, {})
        yield from _vllm_calls(function, code, scope)


def _function(body: Sequence[ast.stmt], name: str) -> ast.FunctionDef:
    (function,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    return function


def _aliases(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and isinstance(node.targets[0], ast.Name)
            and ast.unparse(node.value.value).rpartition(".")[2] in ("Literal", "Annotated", "Union", "Optional")
        ):
            yield node.targets[0].id, node.value


def _vllm_calls(function: ast.FunctionDef, code: Code, scope: Scope) -> Iterator[Option]:
    for call in argument_calls(function):
        flags = tuple(str(ast.literal_eval(argument)) for argument in call.args)
        if not flags[0].startswith("-"):
            continue
        words = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        spread = next((keyword.value for keyword in call.keywords if keyword.arg is None), None)
        if isinstance(spread, ast.Dict):  # {**X_kwargs["field"], "default": None}
            spread = next(value for key, value in zip(spread.keys, spread.values, strict=True) if key is None)
        place = scope.place(spread) if spread is not None else None
        if place is None:
            yield _vllm_explicit(flags, words, code)
        else:
            annotation, default = code.fields(place[0])[place[1]]
            yield _vllm_field(flags, place[1], annotation, default, code, scope.changes.get(place, {}))


def _vllm_explicit(flags: tuple[str, ...], words: Mapping[str, ast.expr], code: Code) -> Option:
    action = ast.unparse(words["action"]).strip("'\"").rpartition(".")[2] if "action" in words else "store"
    if action == "BooleanOptionalAction":
        return _switch(flags, _plain_default(words.get("default")))
    return Option(
        flags=flags,
        kind="bool" if action == "store_true" else _vllm_kind(ast.unparse(words["type"])) if "type" in words else "str",
        default=False if action == "store_true" else _plain_default(words.get("default")),
        choices=_vllm_choices(words["choices"], code) if "choices" in words else None,
        nargs=ast.literal_eval(words["nargs"]) if "nargs" in words else None,
        action="store_true" if action == "store_true" else "store",
    )


def _vllm_choices(node: ast.expr, code: Code) -> tuple[Any, ...] | None:
    """The choices in a list of literals or in `get_args(ALIAS)`; None if they are computed, for example from the platform."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "get_args":
        (literal,) = code.hints(node.args[0])
        return code.values(literal)
    try:
        return tuple(ast.literal_eval(node))
    except ValueError:
        return None


def _vllm_field(
    flags: tuple[str, ...], name: str, annotation: ast.expr, default: ast.expr | None, code: Code, changed: Mapping[str, str]
) -> Option:
    """The option that vllm's _compute_kwargs makes from a field, with the later changes of the parser's function."""
    hints = code.hints(annotation)
    names, value = {hint.name for hint in hints}, _plain_default(default)
    nullable = "None" in names
    if changed.get("action"):
        append = changed["action"].strip("'\"") == "append"
        return Option(flags=flags, action="append" if append else "store", default=value, nargs=None if append else "+")
    if "json.loads" in changed.get("type", ""):
        return Option(flags=flags, kind="json", default=value, nullable=nullable)
    if names & set(code.classes):
        return Option(flags=flags, default=value, nullable=nullable)
    if names == {"bool", "str", "None"}:
        return Option(flags=flags, default=value, nargs="?")
    if "bool" in names:
        return _switch(flags, value)
    many = next((hint for hint in hints if hint.name in ("tuple", "list", "set")), None)
    if many is not None and "nargs" not in changed:
        inner = code.hints(many.inside[0])
        last = ast.unparse(many.inside[-1])
        fixed = many.name == "tuple" and "Ellipsis" not in last and "..." not in last
        kind, choices = _single(inner, name, code) if len(inner) == 1 and "choices" not in changed else ("str", None)
        nargs = len(many.inside) if fixed else "+"
        return Option(flags=flags, kind=kind, default=value, choices=choices, nargs=nargs, nullable=nullable)
    kind, choices = _single(hints, name, code) if not changed else ("str", None)
    return Option(flags=flags, kind=kind, default=value, choices=choices, nullable=nullable)


def _switch(flags: tuple[str, ...], default: Any) -> Option:
    """The option of an argparse.BooleanOptionalAction: --x and --no-x, without a value."""
    opposite = tuple(f"--no-{flag[2:]}" for flag in flags if flag.startswith("--"))
    return Option(flags=(*flags, *opposite), kind="bool", default=default, action="switch")


def _single(hints: Sequence[Hint], name: str, code: Code) -> tuple[OptionKind, tuple[Any, ...] | None]:
    """Kind and choices of one value. The kind is text if several types are possible."""
    by_name = {hint.name: hint for hint in hints if hint.name != "None"}
    if "Literal" in by_name:
        values = code.values(by_name["Literal"])
        if len(by_name) > 1 or values is None:
            return "str", None
        return "int" if isinstance(values[0], int) else "str", values
    if len(by_name) == 1 and name not in HUMAN_INTEGERS:
        return _vllm_kind("json.loads" if "dict" in by_name else next(iter(by_name))), None
    return "str", None


def _vllm_kind(text: str) -> OptionKind:
    known: dict[str, OptionKind] = {"int": "int", "float": "float", "json.loads": "json"}
    return known.get(text, "str")


def _plain_default(node: ast.expr | None) -> Any:
    """The default if it is a literal, else None."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
        given = next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
        node = given or (node.args[0] if node.args else None)
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return value if isinstance(value, str | int | float | bool | list) else None


if __name__ == "__main__":
    sys.stdout.write(render(read_wheel(Path(sys.argv[1]))))
