"""Trusted proxies: the index uses their X-Forwarded-* headers to find the client's address."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from starlette.types import Scope

from gracefarm.errors import UsageError

_REMEMBERED = 1000


class Proxies:
    """The value of `--trusted-proxy`."""

    def __init__(self, *networks: IPv4Network | IPv6Network) -> None:
        self._networks = networks
        self._trusts = lru_cache(_REMEMBERED)(self._look)

    def __contains__(self, address: object) -> bool:
        return bool(self._networks) and isinstance(address, str) and self._trusts(address)

    def _look(self, address: str) -> bool:
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(parsed in network for network in self._networks)


def client_address(scope: Scope, trusted: Proxies) -> str:
    """The client's address: from the X-Forwarded-For header of a trusted proxy, else the peer's address.

    The header may occur several times, once per proxy; all lines together form one list (RFC 9110, 5.3).
    """
    peer = scope["client"][0] if scope.get("client") else "-"
    if peer in trusted:
        lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for hop in reversed([part.strip() for part in ",".join(lines).split(",")]):
            if hop and hop not in trusted:
                return hop[:64]
    return str(peer)


def parse(texts: Iterable[str]) -> Proxies:
    """Parse addresses (10.0.0.1, ::1) and networks (10.0.0.0/8).

    Raises:
        UsageError: a text is neither.
    """
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise UsageError(
                f"--trusted-proxy {text}: {error}", remedy="give an address such as 10.0.0.1 or a network such as 10.0.0.0/8"
            ) from None
    return Proxies(*networks)
