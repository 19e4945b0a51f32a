"""CUDA_HOME of a sandbox: links to the target's wheels and to the host's compiler, with our nvcc wrapper."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from builder.box.sandbox import BindMount, Sandbox
from builder.planning import driver
from builder.planning.plan import CUDA_LAYOUT, Plan
from builder.planning.settings import Settings
from builder.toolchains.wrappers import CUDA, DEVICE_PASSES, INSIDE, NVCC, PASSES, site_packages
from gracefarm.errors import RootError
from gracefarm.files import atomic_directory, lock
from gracefarm.process import tail


def lay_out(plan: Plan, environment: Path, compiler: Path, root: Path, settings: Settings) -> Path:
    """A CUDA_HOME for the target: our nvcc wrapper, headers and libraries of the target's wheels under their usual names.

    Links point to paths in the sandbox (/env, /toolchain), so the folder is small and depends only on digests.
    """
    stack = plan.inputs["stack"]
    assert isinstance(stack, dict)
    final = settings.home / "cuda" / f"{CUDA_LAYOUT}-{str(stack['toolchain'])[:12]}-{str(stack['environment'])[:12]}"
    with lock(final.with_name(f"{final.name}.lock")):
        if final.is_dir():
            return final
        packages = site_packages(environment, plan.stack.python)
        inside = Path("/env/lib") / f"python{plan.stack.python}" / "site-packages"
        with atomic_directory(final) as folder:
            (folder / "bin").mkdir()
            (folder / "bin" / "nvcc").symlink_to(f"{INSIDE}/bin/nvcc")
            (folder / "include").mkdir()
            (folder / "lib64").mkdir()
            # CUDA 13 has one folder, nvidia/cu13; earlier releases have one for each library, such as nvidia/cublas.
            for part in sorted(packages.glob("nvidia/*/")):
                _link_part(folder, part, inside / "nvidia" / part.name)
            (folder / "lib").symlink_to("lib64")
            (folder / "lib64" / "stubs").mkdir()
            _static_runtime(folder / "lib64")
            _driver_stub(folder / "lib64" / "stubs", root, packages)
            inside = Path(NVCC, "nvidia", f"cu{plan.stack.data.cuda.split('.')[0]}")
            (folder / "nvvm").symlink_to(inside / "nvvm")
            _passes(folder / Path(PASSES).name, compiler / inside.relative_to(NVCC) / "bin", inside / "bin")
    return final


def _passes(folder: Path, programs: Path, inside: Path) -> None:
    """Link nvcc's programs, and replace its device passes by ours. nvcc reads nvcc.profile, which names the folder of the
    passes, in the folder of the link."""
    folder.mkdir()
    for program in sorted(programs.iterdir()):
        if program.name not in (*DEVICE_PASSES, "nvcc.profile"):
            (folder / program.name).symlink_to(inside / program.name)
    for name in DEVICE_PASSES:
        (folder / name).symlink_to(f"{INSIDE}/passes/{name}")
    profile = (programs / "nvcc.profile").read_text().replace("$(_HERE_)", str(inside))
    profile = re.sub(r"^CICC_PATH\s*=.*$", f"CICC_PATH = {PASSES}", profile, flags=re.MULTILINE)
    (folder / "nvcc.profile").write_text(f"{profile}\nPATH += {PASSES}:\n")


def _static_runtime(libraries: Path) -> None:
    """Add the two libraries that nvcc links into programs (CMake tests this first); wheels of CUDA 12 do not have them.

    The static runtime is a linker script for the shared one. The device runtime is empty: code that launches kernels from
    kernels gets an undefined symbol.
    """
    static, device = libraries / "libcudart_static.a", libraries / "libcudadevrt.a"
    shared = next(iter(sorted(libraries.glob("libcudart.so.*"))), None)
    if shared is not None and not static.is_symlink():
        static.write_text(f"INPUT({CUDA}/lib64/{shared.name})\n")
    if not device.is_symlink():
        device.write_bytes(b"!<arch>\n")


def _driver_stub(folder: Path, root: Path, packages: Path) -> None:
    """Compile a stub of libcuda.so to link with, as the toolkit has one: only the driver's symbols.

    Raises:
        RootError: the root's compiler failed.
    """
    include = driver.headers(packages)
    if include is None:
        return
    # CUDA_ERROR_STUB_LIBRARY
    functions = "".join(f"int {name}(void) {{ return 34; }}\n" for name in sorted(driver.symbols(include)))
    (folder / "stub.c").write_text(functions)
    box = Sandbox(
        root=root,
        mounts=(BindMount(source=folder, target="/build", writable=True),),
        environment={"PATH": "/opt/gracefarm/bin:/usr/bin", "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "0"},
        workdir="/build",
        memory=0,
    )
    command = ["gcc", "-shared", "-fPIC", "-O1", "-nostdlib", f"-Wl,-soname,{driver.SONAME}", "-o", "libcuda.so", "stub.c"]
    process = subprocess.run(box.command(command), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RootError(
            f"the stub of NVIDIA's driver library cannot be compiled: {tail(process.stderr)}",
            remedy="run `builder doctor`, which tests the sandbox and the root of the stack, then repeat the command",
        )
    (folder / "stub.c").unlink()


def _link_part(folder: Path, part: Path, inside: Path) -> None:
    """Link headers and libraries of one NVIDIA wheel to their paths in the sandbox."""
    for header in sorted((part / "include").glob("*")):
        place = folder / "include" / header.name
        if header.name not in ("__init__.py", "__pycache__") and not place.is_symlink():
            place.symlink_to(inside / "include" / header.name)
    for library in sorted((part / "lib").glob("lib*")):
        for name in {library.name, link_name(library.name)}:
            if not (folder / "lib64" / name).is_symlink():
                (folder / "lib64" / name).symlink_to(inside / "lib" / library.name)


def link_name(library: str) -> str:
    """The name under which a linker finds a library, as libcudart.so for libcudart.so.13."""
    return library.partition(".so.")[0] + ".so" if ".so." in library else library
