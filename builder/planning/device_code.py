"""Architectures of device code: those that a CUDA release supports, those of a cell, and their names for torch and CMake.

`90` is code for devices of compute capability 9.0; `90a` adds instructions that only this capability has; `100f` adds those
that a family of capabilities shares (CUDA C++ Programming Guide, "Compute Capabilities").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from builder.planning.recipe import PLACEHOLDERS, LoadedRecipe
from builder.planning.stack import LoadedStack
from gracefarm import tables
from gracefarm.errors import ConfigError, UsageError

_NONE = "none"
"Instead of an architecture: no PTX."
_VALUE = re.compile(r"\d{2,3}[af]?")
_ALWAYS, _BEFORE_13 = ("11.8", None), ("11.8", "13.0")
_RELEASES: Mapping[str, tuple[str, str | None]] = {
    **dict.fromkeys(("50", "52", "53", "60", "61", "62", "70", "72"), _BEFORE_13),
    **dict.fromkeys(("75", "80", "86", "87", "89", "90"), _ALWAYS),
    "90a": ("12.0", None),
    **dict.fromkeys(("100", "100a", "120", "120a"), ("12.8", None)),
    **dict.fromkeys(("101", "101a"), ("12.8", "13.0")),
    **dict.fromkeys(("100f", "103", "103a", "103f", "120f", "121", "121a", "121f"), ("12.9", None)),
    "101f": ("12.9", "13.0"),
    **dict.fromkeys(("88", "110", "110a", "110f"), ("13.0", None)),
}
"""First CUDA release that supports a value, and the first that does not support it any more, from NVIDIA's release notes.
tests/integration/test_device_code.py compares nvcc 12.4.131 and 13.0.88 with it."""
_UNKNOWN_TO_TORCH = frozenset({"88"})
"Values that torch's cpp_extension.py does not accept in TORCH_CUDA_ARCH_LIST (read in 2.4.0 and 2.11.0)."


def parse(text: str) -> tuple[str, ...]:
    """The values of a list such as `90+100f`, without duplicates, sorted by number.

    Raises:
        UsageError: the text is not such a list.
    """
    values = dict.fromkeys(text.split("+"))
    for value in values:
        if not _VALUE.fullmatch(value):
            where = "" if value == text else f" in {text!r}"
            raise UsageError(
                f"{value!r}{where} is not an architecture",
                remedy="write architectures such as 90, 90a or 100f, and join the architectures of one wheel with '+', "
                "such as 90+100",
            )
    return tuple(sorted(values, key=_order))


def parse_ptx(text: str) -> str:
    """An architecture for PTX, such as `90`, or `none`.

    Raises:
        UsageError: the text is neither.
    """
    if text != _NONE and not (text.isdecimal() and _VALUE.fullmatch(text)):
        raise UsageError(
            f"{text!r} is not an architecture for PTX", remedy=f"give an architecture without a letter, such as 90, or {_NONE}"
        )
    return text


def first(*choices: str | None) -> str | None:
    """The architecture of the PTX from the first choice that is set; None: no PTX."""
    chosen = next((choice for choice in choices if choice is not None), _NONE)
    return None if chosen == _NONE else chosen


def require(recipe: LoadedRecipe, stack: LoadedStack, ptx: str | None) -> None:
    """Refuse architectures that CUDA, torch or the recipe's source does not support.

    Raises:
        ConfigError: an architecture is not supported; names the nearest supported one.
    """
    supported, compiles = recipe.data.wheel.sm_supported, known(stack.data.cuda)
    extra = [value for values in recipe.data.wheel.sm_extra.values() for value in values]
    for value in (*stack.sm, *extra, *([ptx] if ptx is not None else [])):
        if value not in compiles:
            raise ConfigError(
                f"CUDA {stack.data.cuda} of stack {stack.data.name} does not compile for sm_{value}",
                remedy=tables.nearest(value, compiles, "supported architectures"),
            )
        if stack.data.torch is not None and value in _UNKNOWN_TO_TORCH:
            raise ConfigError(
                f"torch {stack.data.torch.version} of stack {stack.data.name} does not support sm_{value}",
                remedy="choose different architectures with --sm, or remove this architecture from `sm` of the stack",
            )
        if value.endswith("f") and value[:-1] in stack.sm:
            raise ConfigError(
                f"sm_{value[:-1]} and sm_{value} cannot be in one wheel: nvcc compiles only one of them",
                remedy=f"choose sm_{value}, whose code runs on the whole family, or sm_{value[:-1]}",
            )
    for value in stack.sm if supported else ():
        if value not in supported:
            raise ConfigError(
                f"{recipe.key} does not support sm_{value}: its recipe lists {', '.join(supported)}",
                remedy=f"choose one of these architectures with --sm; if the source supports sm_{value}, add "
                f"{value} to sm_supported of [wheel] in the recipe",
            )


def refuse_known_bad(recipe: LoadedRecipe, stack: LoadedStack) -> None:
    """Refuse a combination that the recipe lists as bad.

    Raises:
        ConfigError: the combination is listed; gives the reason and the link.
    """
    release = stack.data.torch
    for bad in recipe.data.known_bad:
        named = sorted({value for value in stack.sm for own in bad.sm if _base(value).rstrip("a") == own.rstrip("af")})
        if (
            (named or not bad.sm)
            and SpecifierSet(bad.cuda).contains(stack.data.cuda, prereleases=True)
            and (
                not bad.torch
                or (release and SpecifierSet(bad.torch).contains(Version(release.version).public, prereleases=True))
            )
        ):
            architectures = f" for {', '.join(f'sm_{value}' for value in named)}" if named else ""
            raise ConfigError(
                f"{recipe.key} on stack {stack.data.name}{architectures} is known to be bad: {bad.reason} ({bad.link})",
                remedy="choose different architectures with --sm, or a different stack; see [[known_bad]] in the recipe",
            )


def torch_list(sm: Iterable[str]) -> str:
    """The value of TORCH_CUDA_ARCH_LIST, such as `9.0 10.0a`. torch 2.11 refuses families: it gets the base architecture, and
    our nvcc compiles for the family."""
    names = (re.sub(r"(\d)(a?)$", r".\1\2", _base(value)) for value in sm)
    return " ".join(dict.fromkeys(names))


def cmake_list(sm: Iterable[str]) -> str:
    """The value of CMAKE_CUDA_ARCHITECTURES, such as `90-real;100a-real`; families as in `torch_list`."""
    return ";".join(dict.fromkeys(f"{_base(value)}-real" for value in sm))


def filled(text: str, sm: Iterable[str]) -> str:
    """A recipe's text with `{sm}` (90;100a), `{sm_dotted}` (9.0;10.0a) and `{sm_gencode}` replaced by the architectures."""
    values = tuple(sm)
    options = (f"-gencode=arch=compute_{value},code=sm_{value}" for value in values)
    forms = {
        "{sm}": ";".join(values),
        "{sm_dotted}": torch_list(values).replace(" ", ";"),
        "{sm_gencode}": " ".join(options),
    }
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, forms[placeholder])
    return text


def _base(value: str) -> str:
    return value.removesuffix("f")


def known(cuda: str) -> tuple[str, ...]:
    """The values that a CUDA release, such as 13.0, supports."""
    release = Version(cuda)
    values = [
        value
        for value, (first, dropped) in _RELEASES.items()
        if Version(first) <= release and (dropped is None or release < Version(dropped))
    ]
    return tuple(sorted(values, key=_order))


def _order(value: str) -> tuple[int, str]:
    return int(value.rstrip("af")), value
