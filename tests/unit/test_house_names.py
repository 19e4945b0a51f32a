"""The house of design.md: what things may be called, how long functions and files may be, and what a process keeps."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.unit.house import Module, everything, let_pass, parse, programs, read, report

# Each is the first function of a new process, before the import of what reads its environment: two of
# the builder's, and the two calls of deploy.remote that import Ray and torch, which take these settings from nowhere else.
FIRST_OF_A_PROCESS = {
    ("builder/cli/__init__.py", "main"),
    ("builder/farm/worker.py", "main"),
    ("deploy/remote/cluster.py", "nodes"),
    ("deploy/remote/preflight.py", "collective"),
}
EMPTY_WORDS = {"one", "found", "done", "said", "made", "it"}
FUNCTION_LINES = 60
FILE_LINES = 500
LONG_FILES = 3
CHANGES = {"append", "add", "update", "pop", "popitem", "setdefault", "clear", "extend", "insert", "remove", "discard"}


def classes(modules: dict[str, Module]) -> Iterator[str]:
    """Names of classes and of types that two modules define."""
    places: dict[str, list[str]] = {}
    for module in modules.values():
        for name, line in class_names(module.tree):
            places.setdefault(name, []).append(f"{module.path}:{line}")
    for name, (first, *others) in places.items():
        for place in others:
            yield f"{place} {name} is defined in {first} too: one meaning, one name; define it once, or say what differs"


def class_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Classes, and what is bound to such a name at the top of the module, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if name[0].isupper() and not name.isupper():
                    yield name, statement.lineno


def loop_variables(modules: dict[str, Module]) -> Iterator[str]:
    """Variables of loops and comprehensions that do not say what they hold."""
    for module in modules.values():
        loops = [node for node in ast.walk(module.tree) if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)]
        for name in (name for loop in loops for name in ast.walk(loop.target) if isinstance(name, ast.Name)):
            if name.id in EMPTY_WORDS:
                yield f"{module.path}:{name.lineno} the loop variable {name.id!r} is empty: `for node in nodes`"


def variables(modules: dict[str, Module]) -> Iterator[str]:
    """Variables and parameters that do not say what they hold; fields of classes may, for `check.found` does."""
    for module in modules.values():
        fields = {name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) for name in field_names(node)}
        for node in ast.walk(module.tree):
            name = bound_name(node)
            if name in EMPTY_WORDS and node not in fields:
                yield f"{module.path}:{getattr(node, 'lineno', 1)} the variable {name!r} is empty: `match = re.search(…)`"


def field_names(node: ast.ClassDef) -> Iterator[ast.AST]:
    """The names that the body of a class binds itself."""
    for statement in node.body:
        match statement:
            case ast.Assign(targets=names):
                yield from names
            case ast.AnnAssign(target=name):
                yield name


def bound_name(node: ast.AST) -> str | None:
    """The variable or parameter that a node binds."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
            return name
    return None


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


def test_a_class_is_defined_once() -> None:
    report(classes(programs()))


def test_a_loop_variable_says_what_it_holds() -> None:
    report(loop_variables(everything()))


def test_a_variable_says_what_it_holds() -> None:
    report(variables({**programs(), **read("bench", "tools")}))


def test_a_function_fits_on_a_screen() -> None:
    report(long_functions(everything()))


def test_a_file_is_short_or_says_why_not() -> None:
    report(long_files(everything()))


def test_nothing_changes_the_process() -> None:
    report(process_state(programs()))


def test_no_exception_is_left_over() -> None:
    assert {(module.path, name) for module in programs().values() for name, _ in environ_changes(module)} >= FIRST_OF_A_PROCESS


LONG = "\n".join(["def long():", *["    pass"] * 60])


@pytest.mark.parametrize(
    ("checker", "path", "source", "words"),
    [
        (loop_variables, "recipes/a/smoke.py", "for one in ():\n    pass", "smoke.py:1 the loop variable 'one'"),
        (loop_variables, "sets/a/smoke.py", "names = [it for (name, it) in ()]", "smoke.py:1 the loop variable 'it'"),
        (
            loop_variables,
            "tests/a.py",
            "async def f():\n    async for found in g():\n        pass",
            "a.py:2 the loop variable 'found'",
        ),
        (variables, "index/app.py", "found = 1", "app.py:1 the variable 'found'"),
        (variables, "index/app.py", "def f(*, done):\n    pass", "app.py:1 the variable 'done'"),
        (variables, "deploy/app.py", "a = lambda it: 1", "app.py:1 the variable 'it'"),
        (variables, "deploy/app.py", "class A:\n    def f(self):\n        one: int = 1", "app.py:3 the variable 'one'"),
        (variables, "tools/a.py", "with f() as made:\n    pass", "a.py:1 the variable 'made'"),
        (variables, "tools/a.py", "if said := f():\n    pass", "a.py:1 the variable 'said'"),
        (variables, "tools/a.py", "try:\n    f()\nexcept ValueError as found:\n    pass", "a.py:3 the variable 'found'"),
        (variables, "tools/a.py", "match f():\n    case {'a': int() as found}:\n        pass", "a.py:2 the variable 'found'"),
        (variables, "tools/a.py", "match f():\n    case [1, *found]:\n        pass", "a.py:2 the variable 'found'"),
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
def test_the_checkers_see(checker: Callable[[dict[str, Module]], Iterable[str]], path: str, source: str, words: str) -> None:
    (violation,) = checker(parse({path: source}))
    assert words in violation


@pytest.mark.parametrize("source", ["class Plan:\n    pass", "Plan = dict[str, int]", "Plan: TypeAlias = dict[str, int]"])
def test_the_checkers_see_a_class_of_two_modules(source: str) -> None:
    (violation,) = classes(parse({"builder/planning/plan.py": "class Plan:\n    pass", "deploy/planning/plans.py": source}))
    assert violation.startswith("deploy/planning/plans.py:1 Plan is defined in builder/planning/plan.py:1 too")


def test_a_fourth_long_file_is_too_many() -> None:
    reason = '"""A table.\n\nIt has over 500 lines, for a table is read as a whole."""' + "\n" * 600
    names = ["index/a.py", "index/b.py", "index/c.py", "index/d.py"]
    assert long_files(parse(dict.fromkeys(names[:3], reason))) == []
    assert len(long_files(parse(dict.fromkeys(names, reason)))) == 4


def test_the_checkers_let_pass_what_is_allowed() -> None:
    let_pass((classes, loop_variables, variables, long_functions, long_files, process_state))
