"""The compiler cache that machines share through `index serve`: real ccache, a real index, two homes for two machines."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from builder.proof import signing
from builder.proof.shared_cache import KIND
from gracefarm.files import remove_tree
from tests.conftest import Farm
from tests.index.index_kit import Server, make_token, serving
from tests.integration.test_compiler_cache import built, counts, many, tiny


@dataclass(frozen=True, kw_only=True)
class Builder:
    """A machine that builds: its key, and how it asks the index."""

    key: Ed25519PrivateKey
    farm: Farm

    @property
    def public(self) -> str:
        return signing.pem(self.key.public_key())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "index") as running:
        yield running


@pytest.fixture
def writer(farm: Farm, server: Server, tmp_path: Path) -> Builder:
    """A machine that may write."""
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    variables = {
        "GRACEFARM_SIGNING_KEY": text.decode(),
        "GRACEFARM_SHARED_CACHE": f"{server.url}/",
        "GRACEFARM_CACHE_TOKEN": make_token(server.root, "--cache"),
        "GRACEFARM_SETTINGS": str(tmp_path / "none.toml"),
    }
    return Builder(key=key, farm=replace(farm, environment=farm.environment | variables))


@pytest.fixture
def reader(farm: Farm, server: Server, writer: Builder, tmp_path: Path) -> Farm:
    """Another one, that trusts the writer's key; its own cache is empty whenever `cold` was called."""
    (tmp_path / "writer.pem").write_text(writer.public)
    variables = {
        "GRACEFARM_SHARED_CACHE": server.url,
        "GRACEFARM_SHARED_CACHE_KEYS": str(tmp_path / "writer.pem"),
        "GRACEFARM_SETTINGS": str(tmp_path / "none.toml"),
    }
    return replace(farm, environment=farm.environment | variables)


def cold(farm: Farm) -> None:
    """Nothing is built, and nothing is in the machine's own cache."""
    for name in ("builds", "ccache"):
        remove_tree(farm.settings.home / name)


def entries(server: Server) -> list[Path]:
    return [path for path in (server.root / "cache" / "ccache" / "tiny").rglob("*") if path.is_file()]


@pytest.fixture
def filled(writer: Builder, server: Server) -> dict[str, Any]:
    """The record of the build whose objects are on the index."""
    tiny(writer.farm)
    found, said = built(writer.farm, "tiny", "--shared-cache", "write")
    assert counts(found) == (0, 4, 0)
    assert found["shared_cache"]["written"] == len(entries(server)) == 4, said
    cold(writer.farm)
    return found


def test_a_second_machine_compiles_nothing(filled: dict[str, Any], reader: Farm, server: Server) -> None:
    found, said = built(reader, "tiny")
    assert counts(found) == (4, 0, 0)
    assert found["wheel"] == filled["wheel"]
    use = found["shared_cache"]
    assert (use["url"], use["mode"], use["hits"], use["misses"], use["refused"]) == (server.url, "read", 4, 0, [])
    assert f"shared cache {server.url}: 4 entries used, 0 missing, 0 written" in said
    cold(reader)
    found, _ = built(reader, "tiny", "--shared-cache", "off")
    assert counts(found) == (0, 4, 0)
    assert found["shared_cache"] is None


@pytest.mark.slow
def test_units_of_nvcc_are_shared_too(writer: Builder, reader: Farm, server: Server) -> None:
    many(writer.farm)
    first, _ = built(writer.farm, "many_cuda", "--shared-cache", "write")
    assert counts(first) == (0, 4, 0)
    cold(writer.farm)
    second, _ = built(reader, "many_cuda")
    assert counts(second) == (4, 0, 0)
    assert second["wheel"] == first["wheel"]


def signed_by(key: Ed25519PrivateKey, name: str, content: bytes, folder: str = "ccache/tiny") -> bytes:
    """An entry as `builder` writes it."""
    sha256 = hashlib.sha256(content).hexdigest()
    signature = key.sign(signing.encoding(KIND, f"{folder}/{name} {sha256}".encode()))
    header = {"sha256": sha256, "keyid": signing.key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
    return json.dumps(header).encode() + b"\n" + content


def strange(path: Path, _: Builder, __: Path) -> bytes:
    return signed_by(Ed25519PrivateKey.generate(), path.name, path.read_bytes().partition(b"\n")[2])


def changed(path: Path, _: Builder, __: Path) -> bytes:
    return path.read_bytes()[:-1] + b"x"


def moved(_: Path, __: Builder, other: Path) -> bytes:
    return other.read_bytes()


def claimed(path: Path, builder: Builder, _: Path) -> bytes:
    """As a client writes it that has a token and no key: it names the trusted key."""
    header, _, content = strange(path, builder, path).partition(b"\n")
    named = json.loads(header) | {"keyid": signing.key_id(builder.key.public_key())}
    return json.dumps(named).encode() + b"\n" + content


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (strange, "this machine does not trust the key "),
        (changed, "the bytes of the entry differ from the signed bytes"),
        (moved, "the signature of key"),
        (claimed, "the signature of key"),
    ],
)
def test_a_wrong_entry_is_a_miss_and_is_named(
    filled: dict[str, Any],
    writer: Builder,
    reader: Farm,
    server: Server,
    poison: Callable[[Path, Builder, Path], bytes],
    words: str,
) -> None:
    one, other, *_ = sorted(entries(server))
    one.write_bytes(poison(one, writer, other))
    found, said = built(reader, "tiny")
    assert counts(found) == (3, 1, 0)
    assert found["wheel"] == filled["wheel"]
    (refused,) = found["shared_cache"]["refused"]
    assert refused.startswith(f"ccache/tiny/{one.name[:16]}: {words}"), refused
    assert refused in said


def test_who_has_no_token_writes_nothing(writer: Builder, server: Server) -> None:
    tiny(writer.farm)
    found, said = built(writer.farm, "tiny", "--shared-cache", "write", GRACEFARM_CACHE_TOKEN="gf_wrong")
    assert counts(found) == (0, 4, 0)
    assert entries(server) == []
    assert "stopped writing: 401 " in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GRACEFARM_SHARED_CACHE", "--shared-cache write requires the URL of an index"),
        ("GRACEFARM_SIGNING_KEY", "--shared-cache write requires this machine's signing key, which signs the entries"),
        ("GRACEFARM_CACHE_TOKEN", "--shared-cache write requires a token of the index in GRACEFARM_CACHE_TOKEN"),
    ],
)
def test_what_writing_needs_is_asked_for_first(writer: Builder, name: str, words: str) -> None:
    tiny(writer.farm)
    ended = writer.farm.run("build", "tiny", "--shared-cache", "write", **{name: ""})
    assert ended.code == 3
    assert words in ended.said


def test_a_server_that_answers_nothing_delays_a_build_and_breaks_nothing(farm: Farm, tmp_path: Path) -> None:
    tiny(farm)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.close()
        url = f"http://127.0.0.1:{server.getsockname()[1] if server.fileno() >= 0 else 9}"
    found, _ = built(farm, "tiny", GRACEFARM_SHARED_CACHE=url, GRACEFARM_SETTINGS=str(tmp_path / "none.toml"))
    assert counts(found) == (0, 4, 0)
    assert "Connection refused" in found["shared_cache"]["off"]
