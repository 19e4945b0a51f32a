"""Routes of files, records, locks and operation, and the application with all routes. front.py answers /simple/."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from html import escape
from importlib import metadata
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from gracefarm.errors import UsageError
from gracefarm.variants import index_filename
from index.errors import (
    ForbiddenError,
    GoneError,
    NotFoundError,
    RefusalError,
    RefusedError,
    sentence,
)
from index.names import name_in_address
from index.serving import openapi, upload
from index.serving.requests import IMMUTABLE, body_of, client_of, identify, send_stored
from index.serving.service import IndexService
from index.simple_api import negotiate, requirements, views
from index.store import provenance, records
from index.web.site import forwarded_prefix

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


async def stored_file(service: IndexService, request: Request) -> Response:
    """GET /files/SHA256/FILENAME, ….metadata and ….provenance: immutable, with ranges, without Content-Encoding."""
    sha256, filename = request.path_params["sha256"], request.path_params["filename"]
    if not _SHA256.match(sha256):
        raise NotFoundError("this index has no such file", remedy="use the links on the project's page")
    if filename.endswith(index_filename("")):
        return _variants_json(service, request, sha256, filename)
    return send_stored(service, request, *_locate(service, sha256, filename))


def _variants_json(service: IndexService, request: Request, sha256: str, filename: str) -> Response:
    """NAME-VERSION-variants.json, the current or an earlier one.

    Raises:
        NotFoundError, GoneError, ForbiddenError: the file is unknown, its release was deleted, or its project is quarantined.
    """
    row = service.catalogue.row(_VARIANTS_JSON, (sha256, filename))
    if row is None:
        raise NotFoundError(f"this index has no file {filename}", remedy="use the links on the project's page")
    _check_state(filename, row)
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": IMMUTABLE}
    match = request.headers.get("if-none-match")
    if match and negotiate.names_etag(match, etag):
        return Response(status_code=304, headers=headers)
    return Response(row["content"], media_type="application/json", headers=headers)


async def package(service: IndexService, request: Request) -> Response:
    """GET /packages/FILENAME: the address of a file in pypiserver."""
    filename = request.path_params["filename"]
    wanted = filename.removesuffix(".metadata").removesuffix(provenance.SUFFIX)
    row = service.catalogue.row("SELECT sha256 FROM file WHERE filename = ? AND hidden = 0", (wanted,))
    if row is None:
        raise NotFoundError(f"this index has no file {filename}", remedy="use the links on the project's page")
    return send_stored(service, request, *_locate(service, row["sha256"], filename))


async def packages(service: IndexService, _request: Request) -> Response:
    """GET /packages/: a list of all files, as in pypiserver."""

    def answer() -> Response:
        rows = service.catalogue.rows(
            "SELECT filename, sha256 FROM public_file JOIN project ON project.name = project"
            " WHERE channel = 'release' AND project.status <> 'quarantined' ORDER BY filename"
        )
        links = "".join(
            f'<a href="{quote(row["filename"], safe="")}#sha256={row["sha256"]}">{escape(row["filename"])}</a><br>\n'
            for row in rows
        )
        text = f"<!DOCTYPE html>\n<html><head><title>Packages</title></head><body>\n{links}</body></html>\n"
        return HTMLResponse(text, headers={"Cache-Control": "no-cache"})

    return await service.rendered(("/packages/", ""), answer)


async def bare_name(service: IndexService, request: Request) -> Response:
    """GET /NAME and /NAME/: redirect to the project's page, as in pypiserver."""
    name = name_in_address(request.path_params["name"])
    if not views.files(service.catalogue, views.ALL, name):
        raise NotFoundError(
            f"/simple/ has no project {name!r}", remedy="open the page /simple/ of this index, which lists the projects"
        )
    up = "../" if request.url.path.endswith("/") else ""
    return RedirectResponse(f"{up}simple/{name}/", status_code=303)


_LOCATE = """
SELECT file.sha256, metadata_sha256, provenance_sha256, kind, deleted, project.status
    FROM file LEFT JOIN project ON project.name = file.project
    WHERE file.sha256 = :sha256 AND filename = :filename
UNION ALL
SELECT sha256, metadata_sha256, NULL, kind, withdrawn, 'active' FROM mirrored
    WHERE sha256 = :sha256 AND filename = :filename AND url IS NULL
LIMIT 1
"""


_VARIANTS_JSON = """
SELECT content, project.status, (SELECT CASE WHEN max(deleted IS NULL) THEN NULL ELSE max(deleted) END FROM file
    WHERE file.project = variants_json.project AND file.version = variants_json.version AND variant IS NOT NULL) AS deleted
    FROM variants_json LEFT JOIN project ON project.name = project WHERE sha256 = ? AND filename = ?
"""


def _check_state(filename: str, row: sqlite3.Row) -> None:
    if row["deleted"] is not None:
        raise GoneError(f"{filename} was deleted on {row['deleted'][:10]}", remedy="choose a different version")
    if row["status"] == "quarantined":
        raise ForbiddenError(
            f"the project of {filename} is quarantined",
            remedy="use a different project, or ask the operator of this index for the reason",
        )


def _locate(service: IndexService, sha256: str, filename: str) -> tuple[str, str]:
    """Digest and media type of the content to send.

    Raises:
        NotFoundError, GoneError, ForbiddenError: the file is unknown, deleted, or its project is quarantined.
    """
    wanted = filename.removesuffix(".metadata").removesuffix(provenance.SUFFIX)
    row = service.catalogue.row(_LOCATE, {"sha256": sha256, "filename": wanted})
    if row is None:
        raise NotFoundError(f"this index has no file {filename}", remedy="use the links on the project's page")
    _check_state(filename, row)
    if wanted == filename:
        return sha256, "application/octet-stream" if row["kind"] == "bdist_wheel" else "application/x-tar"
    if filename.endswith(provenance.SUFFIX):
        if row["provenance_sha256"] is None:
            raise NotFoundError(f"this index has no attestations of {wanted}", remedy="upload the file with its attestations")
        return row["provenance_sha256"], "application/vnd.pypi.integrity.v1+json"
    if row["metadata_sha256"] is None:
        raise NotFoundError(f"this index has no metadata of {wanted}", remedy="read the metadata from the file itself")
    return row["metadata_sha256"], "text/plain; charset=utf-8"


async def record(service: IndexService, request: Request) -> Response:
    """/records/ID and /records/ID/log: GET is public, PUT requires a token."""
    identifier = records.check_id(request.path_params["id"])
    is_log = request.url.path.endswith("/log")
    if request.method in ("GET", "HEAD"):
        row = service.catalogue.row("SELECT * FROM public_record WHERE id = ?", (identifier,))
        return _send_record(service, request, row, identifier)
    token = await identify(service, request)
    async with service.gate.upload(client_of(service, request)):
        raw = await body_of(service, request)
        loop = asyncio.get_running_loop()
        common = (service.store, service.catalogue, token, identifier, raw)
        if is_log:
            await loop.run_in_executor(service.writer, records.put_log, *common)
        else:  # parsed in a thread: 32 MiB of JSON take a second
            document = await loop.run_in_executor(service.workers, records.parse, raw)
            await loop.run_in_executor(service.writer, records.put, *common, document)
    service.page_cache.refresh(now=True)
    return PlainTextResponse(f"{'log' if is_log else 'record'} {identifier} is stored\n")


async def staged_record(service: IndexService, request: Request) -> Response:
    """GET /preview/TOKEN/records/ID and …/log: builds of the wheels in that staged set."""
    identifier = records.check_id(request.path_params["id"])
    view = views.find(service.catalogue, ("preview", request.path_params["token"]))
    row = service.catalogue.row(
        "SELECT * FROM record WHERE id = ? AND EXISTS (SELECT 1 FROM file JOIN member ON member.file_id = file.id"
        " WHERE file.build = record.id AND set_name = ?)",
        (identifier, view.argument if view is not None else None),
    )
    return _send_record(service, request, row, identifier)


async def set_lock(service: IndexService, request: Request) -> Response:
    """GET /SET/requirements.lock, /preview/TOKEN/requirements.lock."""
    prefix = request.url.path.strip("/").split("/")[:-1]

    def render() -> str:
        with service.catalogue.moment():
            view = views.find(service.catalogue, prefix)
            if view is None or view.kind != "set":
                raise NotFoundError(
                    f"this index has no set {prefix[-1]!r}", remedy="open the page /sets/ of this index, which lists the sets"
                )
            return requirements.render(service.catalogue, view)

    text = await asyncio.get_running_loop().run_in_executor(service.workers, render)
    return PlainTextResponse(text, headers={"Cache-Control": "no-cache"})


def _send_record(service: IndexService, request: Request, row: sqlite3.Row | None, identifier: str) -> Response:
    is_log = request.url.path.endswith("/log")
    digest = row["log_sha256" if is_log else "document_sha256"] if row is not None else None
    if digest is None:
        raise NotFoundError(
            f"this index has no {'log' if is_log else 'record'} of {identifier}",
            remedy="open the page /board/ of this index, which lists the builds",
        )
    return send_stored(
        service, request, digest, "text/plain; charset=utf-8" if is_log else "application/json", cache="no-cache"
    )


CHANGES = 1000
"Maximum rows of one response of /changes. The next request continues from its serial."

_CHANGES = """
SELECT serial, time, action, subject FROM audit WHERE serial > ? AND serial <= ?
    AND action NOT LIKE 'token.%' AND action NOT LIKE 'set.%'
    AND (action NOT LIKE 'file.%' OR EXISTS (SELECT 1 FROM file WHERE filename = subject AND hidden = 0))
    AND (action NOT LIKE 'record.%' OR EXISTS (SELECT 1 FROM public_record WHERE id = subject))
    ORDER BY serial LIMIT ?
"""


def operation(service: IndexService) -> list[Route]:
    """/health, /ready, /metrics, /changes."""

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n", headers={"Cache-Control": "no-store"})

    async def ready(_request: Request) -> Response:
        service.catalogue.serial()
        service.check_space(0)
        return PlainTextResponse("ready\n", headers={"Cache-Control": "no-store"})

    async def prometheus(_request: Request) -> Response:
        row = service.catalogue.row("SELECT count(*) AS files, coalesce(sum(size), 0) AS bytes FROM live_file")
        service.metrics.gauges = {
            "files": ("Files listed", float(row["files"]) if row else 0.0),
            "stored_bytes": ("Bytes of the files listed", float(row["bytes"]) if row else 0.0),
            "open_uploads": ("Uploads under way", float(service.gate.open_uploads)),
            "waiting_uploads": ("Uploads that wait for a free place", float(service.gate.waiting_uploads)),
            "serial": ("Serial of the last change", float(service.catalogue.serial())),
        }
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def changes(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        newest = (
            service.catalogue.serial()
        )  # read before the rows, so that changes committed in between come with the next request
        rows = service.catalogue.rows(_CHANGES, (int(since) if since.isdecimal() and len(since) < 18 else 0, newest, CHANGES))
        serial = rows[-1]["serial"] if len(rows) == CHANGES else newest
        return JSONResponse({"serial": serial, "changes": [dict(row) for row in rows]})

    async def description(_request: Request) -> Response:
        return JSONResponse(openapi.describe(metadata.version("gracefarm")))

    return [
        Route("/openapi.json", description),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", prometheus),
        Route("/changes", changes),
    ]


async def on_refusal(service: IndexService, request: Request, error: Exception) -> Response:
    """Cause and remedy as text; installers and twine print it."""
    assert isinstance(error, RefusalError)
    headers = {"Cache-Control": "no-store"}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="gracefarm index", charset="UTF-8"'
    if error.status in (429, 507):
        headers["Retry-After"] = "5"
    text = sentence(error, forwarded_prefix(request, service.options.trusted_proxies))
    return PlainTextResponse(text + "\n", status_code=error.status, headers=headers)


async def on_usage(service: IndexService, request: Request, error: Exception) -> Response:
    """A usage error of the command line is a refused request here."""
    assert isinstance(error, UsageError)
    return await on_refusal(service, request, RefusedError(error.cause, remedy=error.remedy))


async def on_http(_request: Request, error: Exception) -> Response:
    """Requests that Starlette refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", status_code=error.status_code, headers=error.headers)


def starlette_app(service: IndexService, more: list[Route], on_end: Callable[[], None]) -> Starlette:
    """The Starlette application behind `Front`, for all except /simple/. `more`: all other routes, from assembly.py."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        on_end()

    routes = [
        *upload.routes(service),
        Route("/files/{sha256}/{filename}", partial(stored_file, service)),
        Route("/packages/", partial(packages, service)),
        Route("/packages/{filename}", partial(package, service)),
        Route("/records/{id}", partial(record, service), methods=["GET", "HEAD", "PUT"]),
        Route("/records/{id}/log", partial(record, service), methods=["GET", "HEAD", "PUT"]),
        Route("/preview/{token}/records/{id}", partial(staged_record, service)),
        Route("/preview/{token}/records/{id}/log", partial(staged_record, service)),
        Route(f"/{{set_name}}/{requirements.FILENAME}", partial(set_lock, service)),
        Route(f"/preview/{{token}}/{requirements.FILENAME}", partial(set_lock, service)),
        *operation(service),
        *more,
        upload.at_root(service),
        Route("/{name}", partial(bare_name, service)),
        Route("/{name}/", partial(bare_name, service)),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={
            RefusalError: partial(on_refusal, service),
            UsageError: partial(on_usage, service),
            HTTPException: on_http,
        },
    )
    app.router.redirect_slashes = False
    return app
