"""`builder doctor`: test what builds require on this machine, and fix it.

The list of system packages is a text file, builder/data/system-packages.txt, so that bootstrap can read it before any Python
package is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path

import httpx
import psutil
from packaging.version import Version
from pypi_simple import PYPI_SIMPLE_ENDPOINT

from builder.box import sandbox
from builder.box.binfmt import FOLDER, registration
from builder.fetch import debian_mirror
from builder.fetch.urls import shown, split_credentials
from builder.ground import root
from builder.planning import packages, pins, recipe, stack
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from gracefarm.errors import GracefarmError, HostError
from gracefarm.files import remove_tree
from gracefarm.settings import config_path

PYTHON = (3, 11)
GIT = Version("2.25")
BWRAP = Version("0.5")
DISK = 25 << 30
"In bytes: an environment (5 GB) with its cache, a root, a build."
MEMORY = 4 << 30
"In bytes: the default of a compile job."
TIMEOUT = 10.0
APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
CLONE = Path("/proc/sys/kernel/unprivileged_userns_clone")
PROFILE = Path("/etc/apparmor.d/gracefarm-bwrap")


@dataclass(frozen=True)
class HostCheck:
    """One check."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    packages: tuple[str, ...] = ()
    "Debian packages that fix it."


def system_packages() -> tuple[str, ...]:
    """The Debian packages that a machine requires."""
    text = (files("builder") / "data" / "system-packages.txt").read_text()
    return tuple(word for line in text.splitlines() if (word := line.partition("#")[0].strip()))


def checks(settings: Settings) -> list[HostCheck]:
    """Test everything that a build requires. This takes about a second, or until the network times out."""
    return [
        python(),
        _venv(),
        _packages(),
        _version("git", ["git", "--version"], GIT, "it fetches commits"),
        _version("bubblewrap", ["bwrap", "--version"], BWRAP, "it starts the sandbox"),
        _sandbox(),
        _memory(),
        _disk(settings),
        _settings(),
        _index(settings),
        *_stacks(settings),
        *_binfmt(settings),
    ]


def fix(checks: Sequence[HostCheck], settings: Settings) -> None:
    """Fix what root can fix: install packages, allow user namespaces for bubblewrap, register binfmt if a recipe requires it,
    and remove damaged roots.

    Raises:
        HostError: this user is not root and sudo asks for a password, or a command failed; names the command.
    """
    bad = {check.name: check for check in checks if not check.ok}
    missing = sorted({package for check in bad.values() for package in check.packages})
    if missing:
        _as_root(["apt-get", "update", "--quiet"])
        _as_root(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends", *missing])
    if "sandbox" in bad and (problem := sandbox.check()):
        _allow_namespaces(problem)
    for name in bad:
        if match := re.fullmatch(r"root ([0-9a-f]{64})", name):
            remove_tree(settings.home / "roots" / match[1])
        if match := re.fullmatch(r"binfmt (\w+)", name):
            register(Arch(match[1]), settings)


# --- the checks --------------------------------------------------------------------------------------------------------------


def python() -> HostCheck:
    """The Python that runs this program."""
    # Not by Version: Ubuntu 22.04's python3.11 is a release candidate, which Version puts before 3.11.
    remedy = f"install gracefarm with Python {'.'.join(map(str, PYTHON))} or later"
    return HostCheck("python", sys.version_info >= PYTHON, f"{platform.python_version()} ({sys.executable})", remedy)


def _venv() -> HostCheck:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    state = f"no module {missing[0]}" if missing else "present"
    return HostCheck("venv", not missing, state, f"run as root: apt-get install {package}", (package,) if missing else ())


def _packages() -> HostCheck:
    wanted = system_packages()
    if shutil.which("dpkg-query") is None:
        ok = all(shutil.which(name) for name in ("bwrap", "dpkg-deb", "git", "tar"))
        return HostCheck(
            "system packages", ok, "not Debian or Ubuntu", f"install the packages that correspond to {', '.join(wanted)}"
        )
    missing = tuple(package for package in wanted if not _installed(package))
    state = f"missing: {', '.join(missing)}" if missing else f"all {len(wanted)} installed"
    remedy = f"run `builder doctor --fix`; or run as root: apt-get install {' '.join(missing)}"
    return HostCheck("system packages", not missing, state, remedy, missing)


def _installed(package: str) -> bool:
    command = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout == "installed"


def _version(package: str, command: list[str], least: Version, why: str) -> HostCheck:
    remedy = f"{package} {least} or later is required, because {why}; run as root: apt-get install {package}"
    if shutil.which(command[0]) is None:
        return HostCheck(package, False, "not installed", remedy, (package,))
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    match = re.search(r"\d+(\.\d+)+", text)
    if match is None:
        return HostCheck(package, False, f"no version in {text.strip()!r}", remedy)
    return HostCheck(package, Version(match[0]) >= least, match[0], remedy)


def _sandbox() -> HostCheck:
    problem = sandbox.check()
    user = "root" if os.geteuid() == 0 else "an ordinary user"
    remedy = (
        "run `builder doctor --fix` as root; if this machine is a container, allow user namespaces in it (docker: "
        "--privileged, or a seccomp profile)"
    )
    return HostCheck("sandbox", problem is None, problem or f"starts as {user}", remedy)


def _memory() -> HostCheck:
    have = psutil.virtual_memory().total
    state = f"{have / 2**30:.1f} GiB, {os.cpu_count()} cores"
    return HostCheck(
        "memory",
        have >= MEMORY,
        state,
        f"use a machine with at least {MEMORY >> 30} GiB, because one compile job requires them",
    )


def _disk(settings: Settings) -> HostCheck:
    place = next(folder for folder in (settings.home, *settings.home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    used = (settings.home / "environments").is_dir()
    remedy = f"free {DISK >> 30} GiB on this disk, or set GRACEFARM_HOME to a folder on a larger disk"
    return HostCheck("disk", used or free >= DISK, f"{free / 2**30:.0f} GiB free for {settings.home}", remedy)


def _settings() -> HostCheck:
    path = config_path()
    return HostCheck("settings", True, str(path) if path.is_file() else f"no file ({path})")


def _index(settings: Settings) -> HostCheck:
    url = (settings.index_url or PYPI_SIMPLE_ENDPOINT).rstrip("/")
    return _reach("python index", f"{url}/pip/", "GRACEFARM_PYTHON_INDEX", url)


def _reach(name: str, url: str, setting: str, base: str) -> HostCheck:
    """Request a page as the fetch does."""
    remedy = f"check the network to this address, or set {setting} to the address of a mirror"
    if url.startswith("file://"):
        return HostCheck(name, Path(base.removeprefix("file://")).is_dir(), shown(base), remedy)
    address, credentials = split_credentials(url)
    try:
        answer = httpx.head(address, auth=credentials, timeout=TIMEOUT, follow_redirects=True)
    except httpx.HTTPError as error:
        return HostCheck(name, False, f"{shown(base)}: {shown(str(error)) or type(error).__name__}", remedy)
    state = shown(base) + ("" if answer.is_success else f" returned HTTP status {answer.status_code}")
    return HostCheck(name, answer.status_code < httpx.codes.BAD_REQUEST, state, remedy)


def _stacks(settings: Settings) -> list[HostCheck]:
    """For each stack: its locks, the mirror, and which roots and environments exist."""
    checks, suites, host = [], set(), stack.host_arch()
    for name in stack.names(settings.project / "stacks"):
        try:
            loaded = stack.load(settings.project / "stacks", name)
            ready = _ready(loaded, settings)
        except GracefarmError as error:
            checks.append(HostCheck(f"stack {name}", False, error.cause, error.remedy))
            continue
        suites.add(loaded.root.suite)
        checks.append(HostCheck(f"stack {loaded.data.name}", True, f"locks complete; {ready}"))
        with_rust = [replace(loaded, uses_rust=True)] if loaded.root.rust is not None else []
        for target, variant in product(loaded.root.hosts.get(host, ()), (loaded, *with_rust)):
            place = _root_of(variant, target, settings)
            if place.is_dir() and (program := root.lost(place, variant, host, target)):
                remedy = "remove this root file system with `builder doctor --fix`; the next build assembles it again"
                checks.append(HostCheck(f"root {place.name}", False, f"{program} is missing", remedy))
    return [*(_mirror(suite, settings) for suite in sorted(suites)), *checks]


def _root_of(loaded: LoadedStack, target: Arch, settings: Settings) -> Path:
    return settings.home / "roots" / packages.root_digest(loaded, stack.host_arch(), target)


def _mirror(suite: str, settings: Settings) -> HostCheck:
    try:
        url = debian_mirror.mirror(suite, settings)
    except HostError as error:
        return HostCheck("debian mirror", False, error.cause, error.remedy, ("mmdebstrap",))
    return _reach("debian mirror", f"{url}/dists/{suite}/Release", "GRACEFARM_DEBIAN_MIRROR", url)


def _ready(loaded: LoadedStack, settings: Settings) -> str:
    host = stack.host_arch()
    words = []
    for target in loaded.root.hosts.get(host, ()):
        has_environment = (settings.home / "environments" / pins.environment_digest(loaded, target)).is_dir()
        parts = (("root", _root_of(loaded, target, settings).is_dir()), ("environment", has_environment))
        missing = " and ".join(name for name, has in parts if not has)
        words.append(f"{target}: " + (f"the first build assembles {missing}" if missing else "root and environment ready"))
    return "; ".join(words) or f"no root for an {host} host"


def _binfmt(settings: Settings) -> Iterator[HostCheck]:
    """Check binfmt_misc, which only recipes require that execute programs of the target other than Python."""
    host = stack.host_arch()
    needed: list[str] = []
    for name in recipe.names(settings.project / "recipes"):
        with contextlib.suppress(GracefarmError):  # `builder plan NAME` reports it
            needed += [name] if recipe.load(settings.project / "recipes", name).data.binfmt else []
    who = f"required by {', '.join(needed)}" if needed else "not required by any recipe"
    remedy = "run `builder doctor --fix` as root; this registers qemu until the next reboot"
    for target in Arch:
        if target is not host and host is not Arch.AARCH64:
            state = registration(target)
            yield HostCheck(f"binfmt {target}", state is None or not needed, f"{state or 'registered'}; {who}", remedy)


# --- fixes as root -----------------------------------------------------------------------------------------------------------


def _as_root(command: Sequence[str], text: str | None = None) -> None:
    """Run a command as root, with sudo if necessary; its output goes to the terminal.

    Raises:
        HostError: the command failed, or sudo is not possible.
    """
    line = list(command) if os.geteuid() == 0 else ["sudo", *command]
    by_hand = f"run as root: {' '.join(command)}"
    if line[0] == "sudo" and shutil.which("sudo") is None:
        raise HostError("the fix requires root, and sudo is not installed", remedy=by_hand)
    sys.stderr.write(f"+ {' '.join(line)}\n")
    try:
        process = subprocess.run(line, input=text, text=True, stdout=sys.stderr, check=False)
    except FileNotFoundError as error:
        raise HostError(f"the program {error.filename} is not installed", remedy=by_hand) from error
    if process.returncode:
        raise HostError(f"{' '.join(line)} failed with exit code {process.returncode}", remedy=by_hand)


def _allow_namespaces(problem: str) -> None:
    """Allow user namespaces, which AppArmor of Ubuntu 24.04 and hardened Debian kernels forbid."""
    if APPARMOR.exists() and APPARMOR.read_text().strip() == "1" and shutil.which("apparmor_parser"):
        _as_root(["tee", str(PROFILE)], (files("builder") / "data" / "apparmor-bwrap").read_text())
        _as_root(["apparmor_parser", "--replace", str(PROFILE)])
    elif CLONE.exists() and CLONE.read_text().strip() == "0":
        _as_root(["sysctl", "--write", "kernel.unprivileged_userns_clone=1"])
    else:
        raise HostError(problem, remedy="if this machine is a container, allow user namespaces and mounts in it")


def register(target: Arch, settings: Settings) -> None:
    """Register the qemu of the root with flag F: the kernel keeps it open, so that it works in every sandbox."""
    names = stack.names(settings.project / "stacks")
    roots = (_root_of(stack.load(settings.project / "stacks", name), target, settings) for name in names)
    place = next((folder for folder in roots if folder.is_dir()), None)
    if place is None:
        raise HostError(
            f"the root file system for {target} was not assembled yet",
            remedy=f"run `builder build NAME --target {target}`, then repeat the command",
        )
    if not (FOLDER / "register").exists():
        _as_root(["mount", "-t", "binfmt_misc", "binfmt_misc", str(FOLDER)])
    if (FOLDER / f"qemu-{target}").exists():
        _as_root(["tee", str(FOLDER / f"qemu-{target}")], "-1")
    _as_root(["tee", str(FOLDER / "register")], registration_line(place, target))


def registration_line(place: Path, target: Arch) -> str:
    """Debian's line for qemu, with the interpreter of a root and the flag F.

    Debian's flags O, P and C are left out: with P the kernel passes other arguments, which only Debian's qemu expects.
    """
    shipped = (place / f"usr/lib/binfmt.d/qemu-{target}.conf").read_text().strip()
    fields = shipped.split(":")
    return ":".join((*fields[:6], str(place / f"usr/bin/qemu-{target}-static"), "F"))
