"""What an address of uploads says to whoever opens it with a browser: how to upload there, in lines to copy."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from index.web.site import Site

ADDRESSES = ("/legacy/", "/legacy", "/nightly/legacy/", "/stage/{set_name}/legacy/")

TEXT = """\
Wheels and sdists are uploaded here, with POST, as twine and uv publish do it. `index token create` prints a token (gf_...).

  TWINE_USERNAME=__token__ TWINE_PASSWORD=gf_... twine upload --verbose --repository-url {address} dist/*
  UV_PUBLISH_TOKEN=gf_... uv publish --publish-url {address} --check-url {simple} dist/*

With --verbose twine shows the sentence that says why a file was refused; without it, only "400 Bad Request".
With --check-url uv passes over the files that are here already.
Repeating an upload is harmless: the same bytes under the same name are answered with 200, and nothing changes.
"""


def routes(site: Site) -> list[Route]:
    """GET of each address of uploads."""
    return [Route(address, partial(_explain, site), methods=["GET"]) for address in ADDRESSES]


async def _explain(site: Site, request: Request) -> Response:
    base = site.base(request)
    path = request.url.path.rstrip("/") + "/"
    view = "/nightly" if path.startswith("/nightly/") else ""  # a staged set has no view: what is in it is not public yet
    text = TEXT.format(address=base + path, simple=f"{base}{view}/simple/")
    return PlainTextResponse(text, headers={"Cache-Control": "no-cache"})
