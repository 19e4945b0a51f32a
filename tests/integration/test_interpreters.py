"""Pythons other than the one of the stack's root: real ones, real compilers, emulated where the target is not the host."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import uv

from builder.box import sandbox
from builder.box.sandbox import BindMount, Sandbox
from builder.cli.options import plan_of, wanted
from builder.flow import run
from builder.ground import root
from builder.planning import matrix, stack
from builder.planning.ground import Ground
from builder.planning.stack import Arch, host_arch
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.files import sha256_file
from tests import projects
from tests.conftest import Farm
from tests.integration.test_build import record_of

TRIXIE = "3.13-trixie"
SCRIPT = """
import platform, sys, sysconfig, tiny_c
assert platform.machine() == "{machine}"
version = "%d%d" % sys.version_info[:2]
assert sysconfig.get_config_var("EXT_SUFFIX") == f".cpython-{{version}}-{machine}-linux-gnu.so"
assert (sys.prefix, sys.base_prefix) == ("/env", "/env/python")
assert sysconfig.get_config_var("CC").split()[0].endswith("gcc"), sysconfig.get_config_var("CC")
assert tiny_c.add(2, 3) == 5
print(version)
"""
HOST_ONLY = pytest.mark.skipif(host_arch() is Arch.AARCH64, reason="only an x86_64 host builds for x86_64")


def write_recipe(farm: Farm, target: str) -> None:
    """recipes/tiny_c, a C extension whose smoke test looks at its Python."""
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    (farm.settings.project / "recipes" / "tiny_c" / "smoke.py").write_text(SCRIPT.format(machine=target))


def built(farm: Farm, python: str, target: str) -> tuple[str, str]:
    """File name of tiny_c's wheel for that Python, and what its smoke test printed."""
    write_recipe(farm, target)
    done = farm.run("build", "tiny_c", "--python", python, "--target", target)
    assert done.code == 0, done.said
    record = record_of(farm, "tiny_c")
    assert record["interpreter"] == python
    verdicts = {verdict["gate"]: verdict["status"] for verdict in record["verdicts"]}  # type: ignore[index,attr-defined]
    assert "failed" not in verdicts.values()
    assert verdicts["symbols"] == "passed"
    return Path(done.out.strip()).name, record["smoke"]["script"]  # type: ignore[index]


@pytest.mark.parametrize("target", ["aarch64", pytest.param("x86_64", marks=[HOST_ONLY, pytest.mark.slow])])
def test_an_extension_for_the_python_of_another_suite(farm: Farm, target: str) -> None:
    wheel, printed = built(farm, TRIXIE, target)
    assert wheel.startswith("tiny_c-1.0-cp313-cp313-manylinux")
    assert printed == "313\n"
    # The suite's C library is 2.41: the wheel needs no more than that of the root.
    assert int(wheel.partition("manylinux_2_")[2].partition("_")[0]) <= 34


def packed(farm: Farm, target: Arch, into: Path) -> Path:
    """The Python of a root, laid out as a standalone archive, with compilers in its sysconfig that no root has."""
    base = root.ensure(stack.load(farm.settings.project / "stacks", "bare"), host_arch(), target, farm.settings)
    own = base / f"usr/libexec/gracefarm/python3.11-{target}"
    program = own if own.is_file() else base / "usr/bin/python3.11"
    archive = into / f"cpython-{target}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(program, "python/bin/python3.11")
        tar.add(base / "usr/include/python3.11", "python/include/python3.11")
        header = base / f"usr/include/{target.triplet}/python3.11/pyconfig.h"
        tar.add(header, "python/include/python3.11/pyconfig.h")
        for path in sorted((base / "usr/lib/python3.11").iterdir()):
            if path.name.startswith("_sysconfigdata_"):
                lines = path.read_text() + "\nbuild_time_vars.update(CC='clang --sysroot=/tools', LDSHARED='clang -shared')\n"
                variables: dict[str, dict[str, object]] = {}
                exec(lines, variables)
                data = f"build_time_vars = {variables['build_time_vars']!r}\n".encode()
                entry = tarfile.TarInfo(f"python/lib/python3.11/{path.name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            elif not path.is_symlink() and path.name not in ("test", "dist-packages", "__pycache__"):
                tar.add(path, f"python/lib/python3.11/{path.name}")
    return archive


def write_interpreter(farm: Farm, name: str, archives: dict[Arch, Path], *, sha256: str | None = None) -> None:
    """interpreters/NAME, its archives on a local server's place."""
    folder = farm.settings.project / "interpreters" / name
    folder.mkdir()
    lines = ['python = "3.11"', 'version = "3.11.2"', "[source]", 'kind = "archive"']
    for arch, archive in archives.items():
        lines += [f"[source.archives.{arch}]", f'url = "{archive.as_uri()}"', f'sha256 = "{sha256 or sha256_file(archive)}"']
    (folder / "interpreter.toml").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("target", [pytest.param("aarch64", marks=pytest.mark.slow), pytest.param("x86_64", marks=HOST_ONLY)])
def test_an_extension_for_a_standalone_archive(farm: Farm, target: str, tmp_path: Path) -> None:
    archives = {arch: packed(farm, arch, tmp_path) for arch in {Arch(target), host_arch()}}
    write_interpreter(farm, "3.11-packed", archives)
    wheel, printed = built(farm, "3.11-packed", target)
    assert wheel.startswith("tiny_c-1.0-cp311-cp311-manylinux")
    assert printed == "311\n"


@pytest.mark.skipif(host_arch() is Arch.AARCH64, reason="needs a host that is not the target")
def test_an_archive_that_is_not_the_pinned_one_or_of_another_machine(farm: Farm, tmp_path: Path) -> None:
    write_recipe(farm, "aarch64")
    other = Arch.AARCH64
    archive = packed(farm, host_arch(), tmp_path)
    write_interpreter(farm, "3.11-wrong", {host_arch(): archive, other: archive})
    done = farm.run("build", "tiny_c", "--python", "3.11-wrong")
    assert done.code == 12
    assert f"the archive of interpreter 3.11-wrong for {other} is for {host_arch()}" in done.said
    write_interpreter(farm, "3.11-changed", {host_arch(): archive, other: archive}, sha256="0" * 64)
    done = farm.run("build", "tiny_c", "--python", "3.11-changed")
    assert done.code == 11
    assert "interpreter 3.11-changed for" in done.said
    assert "Traceback" not in done.said


def test_root_names_the_python_of_the_stack(farm: Farm) -> None:
    write_recipe(farm, "aarch64")
    done = farm.run("plan", "tiny_c", "--python", "root")
    assert done.code == 0
    assert done.said == farm.run("plan", "tiny_c").said


def test_bad_names(farm: Farm) -> None:
    write_recipe(farm, "aarch64")
    done = farm.run("plan", "tiny_c", "--python", "3.31")
    assert done.code != 0
    assert "unknown interpreter '3.31'" in done.said
    assert "did you mean '3.14'?" in done.said
    (farm.settings.project / "stacks" / "bare" / "requirements-3.14t.lock").unlink()
    done = farm.run("plan", "tiny_c", "--python", "3.14t")
    assert done.code != 0
    assert "has no lock for Python 3.14t" in done.said
    assert "builder lock bare --python 3.14t" in done.said
    done = farm.run("plan", "tiny_c", "--python", "3.13-trixie", "--toolchain", "container")
    assert done.code != 0
    assert "Traceback" not in done.said


@pytest.mark.slow
@HOST_ONLY
def test_pip_and_uv_install_the_wheel_of_their_python_and_architecture(farm: Farm, tmp_path: Path) -> None:
    """The index has four wheels of one version. Each one installs with both clients, and its interpreter imports it."""
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    with run.local_index(farm.settings) as (url, token):
        cells = f"stack=bare python=root,{TRIXIE} target=aarch64,x86_64"
        login = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
        done = farm.run("build", "tiny_c", "--matrix", cells, "--publish", f"{url}/legacy/", **login)
        assert done.code == 0, done.said
        for python in (matrix.ROOT, TRIXIE):
            plan = plan_of("tiny_c", "bare", Arch.AARCH64, farm.settings, wanted("sandbox", None, python, None))
            for target in Arch:
                ground = SandboxToolchain().lay(plan.stack, host_arch(), target, farm.settings, cuda=False)
                for command in (pip_command(plan.stack.python, target), uv_command(plan.stack.python, target)):
                    folder = tmp_path / f"{plan.stack.python}-{target}-{Path(command[0]).name}"
                    subprocess.run([*command, "--index-url", f"{url}/simple/", "--target", folder, "tiny-c"], check=True)
                    assert imported(ground, folder) == f"{plan.stack.python} {target} 5\n"


def pip_command(python: str, target: Arch) -> list[str]:
    """pip for a machine of that architecture with Debian 12's C library."""
    options = ["--isolated", "install", "--quiet", "--no-cache-dir", "--only-binary=:all:", f"--python-version={python}"]
    return [sys.executable, "-m", "pip", *options, *(f"--platform=manylinux_2_{minor}_{target}" for minor in range(5, 37))]


def uv_command(python: str, target: Arch) -> list[str]:
    """uv for the same machine."""
    options = ["--quiet", "--no-config", "--no-cache", f"--python-version={python}", "--only-binary=:all:"]
    return [uv.find_uv_bin(), "pip", "install", *options, f"--python-platform={target}-manylinux_2_36"]


def imported(ground: Ground, folder: Path) -> str:
    """What the ground's Python prints after importing tiny_c from the folder."""
    box = Sandbox(
        root=ground.root,
        mounts=(BindMount(source=ground.environment, target="/env"), BindMount(source=folder, target="/installed")),
        environment={"PATH": "/env/bin:/usr/bin", "PYTHONPATH": "/installed", "PYTHONDONTWRITEBYTECODE": "1"},
        workdir="/",
        memory=1 << 30,
    )
    script = "import platform, sys, tiny_c; print('%d.%d' % sys.version_info[:2], platform.machine(), tiny_c.add(2, 3))"
    outcome = sandbox.run(box, ["/env/bin/python3", "-c", script], log=folder / "log")
    said = (folder / "log").read_text()
    assert outcome.returncode == 0, said
    return said
