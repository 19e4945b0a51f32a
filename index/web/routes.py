"""Routes of the web pages. They are rendered on the server and work without JavaScript, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from index.errors import NotFoundError
from index.web import board, builds, choose, wheel
from index.web.projects import ProjectPages
from index.web.sets import sets
from index.web.site import Site

RenderPage = Callable[[tuple[str, str] | None, Callable[[], Response]], Awaitable[Response]]
"Renders a page in the page thread; with a key, the page is cached until the store changes."

_MEDIA = {"style.css": "text/css", "icon.svg": "image/svg+xml", "copy.js": "text/javascript"}


def static_files() -> dict[str, bytes]:
    """Name and content of the static files."""
    folder = resources.files("index").joinpath("web", "templates")
    return {name: folder.joinpath(name).read_bytes() for name in _MEDIA}


def web_routes(site: Site, render_page: RenderPage) -> list[Route]:
    """The routes of all web pages."""
    projects = ProjectPages(site)
    contents = static_files()

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in contents:
            raise NotFoundError(
                f"this index has no {name!r}", remedy="open the page / of this index, which lists all projects"
            )
        return Response(contents[name], media_type=_MEDIA[name], headers={"Cache-Control": "public, max-age=86400"})

    def page(make: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            def answer() -> Response:
                try:
                    return make(request)
                except NotFoundError as error:
                    return site.missing(request, error)

            key = (request.url.path, site.base(request)) if not request.url.query else None
            return _unless_known(request, await render_page(key, answer))

        return endpoint

    return [
        Route("/", page(projects.first)),
        Route("/project/{name}/", page(projects.project)),
        Route("/project/{name}", page(projects.project)),
        Route(f"/project/{{name}}/{choose.FILENAME}", page(partial(choose.choose, site))),
        Route("/wheel/{filename}/", page(partial(wheel.wheel, site))),
        Route("/board/", page(partial(board.board, site))),
        Route("/board/{id}/", page(partial(builds.build, site))),
        Route("/sets/", page(partial(sets, site))),
        Route("/static/{name}", static),
    ]


def _unless_known(request: Request, answer: Response) -> Response:
    """The response, or a 304."""
    etag = answer.headers.get("etag")
    if answer.status_code != 200 or etag is None or request.headers.get("if-none-match") != etag:
        return answer
    same = ("etag", "cache-control", "content-security-policy")
    return Response(status_code=304, headers={name: answer.headers[name] for name in same if name in answer.headers})
