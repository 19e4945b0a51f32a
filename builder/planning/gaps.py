"""Digests that were not known where a recipe or stack was written: named there, refused by a build, filled in by a lock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.planning.recipe import LoadedRecipe
from builder.planning.stack import Arch, LoadedStack


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One digest that is not known yet."""

    file: Path
    "The TOML file that says so."
    table: tuple[str, ...]
    "The array of tables in it."
    number: int | None
    "Which of the tables, from 0; None: it is one table."
    what: str
    url: str
    reason: str


def of_recipe(recipe: LoadedRecipe) -> list[Gap]:
    """The recipe's own gaps."""
    place = recipe.folder / "recipe.toml"
    return [
        Gap(file=place, table=("files",), number=number, what=file.path, url=file.url or "", reason=file.sha256_unknown)
        for number, file in enumerate(recipe.data.files)
        if file.sha256_unknown is not None
    ]


def of_stack(stack: LoadedStack) -> list[Gap]:
    """The stack's gaps."""
    place, table = stack.folder / "stack.toml", ("environment", "wheels")
    return [
        Gap(file=place, table=table, number=number, what=wheel.title, url=wheel.index, reason=wheel.sha256_unknown)
        for number, wheel in enumerate(stack.data.environment.wheels)
        if wheel.sha256_unknown is not None
    ]


def of_images(stack: LoadedStack, target: Arch | None = None) -> list[Gap]:
    """The gaps of the stack's container images, which builds in a container alone stand on; of one target, or of all."""
    place = stack.folder / "stack.toml"
    return [
        Gap(
            file=place,
            table=("container", arch.value),
            number=None,
            what=f"image {image.name}:{image.tag}",
            url=image.manifest,
            reason=image.sha256_unknown,
        )
        for arch, image in stack.data.container.items()
        if image.sha256_unknown is not None and target in (None, arch)
    ]
