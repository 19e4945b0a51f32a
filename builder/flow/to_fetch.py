"""List the hosts from which a build will fetch sources and interpreter that are not on this machine. No request is sent."""

from __future__ import annotations

from urllib.parse import urlsplit

from builder import fetch
from builder.ground.interpreters import tree
from builder.planning.plan import Plan
from builder.planning.settings import Settings

_PACKAGES = {"pkg:pypi": "the Python index", "pkg:deb": "the Debian archive"}


def sentence(plan: Plan, settings: Settings) -> str:
    """The hosts, in one sentence; empty if nothing is missing."""
    hosts = sorted({host for address in _addresses(plan, settings) if (host := _host(settings.redirect(address)))})
    return f"fetches files from: {', '.join(hosts)}" if hosts else ""


def _addresses(plan: Plan, settings: Settings) -> list[str]:
    interpreter = plan.stack.interpreter
    addresses = [address for part in (plan, *plan.trees) for address in fetch.absent_sources(part.recipe.data, settings)]
    return addresses + (tree.absent(interpreter, plan.host, plan.target, settings) if interpreter is not None else [])


def _host(address: str) -> str | None:
    return _PACKAGES.get(address.partition("/")[0]) or urlsplit(address).hostname
