"""Compilers as a package's build script sees them: CUDA_HOME, wrappers on PATH, and the variables that name them."""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import as_file, files
from pathlib import Path

from builder.box import sandbox
from builder.box.sandbox import Mount, Sandbox
from builder.compiling import units
from builder.ground.root import NATIVE_PYTHON
from builder.planning.plan import CUDA_LAYOUT, Plan, wrappers_digest
from builder.planning.stack import Arch
from gracefarm.errors import RootError
from gracefarm.files import atomic_directory, lock
from gracefarm.settings import Settings

CUDA = "/cuda"
NVCC = "/toolchain"
WRAPPERS = "/gracefarm"
FRONT, SCHEDULER = (f"{NATIVE_PYTHON} -I -S {WRAPPERS}/lib/{name}.py" for name in ("front", "schedule"))
"How the wrappers start a compilation that is cached and measured, and ninja with a schedule."
_COMPILERS = [prefix + name for prefix in ("", *(f"{arch.triplet}-" for arch in Arch)) for name in ("gcc", "g++", "cc", "c++")]
PATH = f"{WRAPPERS}/bin:/opt/gracefarm/bin:{CUDA}/bin:/usr/bin:/bin:/env/bin"


def site_packages(environment: Path, python: str) -> Path:
    """The site-packages of an environment."""
    return environment / "lib" / f"python{python}" / "site-packages"


def wrappers(settings: Settings) -> Path:
    """The folder of wrappers, copied once per content so that a sandbox can mount it from any installation of ours."""
    final = settings.home / "wrappers" / wrappers_digest()[:16]
    with lock(settings.home / "locks" / f"wrappers-{final.name}"):
        if not final.is_dir():
            with atomic_directory(final) as folder, as_file(files("builder") / "data" / "toolchain") as source:
                (folder / "bin").mkdir()
                (folder / "lib").mkdir()
                # Copies: torch believes that a compiler is GNU's when the file that the name leads to says so.
                names = dict.fromkeys(_COMPILERS, "compiler") | {name: name for name in ("emulate", "ninja", "nvcc", "python")}
                for name, script in names.items():
                    shutil.copy(source / script, folder / "bin" / name)
                    (folder / "bin" / name).chmod(0o755)
                for name in ("front.py", "schedule.py"):
                    shutil.copy(source / name, folder / "lib" / name)
                for name in ("python3", "python3.11"):
                    (folder / "bin" / name).symlink_to("python")
                shutil.copy(source / "toolchain.cmake", folder / "toolchain.cmake")
    return final


def cuda_home(plan: Plan, environment: Path, root: Path, settings: Settings) -> Path:
    """A CUDA_HOME for the target: our nvcc in front, headers and libraries of the target's wheels under their usual names.

    Links point to places inside the sandbox (/env, /toolchain), so the folder is small and depends on digests alone.
    """
    stack = plan.inputs["stack"]
    assert isinstance(stack, dict)
    final = settings.home / "cuda" / f"{CUDA_LAYOUT}-{str(stack['toolchain'])[:12]}-{str(stack['environment'])[:12]}"
    with lock(settings.home / "locks" / f"cuda-{final.name}"):
        if final.is_dir():
            return final
        packages = site_packages(environment, plan.stack.data.python)
        inside = Path("/env/lib") / f"python{plan.stack.data.python}" / "site-packages"
        with atomic_directory(final) as folder:
            (folder / "bin").mkdir()
            (folder / "bin" / "nvcc").symlink_to(f"{WRAPPERS}/bin/nvcc")
            (folder / "include").mkdir()
            (folder / "lib64").mkdir()
            # One folder of the 13 series, nvidia/cu13; one per library, nvidia/cublas and so on, before it.
            for part in sorted(packages.glob("nvidia/*/")):
                _link_part(folder, part, inside / "nvidia" / part.name)
            (folder / "lib").symlink_to("lib64")
            (folder / "lib64" / "stubs").mkdir()
            _static_runtime(folder / "lib64")
            _driver_stub(folder / "lib64" / "stubs", root, plan.stack.data.cuda)
            (folder / "nvvm").symlink_to(f"{NVCC}/nvidia/cu{plan.stack.data.cuda.split('.')[0]}/nvvm")
    return final


def _static_runtime(libraries: Path) -> None:
    """nvcc links programs with these two, and CMake tries that before anything else; the wheels of the 12 series lack them.

    The static runtime then is the shared one, by a linker script, and the device runtime is empty: who really launches
    kernels from kernels gets an undefined symbol.
    """
    static, device = libraries / "libcudart_static.a", libraries / "libcudadevrt.a"
    shared = next(iter(sorted(libraries.glob("libcudart.so.*"))), None)
    if shared is not None and not static.is_symlink():
        static.write_text(f"INPUT({CUDA}/lib64/{shared.name})\n")
    if not device.is_symlink():
        device.write_bytes(b"!<arch>\n")


def _driver_stub(folder: Path, root: Path, cuda: str) -> None:
    """A libcuda.so to link with, as the toolkit has one: the driver's names and nothing behind them.

    Raises:
        RootError: the root's compiler failed.
    """
    listing = files("builder") / "data" / f"driver-symbols-{cuda}.txt"
    if not listing.is_file():
        return
    names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip() and not line.startswith("#")]
    (folder / "stub.c").write_text(
        "".join(f"int {name}(void) {{ return 34; }}\n" for name in names)
    )  # CUDA_ERROR_STUB_LIBRARY
    box = Sandbox(
        root=root,
        mounts=(Mount(source=folder, target="/build", writable=True),),
        environment={"PATH": "/opt/gracefarm/bin:/usr/bin", "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "0"},
        workdir="/build",
        memory=0,
    )
    command = ["gcc", "-shared", "-fPIC", "-O1", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so", "stub.c"]
    done = subprocess.run(sandbox.command(box, command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RootError(
            f"the driver's stand-in cannot be compiled: {done.stderr.strip()[-500:]}", remedy="run `builder doctor`"
        )
    (folder / "stub.c").unlink()


def _link_part(folder: Path, part: Path, inside: Path) -> None:
    """Headers and libraries of one NVIDIA wheel, by links to where the sandbox has them."""
    for header in sorted((part / "include").glob("*")):
        place = folder / "include" / header.name
        if header.name not in ("__init__.py", "__pycache__") and not place.is_symlink():
            place.symlink_to(inside / "include" / header.name)
    for library in sorted((part / "lib").glob("lib*")):
        place = inside / "lib" / library.name
        if not (folder / "lib64" / library.name).is_symlink():
            (folder / "lib64" / library.name).symlink_to(place)
        short = library.name.split(".so")[0] + ".so"
        if ".so." in library.name and not (folder / "lib64" / short).is_symlink():
            (folder / "lib64" / short).symlink_to(place)


def mounts(plan: Plan, environment: Path, compiler: Path | None, root: Path, settings: Settings) -> tuple[Mount, ...]:
    """What a build's sandbox sees beside its root and its own folder."""
    found = [Mount(source=environment, target="/env"), Mount(source=wrappers(settings), target=WRAPPERS)]
    if compiler is not None:
        found.append(Mount(source=compiler, target=NVCC))
        found.append(Mount(source=cuda_home(plan, environment, root, settings), target=CUDA))
    return tuple(found)


def variables(plan: Plan, *, jobs: int, epoch: int) -> dict[str, str]:
    """The whole environment of a build; nothing of the machine's own gets in."""
    data, recipe = plan.stack.data, plan.recipe.data
    cross = plan.host is not plan.target
    gcc, gxx = (f"{plan.target.triplet}-gcc", f"{plan.target.triplet}-g++") if cross else ("gcc", "g++")
    found = {
        "PATH": ":".join([*(f"{NVCC}/{folder}" for folder in data.toolchain.path if recipe.build.cuda), PATH]),
        "HOME": "/home/build",
        "USER": "build",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "TERM": "dumb",
        "TMPDIR": "/build/tmp",
        "SOURCE_DATE_EPOCH": str(epoch),
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",
        "GRACEFARM_TARGET": plan.target.value,
        "GRACEFARM_FRONT": FRONT,
        "GRACEFARM_UNITS": f"/build/{units.NAME}",
        "GRACEFARM_SCHEDULER": SCHEDULER,
        "GRACEFARM_SCHEDULE": f"/build/{units.SCHEDULE}",
        "CC": gcc,
        "CXX": gxx,
        "CMAKE_TOOLCHAIN_FILE": f"{WRAPPERS}/toolchain.cmake",
        "CMAKE_GENERATOR": "Ninja",
        "MAX_JOBS": str(jobs),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "MAKEFLAGS": f"-j{jobs}",
        "GRACEFARM_PYTHON_INCLUDE": f"/usr/include/python{data.python}",
        "GRACEFARM_CMAKE": "\n".join(f"{name}={value}" for name, value in sorted(recipe.build.cmake.items())),
    }
    if recipe.build.cuda:
        major = data.cuda.split(".")[0]
        found |= {
            "CUDA_HOME": CUDA,
            "CUDA_PATH": CUDA,
            "CUDACXX": f"{CUDA}/bin/nvcc",
            "GRACEFARM_NVCC": f"{NVCC}/nvidia/cu{major}/bin/nvcc",
            "GRACEFARM_CCBIN": gxx if cross else "",
            "GRACEFARM_SM": " ".join(data.sm),
            "GRACEFARM_SM_EXTRA": " ".join(f"{glob}={','.join(values)}" for glob, values in recipe.wheel.sm_extra.items()),
            "TORCH_CUDA_ARCH_LIST": " ".join(f"{sm[:-1]}.{sm[-1]}" for sm in data.sm if sm.isdigit()),
        }
    return found | dict(recipe.build.environment)
