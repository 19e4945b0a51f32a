"""Fill in digests that were unknown when a recipe or stack was written: for a lock, or at first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import tomlkit

from builder.fetch import own_index, registry, sdist, unpinned
from builder.fetch.urls import shown
from builder.planning.gaps import Gap
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.planning.tags import tags
from gracefarm.console import Tick, no_tick
from gracefarm.errors import DigestError, GracefarmError
from gracefarm.files import atomic_write

_SDIST = "pkg:pypi/"


@dataclass(frozen=True, kw_only=True)
class Filled:
    """The result for each gap."""

    digests: tuple[tuple[Gap, str], ...]
    "Each digest that could be read, with its gap."
    failed: tuple[GracefarmError, ...]
    "One for each remaining gap, with the URL and the setting for a mirror."


def fill(
    missing: Sequence[Gap], stack: LoadedStack, settings: Settings, tick: Tick = no_tick, accepted: date | None = None
) -> Filled:
    """Read each missing digest and write it into its file. Comments and layout are kept. A failure does not stop the others.

    `accepted`: the day of a first use, which is written next to each digest. In that case every file is read completely, and
    a file is refused if its index lists another digest.
    """
    filled, failed = [], []
    for number, gap in enumerate(missing):
        tick(number, len(missing), gap.url)
        try:
            sha256 = _digest(gap, stack, settings, whole=accepted is not None)
        except GracefarmError as error:
            failed.append(error)
            continue
        write(gap, sha256, accepted)
        filled.append((gap, sha256))
    return Filled(digests=tuple(filled), failed=tuple(failed))


def _digest(gap: Gap, stack: LoadedStack, settings: Settings, *, whole: bool) -> str:
    if gap.table == ("files",):
        return unpinned.bring(gap.url, gap.what, settings)
    if gap.table == ("source",):
        return _source_digest(gap, settings, whole=whole)
    if not gap.entry:
        return registry.digest(stack.data.container[Arch(gap.table[-1])], settings)
    wheel = next(
        wheel for wheel in stack.data.environment.wheels if gap.entry.items() <= wheel.model_dump(mode="json").items()
    )
    fitting = tags(stack, wheel.arch)
    filename, url, sha256 = own_index.find_wheel(wheel.name, wheel.version, fitting, wheel.index, settings)
    return _of_index(filename, url, sha256, wheel.index, settings, whole=whole)


def _source_digest(gap: Gap, settings: Settings, *, whole: bool) -> str:
    if not gap.url.startswith(_SDIST):
        return unpinned.bring(gap.url, gap.what, settings)
    name, version = gap.url.removeprefix(_SDIST).split("@")
    filename, url, sha256, index = sdist.find(name, version, settings)
    return _of_index(filename, url, sha256, index, settings, whole=whole)


def _of_index(filename: str, url: str, sha256: str | None, index: str, settings: Settings, *, whole: bool) -> str:
    """The digest that the index lists. With `whole`, or if it lists none: the digest of the file, which must not differ."""
    if sha256 is not None and not whole:
        return sha256
    read = unpinned.bring(url, filename, settings)
    if sha256 not in (None, read):
        raise DigestError(
            f"{filename}: the file at {shown(url)} has sha256 {read}, but the index {shown(index)} lists {sha256}",
            remedy="find out which of the two digests is right, and write it into the recipe or stack by hand; nothing "
            "was written",
        )
    return read


def write(gap: Gap, sha256: str, accepted: date | None = None) -> None:
    """Write the digest in place of the gap, with the day of acceptance if it was accepted at first use."""
    document = tomlkit.parse(gap.file.read_text())
    table: Any = document
    for name in gap.table:
        table = table[name]
    body = (next(entry for entry in table if gap.entry.items() <= entry.items()) if gap.entry else table).value.body
    for index, (key, value) in enumerate(body):
        if key is not None and key.key == "sha256_unknown":
            item = tomlkit.string(sha256)
            item.trivia.comment_ws, item.trivia.comment = value.trivia.comment_ws, value.trivia.comment
            body[index] = (tomlkit.key("sha256"), item)
            if accepted is not None:
                first_use = tomlkit.inline_table()
                first_use.update({"date": accepted, "url": gap.url})
                body.insert(index + 1, (tomlkit.key("accepted"), first_use))
            break
    atomic_write(gap.file, document.as_string())
