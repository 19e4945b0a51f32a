"""Our compiler wrappers, and the variables and the command with which a package's build script uses them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath

from builder.ground.bytecode import NATIVE_PYTHON
from builder.ground.interpreters import tree
from builder.planning import device_code
from builder.planning.plan import Plan, wrappers_digest
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from gracefarm.files import atomic_directory, lock

UNITS, SCHEDULE = "units.jsonl", "schedule.json"
"Files in a build's work folder: front.py writes the first, schedule.py reads the second."
PLUGIN = "setuptools"
"Folder in a build's work folder, with the plugin that makes setuptools compile objects in parallel."
CUDA = "/cuda"
"CUDA_HOME in a sandbox or container: links to the compiler and the libraries, with our nvcc wrapper."
NVCC = "/toolchain"
PASSES = f"{CUDA}/passes"
"Folder in a sandbox with a link to nvcc and our replacements of its device passes."
TOOLS = "/tools"
"Folder in a sandbox with programs for this machine that the recipe requires to build, such as CMake."
INSIDE = "/gracefarm"
FRONT, SCHEDULER = (f"{NATIVE_PYTHON} -I -S {INSIDE}/lib/{name}.py" for name in ("front", "schedule"))
"Commands with which the wrappers start a cached and measured compilation, and ninja with a schedule."
DEVICE = f"{NATIVE_PYTHON} -I -S {INSIDE}/lib/device"
"Command with which they start a device pass."
DEVICE_PASSES = ("cudafe++", "cicc", "ptxas", "fatbinary")
DEVICE_MODULES = ("bitcode.py", "device_store.py")
"Modules that device.py imports."
_COMPILERS = [prefix + name for prefix in ("", *(f"{arch.triplet}-" for arch in Arch)) for name in ("gcc", "g++", "cc", "c++")]
PATH = f"{INSIDE}/bin:/opt/gracefarm/bin:{CUDA}/bin:/usr/bin:/bin:/env/bin"


def site_packages(environment: Path, python: str) -> Path:
    """The site-packages of an environment."""
    return environment / "lib" / f"python{python}" / "site-packages"


def folder(settings: Settings) -> Path:
    """The folder of wrappers, copied once for each content, so that a sandbox can mount it from every installation."""
    final = settings.home / "wrappers" / wrappers_digest()[:16]
    with lock(final.with_name(f"{final.name}.lock")):
        if not final.is_dir():
            with atomic_directory(final) as copy, as_file(files("builder") / "data" / "toolchain") as source:
                (copy / "bin").mkdir()
                (copy / "lib").mkdir()
                # Copies, not links: torch decides by the name of the link's target whether a compiler is GNU's.
                names = dict.fromkeys(_COMPILERS, "compiler") | {name: name for name in ("emulate", "ninja", "nvcc", "python")}
                for name, script in names.items():
                    shutil.copy(source / script, copy / "bin" / name)
                    (copy / "bin" / name).chmod(0o755)
                for name in ("front.py", "schedule.py"):
                    shutil.copy(source / name, copy / "lib" / name)
                _device(source, copy)
                for name in ("python3", *(f"python3.{minor}" for minor in range(10, 16))):
                    (copy / "bin" / name).symlink_to("python")
                shutil.copy(source / "toolchain.cmake", copy / "toolchain.cmake")
    return final


def _device(source: Path, copy: Path) -> None:
    """Create device.py as a program that can import its modules by name, and the scripts that start it."""
    modules = copy / "lib" / "device" / "builder" / "data" / "toolchain"
    modules.mkdir(parents=True)
    for name in DEVICE_MODULES:
        shutil.copy(source / name, modules / name)
    shutil.copy(source / "device.py", copy / "lib" / "device" / "__main__.py")
    (copy / "passes").mkdir()
    for name in DEVICE_PASSES:
        shutil.copy(source / "pass", copy / "passes" / name)
        (copy / "passes" / name).chmod(0o755)


def lay_plugin(work: Path) -> None:
    """Copy the plugin of setuptools into a work folder."""
    with as_file(files("builder") / "data" / PLUGIN) as source:
        shutil.copytree(source, work / PLUGIN, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def variables(plan: Plan, *, jobs: int, epoch: int, tools: Sequence[str] = ()) -> dict[str, str]:
    """All variables of a build; none come from the machine. `tools`: folders of a recipe's programs."""
    data, recipe = plan.stack.data, plan.recipe.data
    cross = plan.host is not plan.target
    python = "/usr" if plan.stack.interpreter is None else tree.PREFIX
    gcc, gxx = (f"{plan.target.triplet}-gcc", f"{plan.target.triplet}-g++") if cross else ("gcc", "g++")
    values = {
        "PATH": ":".join(_path(data.toolchain.path if recipe.build.cuda else (), tools)),
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
        "PYTHONPATH": f"/build/{PLUGIN}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",
        "GRACEFARM_TARGET": plan.target.value,
        "GRACEFARM_FRONT": FRONT,
        "GRACEFARM_UNITS": f"/build/{UNITS}",
        "GRACEFARM_SCHEDULER": SCHEDULER,
        "GRACEFARM_SCHEDULE": f"/build/{SCHEDULE}",
        "CC": gcc,
        "CXX": gxx,
        "CMAKE_TOOLCHAIN_FILE": f"{INSIDE}/toolchain.cmake",
        "CMAKE_GENERATOR": "Ninja",
        "MAX_JOBS": str(jobs),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "MAKEFLAGS": f"-j{jobs}",
        "GRACEFARM_PYTHON_INCLUDE": f"{python}/include/python{plan.stack.python}",
        "GRACEFARM_CMAKE": "\n".join(f"{name}={value}" for name, value in sorted(plan.build.cmake.items())),
    }
    if recipe.tree is not None:
        own = {"CC_FOR_BUILD": f"{plan.host.triplet}-gcc", "CXX_FOR_BUILD": f"{plan.host.triplet}-g++", "OUT": "/build/out"}
        values |= own
    if recipe.build.cuda:
        values |= {
            "CUDA_HOME": CUDA,
            "CUDA_PATH": CUDA,
            "CUDACXX": f"{CUDA}/bin/nvcc",
            "GRACEFARM_NVCC": f"{PASSES}/nvcc",
            "GRACEFARM_DEVICE": DEVICE,
            "GRACEFARM_CUDA": data.cuda,
            "GRACEFARM_CCBIN": gxx if cross else "",
            "GRACEFARM_SM": " ".join(plan.stack.sm),
            "GRACEFARM_SM_EXTRA": "\n".join(f"{glob}={','.join(sorted(sm))}" for glob, sm in recipe.wheel.sm_extra.items()),
            "GRACEFARM_SM_FALLBACK": "yes" if recipe.wheel.allow_sm_fallback else "",
            "GRACEFARM_PTX": plan.ptx or "",
            "GRACEFARM_CMAKE_SM": device_code.cmake_list(plan.stack.sm),
            "TORCH_CUDA_ARCH_LIST": device_code.torch_list(plan.stack.sm),
        }
    return values | plan.build.environment


def _path(of_stack: Sequence[str], tools: Sequence[str]) -> Iterator[str]:
    """PATH: the recipe's programs come before those of stack and root, but our ninja starts first."""
    if tools:
        yield f"{INSIDE}/bin"
    yield from tools
    yield from (f"{NVCC}/{folder}" for folder in of_stack)
    yield PATH


def command(plan: Plan, environment: str = "/env", folder: str = "/build", further: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command in the sandbox, which can also be typed in `builder shell`. `further`: options for the backend."""
    build, tree = plan.build, plan.recipe.data.tree
    if tree is not None:
        return ("sh", "-euxc", "\n".join((f"cd {folder}/source/{build.subdirectory}", *tree.commands)))
    options = {key: value.replace("/build/", f"{folder}/") for key, value in build.config_settings.items()}
    settings = tuple(f"-C{key}={value}" for key, value in sorted(options.items()))
    place = str(PurePosixPath(folder) / "source" / build.subdirectory)
    # --skip-dependency-check: check_requirements did it; build would start the emulated setup.py, and torch, again.
    return (
        f"{environment}/bin/python3",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--skip-dependency-check",
        *further,
        *settings,
        "--outdir",
        f"{folder}/out",
        place,
    )
