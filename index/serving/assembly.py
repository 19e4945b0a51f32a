"""The application over a root, put together from its parts."""

from __future__ import annotations

from index.limits import Gate
from index.pages.shelf import Shelf
from index.people.routes import people_routes
from index.people.site import Site
from index.serving import sets
from index.serving.app import Application
from index.serving.routes import starlette
from index.serving.service import IndexService, ServeOptions
from index.store.catalogue import open_catalogue
from index.store.files import Store


def build(store: Store, options: ServeOptions) -> Application:
    """The application over a root, ready for any ASGI server."""
    store.prepare()
    catalogue = open_catalogue(store.catalogue)
    service = IndexService(
        store=store, catalogue=catalogue, shelf=Shelf(catalogue), options=options, gate=Gate(limits=options.limits)
    )

    site = Site(store=store, catalogue=catalogue, base_url=options.base_url, trusted_proxies=options.trusted_proxies)

    def end() -> None:
        application.log.close()
        service.close()

    application = Application(service, starlette(service, [*sets.routes(service), *people_routes(site, service.painted)], end))
    application.rest.state.client = application.client
    return application
