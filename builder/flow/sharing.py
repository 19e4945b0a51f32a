"""Use the shared cache during a compile, through a socket in the build's folder, and report its results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from builder.compiling import ccache_socket
from builder.flow.attempt import Attempt
from builder.proof import shared_cache
from builder.toolchains import ccache, device_store


@contextmanager
def shared(attempt: Attempt) -> Iterator[None]:
    """Share the recipe's compiler cache and device store during the `with` block, if settings and options allow it."""
    if not _uses(attempt):
        yield
        return
    cache = shared_cache.opened(attempt.settings, attempt.plan.recipe.key, attempt.options.shared_cache)
    if cache is None:
        yield
        return
    try:
        with ccache_socket.serving(attempt.work, cache):
            yield
    finally:
        use = cache.close()
        if os.path.lexists(attempt.work / f"{ccache.SOCKET}.off"):  # device_store.py creates this file
            use = use.stopped("device code: the socket in the build's folder did not answer in time")
        if use.used:
            attempt.shared_cache = use
            attempt.console.step("compile", use.title)
            with attempt.log.open("a") as stream:
                stream.write(f"# {use.title}\n")


def _uses(attempt: Attempt) -> bool:
    """Whether the compile uses a cache that can be shared."""
    caches, settings = attempt.options.caches, attempt.settings
    compiler = caches.compiler and ccache.enabled(settings)
    device = caches.device and device_store.enabled(settings) and attempt.plan.recipe.data.build.cuda
    return compiler or device
