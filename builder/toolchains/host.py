"""Build with the machine's compilers in a clean virtual environment: `--toolchain host`."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import ClassVar, Self

from builder.box.host import HostPlace
from builder.box.place import Place
from builder.planning import pins
from builder.planning.ground import Ground, TrialEnvironment
from builder.planning.plan import CUDA_LAYOUT, Caches, Inputs, Plan, Toolchain, Wanted
from builder.planning.recipe import ToolchainKind
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.toolchains import cuda_home, host_environment, host_tools, wrappers
from builder.toolchains.host_tools import HostTools
from builder.toolchains.host_trial import HostTrialEnvironment, library_path, search_path
from gracefarm.console import Tick, no_tick
from gracefarm.files import atomic_directory, atomic_write, lock, remove_tree


@dataclass(frozen=True, kw_only=True)
class HostToolchain(Toolchain):
    """This machine's Python, gcc and CUDA, for its own architecture."""

    kind: ClassVar[ToolchainKind] = "host"
    native: ClassVar[bool] = True
    pinned: ClassVar[bool] = False
    closed: ClassVar[str | None] = "used this machine's tools without a sandbox"
    unsealed: ClassVar[str | None] = (
        "with the machine's tools. Its objects contain the path of the build folder (debug lines, __FILE__), so a "
        "rebuild in another folder always differs"
    )

    tools: HostTools

    @classmethod
    def find(cls, stack: LoadedStack, wanted: Wanted, *, cuda: bool) -> Self:
        """See Toolchain."""
        return cls(tools=host_tools.find(stack, wanted, cuda=cuda))

    @classmethod
    def used_environment(cls, inputs: Mapping[str, object]) -> bool:
        """See Toolchain."""
        toolchain = inputs["toolchain"]
        return isinstance(toolchain, Mapping) and "distributions" in toolchain  # see HostTools.inputs

    @property
    def differences(self) -> tuple[str, ...]:
        """See Toolchain."""
        return tuple(self.tools.differences())

    def facts(self, stack: LoadedStack) -> LoadedStack:
        """See Toolchain."""
        return self.tools.stack

    def locked(self, stack: LoadedStack) -> LoadedStack | None:
        """See Toolchain."""
        return self.tools.base if self.tools.locked else None

    def inputs(self, plan: Plan) -> Inputs:
        """See Toolchain."""
        return {"toolchain": self.tools.inputs()}

    def digests(self, plan: Plan) -> Inputs:
        """See Toolchain."""
        locked = pins.environment_digest(self.tools.base, plan.target) if self.tools.locked else None
        return {"environment": locked, "toolchain": self.tools.digest(), "root": None}

    def installed(self, plan: Plan) -> dict[str, str]:
        """See Toolchain."""
        return super().installed(plan) if self.tools.locked else dict(self.tools.interpreter.distributions)

    def arguments(self, plan: Plan) -> str:
        """See Toolchain."""
        own = self.tools.wanted.environment
        environment = f" --environment {own}" if own else ""
        return f"--stack {self.tools.base.data.name} --toolchain host{environment}{plan.stack.device_options}"

    def lay(
        self, stack: LoadedStack, host: Arch, target: Arch, settings: Settings, tick: Tick = no_tick, *, cuda: bool
    ) -> Ground:
        """See Toolchain: only a clean environment."""
        site = host_environment.ensure(self.tools, settings, tick)
        own = wrappers.site_packages(site, self.tools.interpreter.minor)
        packages = own if self.tools.locked else self.tools.site_packages
        return Ground(
            root=Path("/"),
            environment=site,
            packages=packages,
            compiler=self.tools.cuda_home,
            title=f"no root is used, only this machine's files and the clean environment {site}",
            folders=host_tools.library_folders(self.tools),
            sm=stack.sm,
            interpreter=self.tools.interpreter.real,
            cuobjdump=_cuobjdump(self.tools, packages),
        )

    def resumes(self, tree: Path, epoch: int) -> bool:
        """See Toolchain: ninja continues with the complete objects."""
        clear_products(tree, epoch)
        return tree.is_dir()

    def command(self, plan: Plan, settings: Settings, folder: Path) -> tuple[str, ...]:
        """See Toolchain."""
        return wrappers.command(plan, str(host_environment.folder(self.tools, settings)), str(folder))

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
        """See Toolchain: the folder itself, without network if the machine allows it."""
        (folder / "home").mkdir(parents=True, exist_ok=True)
        _ninja(folder / "bin", settings)
        wrappers.lay_plugin(folder)
        return HostPlace(
            environment=_variables(plan, self.tools, ground.environment, settings, folder, jobs=jobs, epoch=epoch),
            workdir=str(folder),
            memory=memory,
            network=self.tools.uncut is not None,
        )

    @property
    def note(self) -> str:
        """See Toolchain."""
        return "without network" if self.tools.uncut is None else f"with network: {self.tools.uncut}"

    def build_paths(self, folder: Path) -> tuple[str, ...]:
        """See Toolchain: objects contain the path of the folder."""
        return (*super().build_paths(folder), str(folder))

    def trial_environment(self, ground: Ground, *, emulated: bool) -> TrialEnvironment:
        """See Toolchain."""
        return HostTrialEnvironment(tools=self.tools, ground=ground, emulated=emulated)

    def with_torch(self) -> Self:
        """See Toolchain."""
        return replace(self, tools=replace(self.tools, base=replace(self.tools.base, uses_torch=True)))


def _cuda_home(tools: HostTools, settings: Settings) -> Path | None:
    """A CUDA_HOME with links to the machine's toolkit, of any layout, and our nvcc wrapper; None without CUDA."""
    top = tools.cuda_home
    if top is None:
        return None
    digest = hashlib.sha256(f"{CUDA_LAYOUT} {top} {tools.digest()}".encode()).hexdigest()
    final = settings.home / "host" / "cuda" / digest[:32]
    with lock(final.with_name(f"{final.name}.lock")):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                _link_toolkit(top, folder)
    return final


def _link_toolkit(top: Path, folder: Path) -> None:
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir()
    for name in ("bin", "include"):
        for entry in sorted((top / name).iterdir()):
            if entry.name != "nvcc":
                (folder / name / entry.name).symlink_to(entry)
    with as_file(files("builder") / "data" / "toolchain" / "nvcc") as wrapper:
        (folder / "bin" / "nvcc").write_bytes(wrapper.read_bytes())
    (folder / "bin" / "nvcc").chmod(0o755)
    for entry in sorted(library for part in ("lib64", "lib") for library in (top / part).glob("*")):
        # A toolkit from wheels has libcudart.so.13, but no libcudart.so.
        for name in {entry.name, cuda_home.link_name(entry.name)}:
            if not (folder / "lib64" / name).is_symlink() and not ((top / "lib64" / name).exists() and name != entry.name):
                (folder / "lib64" / name).symlink_to(entry)
    (folder / "lib").symlink_to("lib64")
    for name in ("nvvm", "targets", "extras"):
        if (top / name).exists():
            (folder / name).symlink_to(top / name)


def _variables(
    plan: Plan, tools: HostTools, site: Path, settings: Settings, folder: Path, *, jobs: int, epoch: int
) -> dict[str, str]:
    """The variables of a build: those of a sandbox with this machine's paths, and LD_LIBRARY_PATH if it is set."""
    values = wrappers.variables(plan, jobs=jobs, epoch=epoch)
    values = {name: value.replace("/build/", f"{folder}/") for name, value in values.items()}
    home = _cuda_home(tools, settings)
    cmake, front = settings.home / "host" / "host.cmake", settings.home / "host" / "front.py"
    for source, copy in (("host/host.cmake", cmake), ("toolchain/front.py", front)):
        atomic_write(copy, (files("builder") / "data" / source).read_bytes())
    values |= {
        "PATH": f"{folder / 'bin'}:{search_path(tools, site, home)}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "CC": os.environ.get("CC") or "gcc",
        "CXX": os.environ.get("CXX") or "g++",
        "CMAKE_TOOLCHAIN_FILE": str(cmake),
        "GRACEFARM_FRONT": f"{sys.executable} -I -S {front}",
        "GRACEFARM_SCHEDULER": f"{sys.executable} -I -S {wrappers.folder(settings)}/lib/schedule.py",
        "GRACEFARM_PYTHON": str(site / "bin" / "python3"),
        "GRACEFARM_PYTHON_INCLUDE": str(tools.interpreter.header.parent),
    }
    if home is not None and tools.cuda_home is not None:
        values |= {"CUDA_HOME": str(home), "CUDA_PATH": str(home), "CUDACXX": str(home / "bin" / "nvcc")}
        values |= {"GRACEFARM_NVCC": str(tools.cuda_home / "bin" / "nvcc"), "GRACEFARM_CCBIN": ""}
    if tools.cxx_runtime is not None:
        # Before the objects: then the linker does not search its symbols in libstdc++.a, which the compiler adds at the end.
        shared = f"-Wl,--push-state,--no-as-needed,{tools.cxx_runtime},--pop-state"
        values["LDFLAGS"] = f"{values.get('LDFLAGS', '')} {shared}".strip()
    return values | library_path()


def _ninja(folder: Path, settings: Settings) -> None:
    """Create a folder for the front of PATH that has only our ninja, under all names that CMake searches."""
    remove_tree(folder)
    folder.mkdir()
    for name in ("ninja", *(["ninja-build"] if shutil.which("ninja-build") else [])):
        (folder / name).symlink_to(wrappers.folder(settings) / "bin" / "ninja")


def _cuobjdump(tools: HostTools, packages: Path) -> Path | None:
    """NVIDIA's cuobjdump: from the toolkit, the environment's wheels, or PATH."""
    sites = [packages] if tools.locked else tools.interpreter.sites
    readers = [tools.cuda_home / "bin" / "cuobjdump"] if tools.cuda_home else []
    readers += [reader for site in sites for reader in sorted(site.glob("nvidia/*/bin/cuobjdump"))]
    on_path = shutil.which("cuobjdump")
    return next((reader for reader in readers if os.access(reader, os.X_OK)), Path(on_path) if on_path else None)


def clear_products(tree: Path, epoch: int) -> Sequence[Path]:
    """Remove libraries, which an interrupted build may have left incomplete; ninja checks the objects.

    All files of the source have the time `epoch`.
    """
    stale = [library for library in tree.rglob("*.so") if library.is_file() and int(library.stat().st_mtime) != epoch]
    for library in stale:
        library.unlink()
    return stale
