"""The wheel finder: the properties in which wheels differ, and the values to choose from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag

from gracefarm.pythons import serves
from index.names import wheel_tags
from index.simple_api.views import Listed

FINDER = ("cuda", "torch", "python", "sm", "platform")
"Properties that the wheel finder asks for, in this order."

_MINORS = range(8, 16)
PYTHONS = (*(f"3.{minor}" for minor in _MINORS), *(f"3.{minor}t" for minor in _MINORS if minor >= 13))
"Python versions to choose from; free-threaded ones have a t."

_INTERPRETER = re.compile(r"([a-z]+)(\d)(\d*)\Z")
_PLATFORM = re.compile(r"^(manylinux(_\d+_\d+|\d+)|musllinux_\d+_\d+|linux|macosx_\d+_\d+)_")
_NAMES = {"pp": "PyPy", "graalpy": "GraalPy"}


@dataclass(frozen=True, kw_only=True)
class WheelChoice:
    """A wheel and its properties for the finder."""

    file: Listed
    python: str
    "Text for users: 3.13t, 3.9+, any, source."
    pythons: tuple[str, ...] = ()
    "All of `PYTHONS` that it supports."
    abi: str = ""
    platforms: tuple[str, ...] = ("any",)
    variant: str = ""
    "The label of a variant wheel."

    @property
    def recommended(self) -> bool:
        """A wheel that every installer accepts: not yanked, not a variant, without defects."""
        return self.file.kind == "bdist_wheel" and self.file.yanked is None and not self.variant and not self.file.defects

    def value(self, key: str) -> tuple[str, ...]:
        """The wheel's values of one of FINDER's properties."""
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
        """Whether the wheel matches the choice. A platform-independent wheel matches every platform."""
        return not asked or asked in self.value(key) or (key == "platform" and self.platforms == ("any",))


def choice_of(item: Listed) -> WheelChoice:
    """The finder's properties of this file."""
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
        variant=item.variant,
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
    try:  # test a late micro version: `>=3.9.1` includes 3.9, `<3.13` excludes 3.13
        return not requires_python or SpecifierSet(requires_python).contains(f"3.{_minor(python)}.100")
    except InvalidSpecifier:
        return True


def asked_python(text: str) -> str:
    """Normalise a Python version: 3.13t or, from older links, cp313t."""
    match = re.fullmatch(r"cp3(\d{1,2}t?)", text)
    return f"3.{match[1]}" if match else text


def options(choices: Sequence[WheelChoice], key: str) -> list[str]:
    """The values to choose from, in natural order; empty if every file has the same values, so that there is no choice."""
    different = [choice for choice in choices if key != "python" or choice.python not in ("any", "source")]
    if len({choice.value(key) for choice in choices}) < 2:
        return []
    return sorted({value for choice in different for value in choice.value(key)}, key=natural_order)


def natural_order(text: str) -> list[object]:
    """Sorts 12.4 before 12.10, and cp39 before cp310."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", text))]
