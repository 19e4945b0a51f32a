"""Trusted proxies, whose X-Forwarded-* headers are believed, and the client's address behind them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from starlette.types import Scope

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


def client_address(scope: Scope, trusted: Proxies) -> str:
    """The client's address: what a trusted proxy says in X-Forwarded-For, else the peer's.

    The header may come several times, a line from each proxy; together they are one list (RFC 9110, 5.3).
    """
    peer = scope["client"][0] if scope.get("client") else "-"
    if peer in trusted:
        lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for hop in reversed([part.strip() for part in ",".join(lines).split(",")]):
            if hop and hop not in trusted:
                return hop[:64]
    return str(peer)


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
