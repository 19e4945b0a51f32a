"""Determine whether a wheel depends on the stack's CUDA and torch, from device code and needed libraries of its objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from builder.audit.contents import Contents
from builder.audit.providers import own_names
from builder.planning import driver
from builder.planning.stack import Arch

TORCH = ("libtorch*", "libc10*", "libcaffe2*", "libshm*")
"Names of torch's libraries."
CUDA = (
    "libcuda*", "libcublas*", "libcudnn*", "libcudss*", "libcufft*", "libcufile*", "libcupti*", "libcurand*",
    "libcusolver*", "libcusparse*", "libcutensor*", "libcheckpoint*", "libpcsampling*", "libnccl*", "libnpp*",
    "libnvJitLink*", "libnvToolsExt*", "libnvblas*", "libnvfatbin*", "libnvjpeg*", "libnvperf*", "libnvptxcompiler*",
    "libnvrtc*", "libnvshmem*", "libnvtx*", "libnvvm*",
)  # fmt: skip
"""Names of NVIDIA's libraries, including hashed ones (libcudart-0123abcd.so.13). libcu* and libnv* would also match other
libraries, such as libcustom_ops.so."""
DRIVER = (driver.SONAME, "libnvidia*")
"Names of the driver's libraries, which belong to the machine, not to a release of CUDA."
_TORCH_FOR_CUDA = ("libtorch_cuda*", "libc10_cuda*")


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """Why a wheel depends on CUDA and on torch, with a phrase for each object; empty: it does not."""

    cuda: tuple[str, ...]
    torch: tuple[str, ...]


def measure(contents: Contents, target: Arch) -> Dependence:
    """Measure the objects for the target. Libraries that the wheel contains are not dependencies."""
    own = own_names(contents.objects)
    cuda, torch = [], []
    for name, binary in contents.loadable(target).items():
        outside = [soname for soname in binary.needed if soname not in own]
        cuda += [f"{name} has device code"] if binary.fatbin else []
        cuda += _needing(
            name, (soname for soname in outside if _any(soname, (*CUDA, *_TORCH_FOR_CUDA)) and not _any(soname, DRIVER))
        )
        torch += _needing(name, (soname for soname in outside if _any(soname, TORCH)))
    return Dependence(cuda=tuple(cuda), torch=tuple(torch))


def _needing(name: str, sonames: Iterable[str]) -> list[str]:
    first = next(iter(sonames), None)
    return [f"{name} needs {first}"] if first is not None else []


def _any(soname: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(soname, pattern) for pattern in patterns)
