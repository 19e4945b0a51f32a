"""The OpenAPI description, served at /openapi.json. Tests compare it with the routes and, by schemathesis, with the server.

The parts that operations share (schemas, parameters, responses by HTTP status) are data in openapi.json in this folder.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

Description = dict[str, Any]

_REFUSALS = "400 401 403 408 413 429 507"
_SET_REFUSALS = "400 401 403 404 429"
_FINDER = "cuda torch python sm platform"


def describe(version: str) -> Description:
    """The whole description, as OpenAPI 3.1. `version` is the version of the program."""
    from index.store.schemas import DeviceCertificate, MatrixDocument

    description: Description = json.loads(resources.files("index.serving").joinpath("openapi.json").read_text())
    for model in (MatrixDocument, DeviceCertificate):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        description["components"]["schemas"] |= {**schema.pop("$defs", {}), model.__name__: schema}
    description["info"]["version"] = version
    description["paths"] = {path: _path(path, operations) for path, operations in _paths().items()}
    return description


def _paths() -> dict[str, Description]:
    explained = _get("How to upload to this address, as text.", "200-text")
    return {
        **_simple(""),
        **_simple("/{view}"),
        **_simple("/preview/{token}"),
        "/legacy/": {**explained, **_upload("Upload a wheel or sdist, as twine and uv publish do.")},
        "/legacy": {**explained, **_upload("The same, for clients that omit the slash.")},
        "/nightly/legacy/": {**explained, **_upload("Upload to the nightly channel.")},
        "/stage/{set_name}/legacy/": {**explained, **_upload("Upload into a staged set.")},
        **_stages(),
        "/files/{sha256}/{filename}": _file("A file or its metadata; immutable."),
        "/packages/{filename}": _file("The same by file name, as pypiserver serves it."),
        "/packages/": _get("A list of all files, as pypiserver serves it.", "200-page"),
        **_records(),
        **_trusted(),
        "/health": _get("The process is running.", "200-text"),
        "/ready": _get("The catalogue is readable and the disk has free space.", "200-text 507"),
        "/metrics": _get("Metrics for Prometheus.", "200-text"),
        "/changes": _get("Changes after a serial, for mirrors.", "200-changes", "since"),
        "/openapi.json": _get("This description.", "200-description"),
        "/": {
            **_page("All projects, as a web page.", parameters="q"),
            **_upload("Upload a file, at the address that pypiserver uses."),
        },
        **_pages(),
        "/static/{name}": _get("Style sheet, script and icon.", "200-static 404"),
        "/{name}": _get("Redirect from a project's name to its page, as in pypiserver.", "303 404"),
        "/{name}/": _get("The same.", "303 404"),
    }


def _stages() -> dict[str, Description]:
    """Operations on sets."""
    lock = _get("The lock of a set, by sha256.", "200-text 404")
    pylock = _get("The pylock.toml of a set, as its author wrote it (PEP 751).", "200-toml 304 404", "If-None-Match")
    return {
        "/stage/{set_name}": {
            "get": _operation("The state of a set, and its missing wheels.", f"200-set {_SET_REFUSALS}", secured=True),
            "put": _operation(
                "Create a set, with the wheels that it must contain before it can be published.",
                f"200-set {_REFUSALS}",
                body="matrix",
                secured=True,
            ),
        },
        "/stage/{set_name}/pylock.toml": {
            "put": _operation("Store the set's pylock.toml.", f"200-set {_REFUSALS} 404", body="pylock", secured=True)
        },
        "/stage/{set_name}/publish": {"post": _operation("Publish the whole set.", f"200-set {_SET_REFUSALS}", secured=True)},
        "/{set_name}/requirements.lock": lock,
        "/preview/{token}/requirements.lock": lock,
        "/{set_name}/pylock.toml": pylock,
        "/preview/{token}/pylock.toml": pylock,
    }


def _records() -> dict[str, Description]:
    """Operations on records, logs, matrices and certificates."""
    record, log = _stored("record", "The record of a build."), _stored("text", "The log of a build.")
    return {
        "/records/{id}": {**record, "put": _kept("record of a build", "record")},
        "/records/{id}/log": {**log, "put": _kept("log of a build", "log")},
        "/preview/{token}/records/{id}": _stored("record", "The same for a staged build."),
        "/preview/{token}/records/{id}/log": _stored("text", "The same for a staged build."),
        "/matrix/{matrix}": {
            **_stored("matrix", "The cells of a matrix, whether built or not."),
            "put": _kept("matrix that the board shows", "cells"),
        },
        "/certificates/{digest}": {
            **_stored("certificate", "A certificate: results that a GPU computed with device code."),
            "put": _kept("certificate of device code", "certificate"),
        },
        "/cache/{kind}/{recipe}/{key}": {
            **_get("An entry of the shared compiler cache.", "200-entry 404"),
            "put": _operation("Keep an entry.", f"200-text {_REFUSALS} 404", body="entry", secured=True),
        },
    }


def _trusted() -> dict[str, Description]:
    """Trusted publishing (PEP 807, a draft)."""
    return {
        "/.well-known/pytp": _get(
            "The address where a workflow gets an upload token.", "200-discovery 404-problem 406-problem", "discover"
        ),
        "/_/oidc/audience": _get(
            "The audience that identity tokens for this index must name.", "200-audience 404-problem 406-problem"
        ),
        "/_/oidc/mint-token": {
            "post": _operation(
                "Exchange the identity token of a publisher for a short-lived upload token.",
                "200-minted 400-problem 401-problem 403-problem 404-problem 406-problem 408-problem 424-problem 429-problem",
                body="identity",
            )
        },
        "/_/oidc/burn-token": {
            "post": _operation(
                "Revoke a short-lived upload token.",
                "202-burned 400-problem 406-problem 408-problem 429-problem",
                body="identity",
            )
        },
    }


def _pages() -> Description:
    """The web pages, except the first one."""
    return {
        "/project/{name}/": _page("A project and its wheel finder.", "200-page 301 304 404-page", _FINDER),
        "/project/{name}": _page("Redirected.", "301 404-page"),
        "/project/{name}/choose.py": _get(
            "A program that prints the right install command for this machine.", "200-program 304 404-page", "If-None-Match"
        ),
        "/wheel/{filename}/": _page("The page of one file.", "200-page 304 404-page"),
        "/board/": _page("The last build of each recipe and stack."),
        "/board/{id}/": _page("The page of one build.", "200-page 304 404-page"),
        "/sets/": _page("The page of sets and views."),
    }


def _path(path: str, operations: Description) -> Description:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    inherent = _references("parameters", names)
    return {method: {**each, "parameters": inherent + each["parameters"]} for method, each in operations.items()}


def _operation(summary: str, answers: str, parameters: str = "", *, body: str = "", secured: bool = False) -> Description:
    """`answers`, `parameters` and `body` name entries of openapi.json; names of responses begin with the HTTP status."""
    operation: Description = {"summary": summary, "parameters": _references("parameters", parameters.split())}
    if secured:
        operation["security"] = [{"token": []}, {"bearer": []}]
    if body:
        operation["requestBody"] = {"$ref": f"#/components/requestBodies/{body}"}
    names = answers.split()
    operation["responses"] = dict(zip([name[:3] for name in names], _references("responses", names), strict=True))
    return operation


def _references(kind: str, names: list[str]) -> list[Description]:
    return [{"$ref": f"#/components/{kind}/{name}"} for name in names]


def _get(summary: str, answers: str, parameters: str = "") -> Description:
    return {"get": _operation(summary, answers, parameters)}


def _simple(prefix: str) -> dict[str, Description]:
    forms, more = ": JSON (PEP 691) or HTML (PEP 503).", "301 304 404 406"
    return {
        f"{prefix}/simple/": _get(f"The list of projects{forms}", f"200-projects {more}", "format If-None-Match"),
        f"{prefix}/simple/{{project}}/": _get(f"One project's files{forms}", f"200-project {more}", "format If-None-Match"),
    }


def _upload(summary: str) -> Description:
    return {"post": _operation(summary, f"200-text {_REFUSALS} 424", body="upload", secured=True)}


def _file(summary: str) -> Description:
    return _get(summary, "200-file 206-file 304 400 403 404 410 416", "If-None-Match Range If-Range")


def _stored(kind: str, summary: str) -> Description:
    return _get(summary, f"200-{kind} 206-{kind} 304 400 404 416", "If-None-Match Range If-Range")


def _kept(what: str, body: str) -> Description:
    return _operation(f"Store the {what}.", f"200-text {_REFUSALS}", body=body, secured=True)


def _page(summary: str, answers: str = "200-page 304", parameters: str = "") -> Description:
    return _get(summary, answers, f"If-None-Match {parameters}")
