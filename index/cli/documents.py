"""`index schema`: the JSON schemas of what is put beside records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from pydantic import BaseModel

from gracefarm.files import atomic_write
from index.cli.common import IndexContext, in_context
from index.store.schemas import DeviceCertificate, MatrixDocument


@click.command("schema")
@in_context
@click.option("--write", type=click.Path(file_okay=False, path_type=Path), help="Write both into this folder (docs/schema).")
def schema(_context: IndexContext, write: Path | None) -> None:
    """JSON schemas of matrices and certificates, for programs that put them."""
    for name, text in schemas().items():
        if write is not None:
            atomic_write(write / f"{name}.json", text)
        else:
            sys.stdout.write(text)


def schemas() -> dict[str, str]:
    """Name to JSON schema, as committed under docs/schema (a test compares them)."""
    models: dict[str, type[BaseModel]] = {"matrix": MatrixDocument, "certificate": DeviceCertificate}
    return {name: json.dumps(model.model_json_schema(), indent=2) + "\n" for name, model in models.items()}
