"""Fill in the digests that were not known where a recipe or stack was written: for `builder lock` alone, never for a build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomlkit

from builder.fetch import own_index, registry, unpinned
from builder.planning import gaps
from builder.planning.gaps import Gap
from builder.planning.recipe import LoadedRecipe
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.planning.tags import tags
from gracefarm.console import Tick, no_tick
from gracefarm.errors import GracefarmError
from gracefarm.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What became of each gap."""

    digests: tuple[tuple[Gap, str], ...]
    "Each that could be read, with its gap."
    failed: tuple[GracefarmError, ...]
    "One for each gap that is still there; names its address and the setting of a mirror."


def fill(
    recipe: LoadedRecipe | None, stack: LoadedStack, others: Sequence[Gap], settings: Settings, tick: Tick = no_tick
) -> Filled:
    """Read each missing digest and write it into its file, comments and layout kept; one that cannot be had stops no other.

    `others`: those of one toolchain, which are read last.
    """
    filled, failed = [], []
    missing = [*(gaps.of_recipe(recipe) if recipe else ()), *gaps.of_stack(stack), *others]
    for number, gap in enumerate(missing):
        tick(number, len(missing), gap.url)
        try:
            sha256 = _digest(gap, stack, settings)
        except GracefarmError as error:
            failed.append(error)
            continue
        write(gap, sha256)
        filled.append((gap, sha256))
    return Filled(digests=tuple(filled), failed=tuple(failed))


def _digest(gap: Gap, stack: LoadedStack, settings: Settings) -> str:
    if gap.table == ("files",):
        return unpinned.bring(gap.url, gap.what, settings)
    if gap.number is None:
        return registry.digest(stack.data.container[Arch(gap.table[-1])], settings)
    wheel = stack.data.environment.wheels[gap.number]
    fitting = tags(stack, wheel.arch)
    filename, url, sha256 = own_index.find_wheel(wheel.name, wheel.version, fitting, wheel.index, settings)
    return sha256 or unpinned.bring(url, filename, settings)


def write(gap: Gap, sha256: str) -> None:
    """Put the digest where the gap was named."""
    document = tomlkit.parse(gap.file.read_text())
    table: Any = document
    for name in gap.table:
        table = table[name]
    body = (table if gap.number is None else table[gap.number]).value.body
    for index, (key, value) in enumerate(body):
        if key is not None and key.key == "sha256_unknown":
            item = tomlkit.string(sha256)
            item.trivia.comment_ws, item.trivia.comment = value.trivia.comment_ws, value.trivia.comment
            body[index] = (tomlkit.key("sha256"), item)
    atomic_write(gap.file, document.as_string())
