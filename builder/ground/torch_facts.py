"""Facts about the torch of an environment, read without importing it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from builder.planning.stack import LoadedStack
from gracefarm.errors import RootError


def read(site: Path) -> dict[str, object]:
    """The constants of torch/version.py, without importing it; empty without torch."""
    place = site / "torch" / "version.py"
    values: dict[str, object] = {}
    if place.is_file():
        for node in ast.parse(place.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                values |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
    return values


def check(stack: LoadedStack, site: Path) -> None:
    """Check the CUDA version in torch/version.py, since torch's version number is the same for CUDA and CPU builds.

    Raises:
        RootError: torch is for another CUDA than the stack.
    """
    wanted = stack.torch
    if wanted is None:
        return
    cuda = read(site).get("cuda")
    if cuda != wanted.cuda:
        raise RootError(
            f"the locked torch {wanted.version} is built {built_for(cuda)}, but the stack requires a torch "
            f"{built_for(wanted.cuda)}",
            remedy=f"in stack.toml, pin a wheel of torch {built_for(wanted.cuda)}; the file torch/version.py in the wheel "
            "names its CUDA version",
        )


def cxx11_abi(site: Path) -> bool | None:
    """_GLIBCXX_USE_CXX11_ABI of the environment's torch, from its CMake files; None without torch.

    The CPU wheel of 2.4.0 for aarch64 has the old ABI; objects that link with torch must have the same ABI.
    """
    place = site / "torch" / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    if not place.is_file():
        return None
    match = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", place.read_text())
    return match[1] == "1" if match else None


def built_for(cuda: object) -> str:
    """The CUDA of a torch in words; None: torch has no CUDA."""
    return f"for CUDA {cuda}" if cuda else "without CUDA"
