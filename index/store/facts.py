"""CUDA facts of a file: the JSON page shows them as _cuda, _torch, _sm and _glibc, and the views select files by them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gracefarm.variants import Properties
from index.names import Distribution

_CUDA_LOCAL = re.compile(r"(?:^|\.)cu(?:(\d{2})(\d)|\.?(\d+)\.(\d+))(?=\D|$)")
_CUDA = re.compile(r"(\d{1,2}\.\d{1,2})(\.\d{1,3})?")
_TORCH = re.compile(r"\d{1,3}(\.[a-z0-9]{1,12}){0,4}(\+[a-z0-9.]{1,40})?")
_SM = re.compile(r"\d{2,3}[a-z]?")
_SM_CUBIN = re.compile(r"(\d{2,3}[a-z]?)_real")
_GLIBC = re.compile(r"\d{1,2}\.\d{1,3}")
_MAX_SM = 64
_TORCH_LOCAL = re.compile(r"torch\.?(\d+\.\d+)")
_LAST = 1_000_000
"A release number that torch never reaches."
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")
_LEGACY_GLIBC = {"manylinux1": "2.5", "manylinux2010": "2.12", "manylinux2014": "2.17"}


@dataclass(frozen=True, kw_only=True)
class CudaFacts:
    """The properties by which users choose a CUDA wheel. None and empty mean unknown."""

    cuda: str | None = None
    "For example 13.0."
    torch: str | None = None
    "For example 2.11 or 2.11.0."
    sm: tuple[str, ...] = ()
    "For example 90, 90a."
    glibc: str | None = None
    "For example 2.34."
    built_for: str | None = None
    "The only torch release that can load it, for example 2.11, from its local version or its requirements."

    def as_json(self) -> str:
        """Serialise for the catalogue."""
        return json.dumps(asdict(self))

    def keys(self) -> dict[str, object]:
        """The private keys of the JSON page (PEP 700 reserves the leading underscore for indexes)."""
        keys = {"_cuda": self.cuda, "_torch": self.torch, "_sm": list(self.sm), "_glibc": self.glibc}
        return {key: value for key, value in keys.items() if value}

    def over(self, weaker: CudaFacts) -> CudaFacts:
        """These facts, with gaps filled from `weaker`."""
        return CudaFacts(**{name: value or getattr(weaker, name) for name, value in vars(self).items()})


def from_json(text: str) -> CudaFacts:
    """Parse the output of `CudaFacts.as_json`."""
    values = json.loads(text)
    return CudaFacts(**{**values, "sm": tuple(values.get("sm", ()))})


def from_name(distribution: Distribution, requires: Iterable[str]) -> CudaFacts:
    """Facts from the local version, the platform tag and the requirements on torch."""
    local = Version(distribution.version).local or ""
    cuda = _CUDA_LOCAL.search(local)
    torch = _TORCH_LOCAL.search(local)
    required = _required_torch(requires)
    minor = _only_minor(required)
    return CudaFacts(
        cuda=f"{cuda[1] or cuda[3]}.{cuda[2] or cuda[4]}" if cuda else None,
        torch=torch[1] if torch else _pin(required) or minor,
        glibc=_glibc(distribution),
        built_for=torch[1] if torch else minor,
    )


def from_variant(properties: Properties) -> CudaFacts:
    """Facts from the properties of a variant wheel: the lowest CUDA that it accepts, and the GPUs for which it has cubins."""
    nvidia = properties.get("nvidia", {})
    bounds = [match[1] for value in nvidia.get("cuda_version_lower_bound", ()) if (match := _CUDA.fullmatch(value))]
    cubins = [match[1] for value in nvidia.get("sm_arch", ()) if (match := _SM_CUBIN.fullmatch(value))]
    return CudaFacts(cuda=min(bounds, key=Version, default=None), sm=tuple(cubins[:_MAX_SM]))


def built_for(version: str, facts: CudaFacts) -> str | None:
    """The only torch release that can load a wheel; None: any, or no torch. Rows of schema 4 have it only in the version."""
    return torch_of_local(version) or facts.built_for


def torch_of_local(version: str) -> str | None:
    """The torch release in a local version: 1.0+cu130.torch2.11 → 2.11."""
    torch = _TORCH_LOCAL.search(version.partition("+")[2])
    return torch[1] if torch else None


def _required_torch(requires: Iterable[str]) -> SpecifierSet:
    """The requirements on torch, without those of extras; several lines are combined."""
    required = SpecifierSet()
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name.lower() == "torch" and not (requirement.marker and "extra" in str(requirement.marker)):
            required &= requirement.specifier
    return required


def _pin(required: SpecifierSet) -> str | None:
    pins = [item.version.removesuffix(".*") for item in required if item.operator in ("==", "===")]
    return min(pins, default=None)


def _only_minor(required: SpecifierSet) -> str | None:
    """The only minor release, for example 2.11, that the specifiers allow; None if they allow several or none.

    An allowed range begins and ends next to a version that a specifier names, or is unbounded. So it is sufficient to test
    those versions, the minor releases next to them, and the lowest and the highest version of all.
    """
    admitted: set[str] = set()
    try:
        for version in _telling(required):
            if required.contains(version, prereleases=True):
                admitted.add(f"{version.major}.{version.minor}")
    except ValueError:  # a number with more digits than Python converts
        return None
    return admitted.pop() if len(admitted) == 1 else None


def _telling(required: SpecifierSet) -> set[Version]:
    versions: set[Version] = set()
    for item in required:
        with suppress(InvalidVersion):  # === accepts any text
            versions.add(Version(item.version.removesuffix(".*")))
    minors = {(0, 0), (_LAST, 0)}
    nexts: set[Version] = set()
    for version in versions:
        minors |= {(version.major, max(version.minor + step, 0)) for step in (-1, 0, 1)}
        minors |= {(version.major + 1, 0), (max(version.major - 1, 0), _LAST)}
        nexts.add(Version(f"{version.major}.{version.minor}.{version.micro + 1}"))
    return versions | nexts | {Version(f"{major}.{minor}.{micro}") for major, minor in minors for micro in (0, _LAST)}


def _glibc(distribution: Distribution) -> str | None:
    platforms = {tag.platform for tag in distribution.tags}
    versions = [f"{match[1]}.{match[2]}" for platform in platforms if (match := _MANYLINUX.match(platform))]
    versions += [_LEGACY_GLIBC[head] for platform in platforms if (head := platform.split("_")[0]) in _LEGACY_GLIBC]
    return min(versions, key=Version) if versions else None


def from_record(record: Mapping[str, object]) -> CudaFacts:
    """Facts from the builder's record, regardless of where the document has the stack and the measured wheel.

    The first `cuda`, `torch` and `sm` under `facts`, `outputs`, `wheel`, `stack`, `inputs` count: one index serves records of
    several versions, and missing facts are allowed. `glibc` is read only from `facts`, because the stack's glibc is an upper
    bound and the wheel's tag has the measured one.
    """
    places = list(_places(record))
    sm = next((value for place in places if (value := place.get("sm"))), ())
    return CudaFacts(
        cuda=cuda[1] if (cuda := _CUDA.fullmatch(_text(places, "cuda", _CUDA) or "")) else None,
        torch=_text(places, "torch", _TORCH),
        sm=tuple(_sm(sm)) if isinstance(sm, list) else (),
        glibc=_text([own], "glibc", _GLIBC) if isinstance(own := record.get("facts"), Mapping) else None,
    )


def _places(record: Mapping[str, object], depth: int = 0) -> Iterable[Mapping[str, object]]:
    named = [record[key] for key in ("facts", "outputs", "wheel", "stack", "inputs") if key in record]
    yield from ([record] if depth else [])
    for value in named:
        if isinstance(value, Mapping) and depth < 3:
            yield from _places(value, depth + 1)


def _text(places: Iterable[Mapping[str, object]], key: str, form: re.Pattern[str]) -> str | None:
    """The first value of that form. Pages, addresses and exports contain it, so other values are ignored."""
    for place in places:
        value = place.get(key)
        if isinstance(value, str) and form.fullmatch(value):
            return value
    return None


def _sm(values: list[object]) -> Iterable[str]:
    for item in values[:_MAX_SM]:
        value = str(item).removeprefix("sm_") if isinstance(item, str | int) else ""
        if _SM.fullmatch(value):
            yield value
