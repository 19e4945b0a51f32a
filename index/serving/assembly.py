"""Assemble the server of a root: the service, the routes, and the front that receives every request."""

from __future__ import annotations

from index.limits import ClientGate
from index.serving import cache, documents, sets, trusted
from index.serving.front import Front
from index.serving.routes import starlette_app
from index.serving.service import IndexService, ServeOptions
from index.simple_api.page_cache import PageCache
from index.store import variants
from index.store.catalogue import open_catalogue
from index.store.files import Store
from index.trust.attestations import AttestationVerifier
from index.web import uploading
from index.web.routes import web_routes
from index.web.site import Site


def build(store: Store, options: ServeOptions) -> Front:
    """The complete ASGI application."""
    store.prepare()
    catalogue = open_catalogue(store.catalogue_path)
    with_variants = variants.projects(catalogue.database)
    if with_variants:  # another version of this program may have written them in another form
        with catalogue.change("index") as change:
            change.touched.update(with_variants)
    service = IndexService(
        store=store,
        catalogue=catalogue,
        page_cache=PageCache(catalogue, base_url=options.base_url),
        options=options,
        gate=ClientGate(limits=options.limits),
        attestations=AttestationVerifier(offline=options.sigstore_offline),
    )

    site = Site(store=store, catalogue=catalogue, base_url=options.base_url, trusted_proxies=options.trusted_proxies)

    def end() -> None:
        front.log.close()
        service.close()

    more = [*sets.routes(service), *documents.routes(service), *cache.routes(service), *trusted.routes(service, site.base)]
    more += [*web_routes(site, service.rendered), *uploading.routes(site)]
    front = Front(service, starlette_app(service, more, end))
    return front
