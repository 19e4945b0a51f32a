"""The house of design.md: who may import whom, and under which name."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest

from tests.unit.house import DATA, FOLDERS, SHARED, Module, layered, let_pass, outside, parse, report

# design.md, "The house": a folder is a step of the flow or a thing with one meaning, and imports run downwards only.
# A line is a layer: a module imports from its own folder and from the lines below. Names of one line do not import each other.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "builder": (
        ("__main__",),
        ("cli",),
        ("upkeep",),
        ("sets", "farm"),
        ("flow",),
        ("proof",),
        ("smoke",),
        ("audit",),
        ("drafting",),
        ("compiling",),
        ("toolchains",),
        ("ground",),
        ("fetch",),
        ("planning",),
        ("box",),
        ("elf",),
        ("data",),
    ),
    "index": (
        ("__main__",),
        ("cli",),
        ("serving",),
        ("web",),
        ("simple_api",),
        ("sets",),
        ("intake",),
        ("trust",),
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
        ("engine",),
        ("planning",),
        ("fleet",),
        ("nodes",),
        ("remote",),
        ("data",),
    ),
}
# Functions and methods, also of monkeypatch and mock, whose first or second argument names an attribute.
BY_STRING = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "patch", "object"}
# What the standard library and named tuples call `_name` and document.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make", "_MEIPASS"}
# Packages whose __init__ offers what their modules define; two have a command line's entry point.
OPEN_PACKAGES = {"builder.audit", "builder.fetch", "deploy.cli", "index.cli"}
# What the documentation of a library imports under another name.
CONVENTIONS = {("strategies", "st")}


@dataclass(frozen=True, kw_only=True)
class Import:
    """`importer` reads `imported`, at that line."""

    importer: Module
    line: int
    imported: Module
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.importer.path}:{self.line}"


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
        if each.importer.path.startswith(DATA) and imported == SHARED:
            yield f"{each} {each.importer.name} imports {each.imported.name}: {SHARED}/ does not exist where data/ runs"
        elif importer in FOLDERS and imported not in (importer, SHARED):
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


def own_imports(modules: dict[str, Module]) -> Iterator[str]:
    """Imports of `__init__` from its own package: each of the modules imports the package first, unseen by `circles`."""
    for each in imports(modules):
        package = each.importer
        inside = each.imported.name.startswith(f"{package.name}.")
        if package.path.endswith("/__init__.py") and inside and package.name not in OPEN_PACKAGES:
            yield f"{each} {package.name} imports its own {each.imported.name}: move what needs it to a module of the package"


def first_circle(edges: dict[str, dict[str, Import]]) -> list[str] | None:
    """Names of the modules of a circle, the first again at the end, importers first."""
    try:
        graphlib.TopologicalSorter({name: list(imported) for name, imported in edges.items()}).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return None


def private_imports(modules: dict[str, Module]) -> Iterator[str]:
    """`from module import _name`, and `_name` of an object whose class is another module's, by a dot or as a string."""
    advice = "give it a public name, or ask its module for what you need"
    for each in imports(modules):
        for name in (name for name in each.names if is_private(name)):
            yield f"{each} {name} is private to {each.imported.name}: {advice}"
    # A program of a data folder changes setuptools, where only private names exist.
    for module in (module for module in modules.values() if not module.path.startswith(DATA)):
        own = own_names(module.tree) | DOCUMENTED
        for node in ast.walk(module.tree):
            for name in (name for name in attributes(node) if is_private(name) and name not in own):
                line = getattr(node, "lineno", 1)
                yield f"{module.path}:{line} {name} in {ast.unparse(node)} is private to another module: {advice}"


def attributes(node: ast.AST) -> Iterator[str]:
    """What a node takes of another object: `wheel._names`, `setattr(wheel, "_names", …)`, `setattr("wheel._names", …)`."""
    match node:
        case ast.Attribute(attr=name):
            yield name
        case ast.Call(func=ast.Name(id=function) | ast.Attribute(attr=function), args=arguments) if function in BY_STRING:
            strings = [argument.value for argument in arguments[:2] if isinstance(argument, ast.Constant)]
            yield from (value.rpartition(".")[2] for value in strings if isinstance(value, str))


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
    """Imports under another name, of our modules and of others; a module's last part is its own name."""
    for path, line, name, asname in aliased(modules):
        if (name, asname) not in CONVENTIONS:
            yield f"{path}:{line} {name} as {asname}: give one of the two another name, or import the module"


def aliased(modules: dict[str, Module]) -> Iterator[tuple[str, int, str, str]]:
    """Path, line, imported name and given name of each import under another name."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    if alias.asname not in (None, alias.name.rpartition(".")[2]):
                        yield module.path, node.lineno, alias.name, alias.asname or ""


def test_every_module_is_in_a_folder_that_has_a_layer() -> None:
    report(unplaced(layered()))


def test_every_layer_has_modules() -> None:
    there = {(module.program, module.layer) for module in layered().values()}
    assert {(program, name) for program, layers in LAYERS.items() for layer in layers for name in layer} - there == set()


def test_imports_run_downwards() -> None:
    report(upward(layered()))


def test_no_circle_of_imports() -> None:
    report(circles(layered()))


def test_a_package_imports_nothing_of_its_own() -> None:
    report(own_imports(layered()))


def test_no_program_imports_another_and_nobody_imports_tools() -> None:
    report(across(outside()))


def test_nothing_private_is_used_from_outside_its_module() -> None:
    report(private_imports(layered()))


def test_tests_import_nothing_private() -> None:
    report(private_imports(outside()))


def test_nothing_is_imported_under_another_name() -> None:
    report(aliases(outside()))


BELOW = {
    "builder/audit/tag.py": "TAG = 1\n_HIDDEN = 2",
    "builder/data/toolchain/schedule.py": "",
    "gracefarm/files.py": "",
    "index/names.py": "",
    "index/errors.py": "",
    "tools/options.py": "",
    "deploy/cli.py": "",
}


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
        (
            own_imports,
            "gracefarm/__init__.py",
            "from gracefarm.files import A",
            "gracefarm/__init__.py:1 gracefarm imports its own gracefarm.files",
        ),
        (across, "index/app.py", "from builder.audit.tag import TAG", "index imports builder.audit.tag"),
        (across, "gracefarm/app.py", "import index.names", "gracefarm imports index.names"),
        (across, "deploy/app.py", "from tools import options", "deploy imports tools.options"),
        (across, "bench/app.py", "from tools import options", "bench.app imports tools.options"),
        (
            across,
            "deploy/app.py",
            "from builder.data.toolchain import schedule",
            "deploy imports builder.data.toolchain.schedule",
        ),
        (across, "builder/data/probe.py", "from gracefarm import files", "builder.data.probe imports gracefarm.files"),
        (upward, "builder/data/probe.py", "from builder.audit import tag", "data is not above audit"),
        (
            private_imports,
            "builder/cli.py",
            "from builder.audit.tag import _HIDDEN",
            "cli.py:1 _HIDDEN is private to builder.audit.tag",
        ),
        (
            private_imports,
            "builder/cli.py",
            "from builder.data.toolchain.schedule import _read",
            "_read is private to builder.data",
        ),
        (
            private_imports,
            "builder/cli.py",
            "from builder.audit import tag\ntag._HIDDEN",
            "cli.py:2 _HIDDEN in tag._HIDDEN",
        ),
        (
            private_imports,
            "builder/cli.py",
            "def f(wheel):\n    return wheel._names",
            "cli.py:2 _names in wheel._names",
        ),
        (private_imports, "tests/a.py", "monkeypatch.setattr(tag, '_HIDDEN', 2)", "a.py:1 _HIDDEN in monkeypatch.setattr"),
        (private_imports, "tests/a.py", "monkeypatch.setattr('builder.audit.tag._HIDDEN', 2)", "a.py:1 _HIDDEN in "),
        (private_imports, "tests/a.py", "getattr(tag, '_HIDDEN')", "a.py:1 _HIDDEN in getattr"),
        (aliases, "builder/cli.py", "from builder.audit import tag as tags", "cli.py:1 tag as tags"),
        (aliases, "builder/cli.py", "import builder.audit.tag as tags", "cli.py:1 builder.audit.tag as tags"),
        (aliases, "deploy/cli.py", "from rich.console import Console as RichConsole", "cli.py:1 Console as RichConsole"),
        (aliases, "tests/a.py", "def f():\n    from dataclasses import replace as replaced", "a.py:2 replace as replaced"),
        (aliases, "tests/a.py", "import numpy as np", "a.py:1 numpy as np"),
    ],
)
def test_the_checkers_see(checker: Callable[[dict[str, Module]], Iterable[str]], path: str, source: str, words: str) -> None:
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


def test_the_checkers_let_pass_what_is_allowed() -> None:
    let_pass((unplaced, upward, circles, own_imports, across, private_imports, aliases), BELOW)
