"""`--toolchain container`: cibuildwheel itself, a real engine, and an image that is laid out as manylinux is, made here.

Slow: the image is the builder's root as a container. Skipped without a podman that starts containers for this user; the tests
bring their own configuration and storage and do not touch /etc and the user's images.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from builder.ground import environment, root
from builder.planning import stack
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import REPOSITORY, Farm, new_farm
from tests.integration.container_kit import HERE, find, with_image
from tests.integration.host_kit import PRELOAD
from tests.integration.pinned_kit import engine, mirrors, trinity, with_driver
from tests.integration.test_build import record_of, start
from tests.integration.test_schedule import held, pairs

CONFIGURATION = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"What podman 4.3 needs where it may raise no limits and systemd runs no session."
PIP = '#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n'


@dataclass(frozen=True, kw_only=True)
class Depot:
    """An engine with one image in it."""

    variables: dict[str, str]
    sha256: str

    def podman(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["podman", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, **self.variables},
        )


@pytest.fixture(scope="module")
def depot(shared_home: Path) -> Iterator[Depot]:
    if shutil.which("podman") is None:
        pytest.skip("no podman: apt-get install podman runc")
    with new_farm(shared_home) as farm:
        folder = farm.settings.home / "containers"
        folder.mkdir()
        (folder / "containers.conf").write_text(CONFIGURATION)
        places = f'graphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\n{places}')
        variables = {name: f"{folder}/{file}" for name, file in CONFIGURED.items()}
        made = Depot(variables=variables, sha256="")
        archive = image_archive(farm, folder)
        done = made.podman("import", str(archive), "localhost/farm:one")
        if done.returncode == 0:
            done = made.podman("run", "--rm", "--network=none", "localhost/farm:one", "/bin/true")
        if done.returncode:
            pytest.skip(f"podman starts no container here: {done.stderr.strip()[-300:]}")
        archive.unlink()
        digest = made.podman("image", "inspect", "--format={{.Digest}}", "localhost/farm:one").stdout.strip()
        yield Depot(variables=variables, sha256=digest.removeprefix("sha256:"))
        made.podman("rm", "--all", "--force")
        made.podman("rmi", "--all", "--force")


CUDA = "/usr/local/cuda-13.0"
CONFIGURED = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}


def image_archive(farm: Farm, folder: Path) -> Path:
    """The native root, with Python where manylinux has it (cibuildwheel's helper, and the one that builds), gcc, and CUDA."""
    loaded = stack.load(farm.settings.project / "stacks", "cu130")
    base = root.ensure(loaded, HERE, HERE, farm.settings)
    top = folder / "layout"
    for name in ("cp39-cp39", "cp311-cp311"):
        (top / f"opt/python/{name}/bin").mkdir(parents=True)
        (top / f"opt/python/{name}/bin/python").symlink_to("/usr/bin/python3.11")
    pip = top / "opt/python/cp311-cp311/bin/pip"
    pip.write_text(PIP)
    pip.chmod(0o755)
    (top / "usr/local/bin").mkdir(parents=True)
    for name in ("gcc", "g++"):
        (top / "usr/local/bin" / name).symlink_to(f"/usr/bin/{name}-12")
    (toolkit,) = environment.ensure_toolchain(loaded, HERE, farm.settings).glob("nvidia/cu*")
    cuda = top / CUDA.removeprefix("/")
    shutil.copytree(toolkit, cuda, symlinks=True)
    (cuda / "lib64").symlink_to("lib")
    (cuda / "lib/libcudart.so").symlink_to("libcudart.so.13")
    left_out = [f"--exclude=./{name}" for name in ("proc", "dev", "sys", "usr/share/doc", "usr/share/locale")]
    archive = folder / "image.tar"
    # Not their folders: podman takes no path twice.
    added = ["./opt/python", f".{CUDA}", "./usr/local/bin/gcc", "./usr/local/bin/g++"]
    subprocess.run(["tar", "-cf", archive, *left_out, "-C", base, ".", "-C", top, *added], check=True)
    remove_tree(top)
    return archive


AIM = ("--toolchain", "container", "--target", HERE.value)


@pytest.mark.slow
def test_a_c_extension_by_cibuildwheel_then_the_same_gates_smoke_test_and_record(farm: Farm, depot: Depot) -> None:
    files = projects.tree("tiny_c")
    # A package's own wishes for its own releases: nothing of them may count here.
    files["pyproject.toml"] = text_of(files["pyproject.toml"]) + '\n[tool.cibuildwheel]\nbefore-all = "false"\n'
    farm.recipe("tiny_c", files, name="tiny-c", smoke={"imports": ["tiny_c", "tiny_c._core"]})
    with_image(farm, depot.sha256)
    done = farm.run("build", "tiny_c", *AIM, "--jobs", "1", **depot.variables)
    assert done.code == 0, f"{done.said}\n{farm.run('log', 'tiny_c').out[-3000:]}"
    found = record_of(farm, "tiny_c")
    assert found["toolchain"] == "container"
    own = found["inputs"]["toolchain"]  # type: ignore[index]
    assert own["kind"] == "container"
    assert own["image"] == f"localhost/farm@sha256:{depot.sha256}"
    statuses = {verdict["gate"]: verdict["status"] for verdict in found["verdicts"]}  # type: ignore[index,attr-defined]
    assert "failed" not in statuses.values()
    assert statuses["symbols"] == "passed"
    assert "tiny_c._core" in found["smoke"]["modules"]  # type: ignore[index]
    (compiled,) = [stage for stage in found["stages"] if stage["name"] == "compile"]  # type: ignore[attr-defined]
    assert compiled["note"].startswith("container without network")
    assert "cibuildwheel" in compiled["command"]
    wheel = Path(done.out.strip())
    assert wheel.name.endswith(f"_{HERE.value}.whl")
    assert any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert depot.podman("ps", "--all", "--quiet").stdout == ""
    ids = {str(json.loads(farm.run("plan", "tiny_c", "--target", HERE.value, "--json").out)["build_id"]), found["build_id"]}
    assert len(ids) == 2, "the image does not enter the build id"


def with_cuda(farm: Farm) -> None:
    """stacks/bare with the wheels of CUDA's compiler: libcudart for what is loaded, cuobjdump for what is judged; no torch."""
    place, whole = farm.settings.project / "stacks/bare", stack.load(REPOSITORY / "stacks", "cu130")
    text = (place / "stack.toml").read_text()
    assert text.count("requirements = []") == 1
    (place / "stack.toml").write_text(
        text.replace("requirements = []", f"requirements = {json.dumps(whole.data.toolchain.requirements)}")
    )
    wanted = tuple(f"{Requirement(requirement).name}==" for requirement in whole.data.toolchain.requirements)
    lines = whole.requirements_lock.read_text().splitlines()
    with (place / "requirements.lock").open("a") as stream:
        stream.writelines(f"{before}\n{line}\n" for before, line in pairwise(lines) if line.startswith(wanted))


@pytest.mark.slow
def test_cuda_of_the_image_for_the_stacks_architectures_alone(farm: Farm, depot: Depot) -> None:
    files = projects.tree("tiny_cuda") | {"tiny_cuda/__init__.py": PRELOAD}
    build = {"cuda": True, "memory_per_job": "1GiB"}
    farm.recipe("tiny_cuda", files, name="tiny-cuda", build=build, smoke={"imports": ["tiny_cuda._core"]})
    with_cuda(farm)
    with_image(farm, depot.sha256, cuda=CUDA)
    done = farm.run("build", "tiny_cuda", *AIM, **depot.variables)
    log = farm.run("log", "tiny_cuda").out
    assert done.code == 0, f"{done.said}\n{log[-3000:]}"
    found = record_of(farm, "tiny_cuda")
    statuses = {verdict["gate"]: verdict["status"] for verdict in found["verdicts"]}  # type: ignore[attr-defined]
    assert statuses["cubins"] == statuses["symbols"] == statuses["rpath"] == "passed"
    assert found["inputs"]["toolchain"]["cuda"] == CUDA  # type: ignore[index]
    assert "dropped sm_75 sm_80 sm_86 sm_100, compiles for sm_90" in log


@pytest.mark.slow
@pytest.mark.parametrize("shape", [engine, trinity])
def test_a_recipes_places_in_the_sandbox_are_the_containers(
    farm: Farm, depot: Depot, tmp_path: Path, shape: Callable[[Farm, Path], object]
) -> None:
    """FetchContent's source by CMake variable, and pre-seeded downloads in a subdirectory's build by environment."""
    shape(farm, tmp_path)
    with_image(farm, depot.sha256)
    stack = () if shape is trinity else ("--stack", "own")
    variables = with_driver(farm, tmp_path, HERE.value) if stack else mirrors(tmp_path)
    done = farm.run("build", shape.__name__, *AIM, *stack, **variables, **depot.variables)
    assert done.code == 0, f"{done.said}\n{farm.run('log', shape.__name__).out[-3000:]}"


@pytest.mark.slow
def test_large_units_are_kept_apart_in_the_container_too(farm: Farm, depot: Depot) -> None:
    """Two that are declared large do not run beside each other, whether or not the engine bounds memory."""
    own = replace(farm, environment={**farm.environment, **depot.variables})
    with_image(farm, depot.sha256)
    found, _ = held(own, "--jobs", "2", *AIM, unit_memory={"*_large.c": "750MiB"})
    assert not any(pairs(found, ("large", "large")))
    assert any(pairs(found, ("large", "small")))


def text_of(content: str | bytes) -> str:
    return content if isinstance(content, str) else content.decode()


REACH = """
import socket
socket.create_connection(("192.0.2.1", 443), timeout=5)
return wheel(wheel_directory)
"""


@pytest.mark.slow
def test_the_container_has_no_network_and_what_reaches_for_it_fails_by_name(farm: Farm, depot: Depot) -> None:
    farm.recipe("tiny", projects.backend(REACH))
    with_image(farm, depot.sha256)
    done = farm.run("build", "tiny", *AIM, **depot.variables)
    assert done.code == 20, done.said
    assert "tried to access the network (OSError: [Errno 101] Network is unreachable)" in done.said
    assert depot.podman("ps", "--all", "--quiet").stdout == ""


LARGE = """
subprocess.run([sys.executable, "-c", "taken = [b'x' * (64 << 20) for _ in range(24)]"], check=True)
return wheel(wheel_directory)
"""


@pytest.mark.slow
def test_a_container_is_held_to_the_bound_where_its_engine_can(
    farm: Farm, depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler of 1.5 GiB at a bound of 1: the kernel kills it in there, and the build ends as one in a sandbox does."""
    for name, value in depot.variables.items():
        monkeypatch.setenv(name, value)
    if not find().bounds_memory:
        pytest.skip("podman has no memory controller here")
    farm.recipe("tiny", projects.backend(LARGE))
    with_image(farm, depot.sha256)
    done = farm.run("build", "tiny", *AIM, "--jobs", "1", GRACEFARM_MEMORY="1GiB", **depot.variables)
    assert done.code == 22, f"{done.said}\n{farm.run('log', 'tiny').out[-3000:]}"
    assert "the build of tiny was killed at its limit of 1.0 GiB of memory (podman)" in done.said
    (compiled,) = [stage for stage in record_of(farm, "tiny")["stages"] if stage["name"] == "compile"]  # type: ignore[attr-defined]
    assert (compiled["memory_bound"], compiled["memory_by"]) == (1 << 30, "podman")
    assert "podman limits the memory" in compiled["note"]
    assert depot.podman("ps", "--all", "--quiet").stdout == ""


WRONG = """
print("fatal error: no such header", flush=True)
raise SystemExit(1)
"""


@pytest.mark.slow
def test_a_failure_has_the_compilers_words_and_not_those_of_cibuildwheel(farm: Farm, depot: Depot) -> None:
    farm.recipe("tiny", projects.backend(WRONG))
    with_image(farm, depot.sha256)
    done = farm.run("build", "tiny", *AIM, **depot.variables)
    assert done.code == 21, done.said
    assert "the build of tiny failed: fatal error: no such header" in done.said


HANGING = """
import time
print("waiting", flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_a_build_that_is_cut_off_leaves_no_container_behind_the_next_one(farm: Farm, depot: Depot) -> None:
    """A killed builder cannot remove it; the next build of this id does, before it starts its own."""
    farm.recipe("tiny", projects.backend(HANGING))
    with_image(farm, depot.sha256)
    own = replace(farm, environment={**farm.environment, **depot.variables})
    running = start(own, "build", "tiny", *AIM)
    watch = threading.Timer(120, running.kill)
    watch.start()
    while "waiting" not in "".join(log.read_text() for log in (farm.settings.home / "builds").glob("*/log.txt")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.2)
    running.kill()
    watch.cancel()
    running.communicate(timeout=30)
    (left,) = depot.podman("ps", "--all", "--quiet").stdout.split()
    again = start(own, "build", "tiny", *AIM)
    watch = threading.Timer(120, again.kill)
    watch.start()
    while left in depot.podman("ps", "--all", "--quiet").stdout:
        assert again.poll() is None, again.communicate()
        time.sleep(0.2)
    watch.cancel()
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert depot.podman("ps", "--all", "--quiet").stdout == ""


@pytest.mark.slow
def test_an_image_that_cannot_be_had_is_the_fetch_that_failed(farm: Farm, depot: Depot) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with_image(farm, "0" * 64)
    done = farm.run("build", "tiny", *AIM, **depot.variables)
    assert done.code == 10, done.said
    assert f"podman cannot fetch localhost/farm@sha256:{'0' * 64}" in done.said
