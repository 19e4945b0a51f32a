"""Pages for people: rendered on the server, whole without JavaScript, light and dark, wide and narrow."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.resources import as_file
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from packaging.utils import parse_wheel_filename
from packaging.version import Version
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from index.errors import NotFoundError
from index.limits import Gate
from index.names import view_of_cuda
from index.pages import views
from index.pages.shelf import Shelf
from index.pages.simple import file_path
from index.pages.views import ALL, NIGHTLY, Listed
from index.serving.routes import known_name
from index.serving.service import Options, Service
from index.sets import setlock, stage
from index.store import records
from index.store.catalogue import Catalogue
from index.store.files import Store
from index.store.records import Summary

if TYPE_CHECKING:
    from jinja2 import Environment

FINDER = ("cuda", "torch", "python", "sm", "platform")
"What the wheel finder asks for, in this order."

TAIL = 25
"Lines of a failed build's log that its page shows."

_HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,255}\Z")
POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One wheel and what the finder sorts it by."""

    file: Listed
    python: str
    platform: str

    def value(self, key: str) -> tuple[str, ...]:
        """What this wheel is, under one of FINDER's names."""
        if key == "sm":
            return self.file.facts.sm
        found = {
            "cuda": self.file.facts.cuda,
            "torch": self.file.facts.torch,
            "python": self.python,
            "platform": self.platform,
        }[key]
        return (found,) if found else ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One project on the first page."""

    name: str
    version: str
    summary: str
    cudas: tuple[str, ...]
    status: str
    updated: str


_STATIC = {"style.css": "text/css", "icon.svg": "image/svg+xml"}


def _static_files() -> dict[str, bytes]:
    folder = resources("index").joinpath("people", "templates")
    return {name: folder.joinpath(name).read_bytes() for name in _STATIC}


def making() -> str:
    """A digest of what turns the catalogue into pages: after an upgrade each is made anew."""
    digest = hashlib.sha256(metadata.version("gracefarm").encode())
    with as_file(resources("index")) as folder:
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".py", ".html", ".css", ".svg"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def static_pages(
    store: Store, catalogue: Catalogue, url: str | None, keeps: Callable[..., bool]
) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every page for an export: those of the live server, less the forms that need one.

    Pages of which `keeps(project, *paths)` is true are left out: they are there already.
    """
    options = Options(base_url=url, static=True)
    service = Service(
        store=store, catalogue=catalogue, shelf=Shelf(catalogue), options=options, gate=Gate(limits=options.limits)
    )
    pages = Pages(service)

    def make(page: Callable[[Request], Response], path: str, **params: str) -> tuple[str, bytes]:
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "path_params": params}
        return f"{path[1:]}index.html", bytes(page(Request(scope)).body)

    yield from ((f"static/{name}", content) for name, content in _static_files().items())
    for row in catalogue.rows(
        "SELECT filename, project FROM file WHERE hidden = 0 AND deleted IS NULL AND lost = 0 ORDER BY filename"
    ):
        path = f"wheel/{row['filename']}/index.html"
        if keeps(row["project"], path, f"{path}.gz"):
            continue
        yield make(pages.wheel, f"/wheel/{row['filename']}/", filename=row["filename"])
    for name in pages.names():
        if keeps(name, f"project/{name}/index.html", f"project/{name}/index.html.gz"):
            continue
        yield make(pages.project, f"/project/{name}/", name=name)
    for row in catalogue.rows("SELECT id FROM public_record ORDER BY id"):
        yield make(pages.build, f"/board/{row['id']}/", id=row["id"])
    for page, path in ((pages.board, "/board/"), (pages.sets, "/sets/"), (pages.projects, "/")):
        yield make(page, path)


def unless_known(request: Request, answer: Response) -> Response:
    """The answer, or its 304."""
    etag = answer.headers.get("etag")
    if answer.status_code != 200 or etag is None or request.headers.get("if-none-match") != etag:
        return answer
    same = ("etag", "cache-control", "content-security-policy")
    return Response(status_code=304, headers={name: answer.headers[name] for name in same if name in answer.headers})


def people_routes(service: Service) -> list[Route]:
    """Everything a browser shows."""
    pages = Pages(service)
    kept = _static_files()

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in kept:
            raise NotFoundError(f"there is no {name!r} here", remedy="see /")
        return Response(kept[name], media_type=_STATIC[name], headers={"Cache-Control": "public, max-age=86400"})

    def page(make: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            def answer() -> Response:
                try:
                    return make(request)
                except NotFoundError as error:
                    return pages.missing(request, error)

            key = (request.url.path, pages.base(request)) if not request.url.query else None
            return unless_known(request, await service.painted(key, answer))

        return endpoint

    return [
        Route("/", page(pages.projects)),
        Route("/project/{name}/", page(pages.project)),
        Route("/project/{name}", page(pages.project)),
        Route("/wheel/{filename}/", page(pages.wheel)),
        Route("/board/", page(pages.board)),
        Route("/board/{id}/", page(pages.build)),
        Route("/sets/", page(pages.sets)),
        Route("/static/{name}", static),
    ]


class Pages:
    """The templates and what fills them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._known: dict[str, Row] = {}
        self._serial = -1

    @cached_property
    def templates(self) -> Environment:
        """Made for the first page that is asked for: an index that only installers read starts without."""
        from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

        found = Environment(
            loader=PackageLoader("index.people", "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        found.filters.update(size=size, duration=duration, day=lambda text: text[:10])
        return found

    def missing(self, request: Request, error: NotFoundError) -> Response:
        """What is not here, as a page: whoever follows an old link is told where to go."""
        return self._answer(request, "missing.html", status=404, cause=error.cause[:1].upper() + error.cause[1:])

    def _answer(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        # Relative addresses work under any mount point: `up` leads from this page to the first one.
        depth = request.url.path.rstrip("/").count("/") if request.url.path != "/" else 0
        up = "../" * depth if request.url.path.endswith("/") else "../" * (depth - 1)
        base = self.base(request)
        text = self.templates.get_template(template).render(
            up=up or "./", base=base, trusted=_trusted(base), static=self.service.options.static, **values
        )
        body = text.encode("utf-8", "replace")
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
        return Response(body, status_code=status, media_type="text/html; charset=utf-8", headers=headers)

    def base(self, request: Request) -> str:
        """The address that people copy."""
        if self.service.options.base_url:
            return self.service.options.base_url.rstrip("/")
        scheme, host = request.url.scheme, request.headers.get("host", "")
        if request.client and request.client.host in self.service.options.trusted_proxies:
            scheme = request.headers.get("x-forwarded-proto", scheme)
            host = request.headers.get("x-forwarded-host", host)
        return f"{'https' if scheme == 'https' else 'http'}://{host if _HOST.match(host) else 'HOST'}"

    def projects(self, request: Request) -> Response:
        """The first page."""
        wanted = request.query_params.get("q", "").strip()[:100]
        known = self._all_rows()
        rows = [row for row in known if wanted.lower() in row.name]
        return self._answer(request, "projects.html", rows=rows, wanted=wanted, total=len(known))

    def names(self) -> list[str]:
        """Every project that has a page."""
        rows = self.service.catalogue.rows(
            "SELECT DISTINCT project FROM file WHERE deleted IS NULL AND hidden = 0 AND lost = 0 ORDER BY project"
        )
        return [row["project"] for row in rows]

    def _all_rows(self) -> list[Row]:
        """Every project's row; only those that have changed are read again. Called by one thread, the painter's."""
        catalogue = self.service.catalogue
        serial = catalogue.serial()
        if serial != self._serial:
            changed = [row["name"] for row in catalogue.rows("SELECT name FROM project WHERE serial > ?", (self._serial,))]
            found = self._rows() if len(changed) > 20 else [row for name in changed for row in self._rows(name)]
            for name in changed:
                self._known.pop(name, None)
            self._known.update((row.name, row) for row in found)
            self._serial = serial
        return sorted(self._known.values(), key=lambda row: row.name)

    def _rows(self, project: str | None = None) -> list[Row]:
        found: dict[str, list[Any]] = {}
        for item in self.service.catalogue.rows(
            "SELECT file.project, file.version, file.summary, file.cuda, file.uploaded, project.status FROM file"
            " JOIN project ON project.name = file.project WHERE deleted IS NULL AND hidden = 0 AND lost = 0"
            " AND (:project IS NULL OR file.project = :project) ORDER BY file.project",
            {"project": project},
        ):
            found.setdefault(item["project"], []).append(item)
        return [_row(name, items) for name, items in found.items()]

    def project(self, request: Request) -> Response:
        """A project with its wheel finder."""
        name = known_name(request)
        if request.path_params["name"] != name or not request.url.path.endswith("/"):
            back = "../" if request.url.path.endswith("/") else ""
            return RedirectResponse(f"{back}{name}/", status_code=301)
        catalogue = self.service.catalogue
        files = [*views.files(catalogue, ALL, name), *views.files(catalogue, NIGHTLY, name)]
        if not files:
            raise NotFoundError(f"there is no project {name!r} here", remedy="see / for those that are")
        choices = sorted(
            (_choice(item) for item in files), key=lambda one: (Version(one.file.version), one.file.filename), reverse=True
        )
        asked = {key: request.query_params.get(key, "") for key in FINDER}
        shown = [one for one in choices if all(not value or value in one.value(key) for key, value in asked.items())]
        best = next((one for one in shown if one.file.yanked is None and one.file.kind == "bdist_wheel"), None)
        state = views.status(catalogue, name)
        return self._answer(
            request,
            "project.html",
            name=name,
            state=state,
            filtered=any(asked.values()),
            summary=next((row.summary for row in self._rows(name)), ""),
            finder=[(key, options(choices, key), asked[key]) for key in FINDER],
            shown=[] if state.status == "quarantined" else shown,
            total=len(choices),
            best=best if state.status != "quarantined" else None,
            view=self._view_of(best.file) if best else "",
            file_path=file_path,
        )

    def _view_of(self, file: Listed) -> str:
        """Path of the narrowest view that shows the wheel."""
        row = self.service.catalogue.row("SELECT channel FROM file WHERE filename = ?", (file.filename,))
        if row and row["channel"] == "nightly":
            return "nightly/"
        return f"{view_of_cuda(file.facts.cuda)}/" if file.facts.cuda else ""

    def _tail(self, record: Summary) -> str:
        """The last lines of a failed build's log."""
        if record.outcome != "failed" or record.log is None:
            return ""
        try:
            with self.service.store.path(record.log).open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 14)))
                lines = stream.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-TAIL:])

    def wheel(self, request: Request) -> Response:
        """One file: what it is, what the gates said, where it came from."""
        catalogue = self.service.catalogue
        row = catalogue.row(
            "SELECT * FROM file WHERE filename = ? AND hidden = 0 AND deleted IS NULL AND lost = 0",
            (request.path_params["filename"],),
        )
        if row is None:
            raise NotFoundError("there is no such wheel here", remedy="see the project's page")
        item = views.listed(row)
        record = _record(catalogue.row("SELECT * FROM record WHERE id = ?", (item.build,))) if item.build else None
        return self._answer(
            request,
            "wheel.html",
            file=item,
            record=record,
            document=self._document(record),
            sets=[
                one["set_name"]
                for one in catalogue.rows(
                    "SELECT set_name FROM member JOIN release_set ON name = set_name"
                    " WHERE file_id = ? AND state = 'published'",
                    (row["id"],),
                )
            ],
            path=file_path(item),
            view=self._view_of(item),
            state=views.status(catalogue, item.project),
        )

    def _document(self, record: Summary | None) -> Document:
        if record is None or record.document is None:
            return Document.of({})
        try:
            return Document.of(json.loads(self.service.store.path(record.document).read_bytes()))
        except (OSError, ValueError):
            return Document.of({})

    def board(self, request: Request) -> Response:
        """Recipe by stack, with the last result of each."""
        newest: dict[tuple[str, str], Summary] = {}
        for one in records.all_records(self.service.catalogue):
            if one.outcome:
                newest.setdefault((one.recipe or "?", column(one)), one)
        return self._answer(
            request,
            "board.html",
            recipes=sorted({recipe for recipe, _ in newest}),
            columns=sorted({stack for _, stack in newest}),
            newest=newest,
            failed=sum(one.outcome == "failed" for one in newest.values()),
        )

    def build(self, request: Request) -> Response:
        """One build, failed or not."""
        row = self.service.catalogue.row("SELECT * FROM public_record WHERE id = ?", (request.path_params["id"],))
        record = _record(row)
        if record is None:
            raise NotFoundError("there is no such build here", remedy="see /board/")
        names = self.service.catalogue.rows(
            "SELECT filename FROM file WHERE build = ? AND hidden = 0 AND deleted IS NULL", (record.id,)
        )
        return self._answer(
            request,
            "build.html",
            record=record,
            document=self._document(record),
            wheels=[one["filename"] for one in names],
            tail=self._tail(record),
        )

    def sets(self, request: Request) -> Response:
        """Published sets and views."""
        with self.service.catalogue.moment():
            return self._sets(request)

    def _sets(self, request: Request) -> Response:
        published = [one for one in stage.all_sets(self.service.catalogue) if one.state == "published"]
        shown = [view for view in views.public(self.service.catalogue) if view.kind != "set"]
        lockless = {one.name: self._lockless(one.name) for one in published}
        return self._answer(request, "sets.html", sets=published, views=shown, lockless=lockless)

    def _lockless(self, name: str) -> str:
        """Why the set has no lock; "" when it has."""
        try:
            setlock.render(self.service.catalogue, views.View(kind="set", prefix=(name,), argument=name))
        except NotFoundError as error:
            return error.cause
        return ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One verdict."""

    gate: str
    status: str
    summary: str
    details: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of the build."""

    name: str
    seconds: float | None
    peak_memory: int | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """The parts of a record that pages show."""

    verdicts: tuple[Verdict, ...]
    stages: tuple[Step, ...]
    source: Mapping[str, Any]
    remedy: str

    @staticmethod
    def of(document: Mapping[str, Any]) -> Document:
        """Read what is there; what has another shape is left out."""
        inputs = _mapping(document.get("inputs"))
        recipe = _mapping(inputs.get("recipe"))
        return Document(
            verdicts=tuple(_verdict(item) for item in _mappings(document.get("verdicts"), "gate")),
            stages=tuple(_step(item) for item in _mappings(document.get("stages"), "name")),
            source=_mapping(recipe.get("source")),
            remedy=_text(_mapping(document.get("failure")), "remedy"),
        )


def _verdict(item: Mapping[str, Any]) -> Verdict:
    details = item.get("details")
    return Verdict(
        gate=_text(item, "gate"),
        status=_text(item, "status"),
        summary=_text(item, "summary"),
        details=tuple(one for one in details if isinstance(one, str)) if isinstance(details, list) else (),
    )


def _step(item: Mapping[str, Any]) -> Step:
    peak = records.number(item.get("peak_memory"))
    return Step(
        name=_text(item, "name"),
        seconds=records.number(item.get("wall_s")),
        peak_memory=int(peak) if peak else None,
        note=_text(item, "note"),
    )


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object, key: str) -> tuple[Mapping[str, Any], ...]:
    items = value if isinstance(value, list) else []
    return tuple(item for item in items if isinstance(item, Mapping) and isinstance(item.get(key), str))


def _record(row: Any) -> Summary | None:
    return records.summary(row) if row is not None else None


def _row(name: str, items: Sequence[Any]) -> Row:
    newest = max(items, key=lambda item: Version(item["version"]))
    return Row(
        name=name,
        version=Version(newest["version"]).public,
        summary=newest["summary"],
        cudas=tuple(sorted({item["cuda"] for item in items if item["cuda"]}, key=_natural)),
        status=newest["status"],
        updated=max(item["uploaded"] for item in items),
    )


def _trusted(base: str) -> str:
    """The option without which pip ignores an index that speaks plain http from another machine; "" where it needs none."""
    try:
        host = urlsplit(base).hostname or ""
    except ValueError:  # a Host header with half a bracket
        return ""
    if base.startswith("https:") or host == "localhost" or host.startswith("127.") or host == "::1":
        return ""
    return f" --trusted-host {host}"


def column(record: Summary) -> str:
    """Where the board has a build: its stack and its target."""
    return " ".join(part for part in (record.stack, record.target) if part) or "?"


def _choice(item: Listed) -> Choice:
    if item.kind != "bdist_wheel":
        return Choice(file=item, python="source", platform="any")
    tags = parse_wheel_filename(item.filename)[3]
    abi3 = any(tag.abi == "abi3" for tag in tags)
    python = min(tag.interpreter for tag in tags)
    arches = {re.sub(r"^(manylinux(_\d+_\d+|\d+)|musllinux_\d+_\d+|linux|macosx_\d+_\d+)_", "", tag.platform) for tag in tags}
    return Choice(file=item, python=f"{python}+" if abi3 else python, platform=min(arches))


def options(choices: Sequence[Choice], key: str) -> list[str]:
    """What can be chosen, in a natural order."""
    found = {value for one in choices for value in one.value(key)}
    return sorted(found, key=_natural)


def _natural(text: str) -> list[object]:
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", text))]


def size(count: int) -> str:
    """Bytes for people, in the units of disks and networks' tools: KiB, MiB, GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
