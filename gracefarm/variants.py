"""Wheel variants (PEP 817, 825 and 850, all drafts): the label in a wheel's file name, and the JSON that says what it means.

A variant wheel is called NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM-LABEL.whl and carries .dist-info/variant.json. An index has
one NAME-VERSION-variants.json for each release with variant wheels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

SCHEMA = "https://variants-schema.wheelnext.dev/peps/850/v0.2.0.json"
"The one version of the format that we write and read; uv 0.13 reads it."

MEMBER = "variant.json"
"Name inside .dist-info."

NULL = "null"
"Label of the variant without properties, which every machine may take."

_LABEL = re.compile(r"[0-9a-z_.]+\Z")
_NAME = re.compile(r"[0-9a-z_]+\Z")
_VALUE = re.compile(r"[0-9a-z_.]+\Z")

Properties = Mapping[str, Mapping[str, Sequence[str]]]
'Namespace, feature, the values that the wheel has: {"nvidia": {"sm_arch": ["90_real"]}}.'


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What variant.json says of one wheel."""

    label: str
    properties: Properties
    shared: str
    "JSON of everything but the properties: what all wheels of a release must say alike."


def split_label(filename: str) -> tuple[str, str]:
    """A wheel's file name without its variant label, and the label; "" for a plain wheel.

    A build tag starts with a digit (PEP 427), a Python tag never does: that tells the two optional parts apart.
    """
    parts = filename.removesuffix(".whl").split("-")
    count = 6 if len(parts) > 2 and parts[2][:1] in set("0123456789") else 5
    if not filename.endswith(".whl") or len(parts) != count + 1:
        return filename, ""
    return "-".join(parts[:-1]) + ".whl", parts[-1]


def is_label(text: str) -> bool:
    """Is this a variant label?"""
    return _LABEL.match(text) is not None


def index_filename(stem: str) -> str:
    """Name of an index's JSON of a release; `stem` is NAME-VERSION as wheels' names spell it."""
    return f"{stem}-variants.json"


def parse(raw: bytes | str, label: str) -> Variant:
    """Read the variant.json of a wheel whose name has that label. Bytes are UTF-8 without a byte order mark.

    Raises:
        ValueError: it is not of SCHEMA, or says something else than the name; a sentence without its full stop.
    """
    try:
        document = json.loads(raw if isinstance(raw, str) else raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError(f"{MEMBER} is not JSON in UTF-8 without a byte order mark") from None
    if not isinstance(document, dict) or document.get("$schema") != SCHEMA:
        raise ValueError(f"{MEMBER} is not of the format {SCHEMA}")
    properties = _properties(document.pop("variants", None), label)
    namespaces = _namespaces({key: value for key, value in document.items() if key != "$schema"})
    if missing := sorted(properties.keys() - set(namespaces)):
        raise ValueError(f"{MEMBER} has no priority for the namespace {missing[0]!r}")
    return Variant(label=label, properties=properties, shared=json.dumps(document, sort_keys=True))


def check_together(variants: Iterable[Variant]) -> None:
    """One JSON is for all wheels of a release, whichever of them a page shows; so each agrees with every other, null too.

    Raises:
        ValueError: a label with two meanings, or wheels that rank or find variants in two ways.
    """
    wheels = list(variants)
    labels: dict[str, Properties] = {}
    for variant in wheels:
        if labels.setdefault(variant.label, variant.properties) != variant.properties:
            raise ValueError(f"the label {variant.label!r} has two meanings")
    if len({variant.shared for variant in wheels}) > 1:
        raise ValueError("the wheels name different priorities or providers")


def combine(variants: Iterable[Variant]) -> bytes:
    """The index's JSON of one release, of at least one wheel.

    Wheels that were taken before `check_together` asked for as much may disagree. Then the first with properties says what
    counts, and those with properties that disagree with it are left out: clients pass over what the JSON does not name.
    """
    wheels = sorted(variants, key=lambda variant: not variant.properties)
    first = wheels[0]
    labels: dict[str, Properties] = {}
    for variant in wheels:
        if variant.shared == first.shared or not variant.properties:
            labels.setdefault(variant.label, variant.properties)
    document = {**json.loads(first.shared), "variants": dict(sorted(labels.items()))}
    return json.dumps(document, separators=(",", ":")).encode()


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are Python's own addition to JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(name)


def _properties(variants: object, label: str) -> Properties:
    if not isinstance(variants, dict) or list(variants) != [label]:
        names = ", ".join(variants) if isinstance(variants, dict) else ""
        raise ValueError(f"{MEMBER} is of the variant {names or 'without a name'}, the file name says {label}")
    properties = variants[label]
    if not (properties == {} or _is_mapping(properties, lambda features: _is_mapping(features, _is_values))):
        raise ValueError(f"{MEMBER} does not give the properties of {label} as namespace, feature and a list of values")
    if (label == NULL) == bool(properties):
        raise ValueError(
            f"{MEMBER} gives the variant {label} {'properties' if properties else 'no properties'};"
            f" the variant without properties is called {NULL}, and no other"
        )
    return properties  # type: ignore[no-any-return]  # its form was checked


def _is_mapping(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and bool(value) and all(_NAME.match(key) and accepts(each) for key, each in value.items())


def _is_values(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and _VALUE.match(text) for text in value)


def _namespaces(document: Mapping[str, object]) -> list[str]:
    from gracefarm import variant_json  # here: it brings pydantic, and an index without variant wheels starts quicker without

    try:
        namespaces = variant_json.priorities(document)
    except ValueError as error:
        raise ValueError(f"{MEMBER} is not of the format {SCHEMA}: {error}") from None
    if len(set(namespaces)) < len(namespaces):
        raise ValueError(f"{MEMBER} names a namespace twice in default-priorities.namespace")
    return namespaces
