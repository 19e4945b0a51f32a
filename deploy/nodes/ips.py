"""Reading ips.txt, the tutorial's list of nodes."""

from __future__ import annotations

from pathlib import Path

from deploy.nodes.config import check_address
from gracefarm.errors import ConfigError


def read_ips(path: Path) -> tuple[str, ...]:
    """The addresses in ips.txt: one a line, `#` starts a comment, empty lines count for nothing.

    Raises:
        ConfigError: absent, empty, an address twice, or a line that is no address; names the line.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file", remedy="one address a line, the head first") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file", remedy="one address a line, the head first") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        address = line.split("#", 1)[0].strip()
        if not address:
            continue
        try:
            check_address(address)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}", remedy="one address a line, the head first") from error
        if address in seen:
            raise ConfigError(
                f"{path}:{number}: {address} stands in line {seen[address]} already", remedy="remove one of them"
            )
        seen[address] = number
    if not seen:
        raise ConfigError(f"{path}: no address", remedy="one address a line, the head first")
    return tuple(seen)
