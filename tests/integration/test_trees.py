"""A recipe whose product is a tree, and one that takes it: a generator for the host, a library for the target."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder import elf
from builder.planning import recipe, stack
from builder.planning.stack import Arch, host_arch
from builder.proof import materials, record
from builder.toolchains.choice import make_plan
from gracefarm.errors import ConfigError
from tests.conftest import Farm
from tests.integration.test_build import record_of
from tests.integration.test_sets import write_set

NATIVE = host_arch().value
URL = "https://blobs.example/llvm.tar.gz"
ARCHIVE = {"url": URL, "sha256_unknown": "not reached", "license": "MIT"}
PLACE = "seed/llvm"
LIBRARY: dict[str, str | bytes] = {
    "generator/CMakeLists.txt": "cmake_minimum_required(VERSION 3.20)\nproject(generator CXX)\n"
    "add_executable(generate generate.cpp)\n",
    "generator/generate.cpp": "#include <cstdio>\n"
    'int main(int, char **names) { std::printf("int %s() { return 42; }\\n", names[1]); }\n',
    "library/CMakeLists.txt": "cmake_minimum_required(VERSION 3.20)\nproject(library CXX)\n"
    "add_custom_command(OUTPUT answer.cpp COMMAND ${GENERATE} answer > answer.cpp)\n"
    "add_library(answer STATIC answer.cpp)\nset_property(TARGET answer PROPERTY POSITION_INDEPENDENT_CODE ON)\n"
    "install(TARGETS answer DESTINATION lib)\n",
    "LICENSE.TXT": "Do as you like.\n",
}
COMMANDS = [
    "env -u CMAKE_TOOLCHAIN_FILE CXX=$CXX_FOR_BUILD cmake -S generator -B /build/host",
    "cmake --build /build/host",
    "cmake -S library -B /build/target -DGENERATE=/build/host/generate -DCMAKE_INSTALL_PREFIX=$OUT",
    "cmake --build /build/target --target install",
    "install -D /build/host/generate $OUT/bin/generate",
    "cp LICENSE.TXT $OUT/",
]
# As triton's CMake runs mlir-tblgen: the generator is for the machine that builds, so no kernel starts the target's.
TAKER: dict[str, str | bytes] = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
    "setup.py": "import subprocess\nfrom setuptools import Extension, setup\n"
    f"with open('more.cpp', 'w') as text:\n    subprocess.run(['{PLACE}/bin/generate', 'more'], stdout=text, check=True)\n"
    "setup(name='taker', version='1.0', py_modules=[], ext_modules=[Extension('taker', ['taker.cpp', 'more.cpp'],\n"
    f"      extra_objects=['{PLACE}/lib/libanswer.a'], language='c++')])\n",
    "taker.cpp": "#include <Python.h>\nint answer();\nint more();\n"
    'static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "taker", 0, -1, 0};\n'
    "PyMODINIT_FUNC PyInit_taker(void) {\n"
    "    PyObject *made = PyModule_Create(&module);\n"
    '    PyModule_AddIntConstant(made, "answer", answer() + more());\n    return made;\n}\n',
}


def write(farm: Farm, holds: tuple[str, ...] = ("lib/libanswer.a", "bin/generate"), commands: list[str] = COMMANDS) -> None:
    """Recipe llvm, which makes a tree, and recipe taker, which takes it where --llvm source asks for it."""
    tree = {"commands": commands, "holds": list(holds)}
    folder = farm.recipe("llvm", LIBRARY, stack="cxx", tree=tree, license="MIT")
    place = folder / "recipe.toml"
    place.write_text(re.sub(r"^smoke = .*\n", "", place.read_text(), flags=re.MULTILINE))
    folder = farm.recipe(
        "taker",
        TAKER,
        files=[ARCHIVE | {"path": "seed", "unpack": True, "binfmt": True}, {"text": "here", "path": f"{PLACE}/version.txt"}],
        trees=[{"recipe": "llvm", "path": PLACE, "replaces": "seed"}],
        wheel={"licenses": [f"{PLACE}/LICENSE.TXT"]},
    )
    (folder / "smoke.py").write_text("import taker\nassert taker.answer == 84, taker.answer\n")


@pytest.mark.parametrize("target", list(Arch) if host_arch() is Arch.X86_64 else [Arch.AARCH64])
def test_a_tree_is_built_first_kept_by_its_build_id_and_linked_into_the_wheel(farm: Farm, target: Arch) -> None:
    write(farm)
    command = ("build", "taker", "--target", target.value)
    waits = farm.run(*command)
    assert (waits.code, URL in waits.said) == (3, True), waits.said
    from_source = (*command[1:], "--llvm", "source")
    (tree,) = json.loads(farm.run("plan", *from_source, "--json").out)["trees"]
    said = f"tree llvm 1.0 for {target}, stack cxx, build id {tree['build_id']}: not built"
    assert said in farm.run("plan", *from_source).said

    done = farm.run(*command, "--llvm", "source")
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'llvm').out[-3000:]}"
    place = record.tree_path(farm.settings, tree["build_id"])
    program, library = place / "bin/generate", place / "lib/libanswer.a"
    assert subprocess.run([program, "a"], capture_output=True, text=True, check=True).stdout == "int a() { return 42; }\n"
    assert library.read_bytes()[:8] == b"!<arch>\n"
    made = record_of(farm, "taker")
    assert made["from_source"] == ["llvm"]
    sources = {material.what: material for material in materials.of(made["inputs"])}
    assert sources[PLACE].digest == tree["build_id"]
    assert sources["llvm"].license == "MIT"
    with zipfile.ZipFile(done.out.strip()) as opened:
        (extension,) = [name for name in opened.namelist() if name.endswith(".so")]
        assert elf.read(Path(opened.extract(extension, farm.settings.home))).machine == f"EM_{target.upper()}"
        assert b"as you like" in opened.read(f"taker-1.0.dist-info/licenses/{PLACE}/LICENSE.TXT")
        (bill,) = [json.loads(opened.read(name)) for name in opened.namelist() if name.endswith(".spdx.json")]
    assert {"llvm", PLACE} <= {package["name"] for package in bill["packages"]}

    kept = record.read(farm.settings, tree["build_id"])
    assert kept is not None
    assert (kept.outcome, kept.wheel, bool(kept.tree)) == ("built", None, True)
    again = farm.run("build", "taker", "--target", target.value, "--llvm", "source")
    assert (again.code, "already built" in again.said) == (0, True), again.said
    assert str(place) in farm.run("show", "llvm").out
    farm.recipe("other", TAKER, trees=[{"recipe": "llvm", "path": PLACE}], smoke={"imports": ["taker"]}, name="taker")
    other = farm.run("build", "other", "--target", target.value)
    assert (other.code, "stack cxx: already built, build id" in other.said) == (0, True), other.said


def test_a_set_builds_the_trees_of_its_recipes_too(farm: Farm) -> None:
    write(farm)
    write_set(farm, "duo", ["taker"], ["taker"])
    source = ("--llvm", "source")
    before, planned = (json.loads(farm.run("set", "plan", "duo", *words, "--json").out) for words in ((), source))
    assert [gap["url"] for gap in before["gaps"]] == [URL]
    assert planned["gaps"] == []
    ((tree,),) = [build["trees"] for build in planned["builds"]]
    assert (tree["recipe"], tree["built"]) == ("llvm", False)
    done = farm.run("set", "build", "duo", *source)
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'llvm').out[-3000:]}"
    assert record_of(farm, "taker")["from_source"] == ["llvm"]
    assert f"tree llvm, build id {tree['build_id']}: built" in farm.run("set", "plan", "duo", *source).out

    write_set(farm, "none", ["llvm"], ["llvm"])
    refused = farm.run("set", "build", "none", *source)
    assert (refused.code, "no recipe of the set none uses a tree of llvm" in refused.said) == (2, True), refused.said


def test_what_changes_a_tree_changes_the_build_id_of_its_taker_alone_where_it_takes_it(farm: Farm) -> None:
    def ids() -> tuple[str, str]:
        loaded = recipe.load(farm.settings.project / "recipes", "taker")
        base = stack.load(farm.settings.project / "stacks", "bare")
        plans = [make_plan(loaded.with_trees(names), base, host_arch(), Arch.AARCH64) for names in ((), ("llvm",))]
        return plans[0].build_id, plans[1].build_id

    write(farm)
    before = ids()
    assert before[0] != before[1]
    write(farm, commands=[*COMMANDS, "touch $OUT/more"])
    assert ids()[0] == before[0]
    assert ids()[1] != before[1]


def test_a_tree_that_lacks_what_its_recipe_promises_is_not_kept(farm: Farm) -> None:
    write(farm, holds=("lib/libanswer.a", "share/none"), commands=["mkdir $OUT/lib", "touch $OUT/lib/libanswer.a"])
    done = farm.run("build", "taker", "--target", NATIVE, "--llvm", "source")
    assert (done.code, "the tree of llvm has no share/none" in done.said) == (21, True), done.said
    assert not list((farm.settings.home / "trees").glob("*"))
    write(farm, holds=("lib",), commands=["mkdir $OUT/lib", "ln -s /etc/passwd $OUT/lib/a"])
    done = farm.run("build", "llvm", "--target", NATIVE)
    assert (done.code, "has a link that leads out of the tree: lib/a" in done.said) == (21, True), done.said
    assert "tree llvm" not in farm.run("build", "--changed", "--target", NATIVE).said


def test_trees_are_refused_where_they_do_not_fit(farm: Farm) -> None:
    write(farm)
    source, publish = ("--llvm", "source"), ("--publish", "http://127.0.0.1:9/legacy/")
    for arguments, code, sentence in (
        (("build", "llvm", *publish), 40, "; a tree cannot be published"),
        (("plan", "llvm", *source), 2, "llvm uses no tree of llvm that can be built from source"),
        (("plan", "taker", "--toolchain", "host", *source), 3, "which differ from those of --toolchain host"),
    ):
        done = farm.run(*arguments, TWINE_USERNAME="a", TWINE_PASSWORD="b")
        assert (done.code, sentence in done.said) == (code, True), done.said
    place = farm.settings.project / "recipes/taker/recipe.toml"
    place.write_text(place.read_text().replace('"recipe" = "llvm"', '"recipe" = "taker"'))
    taker = recipe.load(farm.settings.project / "recipes", "taker").with_trees(("taker",))
    base = stack.load(farm.settings.project / "stacks", "bare")
    with pytest.raises(ConfigError, match="of the recipe taker, but taker builds a wheel"):
        make_plan(taker, base, host_arch(), host_arch())
