"""Wheel variants (PEP 817, 825 and 850, all drafts): the label in a wheel's file name, and the JSON that describes it.

A variant wheel is named NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM-LABEL.whl and contains .dist-info/variant.json. An index
has a NAME-VERSION-variants.json for each release with variant wheels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

SCHEMA = "https://variants-schema.wheelnext.dev/peps/850/v0.2.0.json"
"The only version of the format that we write and read. uv 0.13 reads it."

MEMBER = "variant.json"
"Name inside .dist-info."

NULL = "null"
"Label of the variant without properties, which every machine may install."

_LABEL = re.compile(r"[0-9a-z_.]+\Z")
_NAME = re.compile(r"[0-9a-z_]+\Z")
_VALUE = re.compile(r"[0-9a-z_.]+\Z")

Properties = Mapping[str, Mapping[str, Sequence[str]]]
'Namespace, feature and values of a wheel: {"nvidia": {"sm_arch": ["90_real"]}}.'


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The variant of a wheel, from its variant.json."""

    label: str
    properties: Properties
    shared: str
    "JSON without the properties. It must be equal in all wheels of a release."


def split_label(filename: str) -> tuple[str, str]:
    """A wheel's file name without its variant label, and the label; "" for a plain wheel.

    A build tag starts with a digit (PEP 427), a Python tag never does, so the two optional parts can be distinguished.
    """
    parts = filename.removesuffix(".whl").split("-")
    count = 6 if len(parts) > 2 and parts[2][:1] in set("0123456789") else 5
    if not filename.endswith(".whl") or len(parts) != count + 1:
        return filename, ""
    return "-".join(parts[:-1]) + ".whl", parts[-1]


def is_label(text: str) -> bool:
    """Whether the text is a variant label."""
    return _LABEL.match(text) is not None


def index_filename(stem: str) -> str:
    """Name of an index's JSON of a release; `stem` is NAME-VERSION as in the names of wheels."""
    return f"{stem}-variants.json"


def parse(raw: bytes | str, label: str) -> Variant:
    """Read the variant.json of a wheel with that label in its name. Bytes are UTF-8 without a byte order mark.

    Raises:
        ValueError: it does not match SCHEMA, or differs from the name; the message is a sentence without a full stop.
    """
    try:
        document = json.loads(raw if isinstance(raw, str) else raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError(f"{MEMBER} cannot be read as JSON (UTF-8 without a byte order mark)") from None
    if not isinstance(document, dict) or document.get("$schema") != SCHEMA:
        raise ValueError(f"{MEMBER} does not have the format {SCHEMA}")
    properties = _properties(document.pop("variants", None), label)
    namespaces = _namespaces({key: value for key, value in document.items() if key != "$schema"})
    if missing := sorted(properties.keys() - set(namespaces)):
        raise ValueError(f"{MEMBER} has no priority for the namespace {missing[0]!r}")
    return Variant(label=label, properties=properties, shared=json.dumps(document, sort_keys=True))


def check_together(variants: Iterable[Variant]) -> None:
    """Check that the wheels of a release are consistent, including the null variant: they share one JSON.

    Raises:
        ValueError: a label has different properties in two wheels, or priorities or providers differ.
    """
    wheels = list(variants)
    labels: dict[str, Properties] = {}
    for variant in wheels:
        if labels.setdefault(variant.label, variant.properties) != variant.properties:
            raise ValueError(f"two wheels have the label {variant.label!r}, but different properties")
    if len({variant.shared for variant in wheels}) > 1:
        raise ValueError("the wheels have different priorities or providers")


def combine(variants: Iterable[Variant]) -> bytes:
    """Create the index's JSON of one release with at least one wheel.

    Wheels accepted before `check_together` existed may differ. Then the first wheel with properties decides, and other wheels
    with properties that differ from it are omitted: clients skip variants that the JSON does not list.
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
    """Refuse NaN and Infinity, which are not JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(name)


def _properties(variants: object, label: str) -> Properties:
    if not isinstance(variants, dict) or list(variants) != [label]:
        names = ", ".join(variants) if isinstance(variants, dict) else ""
        raise ValueError(
            f"{MEMBER} describes {f'the variant {names}' if names else 'no variant'}, but the file name has the label {label}"
        )
    properties = variants[label]
    if not (properties == {} or _is_mapping(properties, lambda features: _is_mapping(features, _is_values))):
        raise ValueError(f"{MEMBER} must give the properties of {label} as namespace, feature and a list of values")
    if (label == NULL) == bool(properties):
        raise ValueError(
            f"{MEMBER} gives properties to the variant {NULL}, which must not have any"
            if properties
            else f"{MEMBER} gives no properties to the variant {label}, but only the variant {NULL} may have no properties"
        )
    return properties  # type: ignore[no-any-return]  # the structure was checked


def _is_mapping(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and bool(value) and all(_NAME.match(key) and accepts(each) for key, each in value.items())


def _is_values(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and _VALUE.match(text) for text in value)


def _namespaces(document: Mapping[str, object]) -> list[str]:
    from gracefarm import (
        variant_json,
    )  # imported here: it imports pydantic, and an index without variant wheels starts more quickly without it

    try:
        namespaces = variant_json.priorities(document)
    except ValueError as error:
        raise ValueError(f"{MEMBER} does not have the format {SCHEMA}: {error}") from None
    if len(set(namespaces)) < len(namespaces):
        raise ValueError(f"{MEMBER} names a namespace twice in default-priorities.namespace")
    return namespaces
