"""`index schema`: the JSON schemas of matrices and certificates."""

from __future__ import annotations

import json
from pathlib import Path

import click
from pydantic import BaseModel

from gracefarm.cli import show_schemas
from index.cli.common import IndexContext, in_context
from index.store.schemas import DeviceCertificate, MatrixDocument


@click.command("schema")
@in_context
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write each schema into a file in this folder. Without this option, print the schemas.",
)
def schema(_context: IndexContext, write: Path | None) -> None:
    """Print the JSON schemas of matrices and certificates.

    A matrix is a list of wheels with the state of their builds. A certificate says that the GPU code of a wheel has passed a
    test. The schemas are for programs that upload matrices or certificates to the index.

    \b
    # Print both schemas.
    index schema
    # Write the schemas into docs/schema.
    index schema --write docs/schema
    """
    show_schemas(schemas(), write)


def schemas() -> dict[str, str]:
    """Name to JSON schema. docs/schema has copies of them, which a test compares."""
    models: dict[str, type[BaseModel]] = {"matrix": MatrixDocument, "certificate": DeviceCertificate}
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}
