"""Build with cibuildwheel in a container with the layout of manylinux: `--toolchain container`, for CI runners.

The image, pinned by digest, has compilers, CUDA and Python. Sources and the stack's packages come from the same store and lock
as in a sandbox, and the wheel goes through the same gates, smoke test and record. The container has no network.
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
"Engines, with the field of `info` that tells whether memory can be limited: not every user has the required controller."
PROJECT = "/project"
"The folder in the container to which cibuildwheel copies the source."
_LABEL = "gracefarm.build"
_FILES = "/gracefarm"
_KILLED = re.compile(r"\bsignal 9\b|\bSIGKILL\b|\bKilled(?: signal|$)|failed with code (?:137|-9)\b", re.MULTILINE)
"Messages of nvcc, Python, gcc, make and cibuildwheel about a command that the kernel killed."
_KEPT = ("PATH", "XDG_RUNTIME_DIR", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "DOCKER_HOST", "DOCKER_CONFIG", "HOME")
"Variables of this machine that an engine and its client need."


@dataclass(frozen=True, kw_only=True)
class ContainerToolchain(SandboxToolchain):
    """cibuildwheel compiles in the stack's image; the sandbox's root and environment are used to judge the wheel."""

    kind: ClassVar[ToolchainKind] = "container"
    has_rust: ClassVar[bool] = False
    measured: ClassVar[bool] = False  # its record has the figures of cibuildwheel
    pinned: ClassVar[bool] = False
    closed: ClassVar[str | None] = "ran in a container, which was removed"
    unsealed: ClassVar[str | None] = (
        "in a container, with the image's compilers and without network monitoring, so --rebuild cannot verify it"
    )

    engine: str
    "podman or docker; the wheel's bytes do not depend on it."
    cibuildwheel: str
    "Its version."
    bounds_memory: bool = False
    "The engine can limit memory on this machine; the wheel's bytes do not depend on it."

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """The engine and the cibuildwheel of this machine.

        Raises:
            HostError: one of them is missing.
        """
        engine = next((name for name in ENGINES if shutil.which(name) and _info(name) is not None), None)
        if engine is None:
            raise HostError("neither podman nor docker is running", remedy="install podman, or start docker")
        try:
            # An old engine without this field cannot limit memory, but it can build.
            bounds = re.search(r"\b(?:memory|true)\b", _info(engine, "--format", ENGINES[engine]) or "")
            return cls(engine=engine, cibuildwheel=version("cibuildwheel"), bounds_memory=bounds is not None)
        except PackageNotFoundError:
            raise HostError(
                "cibuildwheel is not installed; builds in containers require it",
                remedy="run `pip install 'gracefarm[container]'`",
            ) from None

    @classmethod
    def gaps(cls, stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
        """See Toolchain: the digests of the images."""
        return gaps.of_images(stack, target)

    def require(self, plan: Plan) -> None:
        """See Toolchain: the stack must name an image for the target, and its CUDA if the recipe requires CUDA.

        Raises:
            ConfigError: the stack does not.
        """
        if plan.stack.interpreter is not None:
            raise ConfigError(
                f"--python {plan.stack.interpreter.name} requires the sandbox, but --toolchain container uses the Python "
                "of the image",
                remedy="omit --python or --toolchain container",
            )
        image = plan.stack.data.container.get(plan.target)
        if image is None or (plan.recipe.data.build.cuda and image.cuda is None):
            lacks = "names no container image" if image is None else "names no CUDA in its container image"
            raise ConfigError(
                f"stack {plan.stack.data.name} {lacks} for {plan.target.value}",
                remedy=f"complete [container.{plan.target.value}] in its stack.toml, or omit --toolchain container",
            )

    def inputs(self, plan: Plan) -> Inputs:
        """See Toolchain."""
        own = {"kind": "container", "image": image(plan).reference, "cuda": image(plan).cuda}
        return {"toolchain": {**own, "cibuildwheel": self.cibuildwheel}}

    def arguments(self, plan: Plan) -> str:
        """See Toolchain."""
        return f"{super().arguments(plan)} --toolchain container"

    def fetch(self, plan: Plan) -> None:
        """Fetch the image. Besides the fetch of sources, this is the only step of a container build that uses the network.

        Raises:
            FetchError: the engine cannot fetch it.
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
                f"{engine} cannot fetch {reference}: {reason}",
                remedy=f"run `{engine} pull {reference}` and fix its error",
                repeat=plan.repeat,
            )

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """The command on this machine; the source folder is its working directory."""
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
        """The place of cibuildwheel: this machine, with its network. Only the container has no network."""
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
        """See Toolchain: remove containers whose client was killed, in this run or an earlier one."""
        _remove(self.engine, plan.build_id)
        try:
            yield
        finally:
            _remove(self.engine, plan.build_id)

    def understood(self, outcome: Outcome, log: Path, start: int) -> Outcome:
        """See Toolchain: find in the output which hosts the build tried to reach, and whether it was killed for memory."""
        text = log.read_bytes()[start:].decode(errors="replace")
        hosts = dict.fromkeys(host for line in text.splitlines() if (host := sandbox.reached_in(line)))
        outcome = replace(outcome, reached=tuple(hosts), network_by="log")
        if not self.bounds_memory:
            return outcome
        # In the container only the kernel kills processes: the largest one, and its parent reports it.
        killed = outcome.killed_by_memory or (outcome.returncode != 0 and _KILLED.search(text) is not None)
        return replace(outcome, memory_by=self.engine, killed_by_memory=killed)

    @property
    def note(self) -> str:
        """See Toolchain."""
        bound = f"{self.engine} {'limits the memory' if self.bounds_memory else 'cannot limit the memory on this machine'}"
        return f"container without network; {bound}; CPU time and peak memory are those of the program cibuildwheel"

    def build_paths(self, folder: Path) -> tuple[str, ...]:
        """See Toolchain."""
        return (*super().build_paths(folder), PROJECT)


def _info(engine: str, *options: str) -> str | None:
    process = subprocess.run([engine, "info", *options], capture_output=True, text=True, check=False, timeout=60)
    return process.stdout if process.returncode == 0 else None


def image(plan: Plan) -> Image:
    """The stack's image for the target; `choice.make_plan` has checked that it exists."""
    return plan.stack.data.container[plan.target]


def configuration(
    toolchain: ContainerToolchain, plan: Plan, ground: Ground, folder: Path, *, jobs: int, epoch: int, memory: int
) -> str:
    """Our settings for cibuildwheel, which replace those of the package."""
    volumes = {ground.environment: "/env", folder / "gracefarm": _FILES} | (
        {ground.compiler: wrappers.NVCC} if ground.compiler else {}
    )
    mounts = [f"--volume={source}:{target}:ro" for source, target in volumes.items()]
    # Without swap, as in a sandbox: a build above its limit would become very slow.
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
    """Commands for a CUDA_HOME with links to the image's CUDA and our nvcc wrapper; empty without CUDA."""
    top = image(plan).cuda
    if not plan.recipe.data.build.cuda or top is None:
        return ""
    links = f"mkdir -p {wrappers.CUDA}/bin && ln -s {top}/bin/* {wrappers.CUDA}/bin/ && rm {wrappers.CUDA}/bin/nvcc"
    others = f'for one in {top}/*; do [ "${{one##*/}}" = bin ] || ln -s "$one" {wrappers.CUDA}/; done'
    return f"{links} && cp {_FILES}/nvcc {wrappers.CUDA}/bin/nvcc && {others}"


def variables(plan: Plan, *, jobs: int, epoch: int) -> dict[str, str]:
    """The variables of the build, as in a sandbox, with the container's paths; PATH and compilers are the image's."""
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
        # Nothing is measured, but schedule.py derives the names of units from the source folder in it.
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
    """A recipe's value, with the sandbox's source folder replaced by the container's."""
    return re.sub(r"/build/source(?![^/;:\s])", PROJECT, value)


def _search_path(plan: Plan) -> Iterator[str]:
    """Our ninja, the stack's tools, the image's with its Python first, our nvcc, and the environment's ninja."""
    yield f"{_FILES}/bin"
    if plan.recipe.data.build.cuda:
        yield from (f"{wrappers.NVCC}/{folder}" for folder in plan.stack.data.toolchain.path)
    yield from ("$PATH", f"{wrappers.CUDA}/bin", "/env/bin")


def _remove(engine: str, build_id: str) -> None:
    question = [engine, "ps", "--all", "--quiet", f"--filter=label={_LABEL}={build_id}"]
    containers = subprocess.run(question, capture_output=True, text=True, check=False).stdout.split()
    if containers:
        subprocess.run([engine, "rm", "--force", *containers], capture_output=True, check=False)
