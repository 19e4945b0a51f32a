"""This machine's compilers, CUDA and Python for `--toolchain host`, described so that they can enter a build id.

Differences from the stack are never silent: they are facts of another stack, `NAME@host`, enter build id and record, and are
printed. If torch, its CUDA or the compiler's CUDA differs, this is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from builder import elf
from builder.box.host import uncut
from builder.ground import torch_facts
from builder.planning.plan import Wanted
from builder.planning.stack import HOST_SUFFIX, Arch, LoadedStack, Torch, host_arch
from builder.toolchains.glibc_headers import unread_headers
from gracefarm.errors import HostError
from gracefarm.files import sha256_file
from gracefarm.process import last_line, tail
from gracefarm.tables import Table

_OTHER = "give a working CPython interpreter with --python PATH, or its environment with --environment PATH"
_CUDA_PROGRAMS = ("bin/nvcc", "nvvm/bin/cicc", "bin/cudafe++", "bin/ptxas", "bin/fatbinary", "bin/nvlink")
_GCC_PROGRAMS = ("cc1", "cc1plus", "as", "ld", "collect2")
_PROBE = """
import importlib.metadata, json, os, platform, sys, sysconfig
sites = [one for one in dict.fromkeys(sys.path) if one.endswith("-packages") and os.path.isdir(one)]
found = {}
for one in importlib.metadata.distributions(path=sites):
    found.setdefault(one.metadata["Name"], one.version)
print(json.dumps({
    "implementation": sys.implementation.name, "version": platform.python_version(),
    "real": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    "scripts": sysconfig.get_path("scripts"),
    "header": os.path.join(sysconfig.get_path("include"), "Python.h"), "library": sysconfig.get_config_var("LIBDIR") or "",
    "sites": sites, "distributions": found,
}))
"""


class HostPython(Table):
    """A Python of this machine."""

    executable: Path
    implementation: str
    version: str
    "As 3.12.3"
    real: Path
    "The program that exports the C API"
    scripts: Path
    header: Path
    library: str
    sites: tuple[Path, ...]
    distributions: Mapping[str, str]
    "Version by canonical name"

    @property
    def minor(self) -> str:
        """As 3.12."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class HostTools:
    """The tools of a host build."""

    base: LoadedStack
    "The stack that the user named."
    wanted: Wanted
    arch: Arch
    interpreter: HostPython
    glibc: str
    "As 2_39."
    compilers: Mapping[str, str]
    "Version line and sha256 of each program."
    cuda_home: Path | None
    uncut: str | None = None
    "Why a build has this machine's network; None: it has no network."
    cxx_runtime: Path | None = None
    "The shared libstdc++ to link explicitly, if the compiler would link a static one; None: it links the shared one."

    @property
    def locked(self) -> bool:
        """Whether packages come from the stack's lock, not from an installed environment."""
        return self.wanted.environment is None

    @property
    def site_packages(self) -> Path:
        """The folder of the named environment with torch, else its first folder."""
        return next((site for site in self.interpreter.sites if (site / "torch").is_dir()), self.interpreter.sites[0])

    @cached_property
    def stack(self) -> LoadedStack:
        """The stack with its facts replaced by those of this machine."""
        data = self.base.data
        torch = self.base.torch
        if torch is not None and not self.locked:
            torch = Torch(version=self.interpreter.distributions["torch"], cuda=torch.cuda)
        update: dict[str, object] = {"name": data.name + HOST_SUFFIX, "python": self.interpreter.minor, "torch": torch}
        update["glibc"] = {self.arch: self.glibc}
        return replace(self.base, data=data.model_copy(update=update))

    def differences(self) -> Iterator[str]:
        """Sentences about differences from the stack."""
        data, glibc = self.base.data, self.glibc.replace("_", ".")
        yield f"compilers are those of this machine, not the {self.base.root.suite} packages in the stack's lock"
        if self.interpreter.minor != data.python:
            yield f"Python is {self.interpreter.minor}, but the stack has {data.python}"
        floor = data.glibc.get(self.arch)
        if floor != self.glibc:
            allowed = f"at most {floor.replace('_', '.')}" if floor else "no glibc"
            yield f"glibc is {glibc}, but the stack allows {allowed} on {self.arch.value}: the wheel may require {glibc}"
        if not self.locked:
            yield "packages are those of the environment that --environment names, not those of the stack's lock"
        if self.cxx_runtime is not None:
            yield "g++ links libstdc++ statically by default; the build makes it link the shared libstdc++, which torch uses"

    def inputs(self) -> dict[str, object]:
        """Inputs of the build id in addition to the stack's facts; without paths."""
        own = {} if self.locked else {"distributions": dict(sorted(self.interpreter.distributions.items()))}
        return {
            "kind": "host",
            "python": self.interpreter.version,
            "compilers": dict(sorted(self.compilers.items())),
            "differs": list(self.differences()),
            **own,
        }

    def digest(self) -> str:
        """Hex sha256 of the compilers."""
        return hashlib.sha256(json.dumps(self.compilers, sort_keys=True).encode()).hexdigest()


def find(base: LoadedStack, wanted: Wanted, *, cuda: bool) -> HostTools:
    """This machine's toolchain for a stack; `cuda`: the CUDA compiler and torch are required.

    Raises:
        HostError: a tool is missing, or torch or CUDA differs from the stack; names the tool and the remedy.
    """
    arch = host_arch()
    interpreter = _interpreter(base, wanted)
    glibc = "_".join(os.confstr("CS_GNU_LIBC_VERSION").split()[-1].split(".")[:2])  # type: ignore[union-attr]
    compilers = dict(_gcc()) | {"glibc": glibc.replace("_", ".")}
    cuda_home = None
    if cuda:
        cuda_home = _toolkit(base, wanted)
        compilers |= dict(_nvcc(cuda_home))
        _check_torch(base, wanted, interpreter)
        check_headers(arch, base.data.cuda, compilers["glibc"])
    cxx_runtime = _shared_cxx_runtime(interpreter) if _links_cxx_statically() else None
    return HostTools(
        base=base,
        wanted=wanted,
        arch=arch,
        interpreter=interpreter,
        glibc=glibc,
        compilers=compilers,
        cuda_home=cuda_home,
        uncut=uncut(),
        cxx_runtime=cxx_runtime,
    )


# --- Python ------------------------------------------------------------------------------------------------------------------


def _interpreter(base: LoadedStack, wanted: Wanted) -> HostPython:
    python = base.data.python
    on_path = shutil.which(f"python{python}")
    place = wanted.environment or wanted.python or (Path(on_path) if on_path else None)
    if place is None:
        raise HostError(
            f"python{python}, which the lock of stack {base.data.name} requires, is not on PATH",
            remedy="install this Python; or give its path with --python PATH; or use --environment PATH to give an "
            "environment that has torch",
        )
    if place.is_dir():
        place = place / "bin" / "python3"
    interpreter = probe(place)
    if wanted.environment is None and interpreter.minor != python:
        raise HostError(
            f"{place} is Python {interpreter.minor}, but the lock of stack {base.data.name} is for Python {python}",
            remedy=f"give a Python {python} with --python PATH, or use --environment PATH to give an "
            "environment that has torch",
        )
    if not interpreter.header.is_file():
        raise HostError(
            f"the header {interpreter.header} of {place} is missing",
            remedy=f"install the headers of this Python (Debian: python{interpreter.minor}-dev)",
        )
    if wanted.environment is not None:
        missing = [name for name in ("build", "setuptools") if name not in interpreter.distributions]
        if missing:
            raise HostError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in the environment of {place}",
                remedy=f"run `{place} -m pip install {' '.join(missing)} wheel ninja packaging`",
            )
    return interpreter


def probe(executable: Path) -> HostPython:
    """Run a Python interpreter to read its facts, isolated from our environment.

    Raises:
        HostError: it does not run, or is not CPython.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    try:
        process = subprocess.run(
            [executable, "-c", _PROBE], capture_output=True, text=True, check=False, env=kept, cwd="/", timeout=120
        )
    except OSError as error:
        raise HostError(f"{executable} does not run: {error.strerror}", remedy=_OTHER) from error
    if process.returncode:
        answer = last_line(process.stderr)
        raise HostError(f"{executable} cannot be used for builds: {answer}", remedy=_OTHER)
    try:
        answer = json.loads(process.stdout)
    except ValueError as error:
        raise HostError(f"{executable} is not a working Python interpreter", remedy=_OTHER) from error
    if answer["implementation"] != "cpython":
        raise HostError(f"{executable} is {answer['implementation']}, not CPython", remedy=_OTHER)
    versions = {canonicalize_name(name): version for name, version in answer["distributions"].items() if name}
    return HostPython.model_validate(answer | {"executable": executable.absolute(), "distributions": versions})


def _check_torch(base: LoadedStack, wanted: Wanted, interpreter: HostPython) -> None:
    """Refuse another torch or CUDA than the stack's, since the wheel links with torch."""
    stack = base.data
    if wanted.environment is None or base.torch is None or stack.torch is None:
        return
    version = interpreter.distributions.get("torch")
    if version is None:
        raise HostError(
            f"the environment of {interpreter.executable} has no torch",
            remedy=f"install torch {stack.torch.version} in this environment",
        )
    site = next((site for site in interpreter.sites if (site / "torch" / "version.py").is_file()), None)
    cuda = torch_facts.read(site).get("cuda") if site else None
    if Version(version).public != Version(stack.torch.version).public or cuda != stack.torch.cuda:
        raise HostError(
            f"the environment of {interpreter.executable} has torch {version} {torch_facts.built_for(cuda)}, but "
            f"stack {stack.name} has torch {stack.torch.version} {torch_facts.built_for(stack.torch.cuda)}",
            remedy="give a stack with this version of torch (--stack), or an environment with the stack's version of "
            "torch (--environment)",
        )


# --- compilers ---------------------------------------------------------------------------------------------------------------


def _gcc() -> Iterator[tuple[str, str]]:
    for name, variable in (("gcc", "CC"), ("g++", "CXX")):
        program = shutil.which(os.environ.get(variable) or name)
        if program is None:
            raise HostError(
                f"{os.environ.get(variable) or name} is not on PATH",
                remedy=f"correct the variable {variable}, or unset it"
                if os.environ.get(variable)
                else "install gcc and g++ (Debian: build-essential)",
            )
        yield name, f"{_said([program, '--version']).splitlines()[0]} sha256:{sha256_file(Path(program).resolve())}"
        for part in _GCC_PROGRAMS:
            place = shutil.which(_said([program, f"-print-prog-name={part}"]))
            if place is not None:
                yield part, f"sha256:{sha256_file(Path(place))}"


def _links_cxx_statically() -> bool:
    """Whether the compiler links the C++ runtime statically. Then exceptions could not pass from the object to torch."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "throws.cpp"), Path(folder, "throws.so")
        source.write_text('#include <stdexcept>\nvoid fail() { throw std::runtime_error(""); }\n')
        compiler = os.environ.get("CXX") or "g++"
        process = subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True, check=False, timeout=60
        )
        if process.returncode:
            raise HostError(
                f"{compiler} cannot compile C++: {tail(process.stderr)}",
                remedy="install g++ and its libstdc++ (Debian: build-essential)",
            )
        return "libstdc++.so.6" not in elf.read(library).needed


def _shared_cxx_runtime(interpreter: HostPython) -> Path:
    """The libstdc++ that this Python, and so its torch, loads."""
    program = "import ctypes; ctypes.CDLL('libstdc++.so.6'); print(open('/proc/self/maps').read())"
    process = subprocess.run([interpreter.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    library = next((line.split()[-1] for line in process.stdout.splitlines() if "/libstdc++.so.6" in line), None)
    if library is None:
        raise HostError(
            f"{interpreter.executable} cannot load libstdc++.so.6. The wheel must use it, because g++ links "
            "libstdc++ statically by default",
            remedy="install libstdc++ (Debian: libstdc++6)",
        )
    return Path(library)


def _toolkit(base: LoadedStack, wanted: Wanted) -> Path:
    """The CUDA toolkit: the named one, else the first that has the stack's release."""
    release = base.data.cuda
    places = [wanted.cuda] if wanted.cuda else _usual_places(release)
    seen = []
    for place in dict.fromkeys(places):
        if not os.access(place / "bin" / "nvcc", os.X_OK):
            continue
        have = _release(place)
        if have == release:
            return place
        seen.append(f"{place} has {have or 'no known release'}")
    if seen:
        raise HostError(
            f"stack {base.data.name} requires CUDA {release}, but {', '.join(seen)}",
            remedy=f"give the folder of CUDA {release} with --cuda PATH, or a stack for this CUDA with --stack",
        )
    where = str(wanted.cuda) if wanted.cuda else "CUDA_HOME, /usr/local/cuda or the folders of PATH"
    raise HostError(
        f"no CUDA compiler (nvcc) was found in {where}", remedy=f"install CUDA {release}, or give its folder with --cuda PATH"
    )


def check_headers(arch: Arch, cuda: str, glibc: str) -> None:
    """Require that the CUDA compiler can read the headers of this machine.

    Raises:
        HostError: it is known that it cannot.
    """
    if problem := unread_headers(arch, cuda, glibc):
        raise HostError(
            problem,
            remedy="omit --toolchain host, since the sandbox has older headers; or build on Ubuntu 22.04, Debian 12 or Rocky"
            " 9",
        )


def _usual_places(release: str) -> Iterator[Path]:
    yield from (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    yield from (Path(f"/usr/local/cuda-{release}"), Path("/usr/local/cuda"))
    if program := shutil.which("nvcc"):
        yield Path(program).resolve().parents[1]


def _release(cuda_home: Path) -> str | None:
    words = _said([str(cuda_home / "bin" / "nvcc"), "--version"]).replace(",", " ").split()
    return words[words.index("release") + 1] if "release" in words else None


def _nvcc(cuda_home: Path) -> Iterator[tuple[str, str]]:
    for name in _CUDA_PROGRAMS:
        if (cuda_home / name).is_file():
            place = cuda_home / name
            yield place.name, f"sha256:{sha256_file(place)}"
    version = next(
        (line for line in _said([str(cuda_home / "bin" / "nvcc"), "--version"]).splitlines() if "release" in line), ""
    )
    yield "cuda", version.strip()
    # By name and size, since each build would have to read thousands of files.
    headers = hashlib.sha256()
    top = (cuda_home / "include").resolve()
    for folder, folders, files in os.walk(top):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            headers.update(f"{path.relative_to(top)} {path.stat().st_size if path.exists() else 0}\n".encode())
    yield "cuda headers", f"sha256:{headers.hexdigest()} of names and sizes"


def _said(command: list[str]) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        raise HostError(f"{command[0]} does not run: {error.strerror}", remedy="install the program again") from error
    if process.returncode or not process.stdout.strip():
        raise HostError(f"{' '.join(command)} fails: {tail(process.stderr)}", remedy="install the program again")
    return process.stdout.strip()


def library_folders(tools: HostTools) -> tuple[str, ...]:
    """Folders that this machine's loader searches besides Debian's, relative to /: from its cache, and Python's."""
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin")
    lines = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout if ldconfig else ""
    places = [line.rpartition(" => ")[2].rpartition("/")[0] for line in lines.splitlines() if " => " in line]
    return tuple(place.lstrip("/") for place in dict.fromkeys([*places, tools.interpreter.library]) if place)
