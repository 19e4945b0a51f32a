"""What the torch of an environment says of itself, read and not imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from builder.planning.stack import LoadedStack
from gracefarm.errors import RootError


def read(site: Path) -> dict[str, object]:
    """The constants of torch/version.py, read and not imported; empty without torch."""
    place = site / "torch" / "version.py"
    values: dict[str, object] = {}
    if place.is_file():
        for node in ast.parse(place.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                values |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
    return values


def check(stack: LoadedStack, site: Path) -> None:
    """The version number does not tell a CUDA build from a CPU build; torch/version.py does, without an import.

    Raises:
        RootError: it is for another CUDA than the stack says.
    """
    wanted = stack.torch
    if wanted is None:
        return
    cuda = read(site).get("cuda")
    if cuda != wanted.cuda:
        raise RootError(
            f"the locked torch {wanted.version} is built for CUDA {cuda}, the stack wants {wanted.cuda}",
            remedy="lock a wheel of torch with that CUDA: its file name does not tell, torch/version.py does",
        )


def cxx11_abi(site: Path) -> bool | None:
    """_GLIBCXX_USE_CXX11_ABI of the environment's torch, from its CMake files; None without torch.

    The CPU wheel of 2.4.0 for aarch64 has the old one; what links with torch must have the same.
    """
    place = site / "torch" / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    if not place.is_file():
        return None
    match = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", place.read_text())
    return match[1] == "1" if match else None
