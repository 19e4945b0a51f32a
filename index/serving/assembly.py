"""The application over a root, put together from its parts."""

from __future__ import annotations

from index.limits import AdmissionGate
from index.serving import sets
from index.serving.front import Application
from index.serving.routes import starlette
from index.serving.service import IndexService, ServeOptions
from index.simple_api.page_cache import Shelf
from index.store.catalogue import open_catalogue
from index.store.files import Store
from index.web.routes import web_routes
from index.web.site import Site


def build(store: Store, options: ServeOptions) -> Application:
    """The application over a root, ready for any ASGI server."""
    store.prepare()
    catalogue = open_catalogue(store.catalogue)
    service = IndexService(
        store=store, catalogue=catalogue, shelf=Shelf(catalogue), options=options, gate=AdmissionGate(limits=options.limits)
    )

    site = Site(store=store, catalogue=catalogue, base_url=options.base_url, trusted_proxies=options.trusted_proxies)

    def end() -> None:
        application.log.close()
        service.close()

    application = Application(service, starlette(service, [*sets.routes(service), *web_routes(site, service.painted)], end))
    application.rest.state.client = application.client
    return application
