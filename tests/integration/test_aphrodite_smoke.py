"""The smoke tests of recipes/aphrodite and of its set as they are, on a tiny `aphrodite` whose import swallows what is broken.

Traps 5, 3 and 2 of the pinned builds for the engine itself. torch is a tiny one of the test: it has what the scripts use of it
before the first kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.planning import recipe
from builder.planning.stack import host_arch
from tests import projects
from tests.conftest import REPOSITORY, Farm, new_farm
from tests.integration.fetch_kit import sha256
from tests.integration.test_environment import make_wheel
from tests.integration.test_sets import write_set

NATIVE = host_arch().value
INDEX = "https://torch.example/whl/cu124"
REQUIRES_TORCH = {"requires": {"torch": "torch==2.4.0"}}
NAMES = ("_core_C", "_moe_C", "_C")
TORCH = """
import ctypes

class version:
    cuda = "12.4"

class ops:
    @staticmethod
    def load_library(path):
        print("loading", ctypes.CDLL(str(path))._name)

    class _C:
        pass

def manual_seed(seed):
    raise SystemExit("all libraries are loaded")
"""
SETUP = """
import subprocess
from setuptools import Extension, setup

open("cuda.c", "w").write("int cuPointerGetAttribute(void) { return 0; }")
subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so", "cuda.c"], check=True)

def extension(name, *macros, **more):
    macros = [("INIT", "PyInit_" + name), ("NAME", '"' + name + '"'), *macros]
    if name == "BROKEN_NAME":
        macros.append(("BROKEN", None))
    return Extension("aphrodite." + name, ["core.c"], py_limited_api=True, define_macros=macros, **more)

driver = {"library_dirs": ["."], "libraries": ["cuda"]}
setup(name="aphrodite-engine", version="0.6.4.post1", packages=["aphrodite", "aphrodite.engine"],
      entry_points={"console_scripts": ["aphrodite = aphrodite.engine.main:main"]},
      ext_modules=[extension("_core_C"), extension("_moe_C"), extension("_C", ("DRIVER", None), **driver)])
"""
CORE = """
#define Py_LIMITED_API 0x03080000
#include <Python.h>
#include <stdlib.h>
int cuPointerGetAttribute(void);
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, NAME, 0, -1, 0};
PyMODINIT_FUNC INIT(void) {
    if (getenv("NEVER_SET")) abort();
#ifdef DRIVER
    cuPointerGetAttribute();
#endif
#ifdef BROKEN
    PyErr_SetString(PyExc_ImportError, "broken " NAME);
    return 0;
#endif
    return PyModule_Create(&module);
}
"""
INIT = "try:\n    import aphrodite._C\n    import aphrodite._moe_C\nexcept ImportError:\n    pass\n"
ARGUMENTS = """
class AsyncEngineArgs:
    @staticmethod
    def add_cli_args(parser):
        for name in ("--tensor-parallel-size", "--pipeline-parallel-size", "--kv-cache-dtype"):
            parser.add_argument(name)
        return parser
"""
MAIN = "import sys\n\ndef main():\n    sys.exit(0 if sys.argv[1:] == ['run', '--help'] else 2)\n"


def commit() -> str:
    data = recipe.load(REPOSITORY / "recipes", "aphrodite").data
    assert data.source.kind == "git"
    return data.source.commit


def project(broken: str = "") -> dict[str, str | bytes]:
    return {
        "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
        "setup.py": SETUP.replace("BROKEN_NAME", broken),
        "core.c": CORE,
        "aphrodite/__init__.py": INIT,
        "aphrodite/commit_id.py": f'__commit__ = "{commit()}"\n__short_commit__ = "{commit()[:7]}"\n',
        "aphrodite/engine/__init__.py": "",
        "aphrodite/engine/args_tools.py": ARGUMENTS,
        "aphrodite/engine/main.py": MAIN,
    }


@pytest.fixture(scope="module")
def engine(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A farm whose stack `own` has the tiny torch, from its own index like the real one."""
    folder = tmp_path_factory.mktemp("torch")
    # The functions of the driver are those that the environment declares.
    files = {"torch.py": TORCH, "nvidia/cu13/include/cuda.h": "CUresult cuPointerGetAttribute(void);\n"}
    wheel = make_wheel(folder, "torch", "2.4.0", files)
    page = folder / "torch"
    page.mkdir()
    shutil.move(wheel, page / wheel.name)
    (page / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    own = f'[[environment.wheels]]\nname = "torch"\nversion = "2.4.0"\narch = "{NATIVE}"\nindex = "{INDEX}"\n'
    own += f'sha256 = "{sha256((page / wheel.name).read_bytes())}"\n\n'
    with new_farm(shared_home) as farm:
        stacks = farm.settings.project / "stacks"
        shutil.copytree(stacks / "bare", stacks / "own")
        place = stacks / "own" / "stack.toml"
        text = place.read_text().replace('name = "bare"', 'name = "own"', 1)
        text = text.replace('requirements = ["build"', 'requirements = ["torch==2.4.0", "build"', 1)
        place.write_text(text.replace("[toolchain]\n", f"{own}[toolchain]\n", 1))
        farm.environment["GRACEFARM_MIRRORS"] = f"{INDEX}={folder.as_uri()}"
        yield farm


def write(farm: Farm, files: dict[str, str | bytes], script: bool) -> None:
    """recipes/aphrodite over `files`, with the committed one's imports and, on demand, its smoke.py."""
    imports = list(recipe.load(REPOSITORY / "recipes", "aphrodite").data.imports)
    values = {"name": "aphrodite-engine", "version": "0.6.4.post1", "stack": "own", "smoke": {"imports": imports}}
    folder = farm.recipe("aphrodite", files, **values, wheel=REQUIRES_TORCH)
    (folder / "smoke.py").unlink(missing_ok=True)
    if script:
        shutil.copy(REPOSITORY / "recipes/aphrodite/smoke.py", folder)


def edited(wheel: Path, into: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of a wheel with other contents."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(into / wheel.name, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return into / wheel.name


def test_trap_3_a_build_never_gets_the_torch_of_the_same_version_that_an_index_offers(engine: Farm, tmp_path: Path) -> None:
    """pyproject.toml asks for torch==2.4.0, and for an isolated build pip takes the index's, which is the CPU build."""
    make_wheel(tmp_path / "offered", "torch", "2.4.0", {"torch.py": "class version:\n    cuda = None\n"})
    body = "import torch\nreturn wheel(wheel_directory, files={'tiny/cuda.txt': str(torch.version.cuda).encode()})"
    files = projects.backend(body)
    files["pyproject.toml"] = str(files["pyproject.toml"]).replace("requires = []", 'requires = ["torch==2.4.0"]')
    offered = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "offered"), "PIP_CONFIG_FILE": os.devnull}

    def linked(wheel: Path) -> str:
        with zipfile.ZipFile(wheel) as opened:
            return opened.read("tiny/cuda.txt").decode()

    (tmp_path / "source").mkdir()
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(str(text))
    isolated = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tmp_path / "source"]
    subprocess.run(isolated, check=True, capture_output=True, timeout=120, env=os.environ | offered)
    (found,) = tmp_path.glob("*.whl")
    assert linked(found) == "None", "the trap"

    engine.recipe("tiny", files, stack="own", wheel=REQUIRES_TORCH)
    done = engine.run("build", "tiny", "--target", NATIVE, **offered)
    assert done.code == 0, done.said
    assert linked(Path(done.out.strip())) == "12.4"


@pytest.fixture(scope="module")
def wheel(engine: Farm) -> Path:
    """Built by the real pipeline, with the recipe's own smoke test, where the package itself does not import."""
    write(engine, project() | {"aphrodite/__init__.py": "raise ImportError('wants triton')\n"}, script=True)
    done = engine.run("build", "aphrodite", "--target", NATIVE)
    assert done.code == 0, done.said
    assert "imported torch, aphrodite._core_C, aphrodite._moe_C, aphrodite._C in a clean environment" in done.said
    return Path(done.out.strip())


def test_trap_5_a_broken_extension_of_the_engine_fails_the_recipes_own_smoke_test(
    engine: Farm, wheel: Path, tmp_path: Path
) -> None:
    smoke = ("smoke", "--stack", "own", "--recipe", "aphrodite")
    for name in NAMES:
        other = "_moe_C" if name == "_core_C" else "_core_C"
        with zipfile.ZipFile(wheel) as opened:
            foreign = opened.read(f"aphrodite/{other}.abi3.so")
        broken = edited(wheel, tmp_path, lambda one, data: foreign if one == f"aphrodite/{name}.abi3.so" else data)  # noqa: B023
        done = engine.run(*smoke, str(broken))
        assert done.code == 31, (name, done.said)
        assert f"PyInit_{name}" in done.said


def test_trap_2_an_engine_that_does_not_say_its_commit_fails_the_recipes_own_smoke_test(
    engine: Farm, wheel: Path, tmp_path: Path
) -> None:
    other = edited(
        wheel,
        tmp_path,
        lambda _, data: data.replace(commit().encode(), b"PLACE_HOLDER").replace(commit()[:7].encode(), b"SHORT"),
    )
    done = engine.run("smoke", "--stack", "own", "--recipe", "aphrodite", str(other))
    assert done.code == 31, done.said
    assert f"says no commit, not {commit()}" in done.said


def test_the_test_on_a_gpu_needs_no_more_of_its_environment_than_the_one_without(engine: Farm, wheel: Path) -> None:
    """No GPU here: it comes as far as torch's own numbers, past all that it loads, where the package does not import."""
    driver = "import ctypes, subprocess, pathlib\n"
    driver += (
        "subprocess.run(['gcc', '-shared', '-fPIC', '-Wl,-soname,libcuda.so.1', '-x', 'c', '-', '-o', '/tmp/libcuda.so.1'],"
    )
    driver += " input='int cuPointerGetAttribute(void) { return 0; }', text=True, check=True)\n"
    driver += "ctypes.CDLL('/tmp/libcuda.so.1', mode=ctypes.RTLD_GLOBAL)\n"
    script = engine.settings.project / "gpu.py"
    script.write_text(driver + (REPOSITORY / "recipes/aphrodite/smoke_gpu.py").read_text())
    done = engine.run("smoke", str(wheel), "--stack", "own", "--import", "torch", "--script", str(script))
    assert done.code == 31, done.said
    assert "all libraries are loaded" in done.said


def together() -> dict[str, object]:
    """What the committed set imports and runs of the engine; it has the two others beside it."""
    table = tomllib.loads((REPOSITORY / "sets/gh200-cu124/set.toml").read_text())["together"]
    return {
        "imports": [module for module in table["imports"] if module.split(".")[0] in ("torch", "aphrodite")],
        "commands": table["commands"],
    }


@pytest.mark.parametrize("broken", ["", "_moe_C", "_C"])
def test_trap_5_a_broken_extension_of_the_engine_fails_the_sets_own_smoke_test(engine: Farm, broken: str) -> None:
    write(engine, project(broken), script=False)
    (engine.settings.project / "recipes/aphrodite/smoke.py").write_text('LOADED = ["aphrodite"]\nimport aphrodite\n')
    write_set(engine, "together", ["aphrodite"], [], stack="own", together=together())
    shutil.copy(REPOSITORY / "sets/gh200-cu124/smoke.py", engine.settings.project / "sets/together/smoke.py")
    done = engine.run("set", "build", "together")
    assert (done.code, f"broken {broken}" in done.said) == ((31, True) if broken else (0, False)), done.said
