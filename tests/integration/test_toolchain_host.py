"""`--toolchain host`: this machine's compilers in a clean environment, and from there on the same flow."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest

from builder import elf
from builder.box import sandbox
from builder.box.host import HostPlace
from builder.cli.options import plan_of
from builder.ground import environment, wheels
from builder.planning import pins, stack
from builder.planning.plan import Wanted
from builder.planning.stack import host_arch
from builder.toolchains import host, host_environment, host_tools, wrappers
from builder.toolchains.choice import ToolchainChoice
from gracefarm.errors import RootError
from tests import projects
from tests.conftest import Farm
from tests.integration.host_kit import PRELOAD, Built, built, called, fake_torch, own, python311, tiny_c
from tests.integration.test_build import record_of, start

__all__ = ["built", "own"]

NATIVE = host_arch().value
OTHER = "x86_64" if NATIVE == "aarch64" else "aarch64"


def planned(farm: Farm, own: Path | None) -> str:
    """The build id of tiny_c with this machine's tools over an environment, or in the sandbox."""
    on = ToolchainChoice(kind="host", wanted=Wanted(environment=own)) if own else None
    return plan_of("tiny_c", None, NATIVE, farm.settings, on).build_id


def statuses(found: dict[str, object]) -> dict[str, str]:
    return {verdict["gate"]: verdict["status"] for verdict in found["verdicts"]}  # type: ignore[index,attr-defined]


def test_a_c_extension_in_a_clean_environment_from_the_stacks_lock(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_c(farm)
    done = farm.run("build", "tiny_c", "--toolchain", "host", "--python", python311())
    assert done.code == 0, done.said
    assert "compilers are those of this machine, not the bookworm packages in the stack's lock" in done.said
    assert Path(done.out.strip()).name.endswith(f"_{NATIVE}.whl")
    found = record_of(farm, "tiny_c")
    assert found["toolchain"] == "host"
    assert found["stack"] == "bare@host"
    inputs = found["inputs"]
    assert isinstance(inputs, dict)
    assert inputs["toolchain"]["kind"] == "host"
    assert "sha256:" in inputs["toolchain"]["compilers"]["gcc"]
    assert inputs["stack"]["root"] is None
    assert "failed" not in statuses(found).values()
    assert statuses(found)["symbols"] == "passed"
    (compiled,) = [stage for stage in found["stages"] if stage["name"] == "compile"]  # type: ignore[attr-defined]
    assert compiled["note"] == "without network"
    place = found["smoke"]["modules"]["tiny_c._core"]  # type: ignore[index]
    assert "/smoke/env/lib/" in place
    again = called(farm, monkeypatch, "build", "tiny_c", "--toolchain", "host", "--python", python311())
    assert again == (0, "")
    assert "already built" in capsys.readouterr().err


def test_plan_prints_the_command_that_ran(built: Built, own: Path) -> None:
    asked = ("tiny_c", "--toolchain", "host", "--environment", str(own), "--json")
    said = json.loads(built.farm.run("plan", *asked).out.strip().splitlines()[-1])
    (compiled,) = [stage for stage in record_of(built.farm, "tiny_c")["stages"] if stage["name"] == "compile"]  # type: ignore[attr-defined]
    assert said["command"] == compiled["command"]
    assert "/env/bin/python3" not in said["command"]


def test_why_plans_with_the_tools_that_the_last_build_had(built: Built, own: Path) -> None:
    unknown = built.farm.run("why", "tiny_c")
    assert (unknown.code, "add --environment PATH" in unknown.said) == (2, True), unknown.said
    same = built.farm.run("why", "tiny_c", "--environment", str(own))
    assert same.code == 0, same.said
    assert "nothing changed" in same.said
    place = built.farm.settings.project / "recipes/tiny_c/recipe.toml"
    text = place.read_text()
    place.write_text(text + '[wheel]\nrequires = { numpy = "numpy<2" }\n')
    changed = built.farm.run("why", "tiny_c", "--environment", str(own))
    place.write_text(text)
    assert "changed recipe.requires.numpy: nothing > numpy<2" in changed.said, changed.said
    assert changed.said.count("changed ") == 1, changed.said


def test_trap_3_a_clean_environment_that_is_there_already_is_asked_about_its_torch_again(farm: Farm) -> None:
    base = stack.load(farm.settings.project / "stacks", "cu130")
    here = host_tools.find(base, Wanted(python=Path(python311())), cuda=False)
    place = host_environment.folder(here, farm.settings)
    (torch := wrappers.site_packages(place, "3.11") / "torch").mkdir(parents=True)
    (torch / "version.py").write_text("cuda = None\n")
    (place / "complete").touch()
    with pytest.raises(RootError, match=r"built without CUDA, but the stack requires a torch for CUDA 13\.0"):
        host_environment.ensure(here, farm.settings)


def test_a_rebuild_is_refused_with_the_reason_before_anything_is_built(built: Built) -> None:
    done = built.farm.run("verify", "tiny_c", "--rebuild")
    assert (done.code, "Its objects contain the path of the build folder" in done.said) == (2, True), done.said
    assert "building it again" not in done.said


def test_a_digest_that_an_environment_of_ones_own_does_not_need_is_no_gap(farm: Farm, own: Path) -> None:
    tiny_c(farm, stack="own")
    stacks = farm.settings.project / "stacks"
    shutil.copytree(stacks / "bare", stacks / "own")
    gap = f'[[environment.wheels]]\nname = "wheel"\nversion = "0.45.1"\narch = "{NATIVE}"\n'
    gap += 'index = "https://index.example/simple"\nsha256_unknown = "not reached"\n\n[toolchain]\n'
    text = (stacks / "own/stack.toml").read_text().replace('name = "bare"', 'name = "own"', 1)
    (stacks / "own/stack.toml").write_text(text.replace("[toolchain]\n", gap, 1))
    locked = plan_of(
        "tiny_c", None, NATIVE, farm.settings, ToolchainChoice(kind="host", wanted=Wanted(python=Path(python311())))
    )
    assert [gap.what for gap in locked.gaps] == [f"wheel 0.45.1 for {NATIVE}"]
    taken = ToolchainChoice(kind="host", wanted=Wanted(environment=own))
    assert plan_of("tiny_c", None, NATIVE, farm.settings, taken).gaps == []


def test_an_environment_of_ones_own_is_taken_as_it_is_and_enters_the_build_id(built: Built, own: Path) -> None:
    assert "packages are those of the environment that --environment names" in built.done.said
    found = record_of(built.farm, "tiny_c")
    assert found["inputs"]["toolchain"]["distributions"].keys() >= {"build", "setuptools"}  # type: ignore[index]
    assert statuses(found)["symbols"] == "passed"
    before = planned(built.farm, own)
    assert before == found["build_id"]
    shutil.copytree(own, other := own.with_name("other"), symlinks=True)
    assert planned(built.farm, other) == before, "a path entered the id"
    (site,) = other.glob("lib/*/site-packages")
    (site / "extra-1.0.dist-info").mkdir()
    (site / "extra-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    after = planned(built.farm, other)
    shutil.rmtree(other)
    assert after != before


def test_another_compiler_is_another_build_id_and_so_is_the_sandbox(
    built: Built, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    ids = {planned(built.farm, own), planned(built.farm, None)}
    monkeypatch.setenv("CC", str(compiler))
    ids.add(planned(built.farm, own))
    assert len(ids) == 3


THROWER = """
#include <Python.h>
#include <stdexcept>
static PyObject *fail(PyObject *, PyObject *) {
    try { throw std::runtime_error("thrown"); }
    catch (const std::exception &error) { return PyUnicode_FromString(error.what()); }
}
static PyMethodDef methods[] = {{"fail", fail, METH_NOARGS, ""}, {nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_thrower", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__thrower() { return PyModule_Create(&module); }
"""
THROWER_SETUP = """
from setuptools import Extension, setup
setup(name="thrower", version="1.0", ext_modules=[Extension("_thrower", ["thrower.cpp"], language="c++")])
"""


@pytest.mark.slow
def test_a_compiler_that_links_its_cxx_runtime_statically_is_told_to_take_the_shared_one(
    farm: Farm, own: Path, tmp_path: Path
) -> None:
    """With two C++ runtimes in one process an exception of the extension that torch is to catch is a segmentation fault."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -static-libstdc++\n')
    compiler.chmod(0o755)
    files = {
        "setup.py": THROWER_SETUP,
        "thrower.cpp": THROWER,
        "pyproject.toml": "[build-system]\nrequires = ['setuptools']\n",
    }
    farm.recipe("thrower", files, name="thrower", smoke={"imports": ["_thrower"]})
    done = farm.run("build", "thrower", "--toolchain", "host", "--environment", str(own), CXX=str(compiler))
    assert done.code == 0, done.said
    assert "g++ links libstdc++ statically by default" in done.said
    (member,) = [name for name in zipfile.ZipFile(done.out.strip()).namelist() if name.endswith(".so")]
    found = elf.read(Path(zipfile.ZipFile(done.out.strip()).extract(member, tmp_path)))
    assert "libstdc++.so.6" in found.needed
    assert "__cxa_throw" not in found.exports.symbols


@pytest.mark.slow
def test_cuda_with_the_machines_toolkit_for_the_stacks_architectures_alone(farm: Farm, own: Path) -> None:
    loaded = stack.load(farm.settings.project / "stacks", "cu130")
    (toolkit,) = environment.ensure_toolchain(loaded, host_arch(), farm.settings).glob("nvidia/cu*")
    locked = [
        wheel for wheel in pins.wheels(loaded, host_arch()) if wheel.name.startswith(("nvidia-cuda-r", "nvidia-cuda-cuo"))
    ]
    shutil.copytree(own, cuda := own.with_name("cuda"), symlinks=True)
    wheels.install(locked, ["--python", str(cuda / "bin/python3")], "test", farm.settings)
    build = {"cuda": True, "memory_per_job": "1GiB"}
    files = projects.tree("tiny_cuda") | {"tiny_cuda/__init__.py": PRELOAD}
    farm.recipe("tiny_cuda", files, name="tiny-cuda", build=build, smoke={"imports": ["tiny_cuda._core"]})
    done = farm.run("build", "tiny_cuda", "--toolchain", "host", "--environment", str(cuda), "--cuda", str(toolkit))
    shutil.rmtree(cuda)
    assert done.code == 0, done.said
    found = record_of(farm, "tiny_cuda")
    assert statuses(found)["cubins"] == statuses(found)["symbols"] == statuses(found)["rpath"] == "passed"
    assert "release 13.0" in found["inputs"]["toolchain"]["compilers"]["cuda"]  # type: ignore[index]
    assert "dropped sm_75 sm_80 sm_86 sm_100, compiles for sm_90" in farm.run("log", "tiny_cuda").out


REACH = """
import socket
try:
    socket.create_connection(("example.org", 443), timeout=5)
except OSError:
    pass
return wheel(wheel_directory)
"""


def test_a_build_that_reaches_for_the_network_fails_by_name_even_when_it_goes_on(farm: Farm, own: Path) -> None:
    farm.recipe("tiny", projects.backend(REACH))
    done = farm.run("build", "tiny", "--toolchain", "host", "--environment", str(own))
    assert done.code == 20, done.said
    assert "example.org" in done.said


def test_where_the_network_cannot_be_cut_the_record_says_so(farm: Farm, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forbids namespaces, by a launcher that is refused them."""
    monkeypatch.setattr(host_tools, "uncut", lambda: "Operation not permitted")
    tiny_c(farm)
    loaded = stack.load(farm.settings.project / "stacks", "bare")
    found = host_tools.find(loaded, Wanted(environment=own), cuda=False)
    assert found.uncut == "Operation not permitted"
    box = HostPlace(environment={"PATH": os.defpath}, workdir="/", memory=1 << 30, network=True)
    log = farm.settings.home / "log.txt"
    assert sandbox.run(box, ["ls", "/sys/class/net"], log=log).network_by == "host"
    assert len(log.read_text().split()) >= len(os.listdir("/sys/class/net"))  # noqa: PTH208


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "words"),
    [
        (("--cuda", "{empty}"), {}, 4, "no CUDA compiler (nvcc) was found in {empty}"),
        (("--cuda", "{old}"), {}, 4, "stack bare requires CUDA 13.0, but {old} has 12.4"),
        ((), {"CC": "no-such-gcc"}, 4, "no-such-gcc is not on PATH"),
        (("--target", OTHER), {}, 2, f"the host toolchain builds for {NATIVE}, not for {OTHER}"),
        (("--python", "{old}/bin/python3"), {}, 2, "--environment and --python cannot be used together"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_built(
    farm: Farm,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    code: int,
    words: str,
) -> None:
    places = {"empty": str(tmp_path / "empty"), "old": str(tmp_path / "old")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "old/bin").mkdir(parents=True)
    for name, text in (("nvcc", "Cuda compilation tools, release 12.4, V12.4.131"), ("python3", "")):
        (tmp_path / "old/bin" / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "old/bin" / name).chmod(0o755)
    tiny_c(farm, build={"cuda": True})
    said = [argument.format_map(places) for argument in arguments]
    aim = ("--toolchain", "host", "--environment", str(own), *said)
    ended, cause = called(farm, monkeypatch, "build", "tiny_c", *aim, **variables)
    assert ended == code, cause
    assert words.format_map(places) in cause
    assert not (farm.settings.home / "builds").exists()


@pytest.mark.parametrize(("version", "cuda"), [("2.11.0", None), ("2.10.0+cu130", "13.0")])
def test_another_torch_than_the_stacks_is_refused(
    farm: Farm, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None
) -> None:
    tiny_c(farm, stack="cu130", build={"cuda": True})
    toolkit = tmp_path / "cuda/bin"
    toolkit.mkdir(parents=True)
    (tmp_path / "cuda/include").mkdir()
    (toolkit / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    (toolkit / "nvcc").chmod(0o755)
    place = fake_torch(own, tmp_path / "venv", version=version, cuda=cuda)
    aim = ("--toolchain", "host", "--environment", str(place), "--cuda", str(toolkit.parent))
    code, cause = called(farm, monkeypatch, "build", "tiny_c", *aim)
    assert code == 4, cause
    built_for = f"for CUDA {cuda}" if cuda else "without CUDA"
    assert f"has torch {version} {built_for}, but stack cu130 has torch 2.11.0 for CUDA 13.0" in cause


CUT_OFF = """
subprocess.run(["ninja", "-v"], check=True)
return wheel(wheel_directory)
"""
STEP = """
echo half > $2
if [ $1 = second.c ] && ! [ -e cut ]; then
    touch cut
    sleep 60
fi
exec gcc -c $1 -o $2
"""
NINJA = """
rule step
  command = sh step.sh $in $out
rule link
  command = gcc -shared $in -o $out
build first.o: step first.c
build second.o: step second.c || first.o
build both.so: link first.o second.o
"""


def test_a_build_that_was_cut_off_goes_on_in_its_own_folder(farm: Farm, own: Path) -> None:
    """By a real ninja: an object that is whole stays, the half one that the kill left is made again."""
    sources = {"build.ninja": NINJA, "step.sh": STEP, "first.c": "int first;\n", "second.c": "int second;\n"}
    farm.recipe("tiny", projects.backend(CUT_OFF) | sources)
    aim = ("--toolchain", "host", "--environment", str(own))
    running = start(farm, "build", "tiny", *aim)
    watch = threading.Timer(120, running.kill)
    watch.start()
    while not (cut := list((farm.settings.home / "builds").glob("*/work/source/cut"))):
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.kill()
    watch.cancel()
    running.communicate(timeout=30)
    tree = cut[0].parent
    assert (tree / "second.o").read_text() == "half\n"
    first = (tree / "first.o").stat().st_mtime_ns
    (tree / "both.so").write_text("half")
    done = farm.run("build", "tiny", *aim, "--keep")
    assert done.code == 0, done.said
    assert "continuing in" in done.said
    assert (tree / "first.o").stat().st_mtime_ns == first
    for name in ("second.o", "both.so"):
        assert elf.read(tree / name).bits == 64
    log = farm.run("log", "tiny").out
    assert "[1/2] sh step.sh second.c second.o" in log
    assert "[2/2] gcc -shared" in log


def test_a_half_written_library_of_a_cut_off_build_is_not_taken_for_whole(tmp_path: Path) -> None:
    for name, moment in (("source.so", 1000), ("build/made.so", 2000), ("build/made.o", 2000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (moment, moment))
    assert host.clear_products(tmp_path, 1000) == [tmp_path / "build/made.so"]
    assert sorted(path.name for path in tmp_path.rglob("*.*o")) == ["made.o", "source.so"]
