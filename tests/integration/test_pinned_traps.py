"""The seven traps of the pinned builds (docs/howto/pinned.md): tests reproduce each trap and show how it is avoided."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from builder.box import sandbox
from builder.ground import root
from builder.planning import packages, recipe, stack
from builder.planning.plan import Wanted
from builder.planning.stack import Arch, host_arch
from builder.toolchains import choice, host_tools
from builder.toolchains.container import ContainerToolchain
from builder.toolchains.host import HostToolchain
from gracefarm.errors import ConfigError, HostError
from tests import projects
from tests.conftest import REPOSITORY, Farm
from tests.integration.fetch_kit import Repository
from tests.integration.host_kit import python311
from tests.integration.pinned_kit import CORE, NATIVE, PYPROJECT, TRITON, git_recipe, mirrors, place, trinity


def test_trap_a_download_that_is_not_preseeded_ends_the_build_by_name(farm: Farm, tmp_path: Path) -> None:
    trinity(farm, tmp_path, files=[], wheel={})
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 20, done.said
    assert "blobs.example" in done.said


def test_trap_an_offline_build_that_loses_the_tools_is_refused(farm: Farm, tmp_path: Path) -> None:
    build = {"cuda": False, "subdirectory": "python", "environment": {"TRITON_OFFLINE_BUILD": "1"}}
    trinity(farm, tmp_path, build=build)
    done = farm.run("build", "trinity", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 30, done.said
    assert "trinity/backends/bin/ptxas is declared, but not in the wheel" in done.said


def test_trap_1_a_commit_that_loses_its_suffix_is_not_taken_for_the_release(farm: Farm, tmp_path: Path) -> None:
    commit = trinity(farm, tmp_path)
    exported = {
        "pyproject.toml": PYPROJECT,
        "setup.py": TRITON,
        "core.c": CORE.replace("NAME", "libtrinity"),
        "trinity/__init__.py": "",
    }
    farm.recipe(
        "exported",
        exported,
        name="trinity",
        version=f"3.2.0+git{commit}",
        build={"cuda": False, "environment": {"TRITON_OFFLINE_BUILD": "1"}},
        smoke={"imports": ["trinity"]},
    )
    done = farm.run("build", "exported", "--target", NATIVE)
    assert done.code == 30, done.said
    assert "3.2.0" in done.said
    assert f"3.2.0+git{commit}" in done.said


def test_trap_2_a_branch_and_a_tag_of_one_name_do_not_matter_to_a_pinned_commit(farm: Farm, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "engine")
    body = "commit = subprocess.check_output(['git', 'rev-parse', 'HEAD'], text=True).strip()\n"
    body += "return wheel(wheel_directory, files={'tiny/commit_id.py': commit.encode()})"
    tagged = repository.commit({name: str(text) for name, text in projects.backend(body).items()})
    repository.git("tag", "v0.6.4.post1")
    repository.git("checkout", "--quiet", "-b", "v0.6.4.post1")
    repository.git("commit", "--quiet", "--allow-empty", "--message", "the branch's own")
    branch = repository.git("rev-parse", "HEAD")
    assert branch != tagged
    assert repository.tree(branch) == repository.tree(tagged)
    git_recipe(farm, "tiny", repository, tagged)
    done = farm.run("build", "tiny", "--target", NATIVE, **mirrors(tmp_path))
    assert done.code == 0, done.said
    with zipfile.ZipFile(done.out.strip()) as opened:
        assert opened.read("tiny/commit_id.py").decode() == tagged
    git_recipe(farm, "named", repository, tagged, source={"commit": "v0.6.4.post1"})
    assert farm.run("plan", "named").code == 3


def test_trap_3_the_cpu_torch_of_the_same_version_is_refused(farm: Farm) -> None:
    place = farm.settings.project / "stacks" / "cu124-headers" / "stack.toml"
    gate = f'cuda = "{stack.load(REPOSITORY / "stacks", "cu124").data.torch.cuda}"'  # type: ignore[union-attr]
    place.write_text(place.read_text().replace('version = "2.4.0"\n', f'version = "2.4.0"\n{gate}\n', 1))
    requires = {"requires": {"torch": "torch==2.4.0"}}
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), stack="cu124-headers", wheel=requires)
    done = farm.run("build", "tiny")
    assert done.code == 12, done.said
    assert "the locked torch 2.4.0 is built without CUDA, but the stack requires a torch for CUDA 12.4" in done.said


def test_trap_4_a_build_requirement_that_the_tutorial_forgets_is_named_before_anything_compiles(farm: Farm) -> None:
    files = {
        "pyproject.toml": PYPROJECT.replace('"setuptools"', '"setuptools", "pybind11>=2.13.1"'),
        "setup.py": "import pybind11",
    }
    farm.recipe("tiny", files)
    done = farm.run("build", "tiny", "--target", NATIVE)
    assert done.code == 21, done.said
    assert "requires 'pybind11>=2.13.1'" in done.said
    assert "pybind11" in (REPOSITORY / "stacks/cu124/requirements.lock").read_text()


def test_trap_5_an_extension_whose_import_error_is_swallowed_is_imported_by_name(farm: Farm) -> None:
    broken = CORE.replace("NAME", "_C").replace(
        "return PyModule_Create(&module);", 'PyErr_SetString(PyExc_ImportError, "broken"); return 0;'
    )
    files = {
        "pyproject.toml": PYPROJECT,
        "setup.py": "from setuptools import Extension, setup\n"
        "setup(name='engine', version='1.0', packages=['engine'], ext_modules=[Extension('engine._C', ['core.c'])])\n",
        "core.c": broken,
        "engine/__init__.py": "try:\n    import engine._C\nexcept ImportError:\n    pass\n",
    }
    farm.recipe("engine", files, smoke={"imports": ["engine"]})
    assert farm.run("build", "engine", "--target", NATIVE).code == 0
    wheel = farm.run("build", "engine", "--target", NATIVE).out.strip()
    done = farm.run("smoke", wheel, "--stack", "bare", "--import", "engine._C")
    assert done.code == 31, done.said
    assert "broken" in done.said


def test_trap_6_the_roots_headers_are_older_than_what_cuda_12_4_cannot_read(farm: Farm, tmp_path: Path) -> None:
    """A name of glibc 2.38's bits/math-vector.h, which gcc knows and nvcc's front end does not; the root's own headers pass.

    The whole of glibc 2.41's headers is in test_pinned_long.py.
    """
    loaded = stack.load(REPOSITORY / "stacks", "cu124")
    for host in (Arch.X86_64, Arch.AARCH64):
        (version,) = {
            package.version for package in packages.of_root(loaded, host, Arch.AARCH64) if package.name == "libc6-dev"
        }
        assert tuple(map(int, version.partition("-")[0].split("+")[0].split("."))) < (2, 38), version
    box = place(farm, "cu124-headers", tmp_path / "work")
    newer = "#ifdef __aarch64__\ntypedef __Float32x4_t f32x4;\n#endif\n"
    (tmp_path / "work/newer.cu").write_text(newer + "__global__ void kernel() {}\n")
    (tmp_path / "work/newer.cpp").write_text(newer)
    (tmp_path / "work/own.cu").write_text("#include <cmath>\n__global__ void kernel(float *x) { *x = sinf(*x); }\n")
    log = tmp_path / "log.txt"
    assert sandbox.run(box, ["/cuda/bin/nvcc", "-c", "own.cu", "-o", "own.o"], log=log).returncode == 0, log.read_text()
    assert sandbox.run(box, ["g++", "-c", "newer.cpp", "-o", "newer.o"], log=log).returncode == 0, log.read_text()
    assert sandbox.run(box, ["/cuda/bin/nvcc", "-c", "newer.cu", "-o", "newer.o"], log=log).returncode != 0
    assert "__Float32x4_t" in log.read_text()


OLD_LIBRARY = """
aarch64-linux-gnu-g++ -O1 newer.cpp -o newer
echo 'GLIBCXX_3.4.25 { global: *; };' > old.map
echo 'int nothing;' > old.c
aarch64-linux-gnu-gcc -shared -fPIC -Wl,-soname,libstdc++.so.6 -Wl,--version-script,old.map -o libstdc++.so.6 old.c
run="/usr/bin/qemu-aarch64-static"
[ -x $run ] || run=
$run ./newer && echo "the root's library has it"
LD_LIBRARY_PATH= $run ${run:+-E LD_LIBRARY_PATH=/build} ./newer
[ -n "$run" ] || LD_LIBRARY_PATH=/build ./newer
"""


def test_trap_7_the_roots_cpp_library_is_new_enough_for_the_prebuilt_llvm(farm: Farm, tmp_path: Path) -> None:
    """A program that needs GLIBCXX_3.4.26, as mlir-tblgen does, starts in the root and not where the library is older."""
    box = place(farm, "cu124-headers", tmp_path / "work")
    for base in (box.root, root.ensure(stack.load(REPOSITORY / "stacks", "cu124"), host_arch(), Arch.AARCH64, farm.settings)):
        assert b"GLIBCXX_3.4.26\0" in (base / "usr/lib/aarch64-linux-gnu/libstdc++.so.6").read_bytes()
    # std::filesystem came into the library with that version.
    (tmp_path / "work/newer.cpp").write_text(
        "#include <filesystem>\nint main(int, char **words) { return std::filesystem::exists(words[0]) ? 0 : 1; }\n"
    )
    log = tmp_path / "log.txt"
    sandbox.run(box, ["/bin/bash", "-c", OLD_LIBRARY], log=log)
    assert "the root's library has it" in log.read_text()
    assert "version `GLIBCXX_3.4.26' not found" in log.read_text()


@pytest.mark.parametrize(
    ("arch", "cuda", "glibc", "reads"),
    [
        *((Arch.AARCH64, "12.4", glibc, glibc < "2.38") for glibc in ("2.28", "2.35", "2.37", "2.38", "2.39", "2.41")),
        (Arch.AARCH64, "13.0", "2.41", True),
        (Arch.X86_64, "12.4", "2.39", True),
    ],
)
def test_trap_6_is_said_before_a_host_build_begins(arch: Arch, cuda: str, glibc: str, reads: bool) -> None:
    if reads:
        host_tools.check_headers(arch, cuda, glibc)
        return
    with pytest.raises(HostError, match=rf"CUDA 12\.4 cannot read the headers of glibc {glibc} on aarch64"):
        host_tools.check_headers(arch, cuda, glibc)


def test_trap_6_is_asked_of_the_machine_itself(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake nvcc and an architecture and a glibc that are not this machine's."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    (tmp_path / "cuda/include").mkdir(parents=True)
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(host_tools, "host_arch", lambda: Arch.AARCH64)
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.39")
    wanted = Wanted(python=Path(python311()), cuda=tmp_path / "cuda")
    with pytest.raises(HostError, match=r"headers of glibc 2\.39"):
        host_tools.find(stack.load(farm.settings.project / "stacks", "cu124"), wanted, cuda=True)
    assert host_tools.find(stack.load(farm.settings.project / "stacks", "cu124"), wanted, cuda=False).glibc == "2_39"


def test_trap_7_triton_is_refused_in_a_container(farm: Farm) -> None:
    triton = recipe.load(REPOSITORY / "recipes", "triton")
    base = stack.load(REPOSITORY / "stacks", "cu124")
    contained = ContainerToolchain(engine="podman", cibuildwheel="4")
    with pytest.raises(ConfigError, match=r"triton cannot be built with --toolchain container: .*GLIBCXX_3\.4\.26") as refused:
        choice.make_plan(triton, base, Arch.AARCH64, Arch.AARCH64, contained)
    assert refused.value.remedy == "choose a different --toolchain: sandbox, host"
    choice.make_plan(triton, base, Arch.AARCH64, Arch.AARCH64)
    choice.make_plan(recipe.load(REPOSITORY / "recipes", "flash_attn"), base, Arch.AARCH64, Arch.AARCH64, contained)
    bare = stack.load(farm.settings.project / "stacks", "bare")
    here = HostToolchain.find(bare, Wanted(python=Path(python311())), cuda=False)
    changed = replace(triton, data=triton.data.model_copy(update={"refuses": {"host": "why"}}))
    assert choice.make_plan(triton, bare, host_arch(), host_arch(), here).toolchain is here
    with pytest.raises(ConfigError, match="cannot be built with --toolchain host: why"):
        choice.make_plan(changed, bare, host_arch(), host_arch(), here)
