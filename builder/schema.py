"""JSON schemas for editors and for readers of records."""

from __future__ import annotations

import json

from pydantic import BaseModel

from builder.planning.recipe import Recipe
from builder.planning.stack import Stack
from builder.proof.record import Record
from builder.sets.data import WheelSet
from builder.sets.record import SetRecord


def documents() -> dict[str, str]:
    """Name to JSON schema, as committed under docs/schema (a test compares them)."""
    models: dict[str, type[BaseModel]] = {
        "recipe": Recipe,
        "stack": Stack,
        "set": WheelSet,
        "record": Record,
        "set-record": SetRecord,
    }
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}
