"""The digest of a container image's tag, from its registry (OCI distribution specification)."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import httpx

from builder.fetch.transfer import mirror_remedy
from builder.planning.settings import Settings
from builder.planning.stack import Image
from gracefarm.errors import FetchError

_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)


def digest(image: Image, settings: Settings) -> str:
    """Hex sha256 of the manifest (or index of manifests) that the image's tag names now; read without credentials.

    Raises:
        FetchError: the registry cannot be reached or has no such tag.
    """
    url = settings.redirect(image.manifest)
    try:
        with httpx.Client(timeout=30, follow_redirects=True, headers={"Accept": _MANIFESTS}) as client:
            answer = client.head(url)
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                answer = client.head(url, headers=token(client, answer.headers.get("www-authenticate", "")))
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise FetchError(
            f"the digest of {image.name}:{image.tag} cannot be read: {error}", remedy=mirror_remedy(image.manifest)
        ) from error
    match = re.fullmatch(r"sha256:([0-9a-f]{64})", answer.headers.get("docker-content-digest", ""))
    if match is None:
        raise FetchError(
            f"{url} returns no digest of the image {image.name}:{image.tag}",
            remedy="write the digest as sha256 of this image into [container] of stack.toml by hand",
        )
    return match[1]


def token(client: httpx.Client, challenge: str) -> dict[str, str]:
    """An anonymous token from the server that the challenge names."""
    wanted = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if "realm" not in wanted:
        return {}
    asked = {key: value for key, value in wanted.items() if key in ("service", "scope")}
    answer = client.get(f"{wanted['realm']}?{urlencode(asked)}")
    answer.raise_for_status()
    try:
        body = dict(answer.json())
    except (TypeError, ValueError) as error:
        raise FetchError(
            f"{wanted['realm']} returns no token: its answer is not a JSON object",
            remedy="check which server answers there, or set GRACEFARM_MIRRORS to a mirror",
        ) from error
    return {"Authorization": f"Bearer {body.get('token') or body.get('access_token')}"}
