"""The wheels that requirements.lock pins, and the digests of environment and compilers made from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

from builder.planning import packages
from builder.planning.stack import Arch, BuildRequirements, LoadedStack
from builder.planning.tags import tags
from gracefarm import tables
from gracefarm.errors import ConfigError
from gracefarm.pins import read

LeftOut = Mapping[tuple[str, Arch], str]
"Pythons and architectures that a recipe's requirements.lock leaves out, each with the reason."
_PYTHONS, _LEFT_OUT = "# Pythons: ", "# Left out: "
"Comments of a recipe's requirements.lock."
LAYOUT = 1
"Raised when the layout changes for the same wheels; enters the digests."


@dataclass(frozen=True, kw_only=True, order=True)
class LockedWheel:
    """One line of requirements.lock."""

    name: str
    "Canonical."
    version: str
    sha256: str
    "Empty while it is unknown; a build refuses such a wheel."
    index: str = ""
    "The index that has it; empty: the Python index."
    filename: str = field(default="", compare=False)
    "File name in the lock; empty: the lock does not name it."
    tags: frozenset[Tag] = field(default=frozenset(), compare=False, repr=False)
    "For a wheel of another index: the tags that its file may have."


def wheels(stack: LoadedStack, arch: Arch) -> tuple[LockedWheel, ...]:
    """The wheels that requirements.lock pins for that architecture, sorted.

    Raises:
        ConfigError: the lock is missing or damaged, or does not match stack.toml.
    """
    if stack.interpreter is not None and not stack.requirements_lock.is_file():
        if reason := stack.data.no_lock.get(stack.python):
            raise ConfigError(
                f"stack {stack.data.name} does not support Python {stack.python}: {reason}",
                remedy="use a different Python or a different stack; if this reason is no longer valid, write the lock with "
                f"`{stack.lock_command}`",
                repeat=stack.lock_command,
            )
        raise ConfigError(
            f"stack {stack.data.name} has no lock for Python {stack.python}",
            remedy=f"write the lock with `{stack.lock_command}`; torch and the packages that it requires must have "
            "wheels for this Python",
            repeat=stack.lock_command,
        )
    locked = _of_lock(stack.requirements_lock, stack, arch, stack.lock_command)
    for own in stack.data.environment.wheels:
        if own.arch is arch:
            name = canonicalize_name(own.name)
            locked[name] = LockedWheel(
                name=name, version=own.version, sha256=own.sha256 or "", index=own.index, tags=frozenset(tags(stack, arch))
            )
    _check_fresh(stack, arch, locked)
    if (build := stack.build_requirements) is not None:
        # Distributions of the stack stay as they are.
        for text in build.texts:
            requirement = Requirement(text)
            present = locked.get(canonicalize_name(requirement.name))
            if present is not None and not requirement.specifier.contains(present.version, prereleases=True):
                raise ConfigError(
                    f"the recipe requires {text} to build, but stack {stack.data.name} has {present.name} {present.version}",
                    remedy="build against a different stack, or change the requirement with a patch",
                )
        added = _of_lock(build.lock, stack, arch, build.lock_command)
        _require_in_scope(build, stack.python, arch)
        locked = added | locked
        _require_all(build.texts, build.lock, "recipe.toml", build.lock_command, locked)
    return tuple(sorted(wheel for wheel in locked.values() if stack.takes(wheel.name)))


def _of_lock(lock: Path, stack: LoadedStack, arch: Arch, command: str) -> dict[str, LockedWheel]:
    """The wheels of a lock for the stack's Python on an architecture, by name."""
    locked: dict[str, LockedWheel] = {}
    remedy = f"write the lock again with `{command}`"
    for pin in read(lock, remedy=remedy, repeat=command):
        if len(pin.sha256) > 1:
            raise ConfigError(
                f"{lock}:{pin.number}: the line has several --hash options, but a wheel must be pinned with exactly one",
                remedy=remedy,
                repeat=command,
            )
        if pin.applies({"platform_machine": arch.value, "python_version": stack.python}):
            (sha256,) = pin.sha256
            wheel = LockedWheel(name=pin.name, version=pin.version, sha256=sha256, filename=pin.filename)
            if locked.setdefault(wheel.name, wheel) != wheel:
                raise ConfigError(f"{lock}:{pin.number}: {wheel.name} is pinned twice", remedy="remove one of the two lines")
    return locked


def scope(pythons: Iterable[str], left_out: LeftOut) -> list[str]:
    """Comments of a recipe's requirements.lock: the Pythons that it was written for, and those that it leaves out."""
    by_version = sorted(set(pythons), key=lambda python: (len(python.rstrip("t")), python))
    lines = [_PYTHONS + ", ".join(by_version)]
    return lines + [f"{_LEFT_OUT}Python {python} on {arch}: {reason}" for (python, arch), reason in left_out.items()]


def _require_in_scope(build: BuildRequirements, python: str, arch: Arch) -> None:
    """Require that the lock of a recipe was written for this Python, and does not leave it out; see `scope`."""
    recipe, where = build.lock.parent.name, f"Python {python} on {arch}"
    for line in tables.read_text(build.lock).splitlines():
        if line.startswith(_PYTHONS) and python not in line.removeprefix(_PYTHONS).split(", "):
            raise ConfigError(
                f"{build.lock} was written before Python {python} was added",
                remedy=f"write the lock again with `{build.lock_command}`",
                repeat=build.lock_command,
            )
        start = f"{_LEFT_OUT}{where}: "
        if line.startswith(start):
            raise ConfigError(
                f"{recipe} cannot be built for {where}: {line.removeprefix(start)}",
                remedy="use a different Python; if this reason is no longer valid, write the lock again with "
                f"`{build.lock_command}`",
                repeat=build.lock_command,
            )


def _check_fresh(stack: LoadedStack, arch: Arch, locked: Mapping[str, LockedWheel]) -> None:
    """Require that the lock pins the requirements of stack.toml."""
    _require_all(requirements(stack, arch), stack.requirements_lock, "stack.toml", stack.lock_command, locked)


def _require_all(texts: Sequence[str], lock: Path, file: str, command: str, locked: Mapping[str, LockedWheel]) -> None:
    """Require that the wheels of `lock` meet each requirement of `file`."""
    for text in texts:
        requirement = Requirement(text)
        wheel = locked.get(canonicalize_name(requirement.name))
        if wheel is None or not requirement.specifier.contains(wheel.version, prereleases=True):
            have = f"pins {wheel.name} {wheel.version}" if wheel else f"has no {requirement.name}"
            remedy = f"write the lock again with `{command}`"
            raise ConfigError(f"{lock} {have}, but {file} requires {text}", remedy=remedy, repeat=command)


def requirements(stack: LoadedStack, arch: Arch) -> tuple[str, ...]:
    """Requirements of environment and compiler, resolved together: the environment needs headers of the compiler's release."""
    environment = stack.data.environment.requirements if arch in stack.data.glibc else ()
    return (*environment, *stack.data.toolchain.requirements)


def toolchain_wheels(stack: LoadedStack, host: Arch) -> tuple[LockedWheel, ...]:
    """The wheels of the CUDA compiler."""
    names = {canonicalize_name(Requirement(text).name) for text in stack.data.toolchain.requirements}
    return tuple(wheel for wheel in wheels(stack.base, host) if wheel.name in names)


def tool_wheels(stack: LoadedStack, host: Arch) -> tuple[LockedWheel, ...]:
    """The wheels of a recipe's build requirements with programs for the host, such as CMake and ninja: built for a platform,
    but not for a Python. The same wheels for the target are in the environment, but cannot run here.

    Raises:
        ConfigError: the lock is damaged.
    """
    build = stack.build_requirements
    if build is None or not build.lock.is_file():
        return ()
    locked = _of_lock(build.lock, stack, host, build.lock_command).values()
    return tuple(sorted(wheel for wheel in locked if _holds_programs(wheel)))


def _holds_programs(wheel: LockedWheel) -> bool:
    tags = parse_wheel_filename(wheel.filename)[3] if wheel.filename else frozenset()
    return any(tag.abi == "none" and tag.platform != "any" for tag in tags)


def environment_digest(stack: LoadedStack, target: Arch) -> str:
    """Hex sha256 of everything that determines the environment's bytes: wheels, Python, layout.

    Raises:
        ConfigError: see `wheels`.
    """
    besides = stack.interpreter.digest(target) if stack.interpreter is not None else None
    return digest_of("environment", stack.python, target, wheels(stack, target), besides)


def toolchain_digest(stack: LoadedStack, host: Arch) -> str:
    """Hex sha256 of everything that determines the compilers' bytes.

    Raises:
        ConfigError: see `wheels`.
    """
    besides = packages.toolkit_digest(stack, host)
    return digest_of("toolchain", stack.data.python, host, toolchain_wheels(stack, host), besides)


def digest_of(kind: str, python: str, arch: Arch, locked: Sequence[LockedWheel], besides: str | None = None) -> str:
    """The digest of an environment or of compilers (`kind`) made from these wheels.

    `besides`: the digest of the environment's interpreter, or of the Debian packages with the compiler.
    """
    rows = [(wheel.name, wheel.version, wheel.sha256) for wheel in sorted(locked)]
    content = [kind, LAYOUT, arch.value, python, rows, *([besides] if besides else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
