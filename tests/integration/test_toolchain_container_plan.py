"""`--toolchain container` without an engine: plans, configuration, errors, and the digest of an image."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from builder.box.sandbox import Outcome
from builder.fetch import fill, registry
from builder.planning import gaps, recipe, stack
from builder.planning.ground import Ground
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.planning.stack import Arch, Image
from builder.toolchains import choice, container, wrappers
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError, FetchError, HostError
from tests import projects
from tests.conftest import Farm
from tests.gaps_kit import put_back
from tests.integration.container_kit import HERE, find, with_image


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
