"""Pages for people."""

from __future__ import annotations

from starlette.routing import Route

from index.service import Service


def people_routes(service: Service) -> list[Route]:
    """Everything a browser shows."""
    return []
