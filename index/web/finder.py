"""The finder of the right wheel: what wheels differ in, and what can be chosen of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag

from gracefarm.pythons import serves
from gracefarm.variants import split_label
from index.names import wheel_tags
from index.simple_api.listings import Listed

FINDER = ("cuda", "torch", "python", "sm", "platform")
"What the wheel finder asks for, in this order."

_MINORS = range(8, 16)
PYTHONS = (*(f"3.{minor}" for minor in _MINORS), *(f"3.{minor}t" for minor in _MINORS if minor >= 13))
"What a wheel can be asked for; the free-threaded ones have a t."

_INTERPRETER = re.compile(r"([a-z]+)(\d)(\d*)\Z")
_PLATFORM = re.compile(r"^(manylinux(_\d+_\d+|\d+)|musllinux_\d+_\d+|linux|macosx_\d+_\d+)_")
_NAMES = {"pp": "PyPy", "graalpy": "GraalPy"}


@dataclass(frozen=True, kw_only=True)
class WheelChoice:
    """One wheel and what the finder sorts it by."""

    file: Listed
    python: str
    "What people read: 3.13t, 3.9+, any, source."
    pythons: tuple[str, ...] = ()
    "Every one of `PYTHONS` that it serves."
    abi: str = ""
    platforms: tuple[str, ...] = ("any",)
    variant: str = ""
    "The label of a variant wheel."

    @property
    def recommended(self) -> bool:
        """A wheel that every installer takes as it is: not yanked, no variant, nothing wrong with it."""
        return self.file.kind == "bdist_wheel" and self.file.yanked is None and not self.variant and not self.file.defects

    def value(self, key: str) -> tuple[str, ...]:
        """What this wheel is, under one of FINDER's names."""
        facts = self.file.facts
        values = {
            "cuda": (facts.cuda,),
            "torch": (facts.torch,),
            "python": self.pythons or (self.python,),
            "sm": facts.sm,
            "platform": self.platforms,
        }[key]
        return tuple(value for value in values if value)

    def fits(self, key: str, asked: str) -> bool:
        """Is it for what was asked? A wheel that does not depend on the platform is for each."""
        return not asked or asked in self.value(key) or (key == "platform" and self.platforms == ("any",))


def choice_of(item: Listed) -> WheelChoice:
    """What the finder sorts this file by."""
    if item.kind != "bdist_wheel":
        return WheelChoice(file=item, python="source")
    tags = sorted(wheel_tags(item.filename), key=str)
    pythons = [python for python in PYTHONS if any(serves(tag, python) for tag in tags)]
    return WheelChoice(
        file=item,
        python=", ".join(sorted({_name(tag) for tag in tags}, key=natural_order)),
        pythons=tuple(python for python in pythons if _allowed(item.requires_python, python)),
        abi=".".join(sorted({tag.abi for tag in tags})),
        platforms=tuple(sorted({_PLATFORM.sub("", tag.platform) for tag in tags})),
        variant=split_label(item.filename)[1],
    )


def _name(tag: Tag) -> str:
    match = _INTERPRETER.match(tag.interpreter)
    if match is None:
        return tag.interpreter
    version = ".".join(part for part in match.groups()[1:] if part)
    if match[1] == "py":
        return f"{version}+" if match[3] else "any"
    if match[1] != "cp":
        return f"{_NAMES.get(match[1], match[1])} {version}"
    if tag.abi.startswith("abi3"):
        return f"{version}{tag.abi.removeprefix('abi3')}+"
    return f"{version}t" if tag.abi.endswith("t") else version


def _minor(python: str) -> int:
    return int(python.removeprefix("3.").removesuffix("t"))


def _allowed(requires_python: str | None, python: str) -> bool:
    try:  # of a late micro version: `>=3.9.1` is for 3.9, `<3.13` is not for 3.13
        return not requires_python or SpecifierSet(requires_python).contains(f"3.{_minor(python)}.100")
    except InvalidSpecifier:
        return True


def asked_python(text: str) -> str:
    """3.13t, as links of other years write it too: cp313t."""
    match = re.fullmatch(r"cp3(\d{1,2}t?)", text)
    return f"3.{match[1]}" if match else text


def options(choices: Sequence[WheelChoice], key: str) -> list[str]:
    """What can be chosen, in a natural order; nothing for what makes no difference."""
    different = [choice for choice in choices if key != "python" or choice.python != "any"]
    return sorted({value for choice in different for value in choice.value(key)}, key=natural_order)


def natural_order(text: str) -> list[object]:
    """Sorts 12.4 before 12.10, and cp39 before cp310."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", text))]
