"""Run uv. Of the user's configuration it gets only the settings for reaching the index."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Sequence

import uv

from builder.fetch.urls import shown
from builder.planning.settings import Settings
from builder.planning.stack import Arch, LoadedStack
from builder.planning.tags import glibc
from gracefarm.errors import DigestError, FetchError, GracefarmError, HostError
from gracefarm.process import die_with_us
from gracefarm.uv import explain

_KEPT = frozenset(
    {
        *("PATH", "HOME", "TMPDIR", "NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("UV_HTTP_TIMEOUT", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_INSECURE_HOST", "UV_KEYRING_PROVIDER", "UV_OFFLINE"),
    }
)
"Variables for reaching the index. Others that uv reads could change what is installed."


def platform(stack: LoadedStack, arch: Arch) -> list[str]:
    """The options of uv for a stack's Python and libc on an architecture."""
    return [f"--python-platform={arch}-manylinux_{glibc(stack, arch)}", f"--python-version={stack.python.rstrip('t')}"]


def run(
    arguments: Sequence[str],
    settings: Settings | None,
    failure: Callable[[str], GracefarmError],
    on_line: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run uv.

    Raises:
        FetchError: the index or a file of it cannot be reached.
        DigestError: a wheel differs from its pin.
        GracefarmError: the result of `failure` for uv's message.
    """
    environment = {name: os.environ[name] for name in sorted(_KEPT) if name in os.environ}
    environment |= {"UV_NO_CONFIG": "1", "UV_NO_PROGRESS": "1", "NO_COLOR": "1", "UV_PYTHON_DOWNLOADS": "never"}
    if settings is not None:
        environment["UV_CACHE_DIR"] = str(settings.home / "uv")
        if settings.index_url:
            # Not an argument, since the URL may contain a password.
            environment["UV_DEFAULT_INDEX"] = settings.index_url
    try:
        program = uv.find_uv_bin()
    except FileNotFoundError as error:
        raise HostError(
            "the package uv is not installed in gracefarm's environment", remedy="run `pip install 'gracefarm[builder]'`"
        ) from error
    lines: list[str] = []
    with subprocess.Popen(
        die_with_us([program, *arguments]), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            on_line(line)
    if process.returncode:
        raise _error("".join(lines), failure)


def _error(output: str, failure: Callable[[str], GracefarmError]) -> Exception:
    """uv's message without credentials, as an error of the class that it means."""
    kind, words = explain(output)
    message = shown(words)[:1500]
    match kind:
        case "disk":
            return OSError(errno.ENOSPC, message)
        case "digest":
            return DigestError(
                f"a wheel differs from its pin: {message}",
                remedy="set GRACEFARM_PYTHON_INDEX to an index that has the pinned file",
            )
        case "absent" | "unreachable":
            return FetchError(
                f"the Python index failed: {message}",
                remedy="check the network to the index, or set GRACEFARM_PYTHON_INDEX to the URL of an index that has "
                "the wheels",
            )
        case _:
            return failure(message)
