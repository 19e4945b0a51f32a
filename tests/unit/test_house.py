"""The house of design.md: who may import whom, what a loop variable may be called, how long functions and files may be."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from tests.conftest import REPOSITORY

# design.md, "The house": a folder is a step of the flow or a thing with one meaning, and imports run downwards only.
# A line is a layer: a module imports from its own folder and from the lines below. Names of one line do not import each other.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "builder": (
        ("__main__",),
        ("cli",),
        ("upkeep",),
        ("sets",),
        ("flow",),
        ("proof",),
        ("smoke",),
        ("audit",),
        ("compiling",),
        ("toolchains",),
        ("ground",),
        ("fetch",),
        ("planning",),
        ("box",),
        ("elf",),
    ),
    "index": (
        ("__main__",),
        ("cli",),
        ("serving",),
        ("web",),
        ("simple_api",),
        ("sets",),
        ("intake",),
        ("store",),
        ("names", "limits"),
        ("errors",),
    ),
    "deploy": (
        ("__main__",),
        ("cli",),
        ("rehearsal",),
        ("watch",),
        ("measure",),
        ("steps",),
        ("planning",),
        ("fleet",),
        ("nodes",),
        ("remote",),
    ),
}
PROGRAMS = tuple(LAYERS)
SHARED = "gracefarm"
FOLDERS = (*PROGRAMS, SHARED)
EVERYWHERE = (*FOLDERS, "tests", "bench", "tools", "recipes", "sets")

# Programs of their own: they are copied to where they run, and import nothing of ours.
DATA = ("builder/data/", "deploy/data/")
# The bytes of the compiler wrappers enter every build id, so their variables keep their names.
FROZEN = "builder/data/toolchain/"

# Each is the first function of a process of its own, before anything that reads its environment is imported: the builder's,
# and the two calls of deploy.remote that import Ray and torch, which take these settings from nowhere else.
FIRST_OF_A_PROCESS = {
    ("builder/cli/__init__.py", "main"),
    ("deploy/remote/cluster.py", "nodes"),
    ("deploy/remote/preflight.py", "collective"),
}

EMPTY_WORDS = {"one", "found", "done", "said", "made", "it"}
FUNCTION_LINES = 60
FILE_LINES = 500
LONG_FILES = 3
CHANGES = {"append", "add", "update", "pop", "popitem", "setdefault", "clear", "extend", "insert", "remove", "discard"}
# What the standard library and named tuples call `_name` and document.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make", "_MEIPASS"}


@dataclass(frozen=True, kw_only=True)
class Module:
    """A parsed file of the repository."""

    path: str
    name: str
    tree: ast.Module
    lines: int

    @property
    def program(self) -> str:
        """The top folder."""
        return self.name.partition(".")[0]

    @property
    def layer(self) -> str:
        """The folder below the program, or the module's own name beside these folders."""
        return self.name.split(".")[1] if "." in self.name else "__init__"


@dataclass(frozen=True, kw_only=True)
class Import:
    """`importer` reads `imported`, at that line."""

    importer: Module
    line: int
    imported: Module
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.importer.path}:{self.line}"


def parse(sources: dict[str, str]) -> dict[str, Module]:
    """Modules by dotted name, of path to source."""
    modules = {}
    for path, source in sources.items():
        parts = list(PurePosixPath(path).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(path=path, name=name, tree=ast.parse(source), lines=len(source.splitlines()))
    return modules


def read(*folders: str) -> dict[str, Module]:
    """The repository's own files below these folders."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return parse({path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in paths})


@pytest.fixture(scope="module")
def everything() -> dict[str, Module]:
    """All of our Python but the wrappers whose bytes count."""
    return {name: module for name, module in read(*EVERYWHERE).items() if not module.path.startswith(FROZEN)}


@pytest.fixture(scope="module")
def outside(everything: dict[str, Module]) -> dict[str, Module]:
    """The programs, and what uses them: tests, benchmarks, tools."""
    known = {name: module for name, module in everything.items() if not module.path.startswith(DATA)}
    return {name: module for name, module in known.items() if module.program not in ("recipes", "sets")}


@pytest.fixture(scope="module")
def programs(outside: dict[str, Module]) -> dict[str, Module]:
    """The three programs and what they share."""
    return {name: module for name, module in outside.items() if module.program in FOLDERS}


def imports(modules: dict[str, Module]) -> Iterator[Import]:
    """Every import of one of the modules by another: in functions, under TYPE_CHECKING and by importlib too."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            for target, names in targets(node, modules):
                yield Import(importer=module, line=getattr(node, "lineno", 1), imported=modules[target], names=names)


def targets(node: ast.AST, modules: dict[str, Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted names of the modules that a statement or a call imports, each with the names taken from it."""
    match node:
        case ast.Import(names=aliases):
            for alias in aliases:
                if (module := longest(alias.name, modules)) is not None:
                    yield module, ()
        case ast.ImportFrom(module=str() as parent, names=aliases, level=0):
            plain = tuple(alias.name for alias in aliases if f"{parent}.{alias.name}" not in modules)
            yield from ((f"{parent}.{alias.name}", ()) for alias in aliases if f"{parent}.{alias.name}" in modules)
            if plain and parent in modules:
                yield parent, plain
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
            args=[ast.Constant(value=str() as name), *_],
        ):
            if (module := longest(name, modules)) is not None:
                yield module, ()


def longest(name: str, modules: dict[str, Module]) -> str | None:
    """The longest beginning of a dotted name that is one of the modules."""
    parts = name.split(".")
    return next((start for end in range(len(parts), 0, -1) if (start := ".".join(parts[:end])) in modules), None)


def unplaced(modules: dict[str, Module]) -> Iterator[str]:
    """Modules of a folder that no layer names."""
    for module in modules.values():
        known = {name for layer in LAYERS.get(module.program, ()) for name in layer} | {"__init__"}
        if module.program in LAYERS and module.layer not in known:
            yield f"{module.path}:1 {module.program}/{module.layer} has no place in LAYERS of this test: give it one"


def upward(modules: dict[str, Module]) -> Iterator[str]:
    """Imports of a folder that is not below the importer's own."""
    places = {(program, name): i for program, layers in LAYERS.items() for i, layer in enumerate(layers) for name in layer}
    for each in imports(modules):
        above, below = each.importer, each.imported
        if above.program != below.program or above.layer == below.layer or above.program not in LAYERS:
            continue
        start, end = places.get((above.program, above.layer), -1), places.get((below.program, below.layer), -1)
        if end <= start:
            yield (
                f"{each} {above.name} imports {below.name}, and {above.layer} is not above {below.layer}: "
                "move the fact that both need down, or pass the value in"
            )


def across(modules: dict[str, Module]) -> Iterator[str]:
    """Imports of another program, or of what is not a program at all; tests of tools/ may import it."""
    for each in imports(modules):
        importer, imported = each.importer.program, each.imported.program
        if importer in FOLDERS and imported not in (importer, SHARED):
            yield f"{each} {importer} imports {each.imported.name}: programs share nothing but {SHARED}/"
        elif imported == "tools" and importer not in ("tools", "tests"):
            yield f"{each} {each.importer.name} imports {each.imported.name}: move what you need out of tools/"


def circles(modules: dict[str, Module]) -> Iterator[str]:
    """Each circle of imports; of two that share an import, the first."""
    edges: dict[str, dict[str, Import]] = {name: {} for name in modules}
    for each in imports(modules):
        edges[each.importer.name].setdefault(each.imported.name, each)
    while (circle := first_circle(edges)) is not None:
        steps = [edges[importer][imported] for importer, imported in itertools.pairwise(circle)]
        yield (
            " -> ".join(f"{step} {step.imported.name}" for step in steps)
            + ": a circle; move what both ends need to a module below them"
        )
        del edges[circle[0]][circle[1]]


def first_circle(edges: dict[str, dict[str, Import]]) -> list[str] | None:
    """Names of the modules of a circle, the first again at the end, importers first."""
    try:
        graphlib.TopologicalSorter({name: list(imported) for name, imported in edges.items()}).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return None


def private_imports(modules: dict[str, Module]) -> Iterator[str]:
    """`from module import _name`, and `_name` of an object whose class is another module's."""
    advice = "give it a public name, or ask its module for what you need"
    for each in imports(modules):
        for name in (name for name in each.names if is_private(name)):
            yield f"{each} {name} is private to {each.imported.name}: {advice}"
    for module in modules.values():
        own = own_names(module.tree)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | DOCUMENTED:
                yield f"{module.path}:{node.lineno} {ast.unparse(node)} is private to another module: {advice}"


def is_private(name: str) -> bool:
    """`_name`, not `__name__` and not `_`."""
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """What a module defines itself: functions, classes, variables, attributes that its methods set."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return names | {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}


def aliases(modules: dict[str, Module]) -> Iterator[str]:
    """Imports of our own under another name."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if not any(True for _ in targets(node, modules)) or not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for alias in node.names:
                if alias.asname is not None:
                    yield f"{module.path}:{node.lineno} {alias.name} as {alias.asname}: give one of the two another name"


def loop_variables(modules: dict[str, Module]) -> Iterator[str]:
    """Variables of loops and comprehensions that do not say what they hold."""
    for module in modules.values():
        loops = [node for node in ast.walk(module.tree) if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)]
        for name in (name for loop in loops for name in ast.walk(loop.target) if isinstance(name, ast.Name)):
            if name.id in EMPTY_WORDS:
                yield f"{module.path}:{name.lineno} the loop variable {name.id!r} is empty: `for node in nodes`"


def long_functions(modules: dict[str, Module]) -> Iterator[str]:
    """Functions that do not fit on a screen."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{module.path}:{node.lineno} {node.name} has {length} lines of at most {FUNCTION_LINES}: divide it"


def long_files(modules: dict[str, Module]) -> list[str]:
    """Files that are too long without saying why; all of them where there are too many."""
    files = [module for module in modules.values() if module.lines > FILE_LINES]
    silent = [module for module in files if f"{FILE_LINES} lines" not in (ast.get_docstring(module.tree) or "")]
    if len(files) > LONG_FILES:
        return [
            f"{module.path}:1 has {module.lines} lines: divide it, {len(files)} files have over {FILE_LINES}, {LONG_FILES} may"
            for module in files
        ]
    return [
        f"{module.path}:1 has {module.lines} lines: divide it, or say in its docstring why it has over {FILE_LINES} lines"
        for module in silent
    ]


def process_state(modules: dict[str, Module]) -> Iterator[str]:
    """Changes of os.environ, and module-level state that functions change."""
    for module in modules.values():
        starts = {node for name, node in environ_changes(module) if (module.path, name) in FIRST_OF_A_PROCESS}
        for node in ast.walk(module.tree):
            if changes_environ(node) and node not in starts:
                yield f"{module.path}:{getattr(node, 'lineno', 1)} changes os.environ: pass an environment to what needs it"
            if isinstance(node, ast.Global):
                yield f"{module.path}:{node.lineno} global {', '.join(node.names)}: keep the state in an object and pass it"
        yield from mutated(module)


def environ_changes(module: Module) -> Iterator[tuple[str, ast.AST]]:
    """Function of the module, and the node in it that changes os.environ."""
    for function in module.tree.body:
        if isinstance(function, ast.FunctionDef):
            yield from ((function.name, node) for node in ast.walk(function) if changes_environ(node))


def changes_environ(node: ast.AST) -> bool:
    """os.environ[…] = …, del os.environ[…], os.environ.update(…) and its like, os.putenv."""
    match node:
        case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
            return is_environ(value)
        case ast.AugAssign(target=value):
            return is_environ(value)
        case ast.Call(func=ast.Attribute(value=value, attr=method)):
            return (method in CHANGES and is_environ(value)) or method in ("putenv", "unsetenv")
    return False


def is_environ(node: ast.AST) -> bool:
    """os.environ, by either name."""
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def mutated(module: Module) -> Iterator[str]:
    """Containers at module level that a function fills."""
    containers = {name for statement in module.tree.body for name in container_names(statement)}
    functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        local = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        local |= {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
        for node in ast.walk(function):
            match node:
                case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                    pass
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in CHANGES:
                    pass
                case _:
                    continue
            if name in containers - local:
                yield f"{module.path}:{node.lineno} changes the module's {name}: keep the state in an object and pass it"


def container_names(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement binds to something that can be filled."""
    match statement:
        case ast.Assign(targets=names, value=value):
            bound: list[ast.expr] = names
        case ast.AnnAssign(target=name, value=ast.expr() as value):
            bound = [name]
        case _:
            return
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.Call | ast.ListComp | ast.DictComp | ast.SetComp):
        yield from (name.id for name in bound if isinstance(name, ast.Name))


def report(violations: Iterator[str] | list[str]) -> None:
    """Fail with one line a violation."""
    if lines := sorted(set(violations)):
        pytest.fail("\n".join(lines), pytrace=False)


def test_every_module_is_in_a_folder_that_has_a_layer(programs: dict[str, Module]) -> None:
    report(unplaced(programs))


def test_every_layer_has_modules(programs: dict[str, Module]) -> None:
    there = {(module.program, module.layer) for module in programs.values()}
    assert {(program, name) for program, layers in LAYERS.items() for layer in layers for name in layer} - there == set()


def test_imports_run_downwards(programs: dict[str, Module]) -> None:
    report(upward(programs))


def test_no_circle_of_imports(programs: dict[str, Module]) -> None:
    report(circles(programs))


def test_no_program_imports_another_and_nobody_imports_tools(outside: dict[str, Module]) -> None:
    report(across(outside))


def test_nothing_private_is_used_from_outside_its_module(programs: dict[str, Module]) -> None:
    report(private_imports(programs))


def test_tests_import_nothing_private(outside: dict[str, Module]) -> None:
    report(private_imports(outside))


def test_no_import_of_ours_under_another_name(programs: dict[str, Module]) -> None:
    report(aliases(programs))


def test_a_loop_variable_says_what_it_holds(everything: dict[str, Module]) -> None:
    report(loop_variables(everything))


def test_a_function_fits_on_a_screen(programs: dict[str, Module]) -> None:
    report(long_functions(programs))


def test_a_file_is_short_or_says_why_not(programs: dict[str, Module]) -> None:
    report(long_files(programs))


def test_nothing_changes_the_process(programs: dict[str, Module]) -> None:
    report(process_state(programs))


def test_no_exception_is_left_over(programs: dict[str, Module]) -> None:
    assert {(module.path, name) for module in programs.values() for name, _ in environ_changes(module)} >= FIRST_OF_A_PROCESS


BELOW = {
    "builder/audit/tag.py": "TAG = 1\n_HIDDEN = 2",
    "index/names.py": "",
    "index/errors.py": "",
    "tools/options.py": "",
    "deploy/cli.py": "",
}
LONG = "\n".join(["def long():", *["    pass"] * 60])


@pytest.mark.parametrize(
    ("checker", "path", "source", "words"),
    [
        (unplaced, "builder/shed/__init__.py", "", "builder/shed has no place"),
        (
            upward,
            "builder/fetch/git.py",
            "from builder.audit import tag",
            "fetch/git.py:1 builder.fetch.git imports builder.audit.tag",
        ),
        (upward, "builder/fetch/git.py", "\ndef f():\n    import builder.audit.tag", "fetch/git.py:3 "),
        (upward, "builder/fetch/git.py", "if TYPE_CHECKING:\n    from builder.audit.tag import TAG", "fetch/git.py:2 "),
        (upward, "builder/fetch/git.py", "importlib.import_module('builder.audit.tag')", "fetch/git.py:1 "),
        (upward, "index/limits.py", "from index import names", "limits is not above names"),
        (circles, "index/errors.py", "import index.errors", "index/errors.py:1 index.errors: a circle"),
        (across, "index/app.py", "from builder.audit.tag import TAG", "index imports builder.audit.tag"),
        (across, "gracefarm/app.py", "import index.names", "gracefarm imports index.names"),
        (across, "deploy/app.py", "from tools import options", "deploy imports tools.options"),
        (across, "bench/app.py", "from tools import options", "bench.app imports tools.options"),
        (
            private_imports,
            "builder/cli.py",
            "from builder.audit.tag import _HIDDEN",
            "cli.py:1 _HIDDEN is private to builder.audit.tag",
        ),
        (private_imports, "builder/cli.py", "from builder.audit import tag\ntag._HIDDEN", "cli.py:2 tag._HIDDEN is private"),
        (private_imports, "builder/cli.py", "def f(wheel):\n    return wheel._names", "cli.py:2 wheel._names is private"),
        (aliases, "builder/cli.py", "from builder.audit import tag as tags", "cli.py:1 tag as tags"),
        (aliases, "builder/cli.py", "import builder.audit.tag as tags", "cli.py:1 builder.audit.tag as tags"),
        (loop_variables, "recipes/a/smoke.py", "for one in ():\n    pass", "smoke.py:1 the loop variable 'one'"),
        (loop_variables, "sets/a/smoke.py", "names = [it for (name, it) in ()]", "smoke.py:1 the loop variable 'it'"),
        (
            loop_variables,
            "tests/a.py",
            "async def f():\n    async for found in g():\n        pass",
            "a.py:2 the loop variable 'found'",
        ),
        (long_functions, "index/app.py", LONG, "app.py:1 long has 61 lines"),
        (long_files, "index/app.py", "\n" * 501, "app.py:1 has 501 lines"),
        (process_state, "index/app.py", "import os\nos.environ['A'] = 'b'", "app.py:2 changes os.environ"),
        (process_state, "index/app.py", "import os\nos.environ.update(A='b')", "app.py:2 changes os.environ"),
        (process_state, "index/app.py", "import os\ndel os.environ['A']", "app.py:2 changes os.environ"),
        (process_state, "index/app.py", "import os\nos.environ |= {'A': 'b'}", "app.py:2 changes os.environ"),
        (process_state, "index/app.py", "import os\nos.putenv('A', 'b')", "app.py:2 changes os.environ"),
        (process_state, "index/app.py", "def f():\n    global A\n    A = 1", "app.py:2 global A"),
        (process_state, "index/app.py", "SEEN = set()\ndef f():\n    SEEN.add(1)", "app.py:3 changes the module's SEEN"),
        (
            process_state,
            "index/app.py",
            "SEEN: dict[str, int] = {}\ndef f():\n    SEEN['a'] = 1",
            "app.py:3 changes the module's SEEN",
        ),
    ],
)
def test_the_checkers_see(checker: object, path: str, source: str, words: str) -> None:
    assert callable(checker)
    (violation,) = checker(parse({**BELOW, path: source}))
    assert words in violation


def test_the_checkers_see_a_circle_of_three() -> None:
    circle = {
        "index/a.py": "from index import b",
        "index/b.py": "def f():\n    from index import c",
        "index/c.py": "import index.a",
    }
    (violation,) = circles(parse(circle))
    for place in ("index/a.py:1 index.b", "index/b.py:2 index.c", "index/c.py:1 index.a"):
        assert place in violation


def test_a_fourth_long_file_is_too_many() -> None:
    reason = '"""A table.\n\nIt has over 500 lines, for a table is read as a whole."""' + "\n" * 600
    names = ["index/a.py", "index/b.py", "index/c.py", "index/d.py"]
    assert long_files(parse(dict.fromkeys(names[:3], reason))) == []
    assert len(long_files(parse(dict.fromkeys(names, reason)))) == 4


def test_the_checkers_let_pass_what_is_allowed() -> None:
    source = """
import os
from builder.audit import tag

ROWS = {"a": 1}

class Cell:
    def __init__(self):
        self._rows = []

    def same(self, other):
        return self._rows == other._rows

def rows(environment):
    ROWS = {}
    ROWS["b"] = 2
    return {**os.environ, **environment}, [row for row in ROWS], tag.TAG
"""
    modules = parse({**BELOW, "builder/proof/record.py": source})
    for checker in (
        unplaced,
        upward,
        circles,
        across,
        private_imports,
        aliases,
        loop_variables,
        long_functions,
        long_files,
        process_state,
    ):
        violations = [line for line in checker(modules) if "record.py" in line]
        assert violations == [], checker
