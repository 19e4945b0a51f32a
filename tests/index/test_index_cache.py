"""The shared compiler cache of `index serve`: who may write, what is kept, and how much of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from index_kit import Server, make_token, serving

KEY = "ab" * 20
PLACE = f"/cache/ccache/tiny/{KEY}"


def entry(body: bytes, **more: str) -> bytes:
    header = {"sha256": hashlib.sha256(body).hexdigest(), "keyid": "k", "sig": "s", **more}
    return json.dumps(header).encode() + b"\n" + body


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("cache") / "root", "--cache-size", "1MiB") as running:
        yield running


def put(server: Server, place: str, content: bytes, token: str | None = None) -> httpx.Response:
    return server.client.put(place, content=content, auth=("__token__", token or server.token))


def test_an_entry_comes_back_as_it_was_written(server: Server) -> None:
    assert server.client.get(PLACE).status_code == 404
    assert put(server, PLACE, entry(b"object")).status_code == 200
    assert server.client.get(PLACE).content == entry(b"object")
    assert put(server, PLACE, entry(b"another")).status_code == 200
    assert server.client.get(PLACE).content == entry(b"another")
    assert server.client.get(PLACE.replace("tiny", "other")).status_code == 404


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"object", "must begin with a line of JSON"),
        (b'{"sha256": 1}\nobject', "must begin with a line of JSON"),
        (b"[" * 3000 + b"\nobject", "must begin with a line of JSON"),
        (entry(b"object", sha256="0" * 64), "the sha256 of the cache entry does not match its bytes"),
    ],
)
def test_what_is_not_an_entry_is_refused(server: Server, content: bytes, words: str) -> None:
    refused = put(server, "/cache/ccache/bad/" + KEY, content)
    assert (refused.status_code, words in refused.text) == (400, True), refused.text
    assert server.client.get("/cache/ccache/bad/" + KEY).status_code == 404


@pytest.mark.parametrize("place", ["/cache/other/tiny/" + KEY, "/cache/ccache/..%2fx/" + KEY, "/cache/ccache/tiny/KEY"])
def test_no_entry_has_such_a_place(server: Server, place: str) -> None:
    assert server.client.get(place).status_code == 404
    assert put(server, place, entry(b"object")).status_code in (404, 405)


def test_who_may_write(server: Server) -> None:
    assert server.client.put(PLACE, content=entry(b"poison")).status_code == 401
    for options in (("--project", "tiny"), ("--set", "gh200"), ("--nightly",)):
        refused = put(server, PLACE, entry(b"poison"), make_token(server.root, *options))
        assert refused.status_code == 403, options
    cache = make_token(server.root, "--cache")
    assert put(server, PLACE, entry(b"good"), cache).status_code == 200
    upload = server.upload("tiny-1.0-py3-none-any.whl", b"", token=cache)
    assert (upload.status_code, "only for the compiler cache" in upload.text) == (403, True), upload.text
    assert server.client.get(PLACE).content == entry(b"good")


def test_what_was_not_read_for_the_longest_time_goes(server: Server) -> None:
    for number in range(4):
        assert put(server, f"/cache/device/big/{number:040x}", entry(bytes(300_000))).status_code == 200
        server.client.get(f"/cache/device/big/{0:040x}")
    there = [server.client.get(f"/cache/device/big/{number:040x}").status_code for number in range(4)]
    assert there[0] == there[3] == 200
    assert 404 in there[1:3]
    kept = sum(path.stat().st_size for path in (server.root / "cache").rglob("*") if path.is_file())
    assert kept <= 1 << 20


def test_an_index_may_keep_no_cache(tmp_path: Path) -> None:
    with serving(tmp_path / "root", "--cache-size", "off") as running:
        assert put(running, PLACE, entry(b"object")).status_code == 404
