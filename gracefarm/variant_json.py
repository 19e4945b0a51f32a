"""The schema of variant.json (PEP 825 and 850, drafts), without the properties, which `gracefarm.variants` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

VariantName = Annotated[str, StringConstraints(pattern=r"^[0-9a-z_]+$")]
"A namespace or a feature."

VariantValue = Annotated[str, StringConstraints(pattern=r"^[0-9a-z_.]+$")]


class _JsonPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-"))


class _VariantPriorities(_JsonPart):
    namespace: list[VariantName] = Field(min_length=1)
    feature: dict[VariantName, list[VariantName]] = {}
    property: dict[VariantName, dict[VariantName, list[VariantValue]]] = {}


class _VariantProvider(_JsonPart):
    plugin_api: str | None = None
    requires: list[str] = []
    enable_if: str | None = None
    optional: bool = False
    install_time: bool = True
    plugin_use: Literal["none", "build", "all"] = "all"


class _SharedVariantPart(_JsonPart):
    """All keys of variant.json except its format and the properties."""

    default_priorities: _VariantPriorities
    providers: dict[VariantName, _VariantProvider] = {}
    static_properties: dict[VariantName, dict[VariantName, list[VariantValue]]] = {}


def priorities(document: Mapping[str, object]) -> list[str]:
    """The namespaces of a document without `$schema` and `variants`, in order of priority.

    Raises:
        ValueError: it does not match the schema; the message has the first mismatch.
    """
    try:
        return _SharedVariantPart.model_validate(document).default_priorities.namespace
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
