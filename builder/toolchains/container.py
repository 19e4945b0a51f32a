"""A build by cibuildwheel in a container that is laid out as manylinux is: `--toolchain container`, for CI runners.

The image, named by digest, brings compilers, CUDA and Python. Sources and the stack's packages come from the same store and
lock as in a sandbox, and what comes out goes through the same gates, smoke test and record. The container has no network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Self

import tomlkit

from builder.box import sandbox
from builder.box.host import HostPlace
from builder.box.place import Place
from builder.box.sandbox import Outcome
from builder.planning import gaps
from builder.planning.gaps import Gap
from builder.planning.ground import Ground
from builder.planning.plan import Caches, Inputs, Plan, Wanted
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import Settings
from builder.planning.stack import Arch, Image, LoadedStack
from builder.toolchains import wrappers
from builder.toolchains.sandbox import SandboxToolchain
from gracefarm.errors import ConfigError, FetchError, HostError
from gracefarm.files import atomic_write, remove_tree
from gracefarm.process import last_line

ENGINES = {"podman": "{{.Host.CgroupControllers}}", "docker": "{{.MemoryLimit}}"}
"And what of `info` says whether memory can be bounded, which needs a controller that not every user is given."
PROJECT = "/project"
"In the container: where cibuildwheel copies the source to."
_LABEL = "gracefarm.build"
_FILES = "/gracefarm"
_KILLED = re.compile(r"\bsignal 9\b|\bSIGKILL\b|\bKilled(?: signal|$)|failed with code (?:137|-9)\b", re.MULTILINE)
"As nvcc, Python, gcc and make, and cibuildwheel say of a command that the kernel killed."
_KEPT = ("PATH", "XDG_RUNTIME_DIR", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "DOCKER_HOST", "DOCKER_CONFIG", "HOME")
"What an engine and its client need of this machine's environment."


@dataclass(frozen=True, kw_only=True)
class ContainerToolchain(SandboxToolchain):
    """cibuildwheel and the stack's image compile; the sandbox's root and environment judge what comes out."""

    kind: ClassVar[ToolchainKind] = "container"
    measured: ClassVar[bool] = False  # its record has cibuildwheel's own figures
    closed: ClassVar[str | None] = "ran in a container, which is gone"
    unsealed: ClassVar[str | None] = "in a container, whose compilers are the image's and whose network was not watched"

    engine: str
    "podman or docker; no byte depends on it."
    cibuildwheel: str
    "Its version."
    bounds_memory: bool = False
    "The engine can hold a container to a bound here; no byte depends on it."

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """The engine and the cibuildwheel of this machine.

        Raises:
            HostError: one of them is missing.
        """
        engine = next((name for name in ENGINES if shutil.which(name) and _info(name) is not None), None)
        if engine is None:
            raise HostError("no container engine answers: neither podman nor docker", remedy="install podman, or start docker")
        try:
            # An engine that is too old to be asked bounds nothing, and builds all the same.
            bounds = re.search(r"\b(?:memory|true)\b", _info(engine, "--format", ENGINES[engine]) or "")
            return cls(engine=engine, cibuildwheel=version("cibuildwheel"), bounds_memory=bounds is not None)
        except PackageNotFoundError:
            raise HostError(
                "cibuildwheel is not installed, which builds in containers", remedy="pip install 'gracefarm[container]'"
            ) from None

    @classmethod
    def gaps(cls, stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
        """See Toolchain: those of the images."""
        return gaps.of_images(stack, target)

    def require(self, plan: Plan) -> None:
        """The stack names an image for the target, and the CUDA in it where the recipe needs that.

        Raises:
            ConfigError: it does not.
        """
        if plan.stack.interpreter is not None:
            raise ConfigError(
                f"an image brings its own Python: --python {plan.stack.interpreter.name} is of the sandbox",
                remedy="leave --toolchain container out",
            )
        image = plan.stack.data.container.get(plan.target)
        if image is None or (plan.recipe.data.build.cuda and image.cuda is None):
            lacks = "names no container image" if image is None else "names no CUDA in its container image"
            raise ConfigError(
                f"stack {plan.stack.data.name} {lacks} for {plan.target.value}",
                remedy=f"complete [container.{plan.target.value}] in its stack.toml, or leave --toolchain container out",
            )

    def inputs(self, plan: Plan) -> Inputs:
        """See Toolchain."""
        own = {"kind": "container", "image": image(plan).reference, "cuda": image(plan).cuda}
        return {"toolchain": {**own, "cibuildwheel": self.cibuildwheel}}

    def arguments(self, plan: Plan) -> str:
        """See Toolchain."""
        return f"{super().arguments(plan)} --toolchain container"

    def fetch(self, plan: Plan) -> None:
        """The image; the only step of a container build that has the network beside the fetch of its sources.

        Raises:
            FetchError: the engine could not get it.
        """
        reference, engine = image(plan).reference, self.engine
        if subprocess.run([engine, "image", "inspect", reference], capture_output=True, check=False).returncode == 0:
            return
        platform = {"aarch64": "linux/arm64", "x86_64": "linux/amd64"}[plan.target.value]
        pull = [engine, "pull", "--quiet", f"--platform={platform}", reference]
        process = subprocess.run(pull, capture_output=True, text=True, check=False)
        if process.returncode:
            reason = last_line(process.stderr)
            raise FetchError(
                f"{engine} does not get {reference}: {reason}",
                remedy=f"run `{engine} pull {reference}` by hand",
                repeat=plan.repeat,
            )

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """What runs on this machine; the source folder is its working directory."""
        wheel = f"cp{plan.stack.data.python.replace('.', '')}-manylinux_{plan.target.value}"
        options = ("--only", wheel, "--config-file", f"{folder}/cibuildwheel.toml", "--output-dir", f"{folder}/out")
        return (sys.executable, "-m", "cibuildwheel", *options, str(folder / "source" / plan.recipe.data.build.subdirectory))

    def place(
        self,
        plan: Plan,
        ground: Ground,
        settings: Settings,
        folder: Path,
        *,
        jobs: int,
        epoch: int,
        memory: int,
        caches: Caches,
    ) -> Place:
        """Where cibuildwheel itself runs: this machine, which has its network; the container has none."""
        remove_tree(folder / "gracefarm")
        (folder / "gracefarm" / "bin").mkdir(parents=True)
        places = {"toolchain/nvcc": "nvcc", "host/host.cmake": "host.cmake", "toolchain/ninja": "bin/ninja"}
        for source, name in (places | {"toolchain/schedule.py": "schedule.py"}).items():
            (folder / "gracefarm" / name).write_bytes((files("builder") / "data" / source).read_bytes())
            (folder / "gracefarm" / name).chmod(0o755)
        if (folder / wrappers.SCHEDULE).is_file():
            shutil.copy(folder / wrappers.SCHEDULE, folder / "gracefarm" / wrappers.SCHEDULE)
        text = configuration(self, plan, ground, folder, jobs=jobs, epoch=epoch, memory=memory)
        atomic_write(folder / "cibuildwheel.toml", text)
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        scratch = folder / "tmp"
        own = {"SOURCE_DATE_EPOCH": str(epoch), "TMPDIR": str(scratch), "CIBW_CACHE_PATH": str(scratch / "cache")}
        return HostPlace(
            environment=kept | own | {"LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"},
            workdir=str(folder / "source"),
            memory=memory,
            network=True,
        )

    @contextmanager
    def swept(self, plan: Plan) -> Iterator[None]:
        """See Toolchain: an engine keeps containers whose client was killed, ours or an earlier run's."""
        _remove(self.engine, plan.build_id)
        try:
            yield
        finally:
            _remove(self.engine, plan.build_id)

    def understood(self, outcome: Outcome, log: Path, start: int) -> Outcome:
        """See Toolchain: what the build could not reach and whether its bound killed it, as far as its output says so."""
        text = log.read_bytes()[start:].decode(errors="replace")
        hosts = dict.fromkeys(host for line in text.splitlines() if (host := sandbox.reached_in(line)))
        outcome = replace(outcome, reached=tuple(hosts), network_by="log")
        if not self.bounds_memory:
            return outcome
        # Nobody else kills in there: the kernel takes the largest process, and who started that says so.
        killed = outcome.killed_by_memory or (outcome.returncode != 0 and _KILLED.search(text) is not None)
        return replace(outcome, memory_by=self.engine, killed_by_memory=killed)

    @property
    def note(self) -> str:
        """See Toolchain."""
        bound = f"{self.engine} {'holds its memory to the bound' if self.bounds_memory else 'cannot bound its memory here'}"
        return f"container without network; {bound}; CPU and peak are those of cibuildwheel, not of the container"

    def build_paths(self, folder: Path) -> tuple[str, ...]:
        """See Toolchain."""
        return (*super().build_paths(folder), PROJECT)


def _info(engine: str, *options: str) -> str | None:
    process = subprocess.run([engine, "info", *options], capture_output=True, text=True, check=False, timeout=60)
    return process.stdout if process.returncode == 0 else None


def image(plan: Plan) -> Image:
    """The stack's image for the target, which `choice.make_plan` has found."""
    return plan.stack.data.container[plan.target]


def configuration(
    toolchain: ContainerToolchain, plan: Plan, ground: Ground, folder: Path, *, jobs: int, epoch: int, memory: int
) -> str:
    """cibuildwheel's settings, in a file of our own: what the package says to cibuildwheel does not count."""
    volumes = {ground.environment: "/env", folder / "gracefarm": _FILES} | (
        {ground.compiler: wrappers.NVCC} if ground.compiler else {}
    )
    mounts = [f"--volume={source}:{target}:ro" for source, target in volumes.items()]
    # No swap either, as in a sandbox: a build that passes its bound would crawl through it.
    bound = [f"--memory={memory}", f"--memory-swap={memory}"] if toolchain.bounds_memory else []
    created = ["--network=none", f"--label={_LABEL}={plan.build_id}", *bound, *mounts]
    options: dict[str, object] = {
        "build-frontend": {"name": "build", "args": ["--no-isolation", "--skip-dependency-check"]},
        "container-engine": {"name": toolchain.engine, "create-args": created, "disable-host-mount": True},
        f"manylinux-{plan.target.value}-image": image(plan).reference,
        "before-all": before_all(plan),
        "repair-wheel-command": "",
        "audit-command": "",
        "config-settings": {name: _inside(value) for name, value in plan.build.config_settings.items()},
        "environment": dict(sorted(variables(plan, jobs=jobs, epoch=epoch).items())),
    }
    return tomlkit.dumps({"tool": {"cibuildwheel": options}})


def before_all(plan: Plan) -> str:
    """A CUDA_HOME over the image's own, with our nvcc in front; nothing without CUDA."""
    top = image(plan).cuda
    if not plan.recipe.data.build.cuda or top is None:
        return ""
    links = f"mkdir -p {wrappers.CUDA}/bin && ln -s {top}/bin/* {wrappers.CUDA}/bin/ && rm {wrappers.CUDA}/bin/nvcc"
    others = f'for one in {top}/*; do [ "${{one##*/}}" = bin ] || ln -s "$one" {wrappers.CUDA}/; done'
    return f"{links} && cp {_FILES}/nvcc {wrappers.CUDA}/bin/nvcc && {others}"


def variables(plan: Plan, *, jobs: int, epoch: int) -> dict[str, str]:
    """The build's environment, as in a sandbox, with the container's places in it; PATH and compilers are the image's."""
    ours = wrappers.variables(plan, jobs=jobs, epoch=epoch)
    left_out = {
        "PATH",
        "HOME",
        "USER",
        "TMPDIR",
        "GRACEFARM_PYTHON_INCLUDE",
    }
    python = f"cp{plan.stack.data.python.replace('.', '')}"
    interpreter = f"/opt/python/{python}-{python}/bin/python"
    ours = {name: _inside(value) for name, value in ours.items() if name not in left_out} | {
        "PYTHONPATH": str(wrappers.site_packages(Path("/env"), plan.stack.data.python)),
        "CC": "gcc",
        "CXX": "g++",
        "GRACEFARM_FRONT": "",
        # Nothing is measured, but it says where the source is: schedule.py names units by that.
        "GRACEFARM_UNITS": f"{PROJECT}/{wrappers.UNITS}",
        "GRACEFARM_SCHEDULER": f"{interpreter} -I -S {_FILES}/schedule.py",
        "GRACEFARM_SCHEDULE": f"{_FILES}/{wrappers.SCHEDULE}",
        "GRACEFARM_CCBIN": "",
        "GRACEFARM_PYTHON": interpreter,
        "CMAKE_TOOLCHAIN_FILE": f"{_FILES}/host.cmake",
    }
    if plan.recipe.data.build.cuda:
        ours |= {"CUDA_HOME": wrappers.CUDA, "CUDA_PATH": wrappers.CUDA, "CUDACXX": f"{wrappers.CUDA}/bin/nvcc"}
        ours |= {"GRACEFARM_NVCC": f"{image(plan).cuda}/bin/nvcc"}
    return ours | {"PATH": ":".join(_search_path(plan))}


def _inside(value: str) -> str:
    """A recipe's value, with the container's place for the source where it names the sandbox's."""
    return re.sub(r"/build/source(?![^/;:\s])", PROJECT, value)


def _search_path(plan: Plan) -> Iterator[str]:
    """Our ninja, the stack's own tools, the image's with its Python first, our nvcc, and the environment's ninja."""
    yield f"{_FILES}/bin"
    if plan.recipe.data.build.cuda:
        yield from (f"{wrappers.NVCC}/{folder}" for folder in plan.stack.data.toolchain.path)
    yield from ("$PATH", f"{wrappers.CUDA}/bin", "/env/bin")


def _remove(engine: str, build_id: str) -> None:
    question = [engine, "ps", "--all", "--quiet", f"--filter=label={_LABEL}={build_id}"]
    containers = subprocess.run(question, capture_output=True, text=True, check=False).stdout.split()
    if containers:
        subprocess.run([engine, "rm", "--force", *containers], capture_output=True, check=False)
