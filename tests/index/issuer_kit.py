"""A local issuer of identity tokens, like GitHub Actions: keys, description and tokens."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

BEARER = "the-job-s-own-secret"
SHARED = b"a secret that this issuer publishes, so that any reader can sign"


@dataclass(kw_only=True)
class OwnIssuer:
    """The signing key, and the claims of one job of one workflow."""

    url: str = ""
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048))
    repository: str = "farm/wheels"
    requests: list[str] = field(default_factory=list)
    resetting: bool = False
    "If it is set, connections for the keys are reset after the request."
    answering: threading.Event = field(default_factory=threading.Event)
    "Requests wait until this event is set."

    def claims(self, audience: str, **changes: object) -> dict[str, object]:
        """The claims that GitHub signs for a job; None omits a claim."""
        now = int(time.time())
        claims: dict[str, object] = {
            "iss": self.url,
            "sub": f"repo:{self.repository}:ref:refs/heads/main",
            "aud": audience,
            "iat": now,
            "nbf": now,
            "exp": now + 300,
            "jti": str(uuid.uuid4()),
            "repository": self.repository,
            "repository_id": "4711",
            "job_workflow_ref": f"{self.repository}/.github/workflows/nightly.yml@refs/heads/main",
            "environment": None,
        }
        return {key: value for key, value in {**claims, **changes}.items() if value is not None}

    def token(self, audience: str, **changes: object) -> str:
        """An identity token. It is valid unless the changes make it invalid."""
        return jwt.encode(self.claims(audience, **changes), self.key, algorithm="RS256", headers={"kid": "first"})

    @property
    def public_pem(self) -> bytes:
        """The public key."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_key().public_bytes(serialization.Encoding.PEM, form)

    def answer(self, target: str, authorization: str | None) -> dict[str, object] | None:
        """The document at this address."""
        parts = urlsplit(target)
        if parts.path == "/.well-known/openid-configuration":
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        if parts.path == "/keys":
            key = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
            shared = base64.urlsafe_b64encode(SHARED).rstrip(b"=").decode()
            return {
                "keys": [
                    {**key, "kid": "first", "use": "sig", "alg": "RS256"},
                    {"kty": "oct", "k": shared, "kid": "shared", "use": "sig", "alg": "HS256"},
                ]
            }
        if parts.path == "/job" and (authorization or "").lower() == f"bearer {BEARER}":
            return {"value": self.token(parse_qs(parts.query)["audience"][0])}
        return None

    def job(self) -> dict[str, str]:
        """The environment of a GitHub job that may request identity tokens."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": BEARER,
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/job",
        }


@contextmanager
def issuing() -> Iterator[OwnIssuer]:
    """Run the issuer on a free port of this machine."""
    issuer = OwnIssuer()
    issuer.answering.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.requests.append(self.path)
            issuer.answering.wait()
            if issuer.resetting and self.path == "/keys":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
                return
            document = issuer.answer(self.path, self.headers.get("Authorization"))
            body = json.dumps(document or {}).encode()
            self.send_response(404 if document is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    issuer.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield issuer
    finally:
        issuer.answering.set()
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True, kw_only=True)
class OwnCertificates:
    """Files for TLS on localhost."""

    root: Path
    certificate: Path
    key: Path


def certify(folder: Path) -> OwnCertificates:
    """Create a root and a certificate for localhost: uv's TLS accepts no self-signed certificate."""

    def signed(name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, root: bool) -> bytes:
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "root of a test"))
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        builder = builder.not_valid_after(datetime.now(UTC) + timedelta(hours=12))
        builder = builder.add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    files = OwnCertificates(root=folder / "root.pem", certificate=folder / "cert.pem", key=folder / "key.pem")
    files.root.write_bytes(signed("root of a test", keys[0], keys[0], root=True))
    files.certificate.write_bytes(signed("localhost", keys[1], keys[0], root=False))
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, form, plain))
    return files
