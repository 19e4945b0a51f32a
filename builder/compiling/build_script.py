"""Analyse a package's build script without running it: environment variables, downloads, extension modules."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from builder.compiling.syntax import (
    UNKNOWN,
    FunctionNode,
    Read,
    Script,
    bound,
    dotted,
    environment_read,
    value_of,
    with_local_modules,
)

_FETCHES = re.compile(
    r"(?:urllib\.request|urllib|six\.moves\.urllib\.request)\.(?:urlopen|urlretrieve)"
    r"|(?:requests|httpx)\.(?:get|post|request|head)|requests\.Session\.get|wget\.download"
    r"|torch\.hub\.(?:download_url_to_file|load_state_dict_from_url)|huggingface_hub\.\w+"
)
"Functions that access the network."
_RUNS = re.compile(r"(?:subprocess\.(?:run|call|check_call|check_output|Popen|getoutput)|os\.(?:system|popen))")
_PROGRAMS = re.compile(
    r"\bgit\b.*\b(?:clone|fetch|pull|submodule\s+(?:update|init))\b|\b(?:curl|wget)\b|\bpip3?\b.*\b(?:install|download)\b"
)
"Commands that access the network."
_VALUES = ("TRUE", "1", "True", "true", "ON", "YES", "0", "FALSE", "OFF")
"Values to try for a switch, after the values that the script compares it with."
_SWITCH = re.compile(r"FORCE_BUILD|(?:SKIP|NO|DISABLE)_\w*(?:DOWNLOAD|FETCH|WHEEL)|OFFLINE|FORCE_CUDA|USE_SYSTEM")
_DEEPEST = 4
"Number of callers to follow from a download."
CUDA = re.compile(r"\.cu$")


@dataclass(frozen=True, kw_only=True)
class Position:
    """A line of a file in the source tree."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Variable:
    """An environment variable that the script reads."""

    name: str
    place: Position
    default: object = None
    "UNKNOWN if it depends on running the script."


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """A call that accesses the network."""

    what: str
    "URL, command or function, as far as it is known."
    place: Position
    reached: bool
    "Whether it is executed if no variable is set."
    avoided_by: Mapping[str, str]
    "Variables with the value that avoids the call; variables with a fitting name come first."

    @property
    def switch(self) -> tuple[str, str] | None:
        """The variable, with its value, whose name indicates that it avoids downloads."""
        return next(((name, value) for name, value in self.avoided_by.items() if _SWITCH.search(name)), None)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """An extension module that the script declares."""

    name: str
    "Empty if it depends on running the script."
    kind: str
    "Name of the class, as CUDAExtension."
    place: Position
    sources: tuple[str, ...]
    "Known sources, relative to the source tree."
    includes: tuple[str, ...]
    "Known folders of headers, relative to the source tree."


@dataclass(frozen=True, kw_only=True)
class BuildScript:
    """setup.py, or a build backend in the package, with the local modules that it imports."""

    scripts: tuple[Script, ...]

    @property
    def texts(self) -> Iterator[tuple[str, Position]]:
        """All texts in the scripts, without the format specifications of f-strings, such as 20.2f."""
        for script in self.scripts:
            specifications = {
                id(part)
                for node in ast.walk(script.tree)
                if isinstance(node, ast.FormattedValue) and node.format_spec
                for part in ast.walk(node.format_spec)
            }
            for node in ast.walk(script.tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in specifications:
                    yield node.value, _place(node, script)

    @property
    def modules(self) -> dict[str, Position]:
        """Modules that the script imports unconditionally, by their first name."""
        names: dict[str, Position] = {}
        for script in self.scripts:
            for statement in _at_once(script.tree.body):
                match statement:
                    case ast.Import(names=aliases):
                        for alias in aliases:
                            names.setdefault(alias.name.partition(".")[0], _place(statement, script))
                    case ast.ImportFrom(module=str() as module, level=0):
                        names.setdefault(module.partition(".")[0], _place(statement, script))
        return names

    def variables(self) -> list[Variable]:
        """Environment variables that are read, without duplicates, in the order of the scripts."""
        seen: dict[str, Variable] = {}
        for script in self.scripts:
            for node, reading, names in _reads(script):
                key = value_of(reading.key, script, {}, names)
                if isinstance(key, str) and key:
                    default = None if reading.default is None else value_of(reading.default, script, {}, names)
                    seen.setdefault(key, Variable(name=key, place=_place(node, script), default=default))
        return list(seen.values())

    def downloads(self, variables: Mapping[str, str] | None = None) -> list[NetworkCall]:
        """Calls that access the network if these variables are set, with other variables that avoid them."""
        given = variables or {}
        return [_download(node, what, script, given) for script in self.scripts for node, what in _network_calls(script)]

    def extensions(self) -> list[Extension]:
        """Extension modules."""
        return [
            _extension(node, script)
            for script in self.scripts
            for node in ast.walk(script.tree)
            if isinstance(node, ast.Call) and re.fullmatch(r"\w*Extension", dotted(node.func, script).rpartition(".")[2])
        ]


def read(tree: Path) -> BuildScript:
    """The build script of a source tree, whose backend pyproject.toml names; empty if there is none."""
    try:
        system = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8")).get("build-system", {})
    except (OSError, ValueError):
        system = {}
    folders = [str(PurePosixPath(folder)) for folder in system.get("backend-path", [])] if isinstance(system, dict) else []
    names = ["setup.py"]
    if folders and isinstance(backend := system.get("build-backend"), str):
        path = backend.partition(":")[0].replace(".", "/")
        names = [f"{folder}/{path}{end}" for folder in folders for end in (".py", "/__init__.py")] + names
    names = [str(PurePosixPath(name)) for name in names]
    return BuildScript(scripts=tuple(with_local_modules(tree, names, [".", *folders])))


def _place(node: ast.AST, script: Script) -> Position:
    return Position(file=script.name, line=getattr(node, "lineno", 1))


def _at_once(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that always run when a module is imported, without those in `try` and `if`."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _at_once(statement.body)
        else:
            yield statement


def _reads(script: Script) -> Iterator[tuple[ast.AST, Read, dict[str, object]]]:
    """Reads of the environment, also by functions of the script that get the name as an argument."""
    for node in ast.walk(script.tree):
        reading = environment_read(node, script)
        if reading is None:
            continue
        function = _function(node, script)
        if value_of(reading.key, script, {}) is not UNKNOWN or function is None:
            yield node, reading, {}
            continue
        for call in _calls_of(function.name, script):
            arguments = [value_of(argument, script, {}) for argument in call.args]
            if isinstance(call.func, ast.Attribute) and function.args.args and function.args.args[0].arg in ("self", "cls"):
                arguments = [UNKNOWN, *arguments]
            yield call, reading, bound(function, call, arguments, lambda inner: value_of(inner, script, {}))


def _function(node: ast.AST, script: Script) -> FunctionNode | None:
    """The innermost function around a node."""
    above = script.parents.get(node)
    while above is not None and not isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef):
        above = script.parents.get(above)
    return above


def _calls_of(name: str, script: Script) -> Iterator[ast.Call]:
    for node in ast.walk(script.tree):
        match node:
            case ast.Call(func=ast.Name(id=called)) | ast.Call(func=ast.Attribute(attr=called)) if called == name:
                yield node


def _network_calls(script: Script) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(script.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, script)
        first = node.args[0] if node.args else None
        if _FETCHES.fullmatch(name):
            text = _text(first, script)
            yield node, text if "://" in text else name
        elif _RUNS.fullmatch(name) and first is not None and _PROGRAMS.search(text := _text(first, script)):
            yield node, f"`{text}`"


def _text(node: ast.expr | None, script: Script) -> str:
    """The known part of a text or command; '…' for the rest."""
    match node:
        case None:
            return ""
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return " ".join(_text(element, script) for element in elements)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part.value if isinstance(part, ast.FormattedValue) else part, script) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, script) + _text(right, script)
        case ast.Call(func=ast.Attribute(value=receiver, attr="format" | "split")):
            return re.sub(r"\{[^{}]*\}", "…", _text(receiver, script))
        case ast.Name(id=name) if name in script.assigned and not _inside_itself(node, script.assigned[name]):
            return _text(script.assigned[name], script)
    value = value_of(node, script, {})
    return str(value) if value is not UNKNOWN else "…"


def _inside_itself(name: ast.Name, value: ast.expr) -> bool:
    """Whether a name is assigned from itself, which would be an endless loop."""
    return any(isinstance(node, ast.Name) for node in ast.walk(value)) or name in ast.walk(value)


@dataclass(frozen=True, kw_only=True)
class _Guard:
    """A condition before a call, and the value that it must have for the call to be reached."""

    test: ast.expr
    needed: bool


def _download(call: ast.Call, what: str, script: Script, given: Mapping[str, str]) -> NetworkCall:
    ways = list(_ways(call, script, 0))
    avoided: dict[str, str] = {}
    for name in sorted({name for way in ways for guard in way for name in _names(guard.test, script)}):
        candidates = [*(value for way in ways for guard in way for value in _compared(guard.test, script)), *_VALUES]
        for value in dict.fromkeys(candidates):
            if all(_closed(way, script, {**given, name: value}) for way in ways):
                avoided[name] = value
                break
    reached = not all(_closed(way, script, given) for way in ways)
    avoided = dict(sorted(avoided.items(), key=lambda pair: _SWITCH.search(pair[0]) is None))
    return NetworkCall(what=what, place=_place(call, script), reached=reached, avoided_by=avoided if reached else {})


def _ways(node: ast.AST, script: Script, depth: int) -> Iterator[list[_Guard]]:
    """The conditions on each path to a node: in its function, and in the callers."""
    own = list(_guards(node, script))
    function = _function(node, script)
    callers = (
        [call for call in _calls_of(function.name, script) if _function(call, script) is not function] if function else []
    )
    if not callers or depth >= _DEEPEST:
        yield own
        return
    for call in callers:
        for way in _ways(call, script, depth + 1):
            yield [*own, *way]


def _guards(node: ast.AST, script: Script) -> Iterator[_Guard]:
    """The conditions around a node, and those before it that leave its block."""
    while (above := script.parents.get(node)) is not None:
        if isinstance(above, ast.If | ast.IfExp):
            body = above.body if isinstance(above.body, list) else [above.body]
            if node in body:
                yield _Guard(test=above.test, needed=True)
            elif node is not above.test:
                yield _Guard(test=above.test, needed=False)
        for block in (getattr(above, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list) and node in block:
                for before in block[: block.index(node)]:
                    if isinstance(before, ast.If) and _leaves(before.body):
                        yield _Guard(test=before.test, needed=False)
        if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        node = above


def _leaves(body: Sequence[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return isinstance(last.value.func, ast.Attribute | ast.Name) and ast.unparse(last.value.func) in ("sys.exit", "exit")
    return isinstance(last, ast.Return | ast.Raise | ast.Continue | ast.Break)


def _closed(way: Sequence[_Guard], script: Script, variables: Mapping[str, str]) -> bool:
    """Whether these variables certainly block this path."""
    for guard in way:
        value = value_of(guard.test, script, variables)
        if value is not UNKNOWN and bool(value) is not guard.needed:
            return True
    return False


def _expressions(test: ast.expr, script: Script, depth: int = 0) -> Iterator[ast.AST]:
    """The nodes of an expression, of the values of its names, and of the functions that it calls."""
    for node in ast.walk(test):
        yield node
        if isinstance(node, ast.Name) and depth < _DEEPEST:
            if node.id in script.assigned:
                yield from _expressions(script.assigned[node.id], script, depth + 1)
            if node.id in script.functions:
                yield from ast.walk(script.functions[node.id])


def _names(test: ast.expr, script: Script) -> Iterator[str]:
    """Environment variables that a condition depends on."""
    own = set(map(id, _expressions(test, script)))
    for node, reading, names in _reads(script):
        key = value_of(reading.key, script, {}, names)
        if id(node) in own and isinstance(key, str):
            yield key


def _compared(test: ast.expr, script: Script) -> Iterator[str]:
    """Texts that a condition compares something with."""
    for node in _expressions(test, script):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                if isinstance(side, ast.Constant) and side.value is not None:
                    yield str(side.value)
                elif isinstance(side, ast.List | ast.Tuple | ast.Set):
                    yield from (str(part.value) for part in side.elts if isinstance(part, ast.Constant))


def _extension(call: ast.Call, script: Script) -> Extension:
    words = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    name = words.get("name", call.args[0] if call.args else None)
    sources = words.get("sources", call.args[1] if len(call.args) > 1 else None)
    value = value_of(name, script, {}) if name is not None else UNKNOWN
    return Extension(
        name=value if isinstance(value, str) else "",
        kind=dotted(call.func, script).rpartition(".")[2],
        place=_place(call, script),
        sources=tuple(_paths(sources, script)),
        includes=tuple(_paths(words.get("include_dirs"), script)),
    )


def _paths(node: ast.expr | None, script: Script, depth: int = 0) -> Iterator[str]:
    """The known paths of a list, relative to the source tree."""
    match node:
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            for element in elements:
                path = _path(element, script)
                if isinstance(path, str) and path and not path.startswith(("/", "..")):
                    yield str(PurePosixPath(path))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from _paths(left, script, depth)
            yield from _paths(right, script, depth)
        case ast.Name(id=name) if name in script.assigned and depth < _DEEPEST:
            yield from _paths(script.assigned[name], script, depth + 1)


def _path(node: ast.expr, script: Script) -> Any:
    """A path in the source tree, as of `os.path.join(here, 'csrc', 'a.cu')`; UNKNOWN if more than its folder is unknown."""
    match node:
        case ast.Call(func=function, args=[first, *rest]) if dotted(function, script) == "os.path.join" and rest:
            parts = [value_of(part, script, {}) for part in rest]
            start = value_of(first, script, {})
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            parts, start = [value_of(right, script, {})], _path(left, script)
            if start is UNKNOWN and isinstance(left, ast.BinOp):
                return UNKNOWN
        case ast.Call(func=ast.Name(id="str" | "Path"), args=[inner]):
            return _path(inner, script)
        case _:
            return value_of(node, script, {})
    if not all(isinstance(part, str) for part in parts):
        return UNKNOWN
    return str(PurePosixPath(start if isinstance(start, str) else ".", *parts))
