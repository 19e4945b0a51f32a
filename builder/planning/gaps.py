"""Digests that were not known where a recipe or stack was written: named there, refused by a build, filled in by a lock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from builder.planning.plan import Plan
from builder.planning.recipe import LoadedRecipe
from builder.planning.stack import LoadedStack
from gracefarm.errors import ConfigError


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


def of_images(stack: LoadedStack) -> list[Gap]:
    """The gaps of the stack's container images, which builds in a container alone stand on."""
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
        if image.sha256_unknown is not None
    ]


def of_plan(plan: Plan) -> list[Gap]:
    """What a build of the plan lacks."""
    wanted = f"container.{plan.target.value}"
    images = [gap for gap in of_images(plan.stack) if plan.toolchain.in_image and ".".join(gap.table) == wanted]
    # An environment of somebody's own is taken as it is: nothing of the stack's lock is fetched.
    locked = of_stack(plan.stack) if plan.toolchain.locked(plan.stack) is not None else []
    return [*of_recipe(plan.recipe), *locked, *images]


def require_none(plan: Plan) -> None:
    """Refuse to build while a digest is missing.

    Raises:
        ConfigError: one is; names the address, the hosts, the command that fills it in and the setting for a mirror.
    """
    recipe, stack, missing = plan.recipe, plan.stack, of_plan(plan)
    if not missing:
        return
    prefixes = sorted({f"{urlsplit(gap.url).scheme}://{urlsplit(gap.url).netloc}/" for gap in missing})
    lock = f"builder lock {recipe.key}"
    if stack.folder.name != recipe.data.stack:
        lock += f" --stack {stack.folder.name}"
    if plan.toolchain.in_image:
        lock += f" --toolchain {plan.toolchain.kind}"
    count = "1 digest is" if len(missing) == 1 else f"{len(missing)} digests are"
    raise ConfigError(
        f"{recipe.key} on stack {stack.data.name} cannot be built: {count} not known yet, the first that of {missing[0].url}",
        remedy=f"run `{lock}` on a machine that reaches {', '.join(prefixes)}, or name mirrors that this "
        f"one reaches: GRACEFARM_MIRRORS='{' '.join(f'{prefix}=REPLACEMENT' for prefix in prefixes)}'",
        repeat=lock,
    )
