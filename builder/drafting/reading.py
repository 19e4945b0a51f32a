"""Read the values of a recipe from a source tree: build requirements, architectures, and parts that cannot work."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder.compiling import build_script
from builder.compiling.build_script import BuildScript, Variable
from builder.drafting.findings import Findings
from builder.drafting.metadata import SourceMetadata
from gracefarm.errors import SourceError

_COMPILED = frozenset({".c", ".cc", ".cpp", ".cxx", ".cu", ".pyx", ".rs", ".f90", ".f", ".m"})
_NOT_ITS_OWN = frozenset(
    {
        "third_party",
        "third-party",
        "3rdparty",
        "vendor",
        "extern",
        "external",
        "tests",
        "test",
        "examples",
        "benchmarks",
        "docs",
    }
)
_DISTRIBUTIONS: Mapping[str, str] = MappingProxyType(
    {"Cython": "cython", "pybind11": "pybind11", "numpy": "numpy", "torch": "torch", "skbuild": "scikit-build"}
    | {"setuptools_scm": "setuptools-scm", "setuptools_rust": "setuptools-rust", "cffi": "cffi", "psutil": "psutil"}
    | {"yaml": "pyyaml", "pkg_resources": "setuptools", "distutils": "setuptools", "wheel": "wheel", "packaging": "packaging"}
)
"Distributions of modules that build scripts import without saying so in build-system.requires."
_RUST_TOOLS = ("maturin", "setuptools-rust")
"Build backends that run cargo."
_ARCHS = re.compile(r"(?:^|_)CUDA_ARCH(?:S|ES|_LIST)?$")
_OPS = re.compile(r"_(?:BUILD|WITH)_(?:OPS|CUDA(?:_EXT)?)$")
# Not 20.2f of {:<20.2f} or %20.2f.
_LETTERED = re.compile(r"(?:sm|compute)_(\d{2,3}[af])\b|(?<![<>^%:])\b(\d{1,2})\.(\d[af])\b")
_HOPPER = re.compile(r"(?i)hopper|sm_?90")
_THIRD_PARTY = re.compile(r"(?:third[-_]?party|3rd[-_]?party|extern(?:al)?|submodules?)/[\w./+-]+")
_CMAKE_CUDA = re.compile(r"(?im)^\s*option\s*\(\s*(\w*CUDA)\b[^)]*?\bOFF\s*\)")
_EXTENSION_TARGET = re.compile(
    r"(?i)(?:pybind11_add_module|nanobind_add_module|python3?_add_library|swig_add_library)\s*\(\s*(\w+)"
    r"|extension_module\(\s*'(\w+)'"
)


@dataclass(kw_only=True)
class Draft:
    """The values of a new recipe."""

    name: str
    stack: str
    requires: list[str] = field(default_factory=list)
    substitutions: list[tuple[str, str, str]] = field(default_factory=list)
    "File, text and its replacement."
    environment: dict[str, str] = field(default_factory=dict)
    cuda: bool = False
    rust: bool = False
    memory: str = "2GiB"
    sm_extra: dict[str, list[str]] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    "Extension modules among the imports."
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True, kw_only=True)
class StackFacts:
    """What the stack of the recipe has."""

    name: str
    python: str
    installed: Mapping[str, str]
    "Versions of its environment, by canonical name."
    machine: str = "aarch64"


def draft(tree: Path, name: str, metadata: SourceMetadata, ground: StackFacts) -> Draft:
    """Values from the source tree, and guesses for others.

    Raises:
        SourceError: it cannot be built, because sources are missing.
    """
    script = build_script.read(tree)
    draft = Draft(name=name, stack=ground.name)
    files = [
        str(place.relative_to(tree)) for place in sorted(tree.rglob("*")) if place.suffix in _COMPILED and place.is_file()
    ]
    _require_sources(tree, name, script, files)
    draft.findings.read("build backend", metadata.backend.value, metadata.backend.place)
    _cuda(draft, script, files)
    _requirements(draft, metadata, script, ground, tree)
    _rust(draft, tree, metadata)
    _environment(draft, tree, metadata, script)
    _downloads(draft, tree, script)
    _device_code(draft, tree, script, files)
    _memory(draft, tree, files)
    _imports(draft, tree, metadata, script, ground)
    _missing(draft, tree, script)
    return draft


def _own(files: list[str]) -> list[str]:
    return [name for name in files if not _NOT_ITS_OWN.intersection(PurePosixPath(name).parts[:-1])]


def _require_sources(tree: Path, name: str, script: BuildScript, files: list[str]) -> None:
    """Refuse a tree without the sources that its build script names."""
    known = [extension for extension in script.extensions() if extension.sources]
    lacking = [
        (extension, absent)
        for extension in known
        if (absent := [source for source in extension.sources if not _is_there(tree, source)])
    ]
    if known and len(lacking) == len(known):
        extension, absent = lacking[0]
        raise SourceError(
            f"{name} cannot be built from this source: it lacks {absent[0]}, which {extension.place} compiles",
            remedy="repeat the command with the project's repository: --git URL --commit COMMIT",
        )
    if not files and (named := list(_third_party(tree, script))):
        text, place = named[0]
        raise SourceError(
            f"{name} cannot be built from this source: it lacks {text}, which {place} names",
            remedy="repeat the command with the project's repository: --git URL --commit COMMIT",
        )


def _is_there(tree: Path, source: str) -> bool:
    """A source, or what it is made of: Cython's and SWIG's output may be named."""
    place = tree / source
    return any(place.with_suffix(suffix).is_file() for suffix in (place.suffix, ".pyx", ".i", ".py", ".in")) or "*" in source


def _third_party(tree: Path, script: BuildScript) -> Iterator[tuple[str, str]]:
    """Paths of the code of others that the build script names and the tree lacks."""
    for text, place in script.texts:
        if _THIRD_PARTY.fullmatch(text) and not (tree / text).exists():
            yield text, str(place)


def _cuda(draft: Draft, script: BuildScript, files: list[str]) -> None:
    sources = [name for name in _own(files) if name.endswith(".cu")] or [name for name in files if name.endswith(".cu")]
    extension = next((extension for extension in script.extensions() if "CUDA" in extension.kind), None)
    draft.cuda = extension is not None or bool(sources)
    if extension is not None:
        draft.findings.read("build.cuda", "true", extension.place)
    elif sources:
        draft.findings.read("build.cuda", "true", f"{sources[0]}, one of {len(sources)} CUDA sources")
    else:
        draft.findings.guess("build.cuda", "false", "the source has no .cu file and declares no CUDAExtension")


def _requirements(draft: Draft, metadata: SourceMetadata, script: BuildScript, ground: StackFacts, tree: Path) -> None:
    """Build requirements in addition to the stack, and distributions of the stack that the package does not accept."""
    marker = {"python_version": ground.python.rstrip("t"), "platform_machine": ground.machine}
    declared = set()
    for requirement, text, place in metadata.build_requires:
        declared.add(canonicalize_name(requirement.name))
        if requirement.marker is not None and not requirement.marker.evaluate(marker):
            continue
        have = ground.installed.get(canonicalize_name(requirement.name))
        requirement.marker = None
        if have is None:
            draft.requires.append(str(requirement))
            draft.findings.read("build.requires", str(requirement), place)
        elif not requirement.specifier.contains(have, prereleases=True):
            draft.substitutions.append(("pyproject.toml", text, requirement.name))
            why = (
                f"{place} requires {text}, but stack {ground.name} has {requirement.name} {have}; upstream does not "
                "promise that this version works"
            )
            draft.findings.guess("substitutions", f"{text} -> {requirement.name}", why)
    for module, at in script.modules.items():
        distribution = _DISTRIBUTIONS.get(module)
        if distribution and distribution not in declared and distribution not in ground.installed:
            draft.requires.append(distribution)
            draft.findings.read("build.requires", distribution, f"{at}, which imports {module}")
        elif distribution is None and not _known(module, tree, ground):
            draft.findings.warnings.append(f"{at} imports {module}, but neither the stack nor build-system.requires has it")


def _rust(draft: Draft, tree: Path, metadata: SourceMetadata) -> None:
    """Rust, if maturin or setuptools-rust builds the package; a build also requires a Cargo.lock."""
    required = [canonicalize_name(Requirement(text).name) for text in draft.requires]
    tool = next((name for name in _RUST_TOOLS if name in required), None)
    if tool is None:
        return
    draft.rust = True
    places = [place for requirement, _, place in metadata.build_requires if canonicalize_name(requirement.name) == tool]
    draft.findings.read("build.rust", "true", f"{places[0] if places else 'the build script'}, which requires {tool}")
    if not any(tree.rglob("Cargo.lock")):
        draft.findings.warnings.append(
            "the source has no Cargo.lock; write this file with `cargo generate-lockfile`, and add it with a patch"
        )


def _known(module: str, tree: Path, ground: StackFacts) -> bool:
    local = any((tree / folder / name).exists() for folder in (".", "src", "lib") for name in (module, f"{module}.py"))
    return (
        local or module in sys.stdlib_module_names or canonicalize_name(module) in ground.installed or module.startswith("_")
    )


def _environment(draft: Draft, tree: Path, metadata: SourceMetadata, script: BuildScript) -> None:
    """Variables that a build without a GPU must set; the others are named in NOTES.md."""
    variables = {variable.name: variable for variable in script.variables()}
    for variable in variables.values():
        draft.findings.read("variable", f"{variable.name} (default {variable.default!r})", variable.place)
    if draft.cuda:
        switch = variables.get("FORCE_ONLY_CUDA") or variables.get("FORCE_CUDA")
        for chosen, value, why in _cuda_settings(variables, switch):
            draft.environment[chosen.name] = value
            draft.findings.guess("build.environment", f"{chosen.name}={value}", f"{chosen.place} reads this variable; {why}")
        _cmake_arguments(draft, tree, metadata)


def _cuda_settings(variables: Mapping[str, Variable], switch: Variable | None) -> Iterator[tuple[Variable, str, str]]:
    if switch is not None:
        yield switch, "1", "without a GPU in the build, the script requires it to compile CUDA code"
    for variable in variables.values():
        if _ARCHS.search(variable.name) and variable.name != "TORCH_CUDA_ARCH_LIST":
            # As the default is written: 80;90 or 8.0;9.0.
            plain = isinstance(variable.default, str) and re.fullmatch(r"\d+(?:[;, ]\d+)*", variable.default)
            yield variable, "{sm}" if plain else "{sm_dotted}", "it selects the GPU architectures"
        elif _OPS.search(variable.name) and variable.default in (None, "", "0", 0, False, "OFF", "FALSE"):
            yield variable, "1", "it is off by default, and its name says that it turns on the compiled part"


def _cmake_arguments(draft: Draft, tree: Path, metadata: SourceMetadata) -> None:
    """Set -DX_CUDA=ON if CMake builds the package and its option X_CUDA is off."""
    if not metadata.backend.value.startswith(("scikit_build_core", "skbuild")):
        return
    for place in sorted(tree.rglob("CMakeLists.txt"), key=lambda place: len(place.parts)):
        text = place.read_text(encoding="utf-8", errors="replace")
        match = _CMAKE_CUDA.search(text) or re.search(r"(?i)option\s*\(\s*(GGML_CUDA)\b", text)
        if match:
            line = text[: match.start()].count("\n") + 1
            where = f"{place.relative_to(tree)}:{line}"
            draft.environment["CMAKE_ARGS"] = f"-D{match[1]}=ON"
            why = f"{where} has this option, and the source has CUDA code"
            draft.findings.guess("build.environment", f"CMAKE_ARGS=-D{match[1]}=ON", why)
            return


def _downloads(draft: Draft, tree: Path, script: BuildScript) -> None:
    for download in script.downloads():
        if not download.reached or ("submodule" in download.what and not (tree / ".git").exists()):
            continue
        if download.switch is not None:
            name, value = download.switch
            if draft.environment.setdefault(name, value) == value:
                origin = f"{download.place}; without this variable, the script downloads with {download.what}"
                draft.findings.read("build.environment", f"{name}={value}", origin)
            continue
        others = ", ".join(f"{name}={value}" for name, value in download.avoided_by.items())
        remedy = f"; each of these values avoids this: {others}" if others else ""
        draft.findings.warnings.append(f"{download.place} may reach the network: {download.what}{remedy}")


def _device_code(draft: Draft, tree: Path, script: BuildScript, files: list[str]) -> None:
    """Requests for code of a single capability or family, as 90a."""
    if not draft.cuda:
        return
    for text, place in _texts(tree, script):
        for match in _LETTERED.finditer(text):
            draft.findings.read("request", match[1] or match[2] + match[3], place)
    folders = {
        part
        for name in _own([*files, *(str(place.relative_to(tree)) for place in tree.rglob("*.cuh"))])
        for part in PurePosixPath(name).parts
        if _HOPPER.search(part)
    }
    scripts = {place.name for place in tree.rglob("*.py") if _HOPPER.search(place.name) and "gen" in place.name}
    if folders or scripts:
        draft.sm_extra["*hopper*" if any("opper" in name for name in folders | scripts) else "*sm90*"] = ["90a"]
        example = min(folders | scripts)
        why = f"{example} is named after Hopper, and instructions that only Hopper has require sm_90a"
        draft.findings.guess("wheel.sm_extra", str(draft.sm_extra), why)


def _texts(tree: Path, script: BuildScript) -> Iterator[tuple[str, str]]:
    yield from ((text, str(place)) for text, place in script.texts if len(text) < 200)
    for place in sorted(tree.glob("CMakeLists.txt")) + sorted(tree.glob("c*/CMakeLists.txt")):
        for number, line in enumerate(place.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            yield line, f"{place.relative_to(tree)}:{number}"


def _memory(draft: Draft, tree: Path, files: list[str]) -> None:
    cutlass = next((str(place.relative_to(tree)) for place in tree.rglob("cutlass.h")), None)
    if draft.cuda and cutlass:
        draft.memory, why = "6GiB", f"the source has {cutlass}, and CUTLASS templates need the most memory"
    elif draft.cuda:
        draft.memory, why = "3GiB", "CUDA sources rarely need more for one architecture"
    elif any(name.endswith((".cpp", ".cc", ".cxx", ".rs")) for name in files):
        draft.memory, why = "2GiB", "the source is C++ or Rust without CUDA"
    else:
        draft.memory, why = "1GiB", "the source is C without CUDA"
    draft.findings.guess("build.memory_per_job", draft.memory, f"{why}; a build measures the real value")


def _imports(draft: Draft, tree: Path, metadata: SourceMetadata, script: BuildScript, ground: StackFacts) -> None:
    for module, origin, read in _modules(draft.name, tree, metadata):
        draft.imports.append(module)
        (draft.findings.read if read else draft.findings.guess)("smoke.imports", module, origin)
    extensions = [(extension.name, str(extension.place)) for extension in script.extensions() if extension.name.isascii()]
    for module, origin in extensions:
        if re.fullmatch(r"\w+(?:\.\w+)*", module) and module not in draft.imports:
            draft.imports.append(module)
            draft.compiled.append(module)
            draft.findings.read("smoke.imports", module, origin)
    if "torch" in set(script.modules) | {canonicalize_name(need.name) for need, _ in metadata.run_requires}:
        draft.imports.insert(0, "torch")
    missing = [
        f"{requirement} ({place})"
        for requirement, place in metadata.run_requires
        if canonicalize_name(requirement.name) not in ground.installed and _applies(requirement, ground)
    ]
    if missing:
        draft.findings.warnings.append(
            f"the package requires distributions that stack {ground.name} does not have: {', '.join(missing)}; if an import "
            "in the smoke test needs one of them, add it to `requires` of [build]"
        )


def _applies(requirement: Requirement, ground: StackFacts) -> bool:
    marker = {"python_version": ground.python.rstrip("t"), "platform_machine": ground.machine}
    return requirement.marker is None or requirement.marker.evaluate(marker)


def _modules(name: str, tree: Path, metadata: SourceMetadata) -> list[tuple[str, str, bool]]:
    """Modules of the package with their origin, and whether the origin names them."""
    own = canonicalize_name(name).replace("-", "_")
    listed: list[tuple[str, str, bool]] = []
    for place in sorted(tree.glob("*.egg-info/top_level.txt")) + sorted(tree.glob("src/*.egg-info/top_level.txt")):
        lines = enumerate(place.read_text(errors="replace").split(), 1)
        listed += [(line.partition("/")[0], f"{place.relative_to(tree)}:{number}", True) for number, line in lines]
    tool: Any = metadata.table("tool", "maturin").get("module-name")
    if isinstance(tool, str):
        listed.append((tool.partition(".")[0], metadata.line("module-name"), True))
    packages: Any = metadata.table("tool", "scikit-build", "wheel").get("packages", [])
    listed += [(PurePosixPath(package).name, metadata.line(package), True) for package in packages if isinstance(package, str)]
    if not listed:
        for folder in (".", "src", "lib", "python"):
            places = sorted((tree / folder).glob("*/__init__.py")) if (tree / folder).is_dir() else []
            listed += [
                (place.parent.name, str(place.relative_to(tree)), True)
                for place in places
                if place.parent.name not in _NOT_ITS_OWN and place.parent.name.isidentifier()
            ]
    near = [entry for entry in listed if entry[0] in own or own in entry[0]]
    chosen = list({entry[0]: entry for entry in near or listed}.values())
    if chosen:
        return chosen
    guess = re.sub(r"_(?:py|rs)$|^py_?", "", own) if metadata.backend.value == "maturin" else own
    return [(guess, "the distribution's name", False)]


def _missing(draft: Draft, tree: Path, script: BuildScript) -> None:
    """Parts that the source should have and does not: submodules, folders of headers."""
    gitmodules = tree / ".gitmodules"
    if gitmodules.is_file():
        for number, line in enumerate(gitmodules.read_text(errors="replace").splitlines(), 1):
            key, _, path = (part.strip() for part in line.partition("="))
            if (key == "path" and not (tree / path).is_dir()) or (key == "path" and not any((tree / path).iterdir())):
                draft.findings.warnings.append(f"submodule {path} is not in the source (.gitmodules:{number})")
    for text, place in _third_party(tree, script):
        draft.findings.warnings.append(f"{place} names {text}, but the source does not contain it")
    for extension in script.extensions():
        for folder in extension.includes:
            if not (tree / folder).is_dir():
                draft.findings.warnings.append(
                    f"{extension.place} takes headers from {folder}, but the source does not contain this folder"
                )
