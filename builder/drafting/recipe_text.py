"""The files of a new recipe: recipe.toml with the origin of each value, NOTES.md, smoke.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from builder.drafting.reading import Draft
from builder.planning.sources import GitSource, SdistSource


def recipe_toml(
    draft: Draft, version: str, summary: str, licence: str, texts: list[str], source: SdistSource | GitSource
) -> str:
    """The text of recipe.toml; guessed values are marked."""
    lines = [
        f"name = {_text(draft.name)}",
        f"version = {_text(version)}",
        f"summary = {_text(summary)}",
        *draft.findings.comments("license"),
        f"license = {_text(licence)}",
        f"stack = {_text(draft.stack)}",
        "",
        *_source(source, {"name": draft.name, "version": version}),
        "",
        *_build(draft),
        *_wheel(draft, texts),
        "[smoke]",
        *draft.findings.comments("smoke.imports"),
        f"imports = {_list(draft.imports)}",
    ]
    for path, find, replace in draft.substitutions:
        lines += ["", "[[substitutions]]"]
        lines += [f"# {finding.sentence}" for finding in draft.findings.of("substitutions") if finding.value.startswith(find)]
        lines += [f"path = {_text(path)}", f"find = {_text(json.dumps(find))}", f"replace = {_text(json.dumps(replace))}"]
    return "\n".join(lines) + "\n"


def _source(source: SdistSource | GitSource, recipe: Mapping[str, str]) -> Iterator[str]:
    """The table of the source. Keys that repeat a value of the recipe are left out."""
    yield "[source]"
    yield f"kind = {_text(source.kind)}"
    if isinstance(source, SdistSource):
        own = {"name": source.name, "version": source.version}
        yield from (f"{key} = {_text(value)}" for key, value in own.items() if value != recipe[key])
        yield f"sha256 = {_text(source.sha256 or '')}"
        return
    yield f"url = {_text(source.url)}"
    yield f"commit = {_text(source.commit)}"
    if source.tree is not None:
        yield f"tree = {_text(source.tree)}"
    for path, module in source.submodules.items():
        yield f"\n[source.submodules.{_text(path)}]"
        yield f"url = {_text(module.url)}"
        yield f"commit = {_text(module.commit)}"
        if module.license:
            yield f"license = {_text(module.license)}"


def _build(draft: Draft) -> Iterator[str]:
    yield "[build]"
    if draft.requires:
        yield from draft.findings.comments("build.requires")
        yield f"requires = {_list(draft.requires)}"
    if draft.environment:
        yield from draft.findings.comments("build.environment")
        pairs = ", ".join(f"{name} = {_text(value)}" for name, value in draft.environment.items())
        yield f"environment = {{ {pairs} }}"
    yield from draft.findings.comments("build.cuda")
    if not draft.cuda:
        yield "cuda = false"
    if draft.rust:
        yield from draft.findings.comments("build.rust")
        yield "rust = true"
    yield from draft.findings.comments("build.memory_per_job")
    yield f"memory_per_job = {_text(draft.memory)}"
    yield ""


def _wheel(draft: Draft, texts: list[str]) -> Iterator[str]:
    if not (draft.sm_extra or texts):
        return
    yield "[wheel]"
    if draft.sm_extra:
        yield from draft.findings.comments("wheel.sm_extra")
        yield f"sm_extra = {{ {', '.join(f'{_text(glob)} = {_list(sm)}' for glob, sm in draft.sm_extra.items())} }}"
    if texts:
        yield from draft.findings.comments("wheel.licenses")
        yield f"licenses = {_list(texts)}"
    yield ""


def notes(draft: Draft, version: str, command: str) -> str:
    """NOTES.md: what is set and why, what the build script reads besides, what a person has to look at."""
    set_here = [finding for finding in draft.findings.values if finding.key != "variable"]
    lines = [f"# {draft.name}", "", f"Drafted by `{command}` from {draft.name} {version}. Each guess has to be checked.", ""]
    lines += [f"- `{finding.key}` {finding.value}: {finding.sentence}." for finding in set_here]
    if draft.findings.warnings:
        lines += ["", "## To look at", ""]
        lines += [f"- {warning}." for warning in draft.findings.warnings]
    variables = draft.findings.of("variable")
    if variables:
        lines += ["", "## Environment variables that the build script reads", ""]
        lines += [f"- `{finding.value}`, {finding.origin}" for finding in variables]
    return "\n".join(lines) + "\n"


def smoke(draft: Draft) -> str:
    """The text of smoke.py, with tests that fit every package. A person adds tests that a broken wheel fails."""
    lines = [f'"""The extension modules of {draft.name} are there. Add a computation whose result is known."""', ""]
    if not draft.compiled:
        lines += ["from importlib.metadata import files", ""]
        lines += [f'compiled = [str(file) for file in files({_text(draft.name)}) or () if file.suffix == ".so"]']
        lines += ['assert compiled, "the wheel has no extension module"', 'print("compiled:", *compiled)']
        return "\n".join(lines) + "\n"
    imports = ["torch", *draft.compiled] if "torch" in draft.imports else draft.compiled
    lines += ["from importlib import import_module", "", f"for name in {_list(imports)}:", "    module = import_module(name)"]
    lines += [f"    if name in {_list(draft.compiled)}:"]
    lines += ['        assert module.__file__.endswith(".so"), module.__file__', '        print(name, "is", module.__file__)']
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """A TOML and Python string; TOML has JSON's escapes."""
    return json.dumps(value, ensure_ascii=False)


def _list(values: list[str]) -> str:
    return f"[{', '.join(map(_text, values))}]"
