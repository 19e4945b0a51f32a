"""Secrets out of whatever is shown or handed on: those that are known by value, and whatever looks like one."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import quote

from deploy.nodes.deployment import Folder

SHORTEST = 6
"Bytes; anything shorter that is called a secret would take harmless text along."
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "APHRODITE_API_KEY", "VLLM_API_KEY", "RAY_AUTH_TOKEN")
_NAME = rb"(?:TOKEN|SECRET|PASSWORD|PASSWD|API[_-]?KEYS?|ADMIN[_-]?KEY|ACCESS[_-]?KEY)"
_QUOTES = rb"[\"'\\]{0,4}"
"As JSON and shells put them."
_VALUE = rb"(?!\[redacted)[^\s\"'\\,}&;\0]"
_PATTERNS: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    (
        re.compile(rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.S),
        b"[redacted private key]",
    ),
    # The scheme stays: it tells what was tried.
    (
        re.compile(
            rb"((?:authorization|x-api-key|api-key|cookie)"
            + _QUOTES
            + rb"\s{0,4}[:=,]\s{0,4}"
            + _QUOTES
            + rb"(?:b['\"])?(?:(?:bearer|basic|token)\s+)?)"
            + rb"[^\s\"'\\,}&;\0]"
            + rb"+",
            re.I,
        ),
        rb"\1[redacted]",
    ),
    (re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"), b"[redacted HF token]"),
    (re.compile(rb"\b(?:gf|sk)-[A-Za-z0-9_-]{16,}"), b"[redacted API key]"),
    (re.compile(rb"(\bbearer(?:\s|%20)+)(?!\[redacted)[A-Za-z0-9._~+/=-]{6,}", re.I), rb"\1[redacted]"),
    (re.compile(rb"(\b[a-z][a-z0-9+.-]{0,20}://[^\s/:@\"']{0,100}:)[^\s/@\"']{1,300}(@)", re.I), rb"\1[redacted]\2"),
    # NAME=value, "NAME": 'value', whatever stands before these words; a path to a secret (RAY_AUTH_TOKEN_PATH) is none.
    (
        re.compile(rb"(" + _NAME + _QUOTES + rb"\s{0,4}[=:]\s{0,4}" + _QUOTES + rb")" + _VALUE + rb"{6,}", re.I),
        rb"\1[redacted]",
    ),
    (
        re.compile(rb"(--(?:api-keys?|admin-key|token|hf-token|password)[ =\0\"',]{1,4})" + _VALUE + rb"+", re.I),
        rb"\1[redacted]",
    ),
)


def forms(secret: str) -> set[bytes]:
    """As it is, and as it may stand in addresses and headers."""
    raw = secret.encode()
    encoded = {base64.b64encode(prefix + raw).rstrip(b"=") for prefix in (b"", b":")}
    quoted = {quote(secret, safe=safe).encode() for safe in ("", "/")} | {json.dumps(secret)[1:-1].encode()}
    return {raw, raw.hex().encode(), *quoted, *(form for form in encoded if len(form) >= 8)}


@dataclass(frozen=True)
class Redactor:
    """`known`: values, longest first, so that no rest of a longer one stays."""

    known: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, secrets: Iterable[str]) -> Redactor:
        """For these values, and all that looks like a secret."""
        known = {form for secret in secrets if len(secret) >= SHORTEST for form in forms(secret)}
        return cls(tuple(sorted(known, key=len, reverse=True)))

    def clean(self, content: bytes) -> bytes:
        """Content without secrets."""
        for secret in self.known:
            content = content.replace(secret, b"[redacted]")
        for pattern, instead in _PATTERNS:
            content = pattern.sub(instead, content)
        return content

    def line(self, text: str) -> str:
        """The same for text."""
        return self.clean(text.encode(errors="surrogateescape")).decode(errors="replace")


_CALLED = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ADMIN|ACCESS|PRIVATE)_?KEYS?)(?:_|$)", re.I
)


def called_secret(name: str) -> bool:
    """A variable of this name holds a secret; the path of one is none, and TOKENIZERS_PARALLELISM is neither."""
    return bool(_CALLED.search(name)) and not name.upper().endswith(("_PATH", "_FILE", "_DIR"))


def of(folder: Folder, environ: Mapping[str, str] = os.environ) -> Redactor:
    """For all that this deployment and whoever calls know to be secret."""
    values = [environ.get(name, "") for name in VARIABLES]
    for path in (folder.api_key, folder.path / "ray-token"):
        with suppress(OSError):
            values.append(path.read_text().strip())
    return Redactor.of(values)
