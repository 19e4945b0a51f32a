"""Environments: the target's site-packages from requirements.lock, as the virtual environment /env of the sandbox.

uv unpacks the wheels (hard links from its cache); the root's native Python byte-compiles them, once per wheel. An environment
is read-only and shared by all builds; `fresh` makes a copy of links for one wheel more.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import uv
from packaging.markers import InvalidMarker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from builder.fetch.urls import shown
from builder.ground import toolkit
from builder.ground.root import compile_files, die_with_us
from builder.planning.stack import Arch, LoadedStack
from gracefarm import tables
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, DigestError, FetchError, GracefarmError, HostError, InstallError, RootError
from gracefarm.files import atomic_directory, atomic_write, lock
from gracefarm.settings import Settings

LAYOUT = 1
"Raised when the same wheels are laid out in another way; enters the digests."

INSIDE = "/env"
SHEBANG = f"#!{INSIDE}/bin/python3\n".encode()
_GLIBC_FIRST = {Arch.AARCH64: 17, Arch.X86_64: 5}
"glibc 2.N: the oldest manylinux level of the architecture."
_KEPT = frozenset(
    {
        *("PATH", "HOME", "TMPDIR", "NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("UV_HTTP_TIMEOUT", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_INSECURE_HOST", "UV_KEYRING_PROVIDER", "UV_OFFLINE"),
    }
)
"What says how to reach the index. All else that uv reads could change what is installed."


@dataclass(frozen=True, kw_only=True, order=True)
class LockedWheel:
    """One line of requirements.lock."""

    name: str
    "Canonical."
    version: str
    sha256: str
    "Empty where it is not known yet, which `require_digests` refuses."
    index: str = ""
    "The index of its own that has it; empty: the Python index."
    tags: frozenset[Tag] = field(default=frozenset(), compare=False, repr=False)
    "Where it has an index of its own: what the file's tags must be among."


# --- what is pinned ----------------------------------------------------------------------------------------------------------


def wheels(stack: LoadedStack, arch: Arch) -> tuple[LockedWheel, ...]:
    """The wheels that requirements.lock pins for that architecture, sorted.

    Raises:
        ConfigError: the lock is absent or damaged, or is older than stack.toml.
    """
    try:
        text = tables.read_text(stack.requirements_lock)
    except ConfigError as error:
        raise ConfigError(error.cause, remedy="make it", repeat=stack.lock_command) from error
    found: dict[str, LockedWheel] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        one = _parse_line(line.strip(), arch, f"{stack.requirements_lock}:{number}")
        if one is not None and found.setdefault(one.name, one) != one:
            raise ConfigError(f"{stack.requirements_lock}:{number}: {one.name} is pinned twice", remedy="remove one line")
    for own in stack.data.environment.wheels:
        if own.arch is arch:
            name = canonicalize_name(own.name)
            found[name] = LockedWheel(
                name=name, version=own.version, sha256=own.sha256 or "", index=own.index, tags=frozenset(tags(stack, arch))
            )
    _check_fresh(stack, arch, found)
    return tuple(sorted(found.values()))


def require_digests(stack: LoadedStack, found: Sequence[LockedWheel]) -> None:
    """Refuse wheels whose digest is a gap.

    Raises:
        ConfigError: one is; names its index and the command that fills it in.
    """
    for one in found:
        if not one.sha256:
            raise ConfigError(
                f"{one.name} {one.version} of stack {stack.data.name} has no digest yet; it is on {shown(one.index)}",
                remedy=f"fill it in where that index is reached, or by a mirror: GRACEFARM_MIRRORS='{one.index}=REPLACEMENT'",
                repeat=f"builder lock {stack.data.name}",
            )


def _parse_line(line: str, arch: Arch, place: str) -> LockedWheel | None:
    """`NAME==VERSION [; MARKER] --hash=sha256:DIGEST`; None where the marker says that it is for another architecture."""
    match = re.fullmatch(r"(?P<requirement>.+?)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})", line)
    try:
        if match is None:
            raise InvalidRequirement("it has no --hash=sha256:...")
        requirement = Requirement(match["requirement"])
        (pin,) = requirement.specifier
        if pin.operator != "==" or requirement.url:
            raise InvalidRequirement("it pins no version with ==")
        applies = requirement.marker is None or requirement.marker.evaluate({"platform_machine": arch.value})
    except (InvalidRequirement, InvalidMarker, ValueError) as error:
        raise ConfigError(f"{place}: not a pinned wheel: {error}", remedy="make the lock again") from error
    return (
        LockedWheel(name=canonicalize_name(requirement.name), version=pin.version, sha256=match["sha256"]) if applies else None
    )


def _check_fresh(stack: LoadedStack, arch: Arch, found: Mapping[str, LockedWheel]) -> None:
    """What stack.toml asks for is what the lock pins."""
    for text in _requirements(stack, arch):
        requirement = Requirement(text)
        one = found.get(canonicalize_name(requirement.name))
        if one is None or not requirement.specifier.contains(one.version, prereleases=True):
            have = f"pins {one.name} {one.version}" if one else f"has no {requirement.name}"
            raise ConfigError(
                f"{stack.requirements_lock} {have}; stack.toml wants {text}",
                remedy="make the lock again",
                repeat=stack.lock_command,
            )


def _requirements(stack: LoadedStack, arch: Arch) -> tuple[str, ...]:
    """One resolution for both: the target's environment needs the headers of the compiler's own release."""
    environment = stack.data.environment.requirements if arch in stack.data.glibc else ()
    return (*environment, *stack.data.toolchain.requirements)


def _toolchain_wheels(stack: LoadedStack, host: Arch) -> tuple[LockedWheel, ...]:
    names = {canonicalize_name(Requirement(text).name) for text in stack.data.toolchain.requirements}
    return tuple(one for one in wheels(stack, host) if one.name in names)


def digest(stack: LoadedStack, target: Arch) -> str:
    """Hex sha256 of everything that decides the environment's bytes: wheels, Python, layout.

    Raises:
        ConfigError: see `wheels`.
    """
    return _digest("environment", stack, target, wheels(stack, target))


def digest_of(python: str, target: Arch, found: Sequence[LockedWheel]) -> str:
    """The digest of an environment of these wheels; `digest` for whoever has no stack."""
    return _hashed("environment", python, target, found)


def toolchain_digest(stack: LoadedStack, host: Arch) -> str:
    """Hex sha256 of everything that decides the compilers' bytes.

    Raises:
        ConfigError: see `wheels`.
    """
    return _digest("toolchain", stack, host, _toolchain_wheels(stack, host), toolkit.digest(stack, host))


def _digest(kind: str, stack: LoadedStack, arch: Arch, found: Sequence[LockedWheel], besides: str | None = None) -> str:
    return _hashed(kind, stack.data.python, arch, found, besides)


def _hashed(kind: str, python: str, arch: Arch, found: Sequence[LockedWheel], besides: str | None = None) -> str:
    wheels = [(one.name, one.version, one.sha256) for one in sorted(found)]
    content = [kind, LAYOUT, arch.value, python, wheels, *([besides] if besides else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- resolving ---------------------------------------------------------------------------------------------------------------


def resolve(stack: LoadedStack, settings: Settings, tick: Tick = no_tick) -> str:
    """The text of a new requirements.lock: one resolution per architecture, one wheel per distribution and architecture.

    Raises:
        ConfigError: the requirements contradict each other, or a distribution has no wheel that fits.
        FetchError: the index cannot be reached.
    """
    archs = sorted({*stack.data.root.hosts, *stack.data.glibc})
    files: dict[tuple[str, str, str, str], set[Arch]] = {}
    for number, arch in enumerate(archs):
        tick(number, len(archs), f"wheels for {arch}")
        own = {canonicalize_name(one.name) for one in stack.data.environment.wheels if one.arch is arch}
        for one in _resolve_arch(stack, arch, settings):
            if one[0] not in own:
                files.setdefault(one, set()).add(arch)
    tick(len(archs), len(archs), "")
    title = (
        f"# Every wheel of stack {stack.data.name}: the target's environment and the CUDA compiler of the host."
        if stack.kind == "stack"
        else f"# What set {stack.data.name} runs with, beside the farm's own wheels."
    )
    return _render(title, stack, files, archs)


def _render(
    title: str, stack: LoadedStack, files: Mapping[tuple[str, str, str, str], set[Arch]], archs: Sequence[Arch]
) -> str:
    lines = [title]
    lines += [f"# Written by `{stack.lock_command}`, not by hand. pip and uv read it with --require-hashes."]
    for one in stack.data.environment.wheels:
        lines += [f"# {one.name} {one.version} for {one.arch} is not here: stack.toml pins it on an index of its own."]
    for (name, version, filename, sha256), where in sorted(files.items()):
        marker = "" if len(where) == len(archs) else f' ; platform_machine == "{min(where)}"'
        lines += [f"# {filename}", f"{name}=={version}{marker} --hash=sha256:{sha256}"]
    return "\n".join(lines) + "\n"


def _resolve_arch(stack: LoadedStack, arch: Arch, settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Name, version, file name and sha256 of each wheel: uv reads the index, the tags choose the file."""
    supported = {tag: rank for rank, tag in enumerate(tags(stack, arch))}
    with TemporaryDirectory(prefix="gracefarm-lock-") as name:
        wanted, answer = Path(name, "requirements.in"), Path(name, "pylock.toml")
        wanted.write_text("\n".join(_requirements(stack, arch)) + "\n")
        command = ["pip", "compile", "--quiet", "--format=pylock.toml", "--only-binary=:all:", "--no-header", "--no-annotate"]
        command += [*_platform(stack, arch), f"--output-file={answer}", str(wanted)]
        if stack.data.environment.resolved_before:
            command.append(f"--exclude-newer={stack.data.environment.resolved_before}")
        if stack.data.environment.left_out:
            # An override replaces what anybody requires; this one never applies.
            overrides = Path(name, "overrides.txt")
            overrides.write_text("".join(f"{one} ; python_version < '3'\n" for one in stack.data.environment.left_out))
            command.append(f"--override={overrides}")
        _uv(command, settings, lambda message: ConfigError(f"no resolution for {arch}: {message}", remedy="mend stack.toml"))
        packages = tomllib.loads(answer.read_text())["packages"]
    for package in packages:
        fitting = []
        for wheel in package.get("wheels", []):
            filename = unquote(Path(urlsplit(wheel.get("url") or wheel.get("path") or wheel["name"]).path).name)
            _, _, build, wheel_tags = parse_wheel_filename(filename)
            ranks = [supported[tag] for tag in wheel_tags if tag in supported]
            if ranks:
                # As pip chooses: the best tag, then the highest build number.
                fitting.append((min(ranks), tuple(-part if isinstance(part, int) else 0 for part in build), filename, wheel))
        if not fitting:
            raise ConfigError(
                f"{package['name']} {package['version']} has no wheel for {arch} with glibc {_glibc(stack, arch)}",
                remedy="pin a version in stack.toml that has one",
            )
        _, _, filename, wheel = min(fitting, key=lambda one: one[:3])
        yield canonicalize_name(package["name"]), str(package["version"]), filename, wheel["hashes"]["sha256"]


def tags(stack: LoadedStack, arch: Arch) -> list[Tag]:
    """The wheel tags that the stack's Python takes on that architecture, best first, up to the stack's glibc floor."""
    return _tags(stack.data.python, _glibc(stack, arch), arch)


def _glibc(stack: LoadedStack, arch: Arch) -> str:
    """The level of a target, and for a mere host that of the root, which is the same Debian."""
    return stack.data.glibc.get(arch) or max(stack.data.glibc.values())


def _tags(python: str, glibc: str, arch: Arch) -> list[Tag]:
    major, minor = (int(part) for part in glibc.split("_"))
    levels = [f"manylinux_{major}_{level}_{arch}" for level in range(minor, _GLIBC_FIRST[arch] - 1, -1)]
    aliases = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    platforms = []
    for level in levels:
        platforms.append(level)
        alias = aliases.get(int(level.split("_")[2]))
        if alias and (arch is Arch.X86_64 or alias == "manylinux2014"):
            platforms.append(f"{alias}_{arch}")
    platforms.append(f"linux_{arch}")
    version = tuple(int(part) for part in python.split("."))
    own = cpython_tags(version, platforms=platforms)
    return [*own, *compatible_tags(version, interpreter=f"cp{version[0]}{version[1]}", platforms=platforms)]


def _platform(stack: LoadedStack, arch: Arch) -> list[str]:
    return [f"--python-platform={arch}-manylinux_{_glibc(stack, arch)}", f"--python-version={stack.data.python}"]


# --- assembling --------------------------------------------------------------------------------------------------------------


def ensure(stack: LoadedStack, target: Arch, root: Path, settings: Settings, tick: Tick = no_tick) -> Path:
    """The environment's folder, assembled if it is not there; any number of processes may ask, one assembles.

    Raises:
        ConfigError: see `wheels`.
        FetchError, DigestError: a wheel cannot be had, or is not the pinned one.
        RootError: a wheel cannot be unpacked, or torch is not the build that the stack names.
        HostError, DiskFullError.
    """
    found = wheels(stack, target)
    require_digests(stack, found)
    name = _digest("environment", stack, target, found)
    final = settings.home / "environments" / name
    if final.is_dir():
        # The digest does not say what the stack expects of its torch: another stack may have assembled the same wheels.
        check_torch(stack, final / "lib" / f"python{stack.data.python}" / "site-packages")
        return final
    with lock(final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process assembles this")):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                site = folder / "lib" / f"python{stack.data.python}" / "site-packages"
                install(found, _target(stack, target, site), stack.data.name, settings, tick)
                check_torch(stack, site)
                _lay_out(folder, stack, target)
                _relocate_scripts(folder, site)
                _bytecode(folder, site, found, root, stack, settings, tick)
                _make_read_only(folder)
    return final


def ensure_toolchain(stack: LoadedStack, host: Arch, settings: Settings, tick: Tick = no_tick) -> Path:
    """The folder with the CUDA compiler of the host: nvidia/cu13/bin/nvcc and what it needs.

    Raises:
        ConfigError: see `wheels`; or the stack names no compiler.
        FetchError, DigestError, RootError, HostError, DiskFullError: see `ensure`.
    """
    found = _toolchain_wheels(stack, host)
    if not found and stack.data.toolchain.debian is None:
        raise ConfigError(
            f"stack {stack.data.name} has no CUDA compiler", remedy="list its wheels in [toolchain] requirements"
        )
    name = toolchain_digest(stack, host)
    final = settings.home / "toolchains" / name
    if final.is_dir():
        return final
    with lock(final.with_name(f"{name}.lock"), lambda: tick(0, None, "another process assembles this")):
        if not final.is_dir():
            with atomic_directory(final) as folder:
                if found:
                    install(found, _target(stack, host, folder), stack.data.name, settings, tick)
                toolkit.unpack(stack, host, folder, settings, tick)
                if not any(os.access(nvcc, os.X_OK) for nvcc in folder.glob("nvidia/cu*/bin/nvcc")):
                    raise RootError(
                        "the toolchain's wheels and packages hold no nvcc", remedy="mend [toolchain] in stack.toml"
                    )
                _make_read_only(folder)
    return final


def fresh(environment: Path, into: Path, wheel: Path | None) -> Path:
    """A copy of an environment with `wheel` installed in it (without what it depends on); None: the copy alone.

    The copy is of hard links, so `into` must be on the environment's file system; installing replaces files and never writes
    through a link.

    Raises:
        InstallError: the wheel does not fit the environment's Python or architecture, or is damaged.
        RootError: the copy cannot be made.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    copied = subprocess.run(
        ["cp", "--archive", "--link", "--no-target-directory", environment, into], capture_output=True, text=True, check=False
    )
    if copied.returncode:
        if os.strerror(errno.ENOSPC) in copied.stderr:
            raise OSError(errno.ENOSPC, copied.stderr)
        raise RootError(
            f"{environment} cannot be copied to {into}: {copied.stderr.strip()[:500]}", remedy="run `builder doctor`"
        )
    if wheel is not None:
        add(into, wheel)
    return into


def add(into: Path, wheel: Path) -> None:
    """Install one wheel more in a copy that `fresh` made, without what it depends on.

    Raises:
        InstallError: see `fresh`.
    """
    facts = dict(line.split(" = ", 1) for line in (into / "pyvenv.cfg").read_text().splitlines())
    python, platform = facts["gracefarm-python"], facts["gracefarm-platform"]
    target, _, glibc = platform.partition("-manylinux_")
    _check_tags(wheel, python, glibc, Arch(target))
    site = into / "lib" / f"python{python}" / "site-packages"
    install_wheel(
        wheel,
        ["--python", sys.executable, f"--target={site}", f"--python-version={python}", f"--python-platform={platform}"],
        lambda message: InstallError(
            f"{wheel.name} cannot be installed: {message}", remedy="run `builder audit` on the wheel"
        ),
    )
    _relocate_scripts(into, site)


def _check_tags(wheel: Path, python: str, glibc: str, arch: Arch) -> None:
    """uv takes a wheel that it is given by path, whatever its tags say."""
    try:
        _, _, _, has = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise InstallError(
            f"{wheel.name} is not a wheel's file name: {error}", remedy="name it as the standard says"
        ) from error
    if has.isdisjoint(_tags(python, glibc, arch)):
        raise InstallError(
            f"{wheel.name} is not for Python {python} on {arch} with glibc {glibc.replace('_', '.')}",
            remedy="take the wheel, stack and --target that belong together",
        )


def install(found: Sequence[LockedWheel], where: Sequence[str], title: str, settings: Settings, tick: Tick = no_tick) -> None:
    """Unpack locked wheels, their digests checked, to `where` as uv's options name it (--python, --target); no requirement is
    followed.

    Raises:
        FetchError, DigestError, RootError, HostError.
    """
    with TemporaryDirectory(prefix="gracefarm-install-") as name:
        listing = Path(name, "requirements.txt")
        own = _own_wheels(found, Path(name), settings)
        places = {one: f" @ {own[one.sha256].as_uri()}" if one.index else f"=={one.version}" for one in found}
        listing.write_text("".join(f"{one.name}{places[one]} --hash=sha256:{one.sha256}\n" for one in found))
        command = ["pip", "install", *where, "--require-hashes", "--no-deps", "--no-build", "--link-mode=hardlink"]
        command.append(f"--requirements={listing}")
        started: list[str] = []

        def show(line: str) -> None:
            if match := re.match(r"\s*(Downloading|Downloaded|Building) (.+)", line):
                started.extend([match[2]] if match[1] == "Downloaded" else [])
                tick(len(started), None, f"{match[1].lower()} {match[2]}")

        tick(0, None, f"{len(found)} wheels")
        _uv(
            command,
            settings,
            lambda message: RootError(f"the wheels of {title} cannot be unpacked: {message}", remedy="run `builder doctor`"),
            show,
        )
        tick(len(found), len(found), "wheels unpacked")


def install_wheel(wheel: Path, where: Sequence[str], failure: Callable[[str], GracefarmError]) -> None:
    """Install one wheel file, and nothing that it requires, to `where` as uv's options name it.

    Raises:
        GracefarmError: what `failure` makes of uv's message.
    """
    _uv(
        ["pip", "install", "--quiet", *where, "--no-deps", "--no-index", "--reinstall", "--no-cache", str(wheel)],
        None,
        failure,
    )


def _target(stack: LoadedStack, arch: Arch, site: Path) -> list[str]:
    return ["--python", sys.executable, f"--target={site}", *_platform(stack, arch)]


def _own_wheels(found: Sequence[LockedWheel], folder: Path, settings: Settings) -> dict[str, Path]:
    """The wheels of indexes of their own, fetched and put into `folder` by their names; by sha256."""
    places = {}
    for one in found:
        if one.index:
            # Its clients take longer to import than `builder build` takes to find that a build exists.
            from builder.fetch import own_index

            file, filename = own_index.fetch_wheel(one.name, one.version, one.sha256, one.tags, one.index, settings)
            place = folder / filename
            place.symlink_to(file)
            places[one.sha256] = place
    return places


def _uv(
    arguments: Sequence[str],
    settings: Settings | None,
    failure: Callable[[str], GracefarmError],
    on_line: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run uv with nothing of the user's configuration but how to reach the index.

    Raises:
        FetchError: the index or a file of it cannot be reached.
        DigestError: a wheel is not the pinned one.
        GracefarmError: what `failure` makes of uv's message.
    """
    environment = {name: os.environ[name] for name in sorted(_KEPT) if name in os.environ}
    environment |= {"UV_NO_CONFIG": "1", "UV_NO_PROGRESS": "1", "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never"}
    if settings is not None:
        environment["UV_CACHE_DIR"] = str(settings.home / "uv")
        if settings.index_url:
            # Not an argument: the URL may carry a password.
            environment["UV_DEFAULT_INDEX"] = settings.index_url
    try:
        program = uv.find_uv_bin()
    except FileNotFoundError as error:
        raise HostError("uv is not installed beside this program", remedy="pip install 'gracefarm[builder]'") from error
    lines: list[str] = []
    with subprocess.Popen(
        die_with_us([program, *arguments]), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            on_line(line)
    if process.returncode:
        raise _explain(lines, failure)


def _explain(lines: Sequence[str], failure: Callable[[str], GracefarmError]) -> Exception:
    """uv's own words, without progress and credentials, as the failure class that they mean."""
    words = [
        re.sub(r"^\W+", "", line)
        for line in lines
        if not re.match(r"\s*(Downloading|Downloaded|Resolved|Using|Prepared) ", line)
    ]
    message = shown(" ".join(" ".join(words).split())).removeprefix("error: ")[:1500]
    low = message.lower()
    if os.strerror(errno.ENOSPC).lower() in low:
        return OSError(errno.ENOSPC, message)
    if "hash mismatch" in low:
        return DigestError(f"a wheel is not the one that was pinned: {message}", remedy="see that your index is honest")
    if any(
        word in low
        for word in (
            "failed to fetch",
            "error sending request",
            "connect error",
            "timed out",
            "dns error",
            "not found in the package registry",
        )
    ):
        return FetchError(
            f"the Python index failed: {message}", remedy="see that the index has it: GRACEFARM_PYTHON_INDEX=URL"
        )
    return failure(message)


def torch_facts(site: Path) -> dict[str, object]:
    """The constants of torch/version.py, read and not imported; empty without torch."""
    place = site / "torch" / "version.py"
    values: dict[str, object] = {}
    if place.is_file():
        for node in ast.parse(place.read_text()).body:
            targets = (
                node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            )
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                values |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
    return values


def check_torch(stack: LoadedStack, site: Path) -> None:
    """The version number does not tell a CUDA build from a CPU build; torch/version.py does, without an import.

    Raises:
        RootError: it is for another CUDA than the stack says.
    """
    wanted = stack.data.torch
    if wanted is None:
        return
    cuda = torch_facts(site).get("cuda")
    if cuda != wanted.cuda:
        raise RootError(
            f"the locked torch {wanted.version} is built for CUDA {cuda}, the stack wants {wanted.cuda}",
            remedy="lock a wheel of torch with that CUDA: its file name does not tell, torch/version.py does",
        )


def torch_abi(site: Path) -> bool | None:
    """_GLIBCXX_USE_CXX11_ABI of the environment's torch, from its CMake files; None without torch.

    The CPU wheel of 2.4.0 for aarch64 has the old one; what links with torch must have the same.
    """
    place = site / "torch" / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    if not place.is_file():
        return None
    found = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", place.read_text())
    return found[1] == "1" if found else None


def _lay_out(folder: Path, stack: LoadedStack, target: Arch) -> None:
    """What makes it a virtual environment; the keys of ours are for `fresh` and mean nothing to Python."""
    (folder / "bin").mkdir()
    (folder / "pyvenv.cfg").write_text(
        "home = /usr/bin\n"
        "include-system-site-packages = false\n"
        f"version = {stack.data.python}\n"
        f"gracefarm-python = {stack.data.python}\n"
        f"gracefarm-platform = {target}-manylinux_{stack.data.glibc[target]}\n"
    )
    (folder / "bin" / "python3").symlink_to(f"/usr/bin/python{stack.data.python}")
    for name in ("python", f"python{stack.data.python}"):
        (folder / "bin" / name).symlink_to("python3")


def _relocate_scripts(folder: Path, site: Path) -> None:
    """Scripts go from where `uv pip install --target` puts them to bin/, name /env's Python, and RECORD says so."""
    if not (site / "bin").is_dir():
        return
    moved: dict[str, list[str]] = {}
    for script in sorted((site / "bin").iterdir()):
        data = script.read_bytes()
        # uv wrote the Python that runs this program; with a long path, as a shell script of two lines.
        text = re.sub(rb"\A#!(?:[^\n]*python[^\n]*\n|/bin/sh\n'''exec' [^\n]*\n' '''\n)", SHEBANG, data, count=1)
        place = folder / "bin" / script.name
        place.unlink(missing_ok=True)
        place.write_bytes(text)
        place.chmod(script.stat().st_mode)
        script.unlink()
        secure = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        moved[f"bin/{script.name}"] = [f"../../../bin/{script.name}", f"sha256={secure}", str(len(text))]
    (site / "bin").rmdir()
    for record in site.glob("*.dist-info/RECORD"):
        rows = list(csv.reader(io.StringIO(record.read_text())))
        if any(row and row[0] in moved for row in rows):
            output = io.StringIO()
            csv.writer(output, lineterminator="\n").writerows(moved.get(row[0], row) for row in rows if row)
            atomic_write(record, output.getvalue())


def _bytecode(
    folder: Path,
    site: Path,
    found: Sequence[LockedWheel],
    root: Path,
    stack: LoadedStack,
    settings: Settings,
    tick: Tick,
) -> None:
    """Give every module its .pyc: from the store where its wheel was compiled before, else made and put there."""
    modules = dict(_modules(site))
    stores = {
        one: settings.home
        / "environments"
        / "bytecode"
        / hashlib.sha256(f"{LAYOUT} {stack.data.python} {one.sha256}".encode()).hexdigest()
        for one in found
    }
    missing = [one for one in found if not stores[one].is_dir()]
    tick(0, None, f"byte-compiling {len(missing)} wheels" if missing else "linking byte code")
    prefix = site.relative_to(folder)
    compile_files(root, INSIDE, folder, [str(prefix / name) for one in missing for name in modules.get(one.name, ())])
    with lock(settings.home / "environments" / "bytecode.lock"):
        for one in found:
            if one in missing:
                _store(site, modules.get(one.name, []), stores[one])
            else:
                _link_tree(stores[one], site)


def _modules(site: Path) -> Iterator[tuple[str, list[str]]]:
    """Canonical name and Python files (relative to `site`) of each distribution, by its RECORD."""
    for record in site.glob("*.dist-info/RECORD"):
        names = [row[0] for row in csv.reader(io.StringIO(record.read_text())) if row and row[0].endswith(".py")]
        name = canonicalize_name(record.parent.name.split("-")[0])
        yield name, [one for one in names if ".." not in Path(one).parts and (site / one).is_file()]


def _store(site: Path, names: Sequence[str], store: Path) -> None:
    if store.is_dir():
        return
    tag = f"cpython-{site.parent.name.removeprefix('python').replace('.', '')}"
    with atomic_directory(store) as folder:
        for name in names:
            compiled = Path(name).parent / "__pycache__" / f"{Path(name).stem}.{tag}.pyc"
            if (site / compiled).is_file():
                (folder / compiled.parent).mkdir(parents=True, exist_ok=True)
                (folder / compiled).hardlink_to(site / compiled)


def _link_tree(store: Path, site: Path) -> None:
    for parent, _, names in os.walk(store):
        into = site / Path(parent).relative_to(store)
        if names:
            into.mkdir(parents=True, exist_ok=True)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (into / name).unlink()  # numpy 1.26 has .pyc files of its own in its wheel
            os.link(os.path.join(parent, name), into / name)  # noqa: PTH118 tens of thousands of files


def _make_read_only(folder: Path) -> None:
    """No stray write reaches what all builds share; folders stay writable, so that it can be removed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 tens of thousands of files
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and mode & 0o222:
                os.chmod(path, stat.S_IMODE(mode) & ~0o222)  # noqa: PTH101
