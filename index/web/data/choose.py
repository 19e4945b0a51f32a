"""Detects this machine's properties and prints the command that installs the right wheel. It changes nothing.

It reads them from Python, the C library, nvidia-smi and the installed torch. stdout has only the command; stderr has the
detected properties. The index has inserted the wheels of one project into WHEELS. This requires only Python 3.8 or newer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Dict  # noqa: UP035 - for Python 3.8

OfferedWheel = Dict[str, Any]  # noqa: UP006 - for Python 3.8
WHEELS = "__WHEELS__"
LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
NEWEST = "3.15"  # the newest Python that the index knows; later ones are treated like it


def numbers(text: str) -> tuple[int, ...]:
    """Parse 13.0 to (13, 0)."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", text)[:2])


def dotted(version: tuple[int, ...]) -> str:
    """Format (13, 0) as 13.0."""
    return ".".join(map(str, version))


def joined(version: tuple[int, ...]) -> str:
    """Format (9, 0) as 90."""
    return "".join(map(str, version))


class ThisMachine:
    """Properties of this machine. Tests use another class."""

    def __init__(self) -> None:
        self.minor = sys.version_info[1]
        self.free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
        self.implementation = {"cpython": "cp", "pypy": "pp"}.get(sys.implementation.name, sys.implementation.name)
        self.system = platform.system()
        self.arch = platform.machine().lower()
        self.glibc = self._glibc()
        self.driver, self.gpus = self._gpus()
        self.torch, self.torch_cuda = self._torch()

    @property
    def python(self) -> str:
        """For example 3.13t."""
        return f"3.{self.minor}{'t' if self.free_threaded else ''}"

    @staticmethod
    def _glibc() -> tuple[int, ...]:
        try:
            return numbers((os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")[2])
        except (AttributeError, OSError, ValueError):
            return ()

    @staticmethod
    def _gpus() -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """The CUDA version that the driver can run, and the compute capability of each GPU."""
        texts = []
        for arguments in ([], ["--query-gpu=compute_cap", "--format=csv,noheader"]):
            try:
                process = subprocess.run(
                    ["nvidia-smi", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=True
                )
            except (OSError, subprocess.SubprocessError):
                return (), []
            texts.append(process.stdout.decode("utf-8", "replace"))
        version = re.search(r"CUDA(?: UMD)? Version\s*:\s*([0-9]+\.[0-9]+)", texts[0])
        gpus = {numbers(line) for line in texts[1].split() if re.match(r"[0-9]+\.[0-9]+$", line)}
        return numbers(version.group(1)) if version else (), sorted(gpus)

    @staticmethod
    def _torch() -> tuple[str, str]:
        """The version of torch and its CUDA version, read without importing torch."""
        try:
            version = importlib.metadata.version("torch")
            spec = importlib.util.find_spec("torch")
        except (ImportError, ValueError):
            return "", ""
        text = ""
        if spec is not None and spec.origin:
            path = Path(spec.origin).with_name("version.py")
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([0-9]+\.[0-9]+)", text, re.M)
        return version, cuda.group(1) if cuda else ""

    def describe(self) -> str:
        """The properties on one line."""
        parts = ["Python " + self.python, self.system + " " + self.arch]
        parts += [f"glibc {dotted(self.glibc)}"] if self.glibc else []
        parts += ["GPU with sm " + " and ".join(map(joined, self.gpus))] if self.gpus else ["no NVIDIA GPU"]
        parts += [f"driver for CUDA {dotted(self.driver)}"] if self.driver else []
        cuda = " for CUDA " + self.torch_cuda if self.torch_cuda else ""
        parts += ["torch " + self.torch + cuda] if self.torch else ["no torch"]
        return ", ".join(parts)


def fits_python(wheel: OfferedWheel, machine: ThisMachine) -> bool:
    """Whether an installer accepts this file on this machine."""
    known = wheel["pythons"]
    python = machine.python if machine.minor <= numbers(NEWEST)[1] else NEWEST + machine.python[len(NEWEST) :]
    if known is not None and python not in known:
        return False
    return any(fits_interpreter(tag[0], tag[1], machine) and fits_platform(tag[2], machine) for tag in wheel["tags"])


def fits_interpreter(interpreter: str, abi: str, machine: ThisMachine) -> bool:
    """Whether the Python and ABI tags match (PEP 425)."""
    match = re.match(rf"(py|{re.escape(machine.implementation)})3([0-9]*)$", interpreter)
    if match is None:
        return False
    minor = int(match.group(2) or 0)
    if match.group(1) == "py":
        return abi == "none" and minor <= machine.minor
    if abi == "abi3":
        return minor <= machine.minor and not machine.free_threaded
    if abi == "abi3t":
        return minor <= machine.minor and machine.free_threaded
    own = f"cp3{minor}{'t' if machine.free_threaded else ''}"
    return minor == machine.minor and (abi in ("none", own) or abi.startswith("pypy"))


def fits_platform(tag: str, machine: ThisMachine) -> bool:
    """Whether the platform tag matches (PEP 425, PEP 600, PEP 656)."""
    if tag == "any":
        return True
    if machine.system != "Linux":
        wanted = {"Darwin": "macosx_", "Windows": "win_"}.get(machine.system, "?")
        return tag.startswith(wanted) and tag.endswith((machine.arch, "universal2"))
    if not tag.endswith("_" + machine.arch):
        return False
    head = tag[: -len(machine.arch) - 1]
    if head == "linux":
        return True
    if head.startswith("musllinux_"):
        return not machine.glibc
    least = LEGACY.get(head) or (numbers(head[len("manylinux_") :]) if head.startswith("manylinux_") else ())
    return bool(least) and machine.glibc >= least


def fits_gpu(wheel: OfferedWheel, machine: ThisMachine) -> bool:
    """Whether it has device code for each GPU: for the same major version, code for the same or an older minor version."""
    return not wheel["sm"] or all(any(runs(code, gpu) for code in wheel["sm"]) for gpu in machine.gpus)


def runs(code: str, gpu: tuple[int, ...]) -> bool:
    """90a runs only on 9.0, 100f on its family, 80 on 8.0 and every later 8.x."""
    match = re.match(r"([0-9]+)([0-9])([a-z]?)$", code)
    if match is None:
        return False
    own = (int(match.group(1)), int(match.group(2)))
    return own == gpu if match.group(3) == "a" else own[0] == gpu[0] and own[1] <= gpu[1]


def fits_cuda(wheel: OfferedWheel, machine: ThisMachine) -> bool:
    """Whether its CUDA has the major version of torch's or, without torch, is supported by the driver."""
    if not wheel["cuda"]:
        return True
    if machine.torch:
        return numbers(wheel["cuda"])[:1] == numbers(machine.torch_cuda)[:1]
    return not machine.driver or numbers(wheel["cuda"]) <= machine.driver


def fits_torch(wheel: OfferedWheel, machine: ThisMachine) -> bool:
    """Whether it is built for the installed torch; any wheel fits if torch is not installed."""
    return not wheel["torch"] or not machine.torch or numbers(wheel["torch"]) == numbers(machine.torch)


CHECKS = (
    ("Python and platform", fits_python, lambda wheel: "/".join(wheel["tags"][0])),
    ("GPU", fits_gpu, lambda wheel: "sm " + ", ".join(wheel["sm"])),
    ("CUDA", fits_cuda, lambda wheel: "CUDA " + wheel["cuda"]),
    ("torch", fits_torch, lambda wheel: "torch " + wheel["torch"]),
)


def choose(wheels: list[OfferedWheel], machine: ThisMachine) -> tuple[OfferedWheel | None, str]:
    """The right wheel, or None and the reason."""
    left = wheels
    for subject, fits, name in CHECKS:
        before, left = left, [wheel for wheel in left if fits(wheel, machine)]
        if not left:
            there = sorted({name(wheel) for wheel in before})
            more = f", and {len(there) - 8} more" if len(there) > 8 else ""
            return None, f"no wheel matches this machine's {subject}; available: {'; '.join(there[:8])}{more}"
    return min(left, key=lambda wheel: preference(wheel, machine)), ""


def preference(wheel: OfferedWheel, machine: ThisMachine) -> tuple[Any, ...]:
    """Sort key, best first: newest release; torch's CUDA; device code last if there is no GPU; newest CUDA and torch."""
    cuda, torch = numbers(wheel["cuda"]), numbers(wheel["torch"])
    useless = bool(wheel["cuda"]) and not machine.gpus and not machine.torch_cuda
    other_cuda = bool(wheel["cuda"]) and bool(machine.torch_cuda) and cuda != numbers(machine.torch_cuda)
    exact = sum(not {joined(gpu), joined(gpu) + "a"}.isdisjoint(wheel["sm"]) for gpu in machine.gpus)
    newest = [-number for number in (*(cuda or (0, 0)), *(torch or (0, 0)))]
    return (wheel["rank"], useless, other_cuda, -exact, newest, wheel["url"])


def installer() -> list[str]:
    """The command that installs into this Python."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]


def main() -> int:
    """Print the command."""
    document = json.loads(WHEELS)
    name = document["name"]
    machine = ThisMachine()
    sys.stderr.write(f"# This machine has {machine.describe()}.\n")
    wheel, reason = choose(document["wheels"], machine)
    if wheel is None:
        sys.stderr.write(f"# {name}: {reason}.\n")
        return 1
    if wheel["torch"] and not machine.torch:
        sys.stderr.write(f"# The wheel requires torch {wheel['torch']}, which is not installed: install torch first.\n")
    if wheel["sm"] and not machine.gpus:
        sys.stderr.write(f"# No GPU was found, so the wheel's device code (sm {', '.join(wheel['sm'])}) was not checked.\n")
    sys.stdout.write(" ".join(shlex.quote(part) for part in [*installer(), f"{name} @ {wheel['url']}"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
