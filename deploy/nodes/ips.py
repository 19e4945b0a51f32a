"""Reads ips.txt, the list of nodes."""

from __future__ import annotations

from pathlib import Path

from deploy.nodes.config import check_address
from gracefarm.errors import ConfigError

_REMEDY = "write one address per line, the head first"


def read_ips(path: Path) -> tuple[str, ...]:
    """Read the addresses in ips.txt: one per line. `#` starts a comment; empty lines are ignored.

    Raises:
        ConfigError: the file is missing or empty, has an address twice, or has a line that is not an address.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", remedy=f"create this file: {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file", remedy=_REMEDY) from error
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        address = line.split("#", 1)[0].strip()
        if not address:
            continue
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}", remedy=_REMEDY) from error
        if address in seen:
            raise ConfigError(
                f"{path}:{number}: {address} is a duplicate of line {seen[address]}", remedy="remove one of the two lines"
            )
        seen[address] = number
    if not seen:
        raise ConfigError(f"{path}: the file has no addresses", remedy=_REMEDY)
    return tuple(seen)
