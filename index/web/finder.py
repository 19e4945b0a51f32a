"""The finder of the right wheel: what wheels differ in, and what can be chosen of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.utils import parse_wheel_filename

from index.simple_api.listings import Listed

FINDER = ("cuda", "torch", "python", "sm", "platform")
"What the wheel finder asks for, in this order."


@dataclass(frozen=True, kw_only=True)
class WheelChoice:
    """One wheel and what the finder sorts it by."""

    file: Listed
    python: str
    platform: str

    def value(self, key: str) -> tuple[str, ...]:
        """What this wheel is, under one of FINDER's names."""
        if key == "sm":
            return self.file.facts.sm
        value = {
            "cuda": self.file.facts.cuda,
            "torch": self.file.facts.torch,
            "python": self.python,
            "platform": self.platform,
        }[key]
        return (value,) if value else ()


def choice_of(item: Listed) -> WheelChoice:
    """What the finder sorts this file by."""
    if item.kind != "bdist_wheel":
        return WheelChoice(file=item, python="source", platform="any")
    tags = parse_wheel_filename(item.filename)[3]
    abi3 = any(tag.abi == "abi3" for tag in tags)
    python = min(tag.interpreter for tag in tags)
    arches = {re.sub(r"^(manylinux(_\d+_\d+|\d+)|musllinux_\d+_\d+|linux|macosx_\d+_\d+)_", "", tag.platform) for tag in tags}
    return WheelChoice(file=item, python=f"{python}+" if abi3 else python, platform=min(arches))


def options(choices: Sequence[WheelChoice], key: str) -> list[str]:
    """What can be chosen, in a natural order."""
    return sorted({value for choice in choices for value in choice.value(key)}, key=natural_order)


def natural_order(text: str) -> list[object]:
    """Sorts 12.4 before 12.10, and cp39 before cp310."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", text))]
