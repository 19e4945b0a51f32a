"""A Python script as syntax tree: the meaning of its names, and the value of an expression with given environment variables.

Nothing is run. A value that depends on running the script is UNKNOWN, and so are values that depend on it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

DEEPEST = 12
"Limit of names to follow, such as a variable that is set to another one."
MOST_FILES = 40
"Limit of local modules to read for a setup.py."
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.Is: operator.is_,
        ast.IsNot: operator.is_not,
        ast.In: lambda left, right: left in right,
        ast.NotIn: lambda left, right: left not in right,
    }
)
_METHODS = frozenset({"lower", "upper", "strip", "startswith", "endswith", "split", "replace"})
"Methods of str without side effects."
_BUILTINS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"int": int, "bool": bool, "str": str, "len": len, "float": float}
)
ENVIRON, GETENV = "os.environ", "os.getenv"
_READS = frozenset({f"{ENVIRON}.get", GETENV, f"{ENVIRON}.setdefault", f"{ENVIRON}.pop"})


class _Unknown:
    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = _Unknown()
"A value that depends on running the script."

Of = Callable[[ast.expr], Any]
"Returns the value of an inner expression."
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Script:
    """One Python file."""

    name: str
    "Path in the source tree."
    tree: ast.Module
    assigned: Mapping[str, ast.expr] = field(default_factory=dict)
    "Names that are assigned once, with their expressions."
    imported: Mapping[str, str] = field(default_factory=dict)
    "Imported names, as {'environ': 'os.environ'}."
    functions: Mapping[str, FunctionNode] = field(default_factory=dict)
    parents: Mapping[ast.AST, ast.AST] = field(default_factory=dict)


def read(place: Path, name: str) -> Script | None:
    """Read a script; None if it is not valid Python 3."""
    try:
        tree = ast.parse(place.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None
    assigned: dict[str, ast.expr] = {}
    several: set[str] = set()
    imported: dict[str, str] = {}
    functions: dict[str, FunctionNode] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=target)], value=value)
                | ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value)
            ):
                if target in assigned:
                    several.add(target)
                assigned[target] = value
            case ast.AugAssign(target=ast.Name(id=target)):
                several.add(target)
            case ast.Import(names=aliases):
                imported |= {alias.asname: alias.name for alias in aliases if alias.asname}
            case ast.ImportFrom(module=str() as module, names=aliases):
                imported |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in aliases}
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                functions[node.name] = node
    return Script(
        name=name,
        tree=tree,
        assigned={target: value for target, value in assigned.items() if target not in several},
        imported=imported,
        functions=functions,
        parents={child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)},
    )


def with_local_modules(tree: Path, names: Sequence[str], search: Sequence[str] = (".",)) -> list[Script]:
    """Scripts of a source tree, and the modules of the tree that they import; `search`: folders on their sys.path."""
    scripts: dict[str, Script] = {}
    waiting = [name for name in names if (tree / name).is_file()]
    while waiting and len(scripts) < MOST_FILES:
        name = waiting.pop(0)
        if name in scripts or (script := read(tree / name, name)) is None:
            continue
        scripts[name] = script
        folders = [*search, str(PurePosixPath(name).parent)]
        waiting += [place for module in _imports(script.tree, name) for place in _places(tree, module, folders)]
    return list(scripts.values())


def _imports(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                folder = PurePosixPath(name).parents[level - 1] if 0 < level <= len(PurePosixPath(name).parents) else None
                prefix = ".".join(folder.parts) if folder is not None else ""
                base = ".".join(part for part in (prefix, module or "") if part)
                yield from (f"{base}.{alias.name}" if base else alias.name for alias in aliases)
                if base:
                    yield base


def _places(tree: Path, module: str, folders: Sequence[str]) -> Iterator[str]:
    path = module.replace(".", "/")
    for folder in folders:
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            place = str(PurePosixPath(folder) / candidate)
            if (tree / place).is_file():
                yield place
                return


def dotted(node: ast.expr, script: Script, depth: int = 0) -> str:
    """The full name of a name or attribute, as 'os.environ.get'; empty for other expressions."""
    match node:
        case ast.Name(id=name):
            if name in script.imported:
                return script.imported[name]
            value = script.assigned.get(name)
            if isinstance(value, ast.Attribute) and depth < DEEPEST:
                return dotted(value, script, depth + 1)
            return name
        case ast.Attribute(value=value, attr=attribute):
            base = dotted(value, script, depth)
            return f"{base}.{attribute}" if base else ""
    return ""


@dataclass(frozen=True, kw_only=True)
class Read:
    """An expression that reads an environment variable."""

    key: ast.expr
    default: ast.expr | None
    present: bool = False
    "Whether it only tests if the variable is set."


def environment_read(node: ast.AST, script: Script) -> Read | None:
    """The read of the environment in a node, or None."""
    match node:
        case ast.Call(func=function, args=[key, *rest], keywords=keywords) if dotted(function, script) in _READS:
            default = next((keyword.value for keyword in keywords if keyword.arg == "default"), rest[0] if rest else None)
            return Read(key=key, default=default)
        case ast.Subscript(value=value, slice=key, ctx=ast.Load()) if dotted(value, script) == ENVIRON:
            return Read(key=key, default=None)
        case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[value]) if dotted(value, script) == ENVIRON:
            return Read(key=key, default=None, present=True)
    return None


Names = Mapping[str, object]


def value_of(node: ast.expr, script: Script, variables: Mapping[str, str], names: Names | None = None, depth: int = 0) -> Any:
    """The value of an expression if the environment has these variables; `names`: values of a function's parameters."""
    names = names or {}
    if depth > DEEPEST:
        return UNKNOWN

    def of(inner: ast.expr) -> Any:
        return value_of(inner, script, variables, names, depth + 1)

    if (reading := environment_read(node, script)) is not None:
        return _read_value(node, reading, variables, of)
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            return of(script.assigned[name]) if name in script.assigned else UNKNOWN
        case ast.Call():
            return _call(node, script, variables, depth, of)
        case ast.List() | ast.Tuple() | ast.Set() | ast.JoinedStr():
            return _joined(node, of)
    return _operation(node, of)


def _joined(node: ast.List | ast.Tuple | ast.Set | ast.JoinedStr, of: Of) -> Any:
    parts = node.values if isinstance(node, ast.JoinedStr) else node.elts
    values = [of(part.value) if isinstance(part, ast.FormattedValue) else of(part) for part in parts]
    if any(value is UNKNOWN for value in values):
        return UNKNOWN
    return "".join(map(str, values)) if isinstance(node, ast.JoinedStr) else values


def _operation(node: ast.expr, of: Of) -> Any:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _attempt(operator.add, of(left), of(right))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _attempt(operator.not_, of(operand))
        case ast.BoolOp(op=op, values=operands):
            return _bool_op(op, [of(operand) for operand in operands])
        case ast.IfExp(test=test, body=body, orelse=orelse):
            chosen = of(test)
            return UNKNOWN if chosen is UNKNOWN else of(body if chosen else orelse)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _attempt(_COMPARISONS[type(op)], of(left), of(right))
    return UNKNOWN


def _read_value(node: ast.AST, reading: Read, variables: Mapping[str, str], of: Of) -> Any:
    key = of(reading.key)
    if not isinstance(key, str):
        return UNKNOWN
    if reading.present:
        absent = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotIn)
        return (key in variables) is not absent
    if key in variables:
        return variables[key]
    return None if reading.default is None else of(reading.default)


def _attempt(function: Callable[..., Any], *values: Any) -> Any:
    if any(value is UNKNOWN for value in values):
        return UNKNOWN
    try:
        return function(*values)
    except (TypeError, ValueError, AttributeError):
        return UNKNOWN


def _bool_op(op: ast.boolop, values: Sequence[Any]) -> Any:
    """Evaluate as Python does, but one operand may decide even if another is unknown."""
    decides = (lambda value: not value) if isinstance(op, ast.And) else bool
    for value in values:
        if value is not UNKNOWN and decides(value):
            return value
    return UNKNOWN if any(value is UNKNOWN for value in values) else values[-1]


def _call(node: ast.Call, script: Script, variables: Mapping[str, str], depth: int, of: Of) -> Any:
    arguments = [of(argument) for argument in node.args]
    match node.func:
        case ast.Name(id=name) if name in _BUILTINS and not node.keywords:
            return _attempt(_BUILTINS[name], *arguments)
        case ast.Attribute(value=receiver, attr=method) if method in _METHODS and not node.keywords:
            text = of(receiver)
            return _attempt(getattr(str, method), text, *arguments) if isinstance(text, str) else UNKNOWN
        case ast.Name(id=name) if name in script.functions:
            return _result(script.functions[name], node, arguments, script, variables, depth, of)
    return UNKNOWN


def _result(
    function: FunctionNode,
    call: ast.Call,
    arguments: Sequence[Any],
    script: Script,
    variables: Mapping[str, str],
    depth: int,
    of: Of,
) -> Any:
    """The result of a function that consists of one `return`."""
    body = [statement for statement in function.body if not _is_text(statement)]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return UNKNOWN
    return value_of(body[0].value, script, variables, bound(function, call, arguments, of), depth + 1)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def bound(function: FunctionNode, call: ast.Call, arguments: Sequence[Any], of: Of) -> dict[str, object]:
    """The parameters of a function in a call."""
    parameters = [argument.arg for argument in function.args.args]
    defaults = function.args.defaults
    names = {name: of(value) for name, value in zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True)}
    names |= dict(zip(parameters, arguments, strict=False))
    return names | {keyword.arg: of(keyword.value) for keyword in call.keywords if keyword.arg is not None}
