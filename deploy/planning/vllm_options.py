"""vllm's options out of its wheel: most are fields of configuration classes, whose annotations say what argparse is told.

Read as syntax, as options.py does. Where a type is a name from elsewhere, or is computed, any text is taken: nothing
that the engine takes may be refused.
"""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.planning.options import Kind, Option

SERVER, ENGINE, CONFIG = "vllm/entrypoints/openai/cli_args.py", "vllm/engine/arg_utils.py", "vllm/config/"
TEXT = ("max_model_len", "max_num_batched_tokens", "max_num_scheduled_tokens", "kv_cache_memory_bytes")
TEXT_TOO = ("safetensors_prefetch_block_size",)
"Integers that may be written as 8k or 2G."


@dataclass(frozen=True)
class Hint:
    """One member of a union of types: its name, and what stands in its brackets."""

    name: str
    inside: tuple[ast.expr, ...] = ()


@dataclass(frozen=True)
class Code:
    """Classes and aliases of types in the files that were read."""

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
                members = [each for one in (inside[:1] if name == "Annotated" else inside) for each in self.hints(one)]
                return [*members, *([Hint("None")] if name == "Optional" else [])]
            return [Hint(name, inside)]
        name = ast.unparse(node).rpartition(".")[2]
        return self.hints(self.aliases[name]) if name in self.aliases else [Hint(name)]

    def values(self, literal: Hint) -> tuple[Any, ...] | None:
        """Of a Literal, those of others in it too; None: not all of them are to be read."""
        found: list[Any] = []
        for one in literal.inside:
            if isinstance(one, ast.Constant):
                found.append(one.value)
                continue
            more = self.hints(one)
            inner = self.values(more[0]) if len(more) == 1 and more[0].name == "Literal" else None
            if inner is None:
                return None
            found += inner
        return tuple(found)

    def fields(self, name: str) -> dict[str, tuple[ast.expr, ast.expr | None]]:
        """Of a class and those it is derived from: name to annotation and default."""
        found: dict[str, tuple[ast.expr, ast.expr | None]] = {}
        for base in self.classes[name].bases:
            if ast.unparse(base) in self.classes:
                found |= self.fields(ast.unparse(base))
        for one in self.classes[name].body:
            if (
                isinstance(one, ast.AnnAssign)
                and isinstance(one.target, ast.Name)
                and "ClassVar" not in ast.unparse(one.annotation)
            ):
                found[one.target.id] = (one.annotation, one.value)
        return found


@dataclass
class Scope:
    """Of one function: names that stand for a class's arguments or one of its fields', and what it changes in those."""

    classes: dict[str, str] = field(default_factory=dict)
    fields: dict[str, tuple[str, str]] = field(default_factory=dict)
    changes: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def place(self, node: ast.expr) -> tuple[str, str] | None:
        """X_kwargs["field"], or a name that stands for it, as class and field."""
        if isinstance(node, ast.Name):
            return self.fields.get(node.id)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant):
            owner = self.classes.get(node.value.id)
            return (owner, str(node.slice.value)) if owner else None
        return None


def read(wheel: zipfile.ZipFile) -> Iterator[Option]:
    """The options of `vllm serve`."""
    wanted = [one for one in wheel.namelist() if one in (SERVER, ENGINE) or (one.startswith(CONFIG) and one.endswith(".py"))]
    trees = {name: ast.parse(wheel.read(name)) for name in wanted}
    code = Code(
        classes={one.name: one for tree in trees.values() for one in tree.body if isinstance(one, ast.ClassDef)},
        aliases={name: value for tree in trees.values() for name, value in _aliases(tree)},
    )
    (parser,) = (one for one in trees[SERVER].body if isinstance(one, ast.FunctionDef) and one.name == "make_arg_parser")
    yield from _calls(parser, code, Scope())
    changes = Scope()
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        for one in ast.walk(code.classes[name]):
            if isinstance(one, ast.FunctionDef) and one.name == "_customize_cli_kwargs":
                _scan(one, changes, {"frontend_kwargs": "FrontendArgs"})
    for key, (annotation, default) in code.fields("FrontendArgs").items():
        yield _option(
            (f"--{key.replace('_', '-')}",), key, annotation, default, code, changes.changes.get(("FrontendArgs", key), {})
        )
    for name in ("EngineArgs", "AsyncEngineArgs"):
        (function,) = (
            one for one in code.classes[name].body if isinstance(one, ast.FunctionDef) and one.name == "add_cli_args"
        )
        scope = Scope()
        _scan(function, scope, {})
        yield from _calls(function, code, scope)


def _aliases(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for one in tree.body:
        if not (isinstance(one, ast.Assign) and isinstance(one.value, ast.Subscript) and isinstance(one.targets[0], ast.Name)):
            continue
        if ast.unparse(one.value.value).rpartition(".")[2] in ("Literal", "Annotated", "Union", "Optional"):
            yield one.targets[0].id, one.value


def _scan(function: ast.FunctionDef, scope: Scope, classes: Mapping[str, str]) -> None:
    """Names and changes, in the order of the lines."""
    scope.classes |= classes
    for one in sorted((node for node in ast.walk(function) if isinstance(node, ast.stmt)), key=lambda node: node.lineno):
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            name, value = one.targets[0].id, one.value
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "get_kwargs":
                scope.classes[name] = ast.unparse(value.args[0])
            elif (place := scope.place(value)) is not None:
                scope.fields[name] = place
        targets = (
            one.targets if isinstance(one, ast.Assign | ast.Delete) else [one.target] if isinstance(one, ast.AugAssign) else []
        )
        for target in targets:
            if (
                isinstance(target, ast.Subscript)
                and isinstance(target.slice, ast.Constant)
                and (place := scope.place(target.value))
            ):
                text = ast.unparse(one.value) if isinstance(one, ast.Assign) else ""
                scope.changes.setdefault(place, {})[str(target.slice.value)] = text


def _calls(function: ast.FunctionDef, code: Code, scope: Scope) -> Iterator[Option]:
    calls = [
        one
        for one in ast.walk(function)
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "add_argument"
    ]
    for call in sorted(calls, key=lambda one: one.lineno):
        flags = tuple(str(ast.literal_eval(one)) for one in call.args)
        if not flags[0].startswith("-"):
            continue
        words = {one.arg: one.value for one in call.keywords if one.arg}
        spread = next((one.value for one in call.keywords if one.arg is None), None)
        if isinstance(spread, ast.Dict):  # {**X_kwargs["field"], "default": None}
            spread = next(value for key, value in zip(spread.keys, spread.values, strict=True) if key is None)
        place = scope.place(spread) if spread is not None else None
        if place is None:
            yield _explicit(flags, words)
        else:
            annotation, default = code.fields(place[0])[place[1]]
            yield _option(flags, place[1], annotation, default, code, scope.changes.get(place, {}))


def _explicit(flags: tuple[str, ...], words: Mapping[str, ast.expr]) -> Option:
    action = ast.unparse(words["action"]).strip("'\"").rpartition(".")[2] if "action" in words else "store"
    if action == "BooleanOptionalAction":
        return _switch(flags, _default(words.get("default")))
    return Option(
        flags=flags,
        kind="bool" if action == "store_true" else _kind(ast.unparse(words["type"])) if "type" in words else "str",
        default=False if action == "store_true" else _default(words.get("default")),
        choices=tuple(ast.literal_eval(words["choices"])) if "choices" in words else None,
        nargs=ast.literal_eval(words["nargs"]) if "nargs" in words else None,
        action="store_true" if action == "store_true" else "store",
    )


def _option(
    flags: tuple[str, ...], name: str, annotation: ast.expr, default: ast.expr | None, code: Code, changed: Mapping[str, str]
) -> Option:
    """What vllm's _compute_kwargs makes of a field, in its order, and what the parser's function then changes."""
    hints = code.hints(annotation)
    names, value = {one.name for one in hints}, _default(default)
    nullable = "None" in names
    if changed.get("action"):
        action = changed["action"].strip("'\"")
        return Option(flags=flags, action="append" if action == "append" else "store", default=value, nargs=_nargs(action))
    if "json.loads" in changed.get("type", ""):
        return Option(flags=flags, kind="json", default=value, nullable=nullable)
    if names & set(code.classes):
        return Option(flags=flags, default=value, nullable=nullable)
    if names == {"bool", "str", "None"}:
        return Option(flags=flags, default=value, nargs="?")
    if "bool" in names:
        return _switch(flags, value)
    many = next((one for one in hints if one.name in ("tuple", "list", "set")), None)
    if many is not None and "nargs" not in changed:
        inner = code.hints(many.inside[0])
        fixed = (
            many.name == "tuple"
            and "Ellipsis" not in ast.unparse(many.inside[-1])
            and "..." not in ast.unparse(many.inside[-1])
        )
        kind, choices = _single(inner, name, code) if len(inner) == 1 and "choices" not in changed else ("str", None)
        return Option(
            flags=flags, kind=kind, default=value, choices=choices, nargs=len(many.inside) if fixed else "+", nullable=nullable
        )
    kind, choices = _single(hints, name, code) if not changed else ("str", None)
    return Option(flags=flags, kind=kind, default=value, choices=choices, nullable=nullable)


def _nargs(action: str) -> str | None:
    return None if action == "append" else "+"


def _switch(flags: tuple[str, ...], default: Any) -> Option:
    """argparse.BooleanOptionalAction: --x and --no-x, without a value."""
    opposite = tuple(f"--no-{one[2:]}" for one in flags if one.startswith("--"))
    return Option(flags=(*flags, *opposite), kind="bool", default=default, action="switch")


def _single(hints: Sequence[Hint], name: str, code: Code) -> tuple[Kind, tuple[Any, ...] | None]:
    """Kind and choices of one value; text where it may be several things."""
    by_name = {one.name: one for one in hints if one.name != "None"}
    if "Literal" in by_name:
        values = code.values(by_name["Literal"])
        if len(by_name) > 1 or values is None:
            return "str", None
        return "int" if isinstance(values[0], int) else "str", values
    if len(by_name) == 1 and name not in (*TEXT, *TEXT_TOO):
        return _kind("json.loads" if "dict" in by_name else next(iter(by_name))), None
    return "str", None


def _kind(text: str) -> Kind:
    known: dict[str, Kind] = {"int": "int", "float": "float", "json.loads": "json"}
    return known.get(text, "str")


def _default(node: ast.expr | None) -> Any:
    """A default that is plainly there, else None."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
        node = next((one.value for one in node.keywords if one.arg == "default"), node.args[0] if node.args else None)
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return value if isinstance(value, str | int | float | bool | list) else None
