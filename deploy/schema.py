"""JSON schemas of deploy.toml, for editors, and of the plan, for whoever reads `deploy plan --json`."""

from __future__ import annotations

import json

from pydantic import BaseModel

from deploy.nodes.inventory import File
from deploy.planning.plan import Plan


def documents() -> dict[str, str]:
    """Name to JSON schema, as committed under docs/schema (a test compares them)."""
    models: dict[str, type[BaseModel]] = {"deploy": File, "deploy-plan": Plan}
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}
