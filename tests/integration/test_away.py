"""`bench/away.sh`, and the steps of the builder that it uses: a package is compiled on a machine without network."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import _away
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import REPOSITORY, Farm

AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


def tiny(farm: Farm) -> None:
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})


def test_a_build_until_root_names_what_the_compile_reads_and_compiles_nothing(farm: Farm) -> None:
    tiny(farm)
    done = farm.run("build", "tiny_c", "--until", "root")
    assert done.code == 0, done.said
    reads = [Path(line).relative_to(farm.settings.home) for line in done.out.splitlines()]
    assert {path.parts[0] for path in reads} == {"roots", "environments", "wrappers", "store"}
    assert all((farm.settings.home / path).exists() for path in reads)
    assert "compile " not in done.err
    assert not list((farm.settings.home / "builds").glob("*/*")), "a later build begins without leftovers"


def test_a_build_until_compile_is_continued_by_the_same_command_without_until(farm: Farm) -> None:
    tiny(farm)
    done = farm.run("build", "tiny_c", "--until", "compile")
    assert done.code == 0, done.said
    assert (Path(done.out.strip()) / "compiled.json").is_file()
    assert "audit" not in done.err
    assert "--until" in farm.run("show", "tiny_c").out
    continued = farm.run("build", "tiny_c")
    assert continued.code == 0, continued.said
    assert "had finished its compile" in continued.said
    assert continued.out.strip().endswith("_aarch64.whl")


def test_until_refuses_what_it_cannot_do(farm: Farm) -> None:
    tiny(farm)
    for options in (("--publish", "http://127.0.0.1:1/legacy/"), ("--farm", "local")):
        done = farm.run("build", "tiny_c", "--until", "compile", *options)
        assert done.code == 2
        assert f"--until and {options[0]} cannot be used together" in done.said


def test_an_environment_travels_without_device_code_and_with_its_symbols(tmp_path: Path) -> None:
    library = tmp_path / "liba.so"
    text = 'char code[9] __attribute__((section(".nv_fatbin"))) = "DEVICE12"; char other[9] = "HOSTCODE";'
    text += 'char third[9] __attribute__((section(".cask_resource"))) = "DEVICE34";'
    subprocess.run(["cc", "-g", "-shared", "-x", "c", "-", "-o", library], input=text, text=True, check=True)
    whole = library.read_bytes()
    content = _away.lean("home/environments/x/liba.so", whole)
    assert content is not None
    assert len(content) == len(whole)
    assert b"DEVICE12" in whole
    assert b"DEVICE12" not in content
    assert b"DEVICE34" not in content
    assert b"HOSTCODE" in content
    library.write_bytes(content)
    assert "code" in subprocess.check_output(["nm", "--dynamic", library], text=True)
    for name, travels in (
        ("triton/_C/libtriton.so", False),
        ("nvidia/cu13/bin/ptxas", False),
        ("nvidia/cu13/lib/libnvrtc_static.a", False),
        ("nvidia/cu13/lib/libcudart_static.a", True),
        ("nvidia/cu13/lib/libcudadevrt.a", True),
        ("torch/lib/libtorch_cpu.so", True),
    ):
        inside = f"home/environments/x/lib/python3.11/site-packages/{name}"
        assert (_away.lean(inside, b"!<arch>") is not None) == travels, name


def test_a_file_of_two_environments_travels_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECE", "1M")
    first, second = tmp_path / "home/environments/a", tmp_path / "home/environments/b"
    content = random.Random(1).randbytes(300_000)
    for folder in (first, second):
        (folder / "nvidia/cu13/bin").mkdir(parents=True)
        (folder / "own").write_text(folder.name)
    for name in ("lib.so", "nvidia/cu13/bin/ptxas"):
        (first / name).write_bytes(content)
        (second / name).hardlink_to(first / name)
    wanted = {f"home/environments/{folder.name}": folder for folder in (first, second)}
    pieces = _away.pack(tmp_path, "environments-x", wanted, _away.lean)
    assert sum((tmp_path / piece).stat().st_size for piece in pieces) < 400_000
    into = tmp_path / "work"
    into.mkdir()
    _away.unpack([tmp_path / piece for piece in pieces], into)
    taken = [into / "home/environments" / name for name in "ab"]
    assert [(folder / "lib.so").read_bytes() for folder in taken] == [content, content]
    assert [(folder / "own").read_text() for folder in taken] == ["a", "b"]
    assert (taken[0] / "lib.so").samefile(taken[1] / "lib.so")
    assert not (taken[1] / "nvidia/cu13/bin/ptxas").exists()


@dataclass(frozen=True, kw_only=True)
class Two:
    """A machine with a network, and a folder that plays a machine without: other paths, other HOME, no installed packages."""

    farm: Farm
    folder: Path

    def home(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        script = REPOSITORY / "bench/away.sh"
        own = {"PYTHON": sys.executable, "CARRIED": str(self.folder / "carried"), "LEVEL": "1", "PIECE": "40M", "OPTIONS": ""}
        own["VERSION"] = f"{sys.version_info.major}.{sys.version_info.minor}"
        return self._run([script, *arguments], projects.environment(self.farm.environment | own | variables))

    def there(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        place = self.folder / "there"
        own = {"HOME": str(place), "PATH": "/usr/bin:/bin", "CARRIED": str(place / "arrived"), "WORK": str(place / "work")}
        own["PYTHON"] = str(Path(sys.base_prefix) / "bin/python3")
        return self._run(["unshare", "--net", place / "checkout/bench/away.sh", *arguments], own | variables)

    def _run(self, command: list[object], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command], env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )


@pytest.fixture
def two(farm: Farm, tmp_path: Path) -> Iterator[Two]:
    tiny(farm)
    for name in ("bench", "builder", "gracefarm", "pyproject.toml"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        (tmp_path / "there/checkout").mkdir(parents=True, exist_ok=True)
        copy(REPOSITORY / name, tmp_path / "there/checkout" / name)
    before = AUTOGROUP.read_text() if AUTOGROUP.is_file() else None
    yield Two(farm=farm, folder=tmp_path)
    if before is not None:
        AUTOGROUP.write_text(before)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.skipif(platform.machine() != "x86_64", reason="both machines are x86_64")
def test_a_package_is_compiled_without_network_and_finished_at_home(two: Two) -> None:
    done = two.home("prepare", "tiny_c")
    assert done.returncode == 0, done.stderr
    carried, arrived = two.folder / "carried", two.folder / "there/arrived"
    assert two.there("take").returncode == 75, "nothing has arrived"
    shutil.copytree(carried, arrived)
    missing = next(iter(sorted(arrived.glob("roots-*"))))
    late = missing.read_bytes()
    missing.write_bytes(late[:1000])
    done = two.there("take")
    assert (done.returncode, missing.name in done.stdout) == (75, True), done.stderr
    missing.write_bytes(late)
    done = two.there("take")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all parts are unpacked"), done.stderr

    assert two.there("wait", 1).returncode == 2, "nothing was started"
    done = two.there("start")
    assert done.returncode == 0, done.stderr
    done = two.there("wait", 300)
    assert (done.returncode, done.stdout.startswith("tiny_c: 0: ")) == (0, True), done.stdout
    assert two.there("results", two.folder / "whole").returncode == 0

    # As if the machine had been lost during the compile.
    work = two.folder / "there/work"
    (work / "tiny_c.rc").unlink()
    next(iter(work.glob("home/builds/*/compiled.json"))).unlink()
    assert two.there("results", two.folder / "partial").returncode == 0
    again = two.there("results", two.folder / "partial")
    assert "tiny_c: not compiled yet; 0 new files" in again.stdout, again.stderr

    done = two.home("continue", two.folder / "partial")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    built = two.farm.run("build", "tiny_c", "--until", "compile")
    assert "compiler cache: 1 hits" in built.said
    remove_tree(two.farm.settings.home / "builds")

    done = two.home("continue", two.folder / "whole")
    assert done.returncode == 0, done.stderr
    assert "an interrupted run had finished its compile; continuing after it" in " ".join(done.stderr.split())
    assert done.stdout.strip().endswith("_aarch64.whl")
    assert Path(done.stdout.strip()).is_relative_to(two.farm.settings.home)


@pytest.mark.root
def test_another_checkout_is_refused(two: Two) -> None:
    # Without the refusal, a build there would miss its root and environment, and fail with a network error.
    work = two.folder / "there/work"
    shutil.copytree(two.farm.settings.project, work / "project")
    (work / "request").write_text(f"--stack bare\ntiny_c {'0' * 64}\n")
    done = two.there("start", PYTHON=sys.executable)
    assert done.returncode == 3
    assert "the two checkouts differ" in done.stderr
