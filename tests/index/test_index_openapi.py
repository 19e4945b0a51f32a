"""The OpenAPI description: it lists every route, and the server conforms to it (schemathesis, as a black box)."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest
from index_kit import JSON, Server, serving, wheel
from starlette.routing import Route

from index.serving.assembly import build
from index.serving.service import ServeOptions
from index.store.files import Store

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with limits that allow a thousand requests."""
    folder = tmp_path_factory.mktemp("openapi")
    with serving(folder / "root", "--allow-new", "--writes-per-second", "100000") as server:
        assert server.upload(*wheel("spec_pkg", "1.0+cu130", requires=("torch==2.11.0",))).status_code == 200
        auth = ("__token__", server.token)
        assert server.client.put("/records/spec-1", json={"recipe": "spec-pkg"}, auth=auth).status_code == 200
        yield server


def test_every_route_is_described_and_nothing_else(tmp_path: Path, described: Server) -> None:
    paths = described.client.get("/openapi.json").json()["paths"]
    described_routes = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    application = build(Store(root=tmp_path / "root"), ServeOptions())
    routes = [route for route in application.rest.routes if isinstance(route, Route)]
    there = {(route.path, method) for route in routes for method in (route.methods or ()) if method != "HEAD"}
    application.service.close()
    front = {(path, "GET") for path, _ in described_routes if "/simple/" in path}
    assert described_routes - front == there


def test_the_pages_are_as_described(described: Server) -> None:
    document = described.client.get("/openapi.json").json()
    components = {"components": document["components"]}
    for path, schema in (("/simple/", "Projects"), ("/simple/spec-pkg/", "Project"), ("/changes", "Changes"),
                         ("/cu130-torch2.11/simple/spec-pkg/", "Project")):  # fmt: skip
        page = described.client.get(path, headers={"Accept": f"{JSON}, */*;q=0.1"}).json()
        assert page.get("files", page.get("projects", page.get("changes")))
        jsonschema_rs.validator_for({**components, "$ref": f"#/components/schemas/{schema}"}).validate(page)


def schemathesis(server: Server, folder: Path, examples: int, *more: str) -> str:
    secret = base64.b64encode(f"__token__:{server.token}".encode()).decode()
    process = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", server.url + "/openapi.json",
         "--header", f"Authorization: Basic {secret}", "--max-examples", str(examples), "--seed", "20261124",
         "--checks", CHECKS, "--continue-on-failure", "--no-color", *more],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    return process.stdout


def test_schemathesis_finds_nothing(described: Server, tmp_path: Path) -> None:
    text = schemathesis(described, tmp_path, 8, "--phases", "examples,coverage,fuzzing", "--generation-deterministic")
    counts = re.search(r"(\d+) generated", text)
    assert counts
    assert int(counts[1]) > 500, text
    assert described.filenames("spec-pkg") == [wheel("spec_pkg", "1.0+cu130")[0]]


def test_schemathesis_finds_nothing_behind_names_that_are_here(described: Server, tmp_path: Path) -> None:
    """The same with valid path parameters, so that real pages respond."""
    item = described.page("spec-pkg").json()["files"][0]
    known = {
        "project": "spec-pkg",
        "name": "spec-pkg",
        "view": "cu130",
        "filename": item["filename"],
        "sha256": item["hashes"]["sha256"],
        "id": "spec-1",
    }
    lines = [f'"path.{name}" = {json.dumps(value)}' for name, value in known.items()]
    (tmp_path / "schemathesis.toml").write_text("[parameters]\n" + "\n".join(lines) + "\n")
    schemathesis(described, tmp_path, 8, "--phases", "coverage,fuzzing", "--generation-deterministic")


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_a_minute(described: Server, tmp_path: Path) -> None:
    schemathesis(described, tmp_path, 2000, "--phases", "fuzzing", "--max-time", "60")
