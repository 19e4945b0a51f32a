"""CUDA facts of a file: what the JSON page adds as _cuda, _torch, _sm and _glibc, and what the views sort by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from index.names import Distribution

_CUDA_LOCAL = re.compile(r"(?:^|\.)cu(?:(\d{2})(\d)|\.?(\d+)\.(\d+))(?=\D|$)")
_CUDA = re.compile(r"(\d{1,2}\.\d{1,2})(\.\d{1,3})?")
_TORCH = re.compile(r"\d{1,3}(\.[a-z0-9]{1,12}){0,4}(\+[a-z0-9.]{1,40})?")
_SM = re.compile(r"\d{2,3}[a-z]?")
_GLIBC = re.compile(r"\d{1,2}\.\d{1,3}")
_MINOR = re.compile(r"\d+\.\d+")
_TORCH_LOCAL = re.compile(r"torch\.?(\d+\.\d+)")
_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")
_LEGACY_GLIBC = {"manylinux1": "2.5", "manylinux2010": "2.12", "manylinux2014": "2.17"}


@dataclass(frozen=True, kw_only=True)
class CudaFacts:
    """What a person chooses a CUDA wheel by. None and empty mean not known."""

    cuda: str | None = None
    "As 13.0."
    torch: str | None = None
    "As 2.11 or 2.11.0."
    sm: tuple[str, ...] = ()
    "As 90, 90a."
    glibc: str | None = None
    "As 2.34."
    built_for: str | None = None
    "The torch that alone can load it, as 2.11: its local version says so, or its requirements pin it."

    def as_json(self) -> str:
        """For the catalogue."""
        return json.dumps(asdict(self))

    def keys(self) -> dict[str, object]:
        """The private keys of the JSON page (PEP 700 keeps the leading underscore for indexes)."""
        keys = {"_cuda": self.cuda, "_torch": self.torch, "_sm": list(self.sm), "_glibc": self.glibc}
        return {key: value for key, value in keys.items() if value}

    def over(self, weaker: CudaFacts) -> CudaFacts:
        """These facts, gaps filled from `weaker`."""
        return CudaFacts(**{name: value or getattr(weaker, name) for name, value in vars(self).items()})


def from_json(text: str) -> CudaFacts:
    """What `CudaFacts.as_json` wrote."""
    values = json.loads(text)
    return CudaFacts(**{**values, "sm": tuple(values.get("sm", ()))})


def from_name(distribution: Distribution, requires: Iterable[str]) -> CudaFacts:
    """What the local version, the platform tag and the pin on torch say."""
    local = Version(distribution.version).local or ""
    cuda = _CUDA_LOCAL.search(local)
    torch = _TORCH_LOCAL.search(local)
    pin = _torch_pin(requires)
    minor = _MINOR.match(pin or "")
    return CudaFacts(
        cuda=f"{cuda[1] or cuda[3]}.{cuda[2] or cuda[4]}" if cuda else None,
        torch=torch[1] if torch else pin,
        glibc=_glibc(distribution),
        built_for=torch[1] if torch else minor and minor[0],
    )


def built_for(version: str, facts: CudaFacts) -> str | None:
    """The torch that alone can load a wheel; rows of schema 4 know it from the version alone. None: any, or none."""
    return torch_of_local(version) or facts.built_for


def torch_of_local(version: str) -> str | None:
    """The torch that a local version names: 1.0+cu130.torch2.11 → 2.11."""
    torch = _TORCH_LOCAL.search(version.partition("+")[2])
    return torch[1] if torch else None


def _torch_pin(requires: Iterable[str]) -> str | None:
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name.lower() == "torch":
            pins = [item.version.removesuffix(".*") for item in requirement.specifier if item.operator in ("==", "===")]
            return pins[0] if pins else None
    return None


def _glibc(distribution: Distribution) -> str | None:
    platforms = {tag.platform for tag in distribution.tags}
    versions = [f"{match[1]}.{match[2]}" for platform in platforms if (match := _MANYLINUX.match(platform))]
    versions += [_LEGACY_GLIBC[head] for platform in platforms if (head := platform.split("_")[0]) in _LEGACY_GLIBC]
    return min(versions, key=Version) if versions else None


def from_record(record: Mapping[str, object]) -> CudaFacts:
    """What a farm's record says, wherever in the document the stack and the measured wheel stand.

    Read are the first `cuda`, `torch` and `sm` found under `facts`, `outputs`, `wheel`, `stack`, `inputs`: records of several
    versions are served by one index, and a fact that is absent is only absent. The stack's glibc is a bound, the wheel's tag
    the measured one, so `glibc` is read from `facts` alone.
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
    """The first value of that form: pages, addresses and exports are made of it, so nothing else is believed."""
    for place in places:
        value = place.get(key)
        if isinstance(value, str) and form.fullmatch(value):
            return value
    return None


def _sm(values: list[object]) -> Iterable[str]:
    for item in values[:64]:
        value = str(item).removeprefix("sm_") if isinstance(item, str | int) else ""
        if _SM.fullmatch(value):
            yield value
