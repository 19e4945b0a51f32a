"""Upload a finished wheel with twine; install it back with the target's own pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from builder import sandbox, smoke
from builder.compile import first_error
from builder.record import Publication, now
from builder.sandbox import Mount, Outcome, Sandbox
from gracefarm.errors import InstallError, PublishError, UsageError


def upload(wheel: Path, url: str) -> Publication:
    """Upload `wheel` by the legacy upload API.

    Credentials come from TWINE_USERNAME and TWINE_PASSWORD or the keyring, never from `url` or an argument.

    Raises:
        UsageError: the URL carries a password.
        PublishError: the index refused it or cannot be reached, in twine's words.
    """
    parts = urlsplit(url)
    if parts.password or parts.username:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))
        raise UsageError(
            "the upload URL carries credentials",
            remedy=f"use --publish {bare} with TWINE_USERNAME and TWINE_PASSWORD in the environment",
        )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "twine",
            "upload",
            "--non-interactive",
            "--disable-progress-bar",
            "--repository-url",
            url,
            str(wheel),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    if done.returncode != 0:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        words = next((line for line in said if line.startswith(("ERROR", "HTTPError"))), said[-1] if said else "no output")
        raise PublishError(
            f"{url} did not take {wheel.name}: {words}",
            remedy="check the address and the token (TWINE_USERNAME=__token__, TWINE_PASSWORD); the wheel is kept",
            repeat=f"twine upload --repository-url {url} {wheel}",
        )
    return Publication(url=url, at=now())


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "ignore"}


def install_back(
    requirement: str,
    *,
    index_url: str,
    imports: tuple[str, ...],
    environment: Path,
    root: Path,
    memory: int,
    log: Path,
    files: Path,
) -> Outcome:
    """Install `requirement` with the pip of the clean environment `environment`, from `index_url` alone, and import it.

    `environment` is written to: pass a fresh copy. `files` is scratch space for the driver.

    Raises:
        InstallError: pip or the import failed, in its words.
    """
    smoke.prepare(files, imports, None)
    box = Sandbox(
        root=root,
        mounts=(Mount(source=environment, target="/env", writable=True), Mount(source=files, target="/smoke")),
        environment=smoke.variables(),
        workdir="/smoke/work",
        memory=memory,
        network=True,
    )
    pip = (
        "/env/bin/python3",
        "-m",
        "pip",
        "install",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--no-input",
        "--no-compile",
        "--root-user-action=ignore",
    )
    for command in ((*pip, "--index-url", index_url, requirement), smoke.driver(imports, None)):
        outcome = sandbox.run(box, command, log=log)
        if outcome.returncode != 0:
            raise InstallError(
                f"{requirement} from {index_url} does not install into a clean environment: {first_error(log)}",
                remedy=f"the whole output is in {log}",
                repeat=" ".join(command),
            )
    return outcome
