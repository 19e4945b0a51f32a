"""A new stack from a template: a torch release of the Python index, with the root file system of another stack."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder.fetch.urls import shown, split_credentials
from builder.ground import resolve
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.planning.tags import glibc, tags_of
from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

RUNTIME = "nvidia-cuda-runtime"
"A torch for CUDA requires it; its version begins with the version of CUDA."
TOOLKIT = "cuda-toolkit"
"NVIDIA's distribution without files; its extras pin the parts of one release of CUDA."
EXTRAS = ("nvcc", "cccl", "cudart", "cuobjdump")
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", RUNTIME)
CUOBJDUMP = "nvidia-cuda-cuobjdump"
"On the index since 13.2; it can read the output of earlier releases."
NEWEST = 8
"Number of releases that an error names."


@dataclass(frozen=True, kw_only=True)
class TorchRelease:
    """A release of torch on the Python index, for the targets of a stack."""

    version: str
    cuda: str
    "As 13.2."
    resolved_before: date
    compiler: tuple[str, ...]
    "Requirements for the CUDA compiler of that release."
    pythons: frozenset[str]
    "The requested Python versions for which it has wheels for every target."


def release_of(version: str, base: LoadedStack, pythons: Sequence[str], settings: Settings, today: date) -> TorchRelease:
    """Read a release of torch on the Python index; `pythons`: the Python versions to look for, as 3.13 or 3.14t.

    Raises:
        UsageError: the index has no such release (names the nearest ones).
        ConfigError: its wheels do not fit the stack's targets, have no CUDA, or have a CUDA without wheels for the compiler.
        FetchError: the index cannot be reached.
    """
    from builder.fetch import simple  # imports requests

    index, credentials = split_credentials(settings.index_url or simple.DEFAULT_INDEX)
    wheels = [wheel for wheel in simple.project_page("torch", index, credentials).packages if wheel.package_type == "wheel"]
    known = _version(version, wheels, shown(index))
    own = [wheel for wheel in wheels if wheel.version == known]
    fitting = frozenset(python for python in pythons if all(_fits(own, python, base, arch) for arch in base.data.glibc))
    if base.data.python not in fitting:
        raise ConfigError(
            f"torch {known} has no wheels for {' and '.join(base.data.glibc)} with Python {base.data.python}, which is the "
            f"Python of stack {base.data.name}",
            remedy="choose a different version of torch, or copy a stack with a different Python: --like STACK",
        )
    uploaded = max((wheel.upload_time.date() for wheel in own if wheel.upload_time is not None), default=date.min)
    # Yesterday, so that later uploads of today do not change a lock.
    before = max(today - timedelta(days=1), uploaded)
    probe = _probe(base, before)
    (cuda,) = {_cuda(known, probe, arch, settings) for arch in base.data.glibc}
    return TorchRelease(
        version=known,
        cuda=cuda,
        resolved_before=before,
        compiler=_compiler(known, probe, settings),
        pythons=fitting,
    )


def _version(asked: str, wheels: Sequence[DistributionPackage], index: str) -> str:
    """The requested release, as the index writes it."""
    known = sorted({wheel.version for wheel in wheels if wheel.version and not wheel.is_yanked}, key=Version)
    try:
        match = next((version for version in known if Version(version) == Version(asked)), None)
    except InvalidVersion:
        match = None
    if match is None:
        remedy = tables.nearest(asked, known[: -NEWEST - 1 : -1], "newest releases of torch on this index")
        raise UsageError(f"the index {index} has no torch {asked}", remedy=remedy)
    return match


def _fits(wheels: Sequence[DistributionPackage], python: str, base: LoadedStack, arch: Arch) -> bool:
    supported = set(tags_of(python, glibc(base, arch), arch))
    return any(not supported.isdisjoint(parse_wheel_filename(wheel.filename)[3]) for wheel in wheels)


def _probe(base: LoadedStack, before: date) -> LoadedStack:
    """The base stack with the new date, to resolve requirements of the new stack."""
    environment = base.data.environment.model_copy(
        update={"resolved_before": before.isoformat(), "left_out": (), "wheels": ()}
    )
    return replace(base.base, data=base.data.model_copy(update={"environment": environment}))


def _cuda(version: str, probe: LoadedStack, arch: Arch, settings: Settings) -> str:
    """The CUDA of the release's wheel for an architecture, as 13.2, from its requirements.

    Raises:
        ConfigError: it has no CUDA, or CUDA 12, for which no wheel contains the compiler.
    """
    required = _versions([f"torch=={version}"], probe, arch, settings)
    if RUNTIME in required:
        return ".".join(required[RUNTIME].split(".")[:2])
    other = sorted(name for name in required if name.startswith(RUNTIME))
    what = f"requires {other[0]}, but no wheel contains the compiler for this CUDA" if other else "has no CUDA"
    raise ConfigError(
        f"the {arch} wheel of torch {version} on the Python index {what}",
        remedy="choose a newer release of torch; or write a stack.toml by hand that takes torch from PyTorch's index "
        "(stacks/cu124 is an example)",
    )


def _compiler(version: str, probe: LoadedStack, settings: Settings) -> tuple[str, ...]:
    """The parts of the CUDA compiler of the release that torch requires."""
    texts = [f"torch=={version}", f"{TOOLKIT}[{','.join(EXTRAS)}]"]
    versions = _versions(texts, probe, min(probe.data.glibc), settings)
    cuobjdump = f"{CUOBJDUMP}=={versions[CUOBJDUMP]}" if CUOBJDUMP in versions else f"{CUOBJDUMP}>=13.2"
    return (*(f"{name}=={versions[name]}" for name in COMPILER), cuobjdump)


def _versions(texts: Sequence[str], probe: LoadedStack, arch: Arch, settings: Settings) -> dict[str, str]:
    """The versions that uv chooses for these requirements, by canonical name."""
    return {name: version for name, version, _, _ in resolve.resolution(texts, probe, arch, settings)}


def render(name: str, release: TorchRelease, base: LoadedStack) -> str:
    """The text of stack.toml; everything except torch and CUDA is copied from the base."""
    data = base.data
    values = {
        "name": name,
        "python": data.python,
        "torch": release.version,
        "cuda": release.cuda,
        "sm": json.dumps(data.sm),
        "glibc": "{ " + ", ".join(f'{arch} = "{level}"' for arch, level in data.glibc.items()) + " }",
        "root": base.root_stack.data.name if base.root_stack is not None else data.name,
        "resolved_before": release.resolved_before.isoformat(),
        "requirements": _array([f"torch=={release.version}", *_others(data.environment.requirements)]),
        "gcc": str(data.toolchain.gcc),
        "compilers": _array([*release.compiler, *_others(data.toolchain.requirements)]),
        "path": json.dumps(data.toolchain.path),
    }
    return Template((files("builder") / "data" / "stack-template.toml").read_text()).substitute(values)


def render_no_lock(reasons: Mapping[str, str]) -> str:
    """The table of stack.toml with the Pythons that have no lock; empty if all have one."""
    lines = [f"{json.dumps(python)} = {json.dumps(reason)}\n" for python, reason in reasons.items()]
    return "".join(["\n[no_lock]\n", *lines]) if lines else ""


def _others(texts: Sequence[str]) -> list[str]:
    """Requirements that do not depend on torch or CUDA."""
    names = {text: canonicalize_name(Requirement(text).name) for text in texts}
    return [text for text, name in names.items() if name != "torch" and not name.startswith("nvidia-")]


def _array(texts: Sequence[str]) -> str:
    return "[\n" + "".join(f"    {json.dumps(text)},\n" for text in texts) + "]"
