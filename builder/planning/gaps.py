"""Digests that were not known where a recipe or stack was written: named there, refused by a build, filled in by a lock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from builder.fetch.urls import manifest
from builder.ground import environment
from builder.planning.plan import Plan
from builder.planning.recipe import LoadedRecipe
from builder.planning.stack import Arch, LoadedStack
from gracefarm.console import Tick, no_tick
from gracefarm.errors import ConfigError, GracefarmError
from gracefarm.files import atomic_write
from gracefarm.settings import Settings


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
    return [
        Gap(
            file=recipe.folder / "recipe.toml",
            table=("files",),
            number=number,
            what=one.path,
            url=one.url or "",
            reason=one.sha256_unknown,
        )
        for number, one in enumerate(recipe.data.files)
        if one.sha256_unknown is not None
    ]


def of_stack(stack: LoadedStack) -> list[Gap]:
    """The stack's gaps."""
    return [
        Gap(
            file=stack.folder / "stack.toml",
            table=("environment", "wheels"),
            number=number,
            what=f"{one.name} {one.version} for {one.arch}",
            url=one.index,
            reason=one.sha256_unknown,
        )
        for number, one in enumerate(stack.data.environment.wheels)
        if one.sha256_unknown is not None
    ]


def of_images(stack: LoadedStack) -> list[Gap]:
    """The gaps of the stack's container images, which builds in a container alone stand on."""
    return [
        Gap(
            file=stack.folder / "stack.toml",
            table=("container", arch.value),
            number=None,
            what=f"image {one.name}:{one.tag}",
            url=manifest(one.name, one.tag),
            reason=one.sha256_unknown,
        )
        for arch, one in stack.data.container.items()
        if one.sha256_unknown is not None
    ]


def of_plan(plan: Plan) -> list[Gap]:
    """What a build of the plan lacks."""
    wanted = f"container.{plan.target.value}"
    images = [one for one in of_images(plan.stack) if plan.contained and ".".join(one.table) == wanted]
    # An environment of somebody's own is taken as it is: nothing of the stack's lock is fetched.
    locked = of_stack(plan.stack) if plan.machine is None or plan.machine.locked else []
    return [*of_recipe(plan.recipe), *locked, *images]


def require_none(plan: Plan) -> None:
    """Refuse to build while a digest is missing.

    Raises:
        ConfigError: one is; names the address, the hosts, the command that fills it in and the setting for a mirror.
    """
    recipe, stack, found = plan.recipe, plan.stack, of_plan(plan)
    if not found:
        return
    prefixes = sorted({f"{urlsplit(one.url).scheme}://{urlsplit(one.url).netloc}/" for one in found})
    lock = f"builder lock {recipe.key}"
    if stack.folder.name != recipe.data.stack:
        lock += f" --stack {stack.folder.name}"
    if plan.contained:
        lock += " --toolchain container"
    count = "1 digest is" if len(found) == 1 else f"{len(found)} digests are"
    raise ConfigError(
        f"{recipe.key} on stack {stack.data.name} cannot be built: {count} not known yet, the first that of {found[0].url}",
        remedy=f"run `{lock}` on a machine that reaches {', '.join(prefixes)}, or name mirrors that this "
        f"one reaches: GRACEFARM_MIRRORS='{' '.join(f'{one}=REPLACEMENT' for one in prefixes)}'",
        repeat=lock,
    )


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What became of each gap."""

    done: tuple[tuple[Gap, str], ...]
    "With the digest that was read."
    failed: tuple[GracefarmError, ...]
    "One for each gap that is still there; names its address and the setting of a mirror."


def fill(
    recipe: LoadedRecipe | None, stack: LoadedStack, settings: Settings, tick: Tick = no_tick, *, images: bool = False
) -> Filled:
    """Read each missing digest and write it into its file, comments and layout kept; one that cannot be had stops no other.

    Those of container images are read last, and where `images` asks for it: no other toolchain needs them.
    """
    done, failed = [], []
    found = [*(of_recipe(recipe) if recipe else ()), *of_stack(stack), *(of_images(stack) if images else ())]
    for number, gap in enumerate(found):
        tick(number, len(found), gap.url)
        try:
            sha256 = _digest(gap, stack, settings)
        except GracefarmError as error:
            failed.append(error)
            continue
        write(gap, sha256)
        done.append((gap, sha256))
    return Filled(done=tuple(done), failed=tuple(failed))


def _digest(gap: Gap, stack: LoadedStack, settings: Settings) -> str:
    from builder.fetch import unpinned  # which loads an HTTP client

    if gap.table == ("files",):
        return unpinned.bring(gap.url, gap.what, settings)
    if gap.number is None:
        from builder.fetch import registry

        image = stack.data.container[Arch(gap.table[-1])]
        return registry.digest(image.name, image.tag, settings)
    from builder.fetch import own_index

    one = stack.data.environment.wheels[gap.number]
    filename, url, sha256 = own_index.find_wheel(one.name, one.version, environment.tags(stack, one.arch), one.index, settings)
    return sha256 or unpinned.bring(url, filename, settings)


def write(gap: Gap, sha256: str) -> None:
    """Put the digest where the gap was named."""
    import tomlkit  # which an existing build need not wait for

    document = tomlkit.parse(gap.file.read_text())
    found: Any = document
    for name in gap.table:
        found = found[name]
    body = (found if gap.number is None else found[gap.number]).value.body
    for index, (key, value) in enumerate(body):
        if key is not None and key.key == "sha256_unknown":
            item = tomlkit.string(sha256)
            item.trivia.comment_ws, item.trivia.comment = value.trivia.comment_ws, value.trivia.comment
            body[index] = (tomlkit.key("sha256"), item)
    atomic_write(gap.file, document.as_string())
