"""New locks of a stack: uv resolves the wheels, apt the Debian packages."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import canonicalize_name, parse_wheel_filename

from builder.ground import debian, index_wheels, uv
from builder.planning import packages
from builder.planning.pins import LeftOut, requirements, scope
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.planning.tags import glibc, tags
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError

LockedRow = tuple[str, str, str, str]
"Name, version, file name and sha256 of a wheel."
Choice = tuple[str, str, dict[str, str]]
"Name and version of a distribution, and the sha256 of each of its wheels by file name."


def requirements_lock(stack: LoadedStack, settings: Settings, tick: Tick = no_tick) -> str:
    """The text of a new requirements.lock: one resolution for each architecture, with one wheel for each distribution.

    Raises:
        ConfigError: the requirements are in conflict, or a distribution has no wheel that fits.
        FetchError: the index cannot be reached.
    """
    archs = sorted({*stack.root.hosts, *stack.data.glibc})
    files: dict[LockedRow, set[Arch]] = {}
    for number, arch in enumerate(archs):
        tick(number, len(archs), f"wheels for {arch}")
        own = {canonicalize_name(wheel.name) for wheel in stack.data.environment.wheels if wheel.arch is arch}
        for row in resolution(requirements(stack, arch), stack, arch, settings):
            if row[0] not in own:
                files.setdefault(row, set()).add(arch)
    tick(len(archs), len(archs), "")
    title = (
        f"# Every wheel of stack {stack.data.name}: the target's environment and the CUDA compiler of the host."
        if stack.kind == "stack"
        else f"# The wheels of set {stack.data.name} that its recipes do not build."
    )
    lines = [title, f"# Written by `{stack.lock_command}`, not by hand. pip and uv read it with --require-hashes."]
    for wheel in stack.data.environment.wheels:
        lines += [f"# {wheel.title} is not in this file: stack.toml pins it on another index."]
    for (name, version, filename, sha256), where in sorted(files.items()):
        marker = "" if len(where) == len(archs) else f' ; platform_machine == "{min(where)}"'
        lines += [f"# {filename}", f"{name}=={version}{marker} --hash=sha256:{sha256}"]
    return "\n".join(lines) + "\n"


def build_lock(
    recipe: LoadedRecipe, stacks: Sequence[LoadedStack], settings: Settings, tick: Tick = no_tick
) -> tuple[str, LeftOut]:
    """The text of a new requirements.lock of a recipe: its build requirements for each stack's Python and targets.

    Also the Pythons that the lock leaves out, because the requirements cannot be resolved for them.

    Raises:
        ConfigError: the requirements are in conflict, or a distribution has no wheel that fits, for all Pythons and targets.
        FetchError: the index cannot be reached.
    """
    places: dict[LockedRow, list[str]] = {}
    errors: dict[tuple[str, Arch], ConfigError] = {}
    cells = {(stack.python, arch): stack for stack in stacks for arch in sorted(stack.data.glibc)}
    for number, ((python, arch), stack) in enumerate(cells.items()):
        tick(number, len(cells), f"wheels for Python {python} on {arch}")
        try:
            rows = list(resolution(recipe.data.build.requires, stack, arch, settings))
        except ConfigError as error:
            errors[python, arch] = error
            continue
        for row in rows:
            places.setdefault(row, []).append(f'python_version == "{python}" and platform_machine == "{arch}"')
    tick(len(cells), len(cells), "")
    if errors and len(errors) == len(cells):
        first = next(iter(errors.values()))
        raise ConfigError(first.cause, remedy="correct `requires` of [build] in recipe.toml") from first
    left_out = {cell: " ".join(error.cause.split()) for cell, error in errors.items()}
    lines = [f"# What {recipe.key} needs to build beside a stack's environment.", "# Written by `builder lock`, not by hand."]
    lines += scope([python for python, _ in cells], left_out)
    for (name, version, filename, sha256), markers in sorted(places.items()):
        marker = "" if len(markers) == len(cells) - len(errors) else " ; " + " or ".join(markers)
        lines += [f"# {filename}", f"{name}=={version}{marker} --hash=sha256:{sha256}"]
    return "\n".join(lines) + "\n", left_out


def resolution(texts: Sequence[str], stack: LoadedStack, arch: Arch, settings: Settings) -> Iterator[LockedRow]:
    """Name, version, file name and sha256 of each wheel: uv chooses the versions, the tags choose the files.

    Raises:
        ConfigError: the requirements are in conflict, or a distribution has no wheel that fits.
        FetchError: the index cannot be reached.
    """
    supported = {tag: rank for rank, tag in enumerate(tags(stack, arch))}
    if stack.python.endswith("t"):
        choices = _of_free_threaded(texts, stack, arch, settings)
    else:
        choices = _choices(texts, stack, arch, settings)
    for name, version, wheels in choices:
        filename = _best(wheels, supported)
        if filename is None:
            raise ConfigError(
                f"{name} {version} has no wheel for {arch} with glibc {glibc(stack, arch)}",
                remedy="in stack.toml, recipe.toml or set.toml, require a version that has such a wheel",
            )
        yield name, version, filename, wheels[filename]


def _best(wheels: Collection[str], supported: Mapping[Tag, int]) -> str | None:
    """The file name of the best wheel; None if none fits."""
    fitting = []
    for filename in wheels:
        _, _, build, wheel_tags = parse_wheel_filename(filename)
        ranks = [supported[tag] for tag in wheel_tags if tag in supported]
        if ranks:
            # The order of pip: the best tag, then the highest build number.
            fitting.append((min(ranks), tuple(-part if isinstance(part, int) else 0 for part in build), filename))
    return min(fitting)[2] if fitting else None


def _of_free_threaded(texts: Sequence[str], stack: LoadedStack, arch: Arch, settings: Settings) -> list[Choice]:
    """The choices for a free-threaded Python.

    uv 0.13.9 accepts no version such as 3.14t. So it chooses versions for the Python with a GIL, such as 3.14, and the index
    lists the wheels. If a version has no wheel that fits, such versions are excluded, and uv chooses again.
    """
    supported = {tag: rank for rank, tag in enumerate(tags(stack, arch))}
    known: dict[str, dict[str, dict[str, str]]] = {}
    excluded: dict[str, str] = {}
    while True:
        choices = []
        for name, version, wheels in _choices(texts, stack, arch, settings, excluded):
            if name not in known and _has_abi(wheels):
                known[name] = index_wheels.by_version(name, stack, settings)
            choices.append((name, version, known[name].get(version, {}) if name in known else wheels))
        unfit = next((choice for choice in choices if choice[0] in known and _best(choice[2], supported) is None), None)
        if unfit is None:
            return choices
        name, version, _ = unfit
        others = {other for other, wheels in known[name].items() if _best(wheels, supported) is None}
        excluded[f"{name} {version}"] = ",".join(f"!={other}" for other in sorted({version, *others}))


def _has_abi(wheels: Collection[str]) -> bool:
    """Whether the project compiles wheels for each Python. uv lists all other wheels for free-threaded Pythons too."""
    return any(tag.abi != "none" for filename in wheels for tag in parse_wheel_filename(filename)[3])


def _choices(
    texts: Sequence[str], stack: LoadedStack, arch: Arch, settings: Settings, excluded: Mapping[str, str] | None = None
) -> list[Choice]:
    """What uv chooses. `excluded`: a distribution and its version without a wheel, and the specifier that excludes it."""
    with TemporaryDirectory(prefix="gracefarm-lock-") as folder:
        wanted, answer = Path(folder, "requirements.in"), Path(folder, "pylock.toml")
        wanted.write_text("\n".join(texts) + "\n")
        command = ["pip", "compile", "--quiet", "--format=pylock.toml", "--only-binary=:all:", "--no-header", "--no-annotate"]
        command += [*uv.platform(stack, arch), f"--output-file={answer}", str(wanted)]
        if stack.data.environment.resolved_before:
            command.append(f"--exclude-newer={stack.data.environment.resolved_before}")
        if stack.data.environment.left_out:
            # An override replaces the requirements of all distributions; this one never applies.
            overrides = Path(folder, "overrides.txt")
            overrides.write_text(
                "".join(f"{left_out} ; python_version < '3'\n" for left_out in stack.data.environment.left_out)
            )
            command.append(f"--override={overrides}")
        if excluded:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text("".join(f"{what.split()[0]}{versions}\n" for what, versions in excluded.items()))
            command.append(f"--constraint={constraints}")
        uv.run(command, settings, lambda message: _unresolved(message, stack, arch, excluded))
        resolved = tomllib.loads(answer.read_text())["packages"]
    choices: list[Choice] = []
    for package in resolved:
        wheels: dict[str, str] = {}
        for wheel in package.get("wheels", []):
            filename = unquote(Path(urlsplit(wheel.get("url") or wheel.get("path") or wheel["name"]).path).name)
            wheels[filename] = wheel["hashes"]["sha256"]
        choices.append((canonicalize_name(package["name"]), str(package["version"]), wheels))
    return choices


def _unresolved(message: str, stack: LoadedStack, arch: Arch, excluded: Mapping[str, str] | None) -> ConfigError:
    if excluded:
        # The other exclusions did not prevent a solution.
        return ConfigError(
            f"{list(excluded)[-1]} has no wheel for Python {stack.python} on {arch}, and no version with such a wheel meets "
            "the requirements",
            remedy="in stack.toml, recipe.toml or set.toml, require a version that has such a wheel; or write the lock for a "
            f"Python with a GIL, such as {stack.python.rstrip('t')}",
        )
    return ConfigError(
        f"the requirements cannot be resolved for {arch}: {message}",
        remedy="correct the requirements in stack.toml, recipe.toml or set.toml",
    )


def _head(what: str, stack: LoadedStack, suite: str) -> list[str]:
    name = stack.data.name
    return [f"# {what} of {name}; written by `builder lock {name}`, not by hand.", f'suite = "{suite}"']


def root_lock(stack: LoadedStack, settings: Settings, tick: Tick = no_tick) -> str:
    """The text of a new root.lock: apt's solution in the current suite, for each pair of host and target in stack.toml.

    Raises:
        HostError: apt, the keyring or a mirror is missing.
        FetchError: the package lists cannot be fetched.
        RootError: apt finds no solution.
    """
    spec = stack.root
    pairs = [(host, target) for host, targets in spec.hosts.items() for target in targets]
    text, with_rust = _head("Every .deb of the roots", stack, spec.suite), []
    for number, (host, target) in enumerate(pairs):
        tick(number, len(pairs), f"packages of {spec.suite} for {target} on {host}")
        with debian.solver(spec.suite, host, [target] if target is not host else [], settings) as apt:
            wanted = packages.requests(stack, host, target)
            debs = {*apt.solve(wanted), *apt.alone(packages.alone(stack, host, target))}
            text += debian.table(f"roots.{host}-{target}", debs)
            if spec.rust is not None:
                rust = {
                    *apt.solve([*wanted, *packages.rust_requests(stack, host)]),
                    *apt.alone(packages.rust_alone(stack, host, target)),
                }
                with_rust += debian.table(f"rust.{host}-{target}", rust - debs)
    tick(len(pairs), len(pairs), "")
    return "\n".join([*text, *with_rust]) + "\n"


def toolchain_lock(stack: LoadedStack, settings: Settings, tick: Tick = no_tick) -> str | None:
    """The text of a new toolchain.lock; None if the stack requires no Debian packages for its compiler.

    Raises:
        HostError, FetchError, RootError: as in `debian.solver`.
    """
    spec = stack.data.toolchain.debian
    if spec is None:
        return None
    text = _head("The CUDA compiler", stack, spec.suite)
    for number, host in enumerate(hosts := sorted(stack.root.hosts)):
        tick(number, len(hosts), f"compiler of {spec.suite} for {host}")
        with debian.solver(spec.suite, host, [], settings, spec.component) as apt:
            text += debian.table(f"hosts.{host}", apt.alone([f"{name}:{host.debian}" for name in spec.packages]))
    return "\n".join(text) + "\n"
