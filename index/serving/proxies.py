"""Trusted proxies: addresses and networks whose X-Forwarded-* headers are believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from gracefarm.errors import UsageError

_REMEMBERED = 1000


@dataclass(frozen=True)
class Proxies:
    """What `--trusted-proxy` named."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    _known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def __contains__(self, address: object) -> bool:
        if not self.networks or not isinstance(address, str):
            return False
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[address] = self._look(address)
        return found

    def _look(self, address: str) -> bool:
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        return any(parsed in network for network in self.networks)


def parse(texts: Iterable[str]) -> Proxies:
    """Addresses (10.0.0.1, ::1) and networks (10.0.0.0/8).

    Raises:
        UsageError: anything else.
    """
    found = []
    for text in texts:
        try:
            found.append(ip_network(text))
        except ValueError as error:
            raise UsageError(
                f"--trusted-proxy {text}: {error}", remedy="give an address as 10.0.0.1, or a network as 10.0.0.0/8"
            ) from None
    return Proxies(tuple(found))
