"""Use the shared compiler cache during a compile, through a socket in the build's folder, and report its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from builder.compiling import ccache_socket
from builder.flow.attempt import Attempt
from builder.proof import shared_cache
from builder.toolchains import ccache


@contextmanager
def shared(attempt: Attempt) -> Iterator[None]:
    """Share the recipe's compiler cache during the `with` block, if settings and options allow both caches."""
    if not attempt.options.caches.compiler or not ccache.enabled(attempt.settings):
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
        if use.hits or use.misses or use.written:
            attempt.shared_cache = use
            attempt.console.step("compile", use.title)
            with attempt.log.open("a") as stream:
                stream.write(f"# {use.title}\n")
