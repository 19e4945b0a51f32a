"""The OpenAPI description, served at /openapi.json. Tests hold it against the routes and, by schemathesis, the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from index.pages import negotiate

JSON, HTML, PLAIN = negotiate.JSON, negotiate.HTML, "text/html"
TEXT = "text/plain"

Spec = dict[str, Any]

_PARAMETERS: Mapping[str, tuple[str, str]] = {
    "project": ("Name of a project; other spellings than the normalised one are redirected.", ""),
    "view": ("cu130 and its like, nightly, or the name of a published set.", r"^[a-z0-9][a-z0-9._-]*$"),
    "token": ("The secret part of a staged set's preview address.", ""),
    "set_name": ("A staged set.", r"^[a-z0-9][a-z0-9._-]*$"),
    "sha256": ("Digest of the file, in lower case.", r"^[0-9a-f]{64}$"),
    "filename": ("Name of a wheel or sdist, or that and .metadata (PEP 658).", ""),
    "id": ("A build id.", r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"),
    "name": ("A project or a file.", ""),
}

_FILE: Spec = {
    "type": "object",
    "required": ["filename", "url", "hashes", "size", "upload-time", "yanked", "core-metadata"],
    "properties": {
        "filename": {"type": "string"},
        "url": {"type": "string"},
        "hashes": {
            "type": "object",
            "required": ["sha256"],
            "additionalProperties": False,
            "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
        },
        "size": {"type": "integer", "minimum": 0},
        "upload-time": {"type": "string", "format": "date-time"},
        "requires-python": {"type": "string"},
        "yanked": {"type": ["boolean", "string"]},
        "core-metadata": {"type": ["boolean", "object"]},
        "_cuda": {"type": "string"},
        "_torch": {"type": "string"},
        "_sm": {"type": "array", "items": {"type": "string"}},
        "_glibc": {"type": "string"},
        "_record": {"type": "string", "description": "Address of the build's record, relative to the page."},
    },
    "additionalProperties": False,
}
_META: Spec = {"type": "object", "required": ["api-version"], "properties": {"api-version": {"const": "1.4"}}}
_SCHEMAS: Spec = {
    "Project": {
        "type": "object",
        "required": ["meta", "name", "project-status", "versions", "files"],
        "properties": {
            "meta": _META,
            "name": {"type": "string"},
            "project-status": {
                "type": "object",
                "required": ["status"],
                "properties": {
                    "status": {"enum": ["active", "archived", "deprecated", "quarantined"]},
                    "reason": {"type": "string"},
                },
            },
            "versions": {"type": "array", "items": {"type": "string"}},
            "files": {"type": "array", "items": _FILE},
        },
    },
    "Projects": {
        "type": "object",
        "required": ["meta", "projects"],
        "properties": {
            "meta": _META,
            "projects": {
                "type": "array",
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    },
    "Changes": {
        "type": "object",
        "required": ["serial", "changes"],
        "properties": {
            "serial": {"type": "integer"},
            "changes": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["serial", "time", "action", "subject"],
                    "properties": {
                        "serial": {"type": "integer"},
                        "time": {"type": "string", "format": "date-time"},
                        "action": {"type": "string"},
                        "subject": {"type": "string"},
                    },
                },
            },
        },
    },
    "Matrix": {
        "type": "object",
        "required": ["expect"],
        "properties": {"expect": {"type": "array", "items": {"type": "string"}}},
    },
    "Set": {
        "type": "object",
        "required": ["name", "state", "expect", "files", "missing", "upload", "preview", "simple"],
        "properties": {
            "name": {"type": "string"},
            "state": {"enum": ["staged", "published", "dropped"]},
            "expect": {"type": "array", "items": {"type": "string"}},
            "files": {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
            "missing": {"type": "array", "items": {"type": "string"}},
            "upload": {"type": ["string", "null"]},
            "preview": {"type": ["string", "null"]},
            "simple": {"type": ["string", "null"]},
        },
        "additionalProperties": False,
    },
    "Record": {"type": "object", "description": "docs/index-records.md says what is read of it."},
    "Upload": {
        "type": "object",
        "required": [":action", "content"],
        "properties": {
            ":action": {"const": "file_upload"},
            "protocol_version": {"const": "1"},
            "name": {"type": "string"},
            "version": {"type": "string"},
            "filetype": {"enum": ["bdist_wheel", "sdist"]},
            "sha256_digest": {"type": "string"},
            "md5_digest": {"type": "string"},
            "blake2_256_digest": {"type": "string"},
            "content": {"type": "string", "format": "binary"},
        },
    },
}

_SAYS = {
    200: "Here it is.",
    206: "The range asked for.",
    301: "The page's one address.",
    303: "The project's page.",
    304: "Still as it was; the ETag is repeated.",
    400: "Refused: cause and remedy in one sentence.",
    401: "A token is needed, or this one is not known.",
    403: "The token does not reach so far, the name is not hosted here, or the project is archived or in quarantine.",
    404: "Not here.",
    406: "Not in that form.",
    408: "The client stopped sending.",
    410: "Deleted on purpose; the name is never used again.",
    413: "Larger than this index takes.",
    416: "The range is outside the file.",
    429: "Too many writes, open uploads or refused tokens.",
    507: "The index's disk is full.",
}
_REFUSED = (400, 401, 403, 408, 413, 429, 507)


def _ref(name: str) -> Spec:
    return {"$ref": f"#/components/schemas/{name}"}


def _answers(codes: Iterable[int], content: Mapping[str, Spec]) -> Spec:
    found: Spec = {}
    for code in codes:
        found[str(code)] = {"description": _SAYS[code]}
        if code in (200, 206):
            found[str(code)]["content"] = {media: {"schema": schema} for media, schema in content.items()}
        elif code >= 400:
            found[str(code)]["content"] = {TEXT: {"schema": {"type": "string"}}}
    return found


def _operation(path: str, summary: str, codes: Iterable[int], content: Mapping[str, Spec], **more: Any) -> Spec:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    parameters = [*(_parameter(name) for name in names), *more.pop("parameters", ())]
    found: Spec = {"summary": summary, "responses": _answers(codes, content), **more}
    return found | ({"parameters": parameters} if parameters else {})


def _parameter(name: str) -> Spec:
    text, pattern = _PARAMETERS[name]
    schema: Spec = {"type": "string", "minLength": 1} | ({"pattern": pattern} if pattern else {})
    return {"name": name, "in": "path", "required": True, "description": text, "schema": schema}


def _header(name: str, text: str) -> Spec:
    return {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}


def _query(name: str, schema: Spec) -> Spec:
    return {"name": name, "in": "query", "schema": schema}


_MATCH = _header("If-None-Match", "ETags; 304 when one of them is the page's.")
_RANGE = (_MATCH, _header("Range", "bytes=FIRST-LAST"), _header("If-Range", "An ETag."))
_FORMAT = _query("format", {"enum": [JSON, HTML, PLAIN]})
_STRING: Spec = {"type": "string"}
_BINARY: Spec = {"type": "string", "format": "binary"}
_SECURED: Spec = {"security": [{"token": []}, {"bearer": []}]}


def _simple(prefix: str) -> Spec:
    pages = {"": ("The list of projects", "Projects"), "{project}/": ("One project's files", "Project")}
    return {
        f"{prefix}/simple/{rest}": {
            "get": _operation(
                f"{prefix}/simple/{rest}",
                f"{summary}: JSON (PEP 691) or HTML (PEP 503).",
                (200, 301, 304, 404, 406),
                {JSON: _ref(schema), HTML: _STRING, PLAIN: _STRING},
                parameters=(_FORMAT, _MATCH),
            )
        }
        for rest, (summary, schema) in pages.items()
    }


def _upload(path: str, summary: str) -> Spec:
    body = {"required": True, "content": {"multipart/form-data": {"schema": _ref("Upload")}}}
    more = {"requestBody": body, **_SECURED}
    return {"post": _operation(path, summary, (200, *_REFUSED), {TEXT: _STRING}, **more)}


def _file(path: str, summary: str) -> Spec:
    content = {
        "application/octet-stream": _BINARY,
        "application/x-tar": _BINARY,
        TEXT: _BINARY,
        "multipart/byteranges": _BINARY,
    }
    codes = (200, 206, 304, 400, 403, 404, 410, 416)
    return {"get": _operation(path, summary, codes, content, parameters=_RANGE)}


def _record(path: str, what: str, media: str, schema: Spec) -> Spec:
    body = {"required": True, "content": {media: {"schema": schema}}}
    codes = (200, 206, 304, 400, 404, 416)
    return {
        "get": _operation(path, f"The {what}.", codes, {media: schema}, parameters=_RANGE),
        "put": _operation(path, f"Keep the {what}.", (200, *_REFUSED), {TEXT: _STRING}, requestBody=body, **_SECURED),
    }


def _stages() -> Spec:
    """A staged set: all with a token."""
    place, shown = "/stage/{set_name}", "/stage/{set_name}/publish"
    media, codes = {"application/json": _ref("Set")}, (200, *_REFUSED[:3], 404, 429)
    body = {"required": True, "content": {"application/json": {"schema": _ref("Matrix")}}}
    return {
        place: {
            "get": _operation(place, "A set's state and what it lacks.", codes, media, **_SECURED),
            "put": _operation(
                place,
                "Open a set, with the wheels that it must hold before it can be published.",
                (200, *_REFUSED),
                media,
                requestBody=body,
                **_SECURED,
            ),
        },
        shown: {"post": _operation(shown, "Show the whole set at once.", codes, media, **_SECURED)},
    }


def _page(path: str, summary: str, *, codes: tuple[int, ...] = (200, 304), **more: Any) -> Spec:
    found = {"get": _operation(path, summary, codes, {PLAIN: _STRING}, parameters=(_MATCH, *more.pop("parameters", ())))}
    if 404 in codes:
        found["get"]["responses"]["404"]["content"] = {PLAIN: {"schema": _STRING}}
    return found


def _plain(path: str, summary: str, media: str = TEXT, schema: Spec = _STRING, **more: Any) -> Spec:
    return {"get": _operation(path, summary, more.pop("codes", (200,)), {media: schema}, **more)}


def describe(version: str) -> Spec:
    """The whole description, as OpenAPI 3.1. `version` is that of the program."""
    paths: Spec = {**_simple(""), **_simple("/{view}"), **_simple("/preview/{token}")}
    paths |= {
        path: _upload(path, summary)
        for path, summary in {
            "/legacy/": "Upload a wheel or sdist, as twine and uv publish do.",
            "/legacy": "The same, for clients that drop the slash.",
            "/nightly/legacy/": "Upload to the nightly channel.",
            "/stage/{set_name}/legacy/": "Upload into a staged set.",
        }.items()
    }
    paths |= _stages()
    finder = tuple(_query(name, _STRING) for name in ("cuda", "torch", "python", "sm", "platform"))
    paths |= {
        "/files/{sha256}/{filename}": _file("/files/{sha256}/{filename}", "A file, or its metadata: immutable."),
        "/packages/{filename}": _file("/packages/{filename}", "The same by name alone, as pypiserver has it."),
        "/packages/": _plain("/packages/", "Every file, as pypiserver lists them.", PLAIN),
        "/records/{id}": _record("/records/{id}", "record of a build", "application/json", _ref("Record")),
        **{
            (path := f"/preview/{{token}}/records/{{id}}{end}"): {
                "get": _record(path, "same of a staged build", kind, schema)["get"]
            }
            for end, kind, schema in (("", "application/json", _ref("Record")), ("/log", TEXT, _STRING))
        },
        "/records/{id}/log": _record("/records/{id}/log", "log of a build", TEXT, _STRING),
        **{
            path: _plain(path, "The lock of a set, by sha256.", codes=(200, 404))
            for path in ("/{set_name}/requirements.lock", "/preview/{token}/requirements.lock")
        },
        "/health": _plain("/health", "The process lives."),
        "/ready": _plain("/ready", "The catalogue can be read and the disk has room.", codes=(200, 507)),
        "/metrics": _plain("/metrics", "For Prometheus."),
        "/changes": _plain(
            "/changes",
            "What changed after a serial, for mirrors.",
            "application/json",
            _ref("Changes"),
            parameters=(_query("since", {"type": "integer", "minimum": 0}),),
        ),
        "/openapi.json": _plain("/openapi.json", "This description.", "application/json", {"type": "object"}),
        "/": _page("/", "All projects, for people.", parameters=(_query("q", _STRING),))
        | _upload("/", "As pypiserver takes it."),
        "/project/{name}/": _page(
            "/project/{name}/", "A project and its wheel finder.", codes=(200, 301, 304, 404), parameters=finder
        ),
        "/project/{name}": _page("/project/{name}", "Redirected.", codes=(301, 404)),
        "/wheel/{filename}/": _page("/wheel/{filename}/", "One file, for people.", codes=(200, 304, 404)),
        "/board/": _page("/board/", "The last build of each recipe and stack."),
        "/board/{id}/": _page("/board/{id}/", "One build.", codes=(200, 304, 404)),
        "/sets/": _page("/sets/", "Sets and views."),
        "/static/{name}": _plain("/static/{name}", "Style and icon.", "text/css", codes=(200, 404)),
        "/{name}": _plain("/{name}", "A project by its bare name, as pypiserver redirects it.", codes=(303, 404)),
        "/{name}/": _plain("/{name}/", "The same.", codes=(303, 404)),
    }
    paths["/static/{name}"]["get"]["responses"]["200"]["content"]["image/svg+xml"] = {"schema": _STRING}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gracefarm index",
            "version": version,
            "description": "A package index for CUDA wheels: the simple API, legacy uploads, build records, pages for people.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "basic", "description": "User __token__, the token as password."},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }
