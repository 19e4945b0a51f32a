"""Removes secrets from everything that is shown or stored: known values, and texts that look like secrets.

Texts that look like secrets are found by the rules of detect-secrets (github.com/Yelp/detect-secrets) and by our own rules for
headers, assignments and URLs. A redactor that also removes the cause of a failure is harmful, so tests check both.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import quote

from deploy.nodes.deployment import Folder

SHORTEST = 6
"Bytes. Shorter values are not redacted, since they occur in harmless text too."
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "APHRODITE_API_KEY", "VLLM_API_KEY", "RAY_AUTH_TOKEN")
_NAME = rb"(?:SECRET|PASSWORD|PASSWD|PASSPHRASE|API[_-]?KEYS?|ADMIN[_-]?KEY|ACCESS[_-]?KEY)"
_QUOTES = rb"[\"'\\]{0,4}"
"Quotes as JSON and shells write them."
_VALUE = rb"(?!\[redacted)[^\s\"'\\,}&;\0]"
_AFTER_OPTION = (
    rb"(?:requires?|required|expects?|expected|without|cannot|should|options?|arguments?|instead|before|because|together"
    rb"|missing|contains|exists?|already|ignored|(?-i:[A-Z_]+))(?![^\s,.:;\])])"
)
"Words of sentences after the name of an option, and names of values in a usage text (`--api-key API_KEY`)."
_REST = rb"[A-Za-z0-9_=.+/-]*"
"The rest of a token. Some rules of detect-secrets match only the first part of one, such as two of a JWT's three parts."


def _opaque(least: int) -> bytes:
    """Pattern of a value that is not a word of a sentence, a path or a special token of a model (`<|eot_id|>`).

    The value has a letter and a digit, and at least `least` characters.
    """
    letters, digits = (rb"(?=[^\s\"'\\,}&;\0]{0,200}?[" + kind + rb"])" for kind in (b"A-Za-z", b"0-9"))
    return rb"(?![/<]|https?:|\[redacted)" + letters + digits + rb"[A-Za-z0-9._~+/=:%%@!#$^*|-]{%d,}" % least


_TOO_BROAD = (
    # These rules look at the name before the value, so they match ordinary sentences. Our rules below are stricter.
    *(
        "Artifactory Credentials",
        "Cloudant Credentials",
        "IBM Cloud IAM Key",
        "IBM COS HMAC Credentials",
        "SoftLayer Credentials",
    ),
    # IP addresses are not secret here. Private keys and URLs with a password are covered by our rules.
    *("Public IP (ipv4)", "Private Key", "Basic Auth Credentials"),
)
"Rules of detect-secrets that are not used."
_OF_A_CLOUD = rb"X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)"
_SIGNED = rb"Signature|Policy|Key-Pair-Id|sig|access_token|token"
"Parameters of a URL that grant access to everyone who has the URL. These names are redacted only in a URL."
_FIRST: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    (
        re.compile(rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.S),
        b"[redacted private key]",
    ),
    (re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"), b"[redacted HF token]"),
    (re.compile(rb"\bgf_[A-Za-z0-9_-]{32,}"), b"[redacted index token]"),
    (re.compile(rb"\b(?:gf|sk)-[A-Za-z0-9_-]{16,}"), b"[redacted API key]"),
    (re.compile(rb"\bgithub_pat_[A-Za-z0-9_]{22,}"), b"[redacted GitHub token]"),
    # Also in HTML, JSON and encoded URLs.
    (re.compile(rb"(" + _OF_A_CLOUD + rb"(?:=|%3D))(?!\[redacted)[^&\s\"'\\]+", re.I), rb"\1[redacted]"),
    (re.compile(rb"(" + _OF_A_CLOUD + _QUOTES + rb"\s{0,4}:\s{0,4}" + _QUOTES + rb")" + _opaque(8), re.I), rb"\1[redacted]"),
    (re.compile(rb"((?:[?&]|&amp;|\\u0026)(?:" + _SIGNED + rb")=)(?!\[redacted)[^&\s\"'\\]+", re.I), rb"\1[redacted]"),
)
_LAST: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    # The scheme (bearer, basic) is kept: it shows which kind of login was used.
    (
        re.compile(
            rb"((?:authorization|x-api-key|api-key|x-auth-token|cookie)"
            + (_QUOTES + rb"\s{0,4}[:=,]\s{0,4}" + _QUOTES + rb"(?:b['\"])?)")
            + (rb"(?:((?:bearer|basic|token)\s+)" + _VALUE + rb"+|" + _opaque(8) + rb")"),
            re.I,
        ),
        rb"\1\2[redacted]",
    ),
    (re.compile(rb"(\bbearer(?:\s|%20)+)" + _opaque(6), re.I), rb"\1[redacted]"),
    (re.compile(rb"(\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@\"']{0,100}:)[^\s/@\"']{1,300}(@)", re.I), rb"\1[redacted]\2"),
    # NAME=value and "NAME": "value", with any prefix of the name. The path of a secret (RAY_AUTH_TOKEN_PATH) is not secret.
    # `NAME: value` may be an error message (`ray-token: Permission denied`), and a model's special tokens are not secret.
    (
        re.compile(
            rb"("
            + (_NAME + rb")(?:(" + _QUOTES + rb"\s{0,4}=\s{0,4}" + _QUOTES + rb")" + _VALUE + rb"{6,}")
            + (rb"|([\"']\s{0,4}:\s{0,4}[\"'])" + _VALUE + rb"{6,}")
            + (rb"|(" + _QUOTES + rb"\s{0,4}:\s{0,4}" + _QUOTES + rb")" + _opaque(8) + rb")"),
            re.I,
        ),
        rb"\1\2\3\4[redacted]",
    ),
    (re.compile(rb"(\b[A-Z0-9_]*TOKEN=" + _QUOTES + rb")(?!<)" + _VALUE + rb"{6,}"), rb"\1[redacted]"),
    (re.compile(rb"(TOKEN" + _QUOTES + rb"\s{0,4}[=:]\s{0,4}" + _QUOTES + rb")" + _opaque(16), re.I), rb"\1[redacted]"),
    (
        re.compile(rb"(--(?:api-keys?|admin-key|token|hf-token|password)[=\0\"',][ \"',]{0,4})" + _VALUE + rb"+", re.I),
        rb"\1[redacted]",
    ),
    # `--api-key VALUE`. An error message or a help text may mention the option too, so some words are not values.
    (
        re.compile(
            rb"(--(?:api-keys?|admin-key|token|hf-token|password)[ \t]{1,4})(?![/<\[({$-]|"
            + _AFTER_OPTION
            + rb")"
            + _VALUE
            + rb"{6,}",
            re.I,
        ),
        rb"\1[redacted]",
    ),
)


@cache
def _maintained() -> tuple[tuple[re.Pattern[bytes], bytes], ...]:
    """The rules of detect-secrets for tokens with a known form (GitHub, GitLab, AWS, Slack, …), as patterns of bytes."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    detectors: Mapping[str, type] = get_mapping_from_secret_type_to_class()
    kept = [(name, kind()) for name, kind in sorted(detectors.items()) if name not in _TOO_BROAD]
    return tuple(
        (
            re.compile(b"(?:" + pattern.pattern.encode() + b")" + _REST, pattern.flags & ~re.UNICODE),
            f"[redacted {name}]".encode(),
        )
        for name, detector in kept
        if isinstance(detector, RegexBasedDetector)
        for pattern in detector.denylist
    )


def forms(secret: str) -> set[bytes]:
    """The secret itself and its encoded forms in URLs, headers and JSON."""
    raw = secret.encode()
    encoded = {base64.b64encode(prefix + raw).rstrip(b"=") for prefix in (b"", b":")}
    quoted = {quote(secret, safe=safe).encode() for safe in ("", "/")} | {json.dumps(secret)[1:-1].encode()}
    return {raw, raw.hex().encode(), *quoted, *(form for form in encoded if len(form) >= 8)}


@dataclass(frozen=True)
class Redactor:
    """Replaces secrets. The values in `known` are sorted by length, longest first, so that no part of a longer one remains."""

    known: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, secrets: Iterable[str]) -> Redactor:
        """A redactor for these values and for everything that looks like a secret."""
        known = {form for secret in secrets if len(secret) >= SHORTEST for form in forms(secret)}
        return cls(tuple(sorted(known, key=len, reverse=True)))

    def clean(self, content: bytes) -> bytes:
        """Return the content without secrets."""
        for secret in self.known:
            content = content.replace(secret, b"[redacted]")
        for pattern, instead in (*_FIRST, *_maintained(), *_LAST):
            content = pattern.sub(instead, content)
        return content

    def line(self, text: str) -> str:
        """Return the text without secrets."""
        return self.clean(text.encode(errors="surrogateescape")).decode(errors="replace")


_CALLED = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ADMIN|ACCESS|PRIVATE)_?KEYS?)(?:_|$)", re.I
)


def called_secret(name: str) -> bool:
    """Whether a variable of this name contains a secret. Paths of secrets and names such as TOKENIZERS_PARALLELISM do not."""
    return bool(_CALLED.search(name)) and not name.upper().endswith(("_PATH", "_FILE", "_DIR"))


def of(folder: Folder, environ: Mapping[str, str] = os.environ) -> Redactor:
    """A redactor for the secrets of this deployment and of the environment."""
    values = [environ.get(name, "") for name in VARIABLES]
    for path in (folder.api_key, folder.path / "ray-token"):
        with suppress(OSError):
            values.append(path.read_text().strip())
    return Redactor.of(values)
