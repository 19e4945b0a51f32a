"""Trusted proxies: addresses and networks whose X-Forwarded-* headers are believed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from gracefarm.errors import UsageError

_REMEMBERED = 1000


class Proxies:
    """What `--trusted-proxy` named."""

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


def parse(texts: Iterable[str]) -> Proxies:
    """Addresses (10.0.0.1, ::1) and networks (10.0.0.0/8).

    Raises:
        UsageError: anything else.
    """
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise UsageError(
                f"--trusted-proxy {text}: {error}", remedy="give an address as 10.0.0.1, or a network as 10.0.0.0/8"
            ) from None
    return Proxies(*networks)
