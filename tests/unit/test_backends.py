"""What a build takes because of its backend: programs of this machine, and Meson's cross file, both inputs of the build id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builder.planning import pins, recipe, stack
from builder.planning.plan import Plan
from builder.planning.stack import Arch
from builder.toolchains import choice, meson
from builder.toolchains.wrappers import variables
from tests.conftest import REPOSITORY

LOCK = "".join(
    f'# {name}-{version}-{tag}\n{name}=={version} ; platform_machine == "{arch}" --hash=sha256:{digit * 64}\n'
    for name, version, tag, arch, digit in (
        ("cmake", "3.31.10", "py3-none-manylinux_2_17_x86_64.whl", "x86_64", "a"),
        ("cmake", "3.31.10", "py3-none-manylinux_2_17_aarch64.whl", "aarch64", "b"),
        ("cython", "3.1.0", "cp311-cp311-manylinux_2_17_x86_64.whl", "x86_64", "c"),
        ("cython", "3.1.0", "cp311-cp311-manylinux_2_17_aarch64.whl", "aarch64", "d"),
        ("meson-python", "0.18.0", "py3-none-any.whl", "x86_64", "e"),
        ("meson-python", "0.18.0", "py3-none-any.whl", "aarch64", "e"),
    )
).replace("meson-python-0", "meson_python-0")


def plan(folder: Path, *requires: str, target: Arch = Arch.AARCH64, lock: str = LOCK) -> Plan:
    loaded = recipe.load(REPOSITORY / "recipes", "torch_scatter")
    (folder / "requirements.lock").write_text(lock)
    build = loaded.data.build.model_copy(update={"requires": requires})
    loaded = replace(loaded, folder=folder, data=loaded.data.model_copy(update={"build": build}))
    return choice.make_plan(loaded, stack.load(REPOSITORY / "stacks", "cu130"), Arch.X86_64, target)


def test_programs_of_the_host_are_those_of_wheels_for_a_platform_and_no_python(tmp_path: Path) -> None:
    made = plan(tmp_path, "cmake", "cython>=3")
    assert [(wheel.name, wheel.sha256[0]) for wheel in pins.tool_wheels(made.stack, Arch.X86_64)] == [("cmake", "a")]
    assert "tools" in made.inputs
    assert made.build_id != plan(tmp_path, "cmake", "cython>=3", lock=LOCK.replace("a" * 64, "f" * 64)).build_id
    path = variables(made, jobs=1, epoch=0, tools=["/tools/cmake/data/bin"])["PATH"].split(":")
    assert path[0] == "/gracefarm/bin"
    assert path.index("/tools/cmake/data/bin") < path.index("/toolchain/cmake/data/bin")
    assert not {"tools", "meson"} & set(plan(tmp_path).inputs)


def test_meson_gets_a_cross_file_for_another_machine_only(tmp_path: Path) -> None:
    made = plan(tmp_path, "Meson_Python>=0.18")
    assert meson.needed(made)
    assert "meson" in made.inputs
    assert "cpu_family = 'aarch64'" in meson.text(made)
    assert not meson.needed(plan(tmp_path, "meson-python", target=Arch.X86_64))
    assert not meson.needed(plan(tmp_path, "cython"))
