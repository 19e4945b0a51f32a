"""The program that selects a project's wheel for the machine on which it runs: data/choose.py with a list of the wheels."""

from __future__ import annotations

import json
from importlib import resources

from packaging.version import Version
from starlette.requests import Request
from starlette.responses import Response

from index.errors import NotFoundError
from index.names import name_in_address, wheel_tags
from index.simple_api import views
from index.simple_api.simple import file_path
from index.web.finder import WheelChoice
from index.web.projects import choices_of
from index.web.site import Site

FILENAME = "choose.py"
MEDIA = "text/x-python; charset=utf-8"
_MARK = '"__WHEELS__"'


def choose(site: Site, request: Request) -> Response:
    """GET /project/NAME/choose.py: a program, served as plain text."""
    name = name_in_address(request.path_params["name"])
    if views.status(site.catalogue, name).status == "quarantined":
        raise NotFoundError(f"the project {name} is quarantined", remedy="see the page of the project, which gives the reason")
    choices = choices_of(site.catalogue, name)
    base = site.base(request)
    offered = [choice for choice in choices if choice.recommended]
    ranks = _ranks({choice.file.version for choice in offered})
    document = {"name": name, "wheels": [_wheel(choice, base, ranks[choice.file.version]) for choice in offered]}
    program = resources.files("index.web").joinpath("data", FILENAME).read_text()
    body = program.replace(_MARK, ascii(json.dumps(document)))
    return site.answer(body.encode(), MEDIA)


def _ranks(versions: set[str]) -> dict[str, int]:
    """Rank of each version, as in installers: the newest public version first, pre-releases after all others."""
    parsed = {text: Version(text) for text in versions}
    order = sorted({(not version.is_prerelease, Version(version.public)) for version in parsed.values()}, reverse=True)
    places = {key: place for place, key in enumerate(order)}
    return {text: places[not version.is_prerelease, Version(version.public)] for text, version in parsed.items()}


def _wheel(choice: WheelChoice, base: str, rank: int) -> dict[str, object]:
    item = choice.file
    facts = item.facts
    return {
        "version": item.version,
        "rank": rank,
        "url": item.url or f"{base}/{file_path(item)}#sha256={item.sha256}",
        "tags": sorted([tag.interpreter, tag.abi, tag.platform] for tag in wheel_tags(item.filename)),
        "pythons": list(choice.pythons) if item.requires_python else None,
        "cuda": facts.cuda or "",
        "torch": facts.torch or "",
        "sm": list(facts.sm),
    }
