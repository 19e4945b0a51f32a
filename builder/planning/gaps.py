"""Gaps: digests that were unknown when a recipe or stack was written; and evidence for known digests.

The recipe or stack names a gap, a build refuses it, and a lock or a first use fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from builder.planning.digests import DigestFields, FirstUse, Witness
from builder.planning.recipe import LoadedRecipe
from builder.planning.sources import GitSource
from builder.planning.stack import Arch, LoadedStack

_SOURCE = "source"
"The name of a recipe's source in messages."


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One unknown digest."""

    file: Path
    "The TOML file that has the gap."
    table: tuple[str, ...]
    "The array of tables in that file."
    entry: Mapping[str, str]
    "Keys that identify the table in the array; empty: it is a single table."
    what: str
    url: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence for one known digest."""

    what: str
    sha256: str
    first_use: FirstUse | None
    "None: the digest was not read at first use."
    witnesses: tuple[Witness, ...]

    @property
    def confirmed(self) -> bool:
        """Whether the digest was pinned by a person, or a source other than the file's server has the same digest."""
        return bool(self.witnesses) or self.first_use is None

    @property
    def sentence(self) -> str:
        """The evidence in words."""
        if self.witnesses:
            return f"confirmed by {', '.join(witness.source for witness in self.witnesses)}"
        assert self.first_use is not None
        return f"read at first use on {self.first_use.date} from {self.first_use.url}, not confirmed"


def evidence(recipe: LoadedRecipe, stack: LoadedStack, target: Arch) -> list[Evidence]:
    """The digests of a recipe, and of a stack for a target, that have witnesses or were accepted at first use."""
    data = stack.data
    source = recipe.data.source
    downloads: list[tuple[str, DigestFields]] = [
        *([] if isinstance(source, GitSource) else [(_SOURCE, source)]),
        *((file.path, file) for file in recipe.data.files),
        *((wheel.title, wheel) for wheel in data.environment.wheels if wheel.arch == target),
        *((f"image {image.name}:{image.tag}", image) for arch, image in data.container.items() if arch == target),
    ]
    return [
        Evidence(what=what, sha256=pinned.sha256, first_use=pinned.accepted, witnesses=pinned.witness)
        for what, pinned in downloads
        if pinned.sha256 and (pinned.accepted or pinned.witness)
    ]


def of_recipe(recipe: LoadedRecipe) -> list[Gap]:
    """The gaps of the recipe."""
    place, source = recipe.folder / "recipe.toml", recipe.data.source
    own = []
    if not isinstance(source, GitSource) and source.sha256_unknown is not None:
        own = [Gap(file=place, table=("source",), entry={}, what=_SOURCE, url=source.origin, reason=source.sha256_unknown)]
    return own + [
        Gap(
            file=place,
            table=("files",),
            entry={"url": file.url, "path": file.path},
            what=file.path,
            url=file.url,
            reason=file.sha256_unknown,
        )
        for file in recipe.data.files
        if file.sha256_unknown is not None and file.url is not None
    ]


def of_stack(stack: LoadedStack) -> list[Gap]:
    """The gaps of the stack in the distributions that the recipe uses."""
    place, table = stack.folder / "stack.toml", ("environment", "wheels")
    return [
        Gap(
            file=place,
            table=table,
            entry={"name": wheel.name, "version": wheel.version, "arch": wheel.arch.value},
            what=wheel.title,
            url=wheel.index,
            reason=wheel.sha256_unknown,
        )
        for wheel in stack.data.environment.wheels
        if wheel.sha256_unknown is not None and stack.takes(canonicalize_name(wheel.name))
    ]


def of_images(stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
    """The gaps of the stack's container images, which only builds in a container use; for one target, or for all."""
    place = stack.folder / "stack.toml"
    return [
        Gap(
            file=place,
            table=("container", arch.value),
            entry={},
            what=f"image {image.name}:{image.tag}",
            url=image.manifest,
            reason=image.sha256_unknown,
        )
        for arch, image in stack.data.container.items()
        if image.sha256_unknown is not None and target in (None, arch)
    ]
