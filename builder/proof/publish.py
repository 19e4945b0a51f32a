"""Upload a finished wheel with twine, and send documents of its build to the index; flow/publishing.py calls this."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx
from packaging.utils import canonicalize_name

from builder.fetch import simple
from builder.proof import trusted
from builder.proof.record import Publication, now
from gracefarm.errors import FetchError, PublishError, UsageError
from gracefarm.files import sha256_file
from gracefarm.process import first_line

Login = tuple[str, str]
"""User and password of an upload. `credentials` finds them, once for all requests of a publication: the identity token of a
CI job may be valid for only one exchange, as on GitLab."""
REMEDY = (
    "check that the index is running and that the URL is correct; set TWINE_USERNAME to __token__, and TWINE_PASSWORD to a "
    "token of the index"
)
"What to do if an index refuses an upload."


def refuse_credentials(url: str, option: str = "--publish") -> None:
    """Refuse credentials in an upload URL, since it is printed, recorded and an argument of twine.

    Raises:
        UsageError: the URL has a password or a user name.
    """
    parts = urlsplit(url)
    if parts.password or parts.username:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))
        raise UsageError(
            "the upload URL contains credentials",
            remedy=f"use {option} {bare} with TWINE_USERNAME and TWINE_PASSWORD in the environment",
        )


class TakenError(PublishError):
    """The index has, or once had, a file with the same name and different content."""


def upload(wheel: Path, url: str, login: Login | None) -> Publication:
    """Upload `wheel` with the legacy upload API and the credentials for `url`.

    Raises:
        UsageError: the URL contains a password.
        TakenError: the index has other bytes with that name.
        PublishError: the index refused the wheel or cannot be reached (has twine's message). If the index has the
            same bytes already, from an interrupted run, this is not an error: some indexes refuse a second upload.
    """
    refuse_credentials(url)
    # --verbose: otherwise twine does not print the index's message
    command = [sys.executable, "-m", "twine", "upload", "--non-interactive", "--disable-progress-bar", "--verbose"]
    command += ["--repository-url", url, str(wheel)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(login))
    if process.returncode != 0 and offered(wheel.name, url, login).get(wheel.name) != sha256_file(wheel):
        words = _reason(process.stdout + process.stderr)
        raise (TakenError if "already exists" in words.lower() else PublishError)(
            f"{wheel.name} was not uploaded to {url}: {words}",
            remedy=f"{REMEDY}; the wheel is kept",
            repeat=f"twine upload --repository-url {url} {wheel}",
        )
    return Publication(url=url, at=now())


def _reason(text: str) -> str:
    """Why twine failed: the index's answer, else twine's last error. Twine breaks lines at 80 columns."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.startswith(("ERROR", "HTTPError"))]
    answers = [at for at, line in enumerate(lines) if "Response from " in line]
    if answers and errors and answers[-1] + 1 < errors[-1]:
        return " ".join(line.removeprefix("INFO").strip() for line in lines[answers[-1] + 1 : errors[-1]])[:500]
    return lines[errors[0] if errors else -1] if lines else "no output"


def offered(filename: str, url: str, login: Login | None) -> dict[str, str | None]:
    """The files of a project on the index with that upload URL, with their sha256; empty if it cannot be reached."""
    name = filename.split("-")[0]
    try:
        packages = simple.project_page(name, f"{_base(url)}/simple/", login).packages
    except FetchError:
        return {}
    return {file.filename: file.digests.get("sha256") for file in packages}


def offered_sm(filename: str, url: str, login: Login | None) -> tuple[str, ...]:
    """The architectures of a wheel on that index; empty for an index that does not list them."""
    headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
    try:
        with httpx.Client(auth=login, timeout=60, headers=headers, follow_redirects=True) as client:
            files = client.get(f"{_base(url)}/simple/{canonicalize_name(filename.split('-')[0])}/").json()["files"]
        return tuple(next(file.get("_sm", ()) for file in files if file["filename"] == filename))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, StopIteration):
        return ()


def _base(url: str) -> str:
    """The URL of the index with that upload URL."""
    return re.sub(r"(?:(?:stage/[^/]+/|nightly/)?legacy/?)?$", "", url).rstrip("/")


def credentials(url: str) -> Login | None:
    """The credentials that twine would use, else a short-lived token for a CI job that the index trusts.

    Raises:
        PublishError: the index does not trust this job.
    """
    name = os.environ.get("TWINE_USERNAME", "__token__")
    if password := os.environ.get("TWINE_PASSWORD") or _from_keyring(url, name):
        return (name, password)
    token = trusted.upload_token(url)
    return ("__token__", token) if token else None


MAX_LOG = 32 << 20
"Largest log that an index accepts, in bytes (docs/reference/index-records.md)."


def send_record(document: Path, log: Path, build_id: str, url: str, login: Login | None) -> str | None:
    """PUT a build's record and log to the index with the upload URL `url`; return None, or why it does not have them.

    Only this project's index accepts records, so a refusal is not an error. The record goes first, since the index accepts a
    log only for a known record.
    """
    bodies = [(f"records/{build_id}", document.read_bytes())]
    if log.is_file():
        bodies.append((f"records/{build_id}/log", end_of(log)))
    return _put(bodies, url, login)


def send_certificate(document: Path, digest: str, url: str, login: Login | None) -> str | None:
    """PUT the certificate of a device digest, as `send_record` does for a record."""
    return _put([(f"certificates/{digest}", document.read_bytes())], url, login)


def send_matrix(content: Mapping[str, object], url: str, login: Login | None) -> str | None:
    """PUT the cells of a matrix, as `send_record` does for a record."""
    return _put([(f"matrix/{content['name']}", json.dumps(content).encode())], url, login)


def _put(bodies: list[tuple[str, bytes]], url: str, login: Login | None) -> str | None:
    base = _base(url)
    try:
        with httpx.Client(auth=login, timeout=60) as client:
            for name, body in bodies:
                answer = client.put(f"{base}/{name}", content=body)
                if answer.status_code >= 300:
                    return f"{base}/{name}: {answer.status_code} {first_line(answer.text, answer.reason_phrase)[:200]}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{base}: {error or type(error).__name__}"
    return None


def _from_keyring(url: str, name: str) -> str | None:
    """The password that twine would use."""
    from twine.auth import CredentialInput, Resolver

    return Resolver({"repository": url}, CredentialInput(name)).get_password_from_keyring()


def end_of(log: Path) -> bytes:
    """A log for the index: its end, if it is too long."""
    with log.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        note = b"" if size <= MAX_LOG else b"# the first part of this log was removed\n"
        stream.seek(max(0, size - MAX_LOG + len(note)) if note else 0)
        return note + stream.read()


def _environment(login: Login | None) -> dict[str, str]:
    own = {"TWINE_USERNAME": login[0], "TWINE_PASSWORD": login[1]} if login else {}
    return {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "ignore", **own}
