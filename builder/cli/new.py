"""`builder new`: write a recipe for a package, read from its source."""

from __future__ import annotations

import tomllib
from pathlib import Path
from uuid import uuid4

import click
from packaging.utils import canonicalize_name

from builder.cli.lock import build_lock
from builder.cli.options import stack_of, start
from builder.drafting import licence, metadata, reading, recipe_text, sources
from builder.drafting.findings import Findings
from builder.drafting.reading import Draft, StackFacts
from builder.planning import licences, pins
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.settings import Settings
from builder.planning.sources import GitSource, SdistSource
from builder.planning.stack import Arch, LoadedStack
from builder.upkeep.clean import FETCHED
from gracefarm.cli import json_option
from gracefarm.console import Console
from gracefarm.errors import UsageError
from gracefarm.files import atomic_directory, lock, remove_tree


@click.command("new")
@click.argument("name")
@click.option(
    "--version",
    metavar="V",
    help="Version of the package. Default: the newest release on the Python index. With --git: the version in pyproject.toml.",
)
@click.option(
    "--stack",
    "stack_name",
    metavar="NAME",
    default="cu130",
    show_default=True,
    help="Stack (a folder in stacks/) to build against. A stack pins torch, CUDA, Python and compilers.",
)
@click.option("--git", "url", metavar="URL", help="Take the source from this git repository. Requires --commit.")
@click.option("--commit", metavar="ID", help="With --git: full id of the commit.")
@json_option
def new_command(name: str, version: str | None, stack_name: str, url: str | None, commit: str | None) -> None:
    """Write a recipe for the package NAME into recipes/NAME.

    A recipe (a folder in recipes/) describes how to build one package. The command downloads the source of the package. By
    default, this is the source archive (sdist) on the Python index. Then the command writes recipe.toml, NOTES.md, smoke.py
    (a test script), and a lock file of the packages that the build requires. For each value in recipe.toml, the command
    prints where in the source it found the value, or why the value is a guess. The command executes no code of the package.

    \b
    # Write a recipe for the newest release of xformers.
    builder new xformers
    # Write a recipe for natten 0.21.7.
    builder new natten --version 0.21.7
    # Write a recipe for a commit of a git repository.
    builder new pyg-lib --git https://example.org/pyg-lib --commit COMMIT
    """
    settings, console = start(writes=True)
    if (url is None) != (commit is None):
        raise UsageError(
            "--git and --commit require each other",
            remedy="give both: --git URL --commit COMMIT, with the full id of a commit",
        )
    key = canonicalize_name(name).replace("-", "_")
    folder = settings.project / "recipes" / key
    command = _command(name, version, stack_name, url, commit)
    _refuse_existing(folder)
    base = stack_of(stack_name, None, settings)
    with lock(settings.home / "locks" / f"new-{key}"):
        with console.progress("fetch") as tick:
            if url is None or commit is None:
                pinned: sources.PinnedSource
                pinned, title = sources.of_index(name, version, settings)
            else:
                pinned, title = sources.of_git(url, commit, settings, tick), url
            tree = settings.home / FETCHED / f"new-{uuid4().hex[:12]}"
            tree.parent.mkdir(parents=True, exist_ok=True)
            try:
                sources.unpack(pinned, name, tree, settings, tick)
                files, draft = _files(name, version, pinned, title, tree, base, command)
            finally:
                remove_tree(tree)
        _lock(folder, files, base, settings, console)
        _refuse_existing(folder)
        with atomic_directory(folder) as partial:
            for file, text in files.items():
                (partial / file).write_text(text)
    _tell(draft, folder, console)


def _command(name: str, version: str | None, stack: str, url: str | None, commit: str | None) -> str:
    options = {"--version": version, "--stack": stack if stack != "cu130" else None, "--git": url, "--commit": commit}
    return " ".join(["builder new", name, *(f"{option} {value}" for option, value in options.items() if value)])


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UsageError(
            f"{folder} already exists, and `builder new` does not overwrite recipes",
            remedy="remove the folder; or create a different project with `builder init DIR`, and repeat the command there",
        )


def _files(
    name: str, version: str | None, pinned: sources.PinnedSource, title: str, tree: Path, base: LoadedStack, command: str
) -> tuple[dict[str, str], Draft]:
    """The texts of the recipe, by file."""
    known = metadata.read(tree)
    installed = {wheel.name: wheel.version for wheel in pins.wheels(base, Arch.AARCH64)}
    ground = StackFacts(name=base.data.name, python=base.python, installed=installed)
    draft = reading.draft(tree, name, known, ground)
    findings = Findings(warnings=draft.findings.warnings)
    if isinstance(pinned, SdistSource):
        number = pinned.version
        findings.read("source", f"{title}, sha256 {pinned.sha256}", "the Python index")
    else:
        number = version or _own_version(known, name)
        findings.read("source", f"commit {pinned.commit}, tree {pinned.tree}", title)
        for path, module in pinned.submodules.items():
            findings.read("source.submodules", f"{path}, commit {module.commit}", f"the tree of {title} and its .gitmodules")
    spdx = licence.find(tree, known, findings)
    if texts := licence.vendored(tree):
        findings.guess(
            "wheel.licenses",
            ", ".join(texts),
            "the source contains code of other projects, which may be compiled into the wheel",
        )
    draft.findings = Findings(values=[*findings.values, *draft.findings.values], warnings=findings.warnings)
    if not licences.redistributable(spdx):
        findings.warnings.append(f"licence {spdx} does not allow redistribution, so the wheel is not published by default")
    if isinstance(pinned, GitSource):
        pinned = _with_licences(pinned, tree)
    summary = known.first("Summary")
    text = summary.value if summary else str(known.table("project").get("description", ""))
    files = {
        "recipe.toml": recipe_text.recipe_toml(draft, number, text, spdx, texts, pinned),
        "NOTES.md": recipe_text.notes(draft, number, command),
        "smoke.py": recipe_text.smoke(draft),
    }
    return files, draft


def _own_version(known: metadata.SourceMetadata, name: str) -> str:
    version = known.table("project").get("version")
    if not isinstance(version, str):
        raise UsageError(
            f"pyproject.toml in the source of {name} contains no version", remedy="give the version with --version V"
        )
    return version


def _with_licences(pinned: GitSource, tree: Path) -> GitSource:
    modules = {
        path: module.model_copy(update={"license": licence.of_folder(tree / path)})
        for path, module in pinned.submodules.items()
    }
    return pinned.model_copy(update={"submodules": modules})


def _lock(folder: Path, files: dict[str, str], base: LoadedStack, settings: Settings, console: Console) -> None:
    """Add the lock of what the recipe needs to build.

    Raises:
        ConfigError: there are no wheels that fit.
    """
    data = Recipe.model_validate(tomllib.loads(files["recipe.toml"]))
    if not data.build.requires:
        return
    loaded = LoadedRecipe(folder=folder, data=data, patches=(), smoke_script=None)
    files["requirements.lock"] = build_lock(loaded, base, settings, console)


def _tell(draft: Draft, folder: Path, console: Console) -> None:
    rows = [
        {"key": finding.key, "value": finding.value, "read": finding.read, "origin": finding.origin}
        for finding in draft.findings.values
    ]
    width = max(len(finding.key) for finding in draft.findings.values)
    lines = [
        f"{'read ' if finding.read else 'guess'}  {finding.key:{width}}  {finding.value}  ({finding.origin})"
        for finding in draft.findings.values
    ]
    lines += [f"look at  {warning}" for warning in draft.findings.warnings]
    lines += [f"wrote {folder}; next: builder plan {folder.name}"]
    value = {"recipe": folder.name, "folder": str(folder), "values": rows, "warnings": draft.findings.warnings}
    console.result(value, "\n".join(lines))
