"""Digests that were not known where a recipe or stack was written, and what speaks for those that are known.

A gap is named there, refused by a build, and filled in by a lock or at first use.
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
"The name of a recipe's source for people."


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One digest that is not known yet."""

    file: Path
    "The TOML file that says so."
    table: tuple[str, ...]
    "The array of tables in it."
    entry: Mapping[str, str]
    "What only that one of the tables says; empty: it is one table."
    what: str
    url: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks for one known digest."""

    what: str
    sha256: str
    first_use: FirstUse | None
    "None: it was not read at first use."
    witnesses: tuple[Witness, ...]

    @property
    def confirmed(self) -> bool:
        """Somebody beside the place that the file comes from says the same."""
        return bool(self.witnesses) or self.first_use is None

    @property
    def sentence(self) -> str:
        """For people."""
        if self.witnesses:
            return f"confirmed by {', '.join(witness.source for witness in self.witnesses)}"
        assert self.first_use is not None
        return f"first use on {self.first_use.date} from {self.first_use.url}, not confirmed"


def evidence(recipe: LoadedRecipe, stack: LoadedStack, target: Arch) -> list[Evidence]:
    """Of the digests of a recipe and of what a stack has for a target, those about which something is written."""
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
    """The recipe's own gaps."""
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
    """The gaps of the stack, as far as the recipe takes it."""
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
    """The gaps of the stack's container images, which builds in a container alone stand on; of one target, or of all."""
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
