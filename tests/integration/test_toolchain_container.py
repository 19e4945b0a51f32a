"""`--toolchain container`: cibuildwheel itself, a real engine, and an image that is laid out as manylinux is, made here.

Slow: the image is the farm's own root as a container. Skipped without a podman that starts containers for this user; the tests
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from builder.box.sandbox import Outcome
from builder.fetch import fill, registry
from builder.ground import environment, root
from builder.planning import gaps, recipe, stack
from builder.planning.ground import Ground
from builder.planning.plan import Plan, Wanted
from builder.planning.settings import Settings
from builder.planning.stack import Arch, Image, host_arch
from builder.toolchains import choice, container, wrappers
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError, FetchError, HostError
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import REPOSITORY, Farm, new_farm
from tests.gaps_kit import put_back
from tests.integration.test_build import record_of, start
from tests.integration.test_pinned import engine, mirrors, trinity, with_driver
from tests.integration.test_schedule import held, pairs
from tests.integration.test_toolchain_host import PRELOAD

HERE = host_arch()
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


def with_image(farm: Farm, sha256: str, **more: str) -> None:
    """stacks/bare names the image."""
    place = farm.settings.project / "stacks/bare/stack.toml"
    own = {"name": "localhost/farm", "tag": "one", "sha256": sha256, **more}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in own.items())
    place.write_text(f"{place.read_text()}\n[container.{HERE.value}]\n{lines}")


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
    assert "podman limits its memory" in compiled["note"]
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


# --- without an engine -------------------------------------------------------------------------------------------------------


def find() -> ContainerToolchain:
    """As for a build against any stack: an engine and cibuildwheel are all that is looked for."""
    return ContainerToolchain.find(stack.load(REPOSITORY / "stacks", "cu130"), Wanted(), cuda=False)


def ground(folder: Path) -> Ground:
    return Ground(root=folder, environment=folder, packages=folder, compiler=None, title="")


def plan_in(farm: Farm, stack_name: str, name: str, target: Arch = Arch.AARCH64) -> Plan:
    loaded = recipe.load(farm.settings.project / "recipes", name)
    base = stack.load(farm.settings.project / "stacks", stack_name)
    return choice.make_plan(loaded, base, HERE, target, ContainerToolchain(engine="podman", cibuildwheel="4.3"))


def test_a_stack_without_an_image_is_no_stack_for_containers(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with pytest.raises(ConfigError, match="stack bare names no container image for aarch64"):
        plan_in(farm, "bare", "tiny")


def test_an_image_without_cuda_is_none_for_cuda(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), build={"cuda": True})
    with_image(farm, "0" * 64)
    with pytest.raises(ConfigError, match="names no CUDA in its container image"):
        plan_in(farm, "bare", "tiny", HERE)


def test_the_image_of_cu124_is_a_gap_of_container_builds_alone(farm: Farm) -> None:
    put_back(farm.settings.project)
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), stack="cu124")
    whats = [gap.what for gap in plan_in(farm, "cu124", "tiny").gaps]
    assert whats[-1] == "image docker.io/pytorch/manylinuxaarch64-builder:cuda12.4"
    base = stack.load(farm.settings.project / "stacks", "cu124")
    sandboxed = choice.make_plan(recipe.load(farm.settings.project / "recipes", "tiny"), base, HERE, Arch.AARCH64)
    assert [gap.what for gap in sandboxed.gaps] == whats[:-1]
    with pytest.raises(ConfigError) as refused:
        plan_in(farm, "cu124", "tiny").require_digests()
    assert refused.value.repeat == "builder lock tiny --toolchain container"
    # What the fetch redirects, not what the image's name begins with.
    assert "https://registry-1.docker.io/=REPLACEMENT" in str(refused.value.remedy)


def test_config_settings_name_the_source_where_it_is(farm: Farm, tmp_path: Path) -> None:
    """In a sandbox, in a folder of the machine's own, and in the container."""
    settings = {"cmake.args": "-DSEED=/build/source/seed;-DOTHER=/build/sources"}
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"), build={"cuda": False, "config_settings": settings})
    with_image(farm, "0" * 64)
    made = plan_in(farm, "bare", "tiny", HERE)
    assert "-Ccmake.args=-DSEED=/build/source/seed;-DOTHER=/build/sources" in wrappers.command(made)
    assert "-Ccmake.args=-DSEED=/work/source/seed;-DOTHER=/work/sources" in wrappers.command(made, "/site", "/work")
    text = container.configuration(made.toolchain, made, ground(tmp_path), tmp_path, jobs=1, epoch=0, memory=1 << 30)
    assert "-DSEED=/project/seed;-DOTHER=/build/sources" in text


def test_no_engine_is_said_before_anything_else(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="neither podman nor docker is running"):
        find()
    broken = tmp_path / "docker"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(HostError, match="neither podman nor docker is running"):
        find()
    broken.write_text("#!/bin/sh\nexit 0\n")
    assert find().engine == "docker"
    broken.write_text("#!/bin/sh\n[ $# = 1 ]\n")  # which knows no such question
    assert find() == ContainerToolchain(engine="docker", cibuildwheel=version("cibuildwheel"))
    for name, output, bounds in (
        ("docker", "true", True),
        ("docker", "false", False),
        ("podman", "[cpuset cpu io memory pids]", True),
        ("podman", "[cpu pids]", False),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (tmp_path / name).chmod(0o755)
        found = find()
        assert (found.engine, found.bounds_memory) == (name, bounds)


@pytest.mark.parametrize(
    ("line", "killed"),
    [
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", True),
        ("g++: fatal error: Killed signal terminated program cc1plus", True),
        ("make: *** [Makefile:2: a.o] Killed", True),
        ("cibuildwheel: error: Command ['python', '-m', 'build'] failed with code 137.", True),
        ("error: 'Killed_units' was not declared in this scope", False),
    ],
)
def test_what_the_kernel_killed_in_a_bounded_container_is_known_by_the_log(
    farm: Farm, tmp_path: Path, line: str, killed: bool
) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with_image(farm, "0" * 64)
    made = plan_in(farm, "bare", "tiny", HERE)
    unbounded_toolchain, bounded = made.toolchain, ContainerToolchain(engine="podman", cibuildwheel="4.3", bounds_memory=True)
    outcome = Outcome(
        returncode=1,
        wall_s=1,
        cpu_s=1,
        peak_memory=1,
        memory_bound=1,
        memory_by="cgroup2",
        killed_by_memory=False,
        reached=(),
    )
    (log := tmp_path / "log.txt").write_text(f"[1/2] a\n{line}\n")
    found = bounded.understood(outcome, log, 0)
    assert (found.killed_by_memory, found.memory_by) == (killed, "podman")
    assert not bounded.understood(replace(outcome, returncode=0), log, 0).killed_by_memory
    # If the container has no limit, a kill there came from elsewhere.
    unbounded = made.toolchain.understood(outcome, log, 0)
    assert (unbounded.killed_by_memory, unbounded.memory_by) == (False, "cgroup2")
    options = [
        container.configuration(toolchain, made, ground(tmp_path), tmp_path, jobs=1, epoch=0, memory=7)
        for toolchain in (bounded, unbounded_toolchain)
    ]
    assert ["--memory=7" in text for text in options] == [True, False]


class Registry(BaseHTTPRequestHandler):
    """As public registries are: no manifest without a token, which each client gets for the scope that the challenge names."""

    digest = "sha256:" + "ab" * 32

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        known = self.path == "/v2/pytorch/manylinuxaarch64-builder/manifests/cuda12.4"
        allowed = self.headers.get("Authorization") == "Bearer for-anybody"
        self.send_response(401 if not allowed else 200 if known else 404)
        if not allowed:
            realm = f"http://{self.headers['Host']}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="here",scope="repository:a/b:pull"')
        elif known and "image.index.v1+json" in self.headers.get("Accept", ""):
            self.send_header("Docker-Content-Digest", self.digest)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        right = self.path == "/token?service=here&scope=repository%3Aa%2Fb%3Apull"
        body = json.dumps({"token": "for-anybody" if right else "for-nobody"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(farm: Farm) -> Iterator[Settings]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        mirrors = {"https://registry-1.docker.io/": f"http://127.0.0.1:{server.server_address[1]}/"}
        yield farm.settings.model_copy(update={"mirrors": mirrors})
        server.shutdown()
        thread.join()


def test_lock_reads_the_digest_of_an_image_from_its_registry_and_writes_it_into_the_stack(farm: Farm, hub: Settings) -> None:
    name = "docker.io/pytorch/manylinuxaarch64-builder"
    image = Image(name=name, tag="cuda12.4", sha256_unknown="not reached")
    assert registry.digest(image, hub) == "ab" * 32
    with pytest.raises(FetchError, match=r"manylinuxaarch64-builder:cuda12\.5 cannot be read.*404"):
        registry.digest(image.model_copy(update={"tag": "cuda12.5"}), hub)
    place = farm.settings.project / "stacks/bare/stack.toml"
    own = f'name = "{name}"\ntag = "cuda12.4"\nsha256_unknown = "not reached" # compare\ncuda = "/usr/local/cuda-12.4"\n'
    place.write_text(f"{place.read_text()}\n[container.aarch64]\n{own}")
    loaded = stack.load(farm.settings.project / "stacks", "bare")
    assert fill.fill([], loaded, hub).digests == ()
    ((gap, found),) = fill.fill(gaps.of_images(loaded), loaded, hub).digests
    assert (gap.what, found) == (f"image {name}:cuda12.4", "ab" * 32)
    again = stack.load(farm.settings.project / "stacks", "bare")
    assert again.data.container[Arch.AARCH64].reference == f"{name}@sha256:{'ab' * 32}"
    assert gaps.of_images(again) == []
    assert f'sha256 = "{"ab" * 32}" # compare' in place.read_text()
