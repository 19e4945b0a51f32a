"""HTTP: content negotiation, conditional requests, codings, ranges, redirects and caching."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import zipfile
from datetime import datetime

import pytest
import zstandard
from index_kit import JSON, Server, wheel

HTML = "application/vnd.pypi.simple.v1+html"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "text/html; charset=utf-8"),
        ("*/*", "text/html; charset=utf-8"),
        ("text/html", "text/html; charset=utf-8"),
        ("text/*", "text/html; charset=utf-8"),
        (JSON, JSON),
        ("application/vnd.pypi.simple.latest+json", JSON),
        (HTML, HTML),
        ("application/vnd.pypi.simple.latest+html", HTML),
        (f"{JSON}, {HTML};q=0.1, text/html;q=0.01", JSON),
        (f"{JSON};q=0.1, text/html", "text/html; charset=utf-8"),
        (f"{JSON}, */*;q=0.1", JSON),
        (f"{JSON};q=0, text/html", "text/html; charset=utf-8"),
    ],
)
def test_negotiation(hosted: Server, accept: str | None, expected: str) -> None:
    headers = {"Accept": accept} if accept else {}
    request = hosted.client.build_request("GET", "/simple/http-pkg/", headers=headers)
    if accept is None:
        del request.headers["accept"]
    answer = hosted.client.send(request)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == expected
    assert {"accept", "accept-encoding"} <= {item.strip().lower() for item in answer.headers["vary"].split(",")}


@pytest.mark.parametrize("accept", ["application/json", "application/vnd.pypi.simple.v2+json", "image/png"])
def test_what_does_not_exist_is_406(hosted: Server, accept: str) -> None:
    answer = hosted.page("http-pkg", accept=accept)
    assert answer.status_code == 406
    assert JSON in answer.text


def test_format_in_the_address_beats_the_header(hosted: Server) -> None:
    answer = hosted.client.get("/simple/http-pkg/", params={"format": JSON}, headers={"Accept": "text/html"})
    assert answer.headers["content-type"] == JSON
    assert hosted.client.get("/simple/http-pkg/", params={"format": "no/such"}).status_code == 406


def test_json_page_holds_what_the_standards_ask(hosted: Server) -> None:
    page = hosted.page("http-pkg").json()
    assert page["meta"]["api-version"] == "1.4"
    assert page["name"] == "http-pkg"
    assert page["project-status"] == {"status": "active"}
    assert page["versions"] == ["1.0", "1.1", "2.0", "2.0+cu130"]
    for item in page["files"]:
        assert set(item["hashes"]) == {"sha256"}, "with several hashes, uv locks one that it does not find later"
        assert "#" not in item["url"]
        assert item["size"] > 0
        datetime.strptime(item["upload-time"], "%Y-%m-%dT%H:%M:%S.%f%z")
        assert item["requires-python"] == ">=3.8"
        content = hosted.client.get("/simple/http-pkg/" + item["url"]).content
        assert hashlib.sha256(content).hexdigest() == item["hashes"]["sha256"]
        meta = hosted.client.get("/simple/http-pkg/" + item["url"] + ".metadata").content
        assert hashlib.sha256(meta).hexdigest() == item["core-metadata"]["sha256"]
        with zipfile.ZipFile(__import__("io").BytesIO(content)) as archive:
            folder = "-".join(item["filename"].split("-")[:2]) + ".dist-info"
            assert archive.read(f"{folder}/METADATA") == meta, "pip compares them byte by byte"


def test_html_page_says_the_same_as_json(hosted: Server) -> None:
    page = hosted.page("http-pkg").json()
    text = hosted.page("http-pkg", accept="text/html").text
    assert '<meta name="pypi:repository-version" content="1.4">' in text
    links = dict(re.findall(r'<a href="([^"#]+)#sha256=([0-9a-f]{64})"', text))
    assert links == {item["url"]: item["hashes"]["sha256"] for item in page["files"]}
    assert text.count('data-requires-python="&gt;=3.8"') == len(page["files"])
    assert set(re.findall(r'data-core-metadata="sha256=([0-9a-f]+)"', text)) == {
        item["core-metadata"]["sha256"] for item in page["files"]
    }


def test_the_list_of_projects(hosted: Server) -> None:
    page = hosted.client.get("/simple/", headers={"Accept": JSON}).json()
    assert {"name": "http-pkg"} in page["projects"]
    assert '<a href="http-pkg/">' in hosted.client.get("/simple/", headers={"Accept": "text/html"}).text


@pytest.mark.parametrize("path", ["/simple/http-pkg/", "/simple/", "FILE", "METADATA"])
@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
def test_not_modified_repeats_the_etag(hosted: Server, path: str, coding: str) -> None:
    item = hosted.page("http-pkg").json()["files"][0]
    path = {"FILE": "/simple/http-pkg/" + item["url"], "METADATA": "/simple/http-pkg/" + item["url"] + ".metadata"}.get(
        path, path
    )
    headers = {"Accept-Encoding": coding, "Accept": f"{JSON}, */*;q=0.1"}
    first = hosted.client.get(path, headers=headers)
    assert first.status_code == 200
    etag = first.headers["etag"]
    for sent in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        again = hosted.client.get(path, headers={**headers, "If-None-Match": sent})
        assert (again.status_code, again.headers.get("etag"), again.content) == (304, etag, b"")
    assert hosted.client.get(path, headers={**headers, "If-None-Match": '"other"'}).status_code == 200


def test_a_change_changes_the_etag_and_only_then(hosted: Server) -> None:
    assert hosted.upload(*wheel("etag_pkg", "1.0")).status_code == 200
    first = hosted.page("etag-pkg").headers["etag"]
    assert hosted.upload(*wheel("unrelated_pkg", "1.0")).status_code == 200
    assert hosted.page("etag-pkg").headers["etag"] == first
    assert hosted.upload(*wheel("etag_pkg", "1.1")).status_code == 200
    assert hosted.page("etag-pkg").headers["etag"] != first


@pytest.mark.parametrize("coding", ["gzip", "zstd", "identity", "gzip;q=0, zstd", "br"])
def test_codings(hosted: Server, coding: str) -> None:
    with hosted.client.stream("GET", "/simple/http-pkg/", headers={"Accept": JSON, "Accept-Encoding": coding}) as answer:
        raw = b"".join(answer.iter_raw())
    used = answer.headers.get("content-encoding")
    assert used == {"gzip": "gzip", "zstd": "zstd", "gzip;q=0, zstd": "zstd"}.get(coding)
    assert int(answer.headers["content-length"]) == len(raw)
    plain = {"gzip": gzip.decompress, "zstd": zstandard.ZstdDecompressor().decompress, None: bytes}[used](raw)
    assert json.loads(plain)["name"] == "http-pkg"


def test_etags_of_codings_differ(hosted: Server) -> None:
    fields = {
        hosted.client.get("/simple/http-pkg/", headers={"Accept": accept, "Accept-Encoding": coding}).headers["etag"]
        for accept in (JSON, "text/html")
        for coding in ("gzip", "zstd", "identity")
    }
    assert len(fields) == 6


@pytest.mark.parametrize("path", ["/simple/http-pkg/", "/simple/", "FILE", "METADATA", "/simple/none/", "/simple/Http_Pkg/"])
def test_head_is_get_without_the_body(hosted: Server, path: str) -> None:
    item = hosted.page("http-pkg").json()["files"][0]
    path = {"FILE": "/simple/http-pkg/" + item["url"], "METADATA": "/simple/http-pkg/" + item["url"] + ".metadata"}.get(
        path, path
    )
    get, head = hosted.client.get(path), hosted.client.head(path)
    skip = {"date"}
    assert head.content == b""
    assert head.status_code == get.status_code
    assert {k: v for k, v in head.headers.items() if k not in skip} == {k: v for k, v in get.headers.items() if k not in skip}
    assert "content-length" in head.headers


def _file(server: Server) -> tuple[str, bytes]:
    item = server.page("http-pkg").json()["files"][0]
    path = "/simple/http-pkg/" + item["url"]
    return path, server.client.get(path).content


def test_files_are_immutable_and_plain(hosted: Server) -> None:
    path, content = _file(hosted)
    answer = hosted.client.get(path, headers={"Accept-Encoding": "gzip, zstd, br"})
    assert answer.content == content
    assert "content-encoding" not in answer.headers
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["accept-ranges"] == "bytes"
    assert int(answer.headers["content-length"]) == len(content)


@pytest.mark.parametrize(
    ("span", "start", "end"), [("bytes=0-99", 0, 100), ("bytes=-50", -50, None), ("bytes=100-", 100, None)]
)
def test_ranges(hosted: Server, span: str, start: int, end: int | None) -> None:
    path, content = _file(hosted)
    answer = hosted.client.get(path, headers={"Range": span})
    assert answer.status_code == 206
    assert answer.content == content[start:end]
    assert answer.headers["content-range"].endswith(f"/{len(content)}")
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_range_beyond_the_end_is_416(hosted: Server) -> None:
    path, content = _file(hosted)
    answer = hosted.client.get(path, headers={"Range": f"bytes={len(content) + 10}-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(content)}"


def test_if_range(hosted: Server) -> None:
    path, content = _file(hosted)
    etag = hosted.client.head(path).headers["etag"]
    assert hosted.client.get(path, headers={"Range": "bytes=0-9", "If-Range": etag}).content == content[:10]
    whole = hosted.client.get(path, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (whole.status_code, whole.content) == (200, content)


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/simple", "/simple/"),
        ("/simple/http-pkg", "/simple/http-pkg/"),
        ("/simple/Http_Pkg", "/simple/http-pkg/"),
        ("/simple/HTTP.pkg/", "/simple/http-pkg/"),
        ("/simple/http--pkg/", "/simple/http-pkg/"),
        ("/simple/Http_Pkg/?format=" + JSON, "/simple/http-pkg/?format=" + JSON),
        ("/cu130/simple/Http_Pkg/", "/cu130/simple/http-pkg/"),
    ],
)
def test_one_address_for_each_page(hosted: Server, path: str, end: str) -> None:
    answer = hosted.client.get(path)
    assert answer.status_code == 301
    followed = hosted.client.get(path, follow_redirects=True)
    assert str(followed.url).replace("%2B", "+") == hosted.url + end
    assert followed.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/simple/no-such/",
        "/none/simple/",
        "/simple/a/b/",
        "/simple/..%2f/",
        "/simple/%00/",
        "/files/xx/y",
        "/files/" + "0" * 64 + "/x",
    ],
)
def test_what_is_not_there_is_404(hosted: Server, path: str) -> None:
    answer = hosted.client.get(path)
    assert answer.status_code == 404
    assert answer.text.strip()


def test_plus_in_names_is_taken_both_ways(hosted: Server) -> None:
    item = hosted.page("http-pkg").json()["files"][-1]
    assert "%2B" in item["url"]
    path = "/simple/http-pkg/" + item["url"]
    for spelled in (path, path.replace("%2B", "+")):
        raw = subprocess.run(
            [
                "curl",
                "-s",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "--path-as-is",
                hosted.url + "/files/" + spelled.partition("/files/")[2],
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert raw.stdout == "200"


def test_an_address_of_uploads_explains_itself(hosted: Server) -> None:
    for path in ("/legacy/", "/legacy", "/nightly/legacy/", "/stage/spring/legacy/"):
        answer = hosted.client.get(path)
        assert answer.status_code == 200
        assert f"twine upload --verbose --repository-url {hosted.url}{path.rstrip('/')}/ " in answer.text
        assert "--check-url" in answer.text
    assert f"--check-url {hosted.url}/nightly/simple/" in hosted.client.get("/nightly/legacy/").text


def test_pages_are_asked_for_again(hosted: Server) -> None:
    assert hosted.page("http-pkg").headers["cache-control"] == "no-cache"


def test_pypiserver_addresses_work(hosted: Server) -> None:
    name, content = wheel("compat_pkg")
    assert hosted.upload(name, content, path="/").status_code == 200
    assert hosted.client.get(f"/packages/{name}").content == content
