"""Matrices of cells and certificates: storage, permissions, refusals, and durability."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from index_kit import REPOSITORY, Server, make_token, run_index, run_json

from index.cli.documents import schemas

DIGEST = hashlib.sha256(b"device code").hexdigest()


def cell(**changes: object) -> dict[str, object]:
    """A cell in the builder's format."""
    return {
        "recipe": "causal_conv1d",
        "version": "1.7.0",
        "stack": "cu130",
        "torch": "2.11.0",
        "cuda": "13.0",
        "python": "3.13",
        "target": "aarch64",
        "sm": ["90a"],
        "state": "not tried",
        **changes,
    }


def matrix(name: str, *cells: dict[str, object], **changes: object) -> dict[str, object]:
    document = {"name": name, "selector": "python=3.13", "made": "2026-11-29T01:00:00+00:00", "cells": list(cells)}
    return {**document, **changes}


def certificate(**changes: object) -> dict[str, object]:
    return {
        "device_digest": DIGEST,
        "sm": "90",
        "gpu": "NVIDIA H100 80GB HBM3",
        "driver": "580.82.07",
        "certified": "2026-11-28T12:00:00+00:00",
        "wheel": {"filename": "causal_conv1d-1.7.0+cu130-cp311-cp311-manylinux_2_34_x86_64.whl", "sha256": "ab" * 32},
        "comparisons": [{"name": "forward float16", "error": 0.0004, "tolerance": 0.001}],
        **changes,
    }


def put(server: Server, path: str, document: object, token: str | None = None) -> tuple[int, str]:
    secret = server.token if token is None else token
    answer = server.client.put(path, content=json.dumps(document).encode(), auth=("__token__", secret))
    return answer.status_code, answer.text


def test_what_was_put_is_served_byte_for_byte(shared: Server) -> None:
    document = matrix("kept", cell(), new_key_of_a_later_builder=1)
    assert put(shared, "/matrix/kept", document) == (200, "matrix kept is stored\n")
    answer = shared.client.get("/matrix/kept")
    assert answer.content == json.dumps(document).encode()
    assert answer.headers["content-type"] == "application/json"
    assert shared.client.get("/matrix/kept", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert put(shared, "/matrix/kept", matrix("kept")) == (200, "matrix kept is stored\n")
    assert shared.client.get("/matrix/kept").json()["cells"] == []
    assert put(shared, f"/certificates/{DIGEST}", certificate())[0] == 200
    assert shared.client.get(f"/certificates/{DIGEST}").json() == certificate()
    assert shared.client.get("/matrix/none").status_code == 404
    assert shared.client.get(f"/certificates/{'0' * 64}").status_code == 404


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ([], "the matrix does not match its schema"),
        (
            matrix("bad", cell(state="broken")),
            "cells.0.state: Input should be 'built', 'served', 'running', 'failed', 'blocked' or 'not tried'",
        ),
        (matrix("bad", cell(), cell(python="cp313")), "cells.1.python: String should match pattern"),
        (matrix("bad", cell(target="riscv64"), cell(sm=["ninety"])), "(1 more)"),
        (matrix("bad", cell(cpu_seconds=-1)), "cells.0.cpu_seconds"),
        (matrix("bad", cell(wheel="../../etc/passwd")), "cells.0.wheel"),
        (matrix("bad", made="yesterday"), "made: Input should be a valid datetime"),
        (
            matrix("other"),
            "the matrix is named 'other', but the address has the name 'bad' (send the matrix to /matrix/other)",
        ),
    ],
)
def test_what_is_not_of_the_schema_is_refused_with_its_place(shared: Server, document: object, sentence: str) -> None:
    status, text = put(shared, "/matrix/bad", document)
    assert status == 400
    assert sentence in text
    assert shared.client.get("/matrix/bad").status_code == 404


@pytest.mark.parametrize("raw", [b"", b"{", b'{"name": "bad", "x": NaN', b"\xff\xfe", b'"\\ud800"', b"[" * 100_000])
def test_bytes_that_are_no_json_are_one_sentence(shared: Server, raw: bytes) -> None:
    answer = shared.client.put("/matrix/bad", content=raw, auth=("__token__", shared.token))
    assert answer.status_code == 400
    assert answer.text.startswith("the matrix does not match its schema: ")
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (certificate(device_digest="0" * 64), f"send the certificate to /certificates/{'0' * 64}"),
        (certificate(wheel={"filename": "a.whl", "sha256": "ab" * 32}), "wheel.filename"),
        (certificate(comparisons=[{"name": "x", "error": "none"}]), "comparisons.0.error"),
    ],
)
def test_a_certificate_that_is_not_of_the_schema_is_refused(shared: Server, document: object, sentence: str) -> None:
    status, text = put(shared, f"/certificates/{DIGEST}", document)
    assert status == 400
    assert sentence in text


def test_a_variant_wheel_has_certificates_too(shared: Server) -> None:
    name = "causal_conv1d-1.7.0+cu130-1-cp311-cp311-manylinux_2_34_x86_64-cu130_sm90.whl"
    digest = hashlib.sha256(b"device code of a variant").hexdigest()
    document = certificate(device_digest=digest, wheel={"filename": name, "sha256": "cd" * 32})
    assert put(shared, f"/certificates/{digest}", document)[0] == 200
    assert shared.client.get(f"/certificates/{digest}").json() == document


def test_names_that_are_no_names_are_refused(shared: Server) -> None:
    for path in ("/matrix/UPPER", "/matrix/a b", "/certificates/abc"):
        assert put(shared, path, {})[0] == 400
        assert shared.client.get(path).status_code == 400


def test_a_token_for_one_project_reaches_that_project_alone(shared: Server) -> None:
    narrow = make_token(shared.root, "--project", "causal-conv1d")
    assert put(shared, "/matrix/mine", matrix("mine", cell(), cell(recipe="Causal.Conv1d")), narrow)[0] == 200
    assert put(shared, "/matrix/mine", matrix("mine", cell(), cell(recipe="vllm")), narrow)[0] == 403
    assert put(shared, "/matrix/all", matrix("all", cell(recipe="vllm")))[0] == 200
    status, text = put(shared, "/matrix/all", matrix("all", cell()), narrow)
    assert (status, "only for causal-conv1d" in text) == (403, True), "it would replace cells of another project"
    assert put(shared, f"/certificates/{DIGEST}", certificate(), narrow)[0] == 200
    wheel = {"filename": "vllm-1.0-cp311-cp311-linux_x86_64.whl", "sha256": "ab" * 32}
    assert put(shared, f"/certificates/{DIGEST}", certificate(wheel=wheel), narrow)[0] == 403
    assert put(shared, "/matrix/mine", matrix("mine"), "gf_wrong")[0] == 401


def test_a_token_for_one_view_reaches_the_matrix_of_its_name(shared: Server) -> None:
    nightly = make_token(shared.root, "--nightly")
    assert put(shared, "/matrix/nightly", matrix("nightly", cell()), nightly)[0] == 200
    status, text = put(shared, "/matrix/default", matrix("default", cell()), nightly)
    assert (status, "send the matrix to /matrix/nightly" in text) == (403, True)
    assert put(shared, f"/certificates/{DIGEST}", certificate(), nightly)[0] == 403


def test_gc_and_fsck_know_them_and_the_audit_log_has_both(shared: Server) -> None:
    assert put(shared, "/matrix/stays", matrix("stays", cell()))[0] == 200
    first = shared.client.get("/matrix/stays").headers["etag"]
    assert put(shared, "/matrix/stays", matrix("stays", cell(), cell(python="3.14t")))[0] == 200
    run_index(shared.root, "gc")
    assert len(shared.client.get("/matrix/stays").json()["cells"]) == 2
    assert "damaged" in str(run_json(shared.root, "fsck"))
    log = run_index(shared.root, "log", "--json").stdout
    assert first.strip('"') in log
    assert "matrix.put" in {change["action"] for change in shared.client.get("/changes").json()["changes"]}


def test_the_committed_schemas_are_those_of_the_index() -> None:
    for name, text in schemas().items():
        committed = (REPOSITORY / "docs" / "schema" / f"{name}.json").read_text()
        assert committed == text, f"run `index schema --write docs/schema` for {name}"


def test_the_example_of_the_documentation_is_of_the_schema() -> None:
    text = (REPOSITORY / "docs" / "reference" / "index-records.md").read_text()
    examples = [json.loads(block.split("```")[0]) for block in text.split("```json\n")[1:]]
    assert len(examples) == 2
    loaded: dict[str, Any] = {name: json.loads(schema) for name, schema in schemas().items()}
    jsonschema_rs.validator_for(loaded["matrix"]).validate(examples[0])
    jsonschema_rs.validator_for(loaded["certificate"]).validate(examples[1])


def test_schema_writes_what_it_prints(tmp_path: Path) -> None:
    run_index(tmp_path / "root", "schema", "--write", str(tmp_path))
    assert (tmp_path / "matrix.json").read_text() == schemas()["matrix"]
