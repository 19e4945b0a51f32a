"""The text that a browser gets at an upload address: commands for uploading, ready to copy."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from index.web.site import Site

ADDRESSES = ("/legacy/", "/legacy", "/nightly/legacy/", "/stage/{set_name}/legacy/")

TEXT = """\
Upload wheels and sdists to this address (POST) with twine or uv publish. `index token create` prints a token (gf_...).

  TWINE_USERNAME=__token__ TWINE_PASSWORD=gf_... twine upload --verbose --repository-url {address} dist/*
  UV_PUBLISH_TOKEN=gf_... uv publish --publish-url {address} --check-url {simple} dist/*

With --verbose, twine shows why a file was refused. Without --verbose, twine shows only "400 Bad Request".
With --check-url, uv skips files that the index already has.
Repeating an upload is safe: for the same bytes with the same name, the index answers 200 and changes nothing.
"""


def routes(site: Site) -> list[Route]:
    """GET of each upload address."""
    return [Route(address, partial(_explain, site), methods=["GET"]) for address in ADDRESSES]


async def _explain(site: Site, request: Request) -> Response:
    base = site.base(request)
    path = request.url.path.rstrip("/") + "/"
    view = "/nightly" if path.startswith("/nightly/") else ""  # a staged set has no view, since it is not public yet
    text = TEXT.format(address=base + path, simple=f"{base}{view}/simple/")
    return PlainTextResponse(text, headers={"Cache-Control": "no-cache"})
