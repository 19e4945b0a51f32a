"""HTTP behaviour: negotiation, conditional requests, ranges, redirects, caching, authentication, operation."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import re
import subprocess
import threading
import zipfile
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import zstandard
from index_kit import JSON, Server, make_token, run_index, serving, stop, wheel
from starlette.requests import Request
from starlette.responses import Response

from index.serving.assembly import build
from index.serving.service import ServeOptions
from index.store.files import Store
from index.web.projects import ProjectPages

HTML = "application/vnd.pypi.simple.v1+html"


@pytest.fixture(scope="module")
def hosted(shared: Server) -> Server:
    """A project with four wheels, one of them with a local version."""
    for version in ("1.0", "1.1", "2.0"):
        assert shared.upload(*wheel("http_pkg", version)).status_code == 200
    assert shared.upload(*wheel("http_pkg", "2.0+cu130", "cp311-cp311-manylinux_2_34_aarch64")).status_code == 200
    return shared


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


# --- yank, status, delete ---------------------------------------------------------------------------------------------------


def test_yank_and_back(hosted: Server) -> None:
    name, content = wheel("yank_pkg")
    assert hosted.upload(name, content).status_code == 200
    run_index(hosted.root, "yank", "Yank.Pkg", "1.0", "--reason", 'broken "on" <arm>')
    assert hosted.page("yank-pkg").json()["files"][0]["yanked"] == 'broken "on" <arm>'
    assert 'data-yanked="broken &quot;on&quot; &lt;arm&gt;"' in hosted.page("yank-pkg", accept="text/html").text
    assert hosted.client.get(f"/packages/{name}").content == content, "pinned installs still work"
    run_index(hosted.root, "unyank", "yank-pkg", "1.0")
    assert hosted.page("yank-pkg").json()["files"][0]["yanked"] is False
    run_index(hosted.root, "yank", "yank-pkg", "1.0")
    assert hosted.page("yank-pkg").json()["files"][0]["yanked"] is True
    refused = run_index(hosted.root, "yank", "yank-pkg", "9", check=False)
    assert refused.returncode == 2
    assert "one of the releases of yank-pkg: 1" in refused.stderr
    absent = run_index(hosted.root, "yank", "absent-pkg", "9", check=False)
    assert "this index has no files of absent-pkg" in absent.stderr


def test_deleted_names_are_never_reused(hosted: Server) -> None:
    name, content = wheel("gone_pkg")
    assert hosted.upload(name, content).status_code == 200
    path = "/simple/gone-pkg/" + hosted.page("gone-pkg").json()["files"][0]["url"]
    run_index(hosted.root, "delete", "gone-pkg", "1.0", "--yes")
    assert hosted.page("gone-pkg").status_code == 404
    assert hosted.client.get(path).status_code == 410
    for bytes_ in (content, wheel("gone_pkg", requires_python=None)[1]):
        answer = hosted.upload(name, bytes_)
        assert answer.status_code == 400
        assert "cannot be reused" in answer.text


@pytest.mark.parametrize("status", ["archived", "deprecated", "quarantined", "active"])
def test_project_status(hosted: Server, status: str) -> None:
    project = f"{status}-pkg"
    name, content = wheel(f"{status}_pkg")
    assert hosted.upload(name, content).status_code == 200
    path = f"/simple/{project}/" + hosted.page(project).json()["files"][0]["url"]
    run_index(hosted.root, "status", project, status, "--reason", "because")
    page = hosted.page(project).json()
    assert page["project-status"] == {"status": status, "reason": "because"}
    text = hosted.page(project, accept="text/html").text
    assert f'<meta name="pypi:project-status" content="{status}">' in text
    assert '<meta name="pypi:project-status-reason" content="because">' in text
    assert len(page["files"]) == (0 if status == "quarantined" else 1)
    assert hosted.client.get(path).status_code == (403 if status == "quarantined" else 200)
    expected = 403 if status in ("archived", "quarantined") else 200
    assert hosted.upload(*wheel(f"{status}_pkg", "2.0")).status_code == expected


# --- tokens -----------------------------------------------------------------------------------------------------------------


def test_uploads_need_a_good_token(hosted: Server) -> None:
    name, content = wheel("token_pkg")
    anonymous = hosted.client.post("/legacy/", data={":action": "file_upload"}, files={"content": (name, content)})
    assert anonymous.status_code == 401
    assert anonymous.headers["www-authenticate"].startswith("Basic ")
    for bad in ("", "gf_wrong", hosted.token[:-1], hosted.token + "x"):
        assert hosted.upload(name, content, token=bad).status_code == 401
    bearer = hosted.client.post(
        "/legacy/",
        data={":action": "file_upload"},
        files={"content": (name, content)},
        headers={"Authorization": f"Bearer {hosted.token}"},
    )
    assert bearer.status_code == 200


def test_a_token_reaches_as_far_as_its_scope(hosted: Server) -> None:
    token = make_token(hosted.root, "--project", "scoped_pkg")
    assert hosted.upload(*wheel("scoped_pkg"), token=token).status_code == 200
    assert hosted.upload(*wheel("unscoped_pkg"), token=token).status_code == 403
    run_index(hosted.root, "stage", "create", "scope-set")
    staged = make_token(hosted.root, "--set", "scope-set")
    assert hosted.upload(*wheel("set_pkg"), token=staged).status_code == 403
    assert hosted.upload(*wheel("set_pkg"), token=staged, path="/stage/scope-set/legacy/").status_code == 200


def test_a_token_for_the_nightly_channel(hosted: Server) -> None:
    token = make_token(hosted.root, "--nightly")
    assert hosted.upload(*wheel("night_scope"), token=token).status_code == 403
    assert hosted.upload(*wheel("night_scope"), token=token, path="/nightly/legacy/").status_code == 200
    run_index(hosted.root, "stage", "create", "night-scope")
    assert hosted.upload(*wheel("night_scope"), token=token, path="/stage/night-scope/legacy/").status_code == 403
    other = make_token(hosted.root, "--set", "night-scope")
    assert hosted.upload(*wheel("night_scope", "2.0"), token=other, path="/nightly/legacy/").status_code == 403
    both = run_index(hosted.root, "token", "create", "--name", "x", "--nightly", "--set", "night-scope", check=False)
    assert both.returncode == 2


def test_tokens_end(hosted: Server) -> None:
    short = make_token(hosted.root, "--expires", "1s")
    __import__("time").sleep(1.2)
    assert hosted.upload(*wheel("expired_pkg"), token=short).status_code == 401
    run_index(hosted.root, "token", "create", "--name", "leaver")
    created = __import__("index_kit").run_json(hosted.root, "token", "create", "--name", "leaver2")
    assert hosted.upload(*wheel("leaver_pkg"), token=created["token"]).status_code == 200
    run_index(hosted.root, "token", "revoke", "leaver2")
    assert hosted.upload(*wheel("leaver_pkg", "2.0"), token=created["token"]).status_code == 401
    assert "leaver2" in run_index(hosted.root, "token", "list").stdout


def test_secrets_are_not_stored(hosted: Server) -> None:
    folder = hosted.root / "catalogue"
    assert not any(hosted.token.encode() in path.read_bytes() for path in folder.iterdir())


def test_refused_tokens_are_rate_limited(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("guess") / "root", "--allow-new") as server:
        name, content = wheel("guess_pkg")
        statuses = [server.upload(name, content, token=f"gf_{number}").status_code for number in range(40)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert server.upload(name, content).status_code == 200, "guesses of another client do not lock out a valid token"


# --- operation --------------------------------------------------------------------------------------------------------------


def test_operation_pages(hosted: Server) -> None:
    assert hosted.client.get("/health").text == "ok\n"
    assert hosted.client.get("/ready").status_code == 200
    text = hosted.client.get("/metrics").text
    assert "gracefarm_index_requests_total" in text
    assert 'gracefarm_index_uploads_total{outcome="created"}' in text


def test_the_audit_log_is_append_only(hosted: Server) -> None:
    import sqlite3

    log = run_index(hosted.root, "log").stdout
    assert "file.upload" in log
    assert "token:test" in log
    database = sqlite3.connect(hosted.root / "catalogue" / "catalogue.db")
    for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'other'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(statement)
    database.close()


def test_changes_feed(hosted: Server) -> None:
    before = hosted.client.get("/changes").json()["serial"]
    assert hosted.upload(*wheel("feed_pkg")).status_code == 200
    changes = hosted.client.get("/changes", params={"since": before}).json()["changes"]
    assert [(item["action"], item["subject"]) for item in changes] == [("file.upload", "feed_pkg-1.0-py3-none-any.whl")]


def test_changes_name_every_file_that_changed(hosted: Server) -> None:
    names = [f"feeds_pkg-{version}-py3-none-any.whl" for version in ("1.0", "1.1")]
    local = wheel("feeds_pkg", "1.0", "cp311-cp311-manylinux_2_34_aarch64")
    for item in (wheel("feeds_pkg", "1.0"), wheel("feeds_pkg", "1.1"), local):
        assert hosted.upload(*item).status_code == 200
    since = hosted.client.get("/changes").json()["serial"]
    run_index(hosted.root, "yank", "feeds-pkg", "1.0", "--reason", "bad")
    run_index(hosted.root, "unyank", "feeds-pkg", "1.0")
    run_index(hosted.root, "delete", "feeds-pkg", "1.1", "--yes")
    changes = hosted.client.get("/changes", params={"since": since}).json()["changes"]
    expected = [(f"file.{action}", name) for action in ("yank", "unyank") for name in (names[0], local[0])]
    assert sorted((item["action"], item["subject"]) for item in changes) == sorted([*expected, ("file.delete", names[1])])


def test_who_follows_the_changes_misses_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("feed") / "root", "--allow-new") as server:
        projects = [f"p{number:04}" for number in range(1203)]
        run_index(server.root, "host", *projects)
        seen: list[str] = []
        since, answers = 0, 0
        while True:
            answer = server.client.get("/changes", params={"since": since}).json()
            answers += 1
            seen += [item["subject"] for item in answer["changes"]]
            if answer["serial"] == since:
                break
            since = answer["serial"]
        assert answers == 3
        assert seen == projects


def test_mirrors_learn_of_a_set_when_it_is_published_and_of_a_dropped_one_never(hosted: Server) -> None:
    for name in ("feed-kept", "feed-dropped"):
        run_index(hosted.root, "stage", "create", name)
        assert hosted.upload(*wheel(name.replace("-", "_")), path=f"/stage/{name}/legacy/").status_code == 200
    since = hosted.client.get("/changes").json()["serial"]
    run_index(hosted.root, "stage", "drop", "feed-dropped")
    assert "feed" not in hosted.client.get("/changes", params={"since": since}).text
    run_index(hosted.root, "stage", "publish", "feed-kept")
    changes = hosted.client.get("/changes", params={"since": since}).json()["changes"]
    assert [(item["action"], item["subject"]) for item in changes] == [("file.show", "feed_kept-1.0-py3-none-any.whl")]
    assert "feed_dropped" not in hosted.client.get("/changes").text


def test_trusted_proxies_alone_say_who_asks(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("proxy") / "root"
    with serving(root, "--trusted-proxy", "127.0.0.1") as server:
        server.client.get("/health", headers={"X-Forwarded-For": "6.6.6.6, 203.0.113.7"})
        server.requests()
        assert server.access_log.read_text().startswith("203.0.113.7 ")
    with serving(root, token=server.token) as server:
        server.forget()
        server.client.get("/health", headers={"X-Forwarded-For": "203.0.113.7"})
        server.requests()
        assert server.access_log.read_text().startswith("127.0.0.1 ")


def test_a_chain_of_proxies_is_read_once_for_limits_and_log(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each proxy may add a header line. The client is the last address that is not a proxy; earlier ones are ignored."""
    root = tmp_path_factory.mktemp("chain") / "root"
    with serving(root, "--trusted-proxy", "127.0.0.1", "--writes-per-second", "1") as server:

        def post(number: int, asks: str) -> int:
            lines = [("X-Forwarded-For", f"6.6.6.{number}"), ("X-Forwarded-For", asks)]
            return server.client.post("/legacy/", headers=lines).status_code

        assert 429 in [post(number, "203.0.113.7") for number in range(6)], (
            "the limits must not depend on a header that the client sent"
        )
        assert post(7, "203.0.113.8") == 401
        server.requests()
        assert {line.split()[0] for line in server.access_log.read_text().splitlines()} == {"203.0.113.7", "203.0.113.8"}


def test_a_proxys_prefix_is_in_the_lines_to_copy(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The proxy removes the prefix. Links are relative, so only commands for users contain it."""
    root = tmp_path_factory.mktemp("prefix") / "root"
    forwarded = {"X-Forwarded-Host": "pypi.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/wheels/gpu/"}
    with serving(root, "--allow-new", "--trusted-proxy", "127.0.0.1") as server:
        assert server.upload(*wheel("prefix_pkg")).status_code == 200
        text = server.client.get("/project/prefix-pkg/", headers=forwarded).text
        assert "https://pypi.example/wheels/gpu/simple/" in text
        assert 'href="/' not in text
        assert (
            "--repository-url https://pypi.example/wheels/gpu/legacy/ "
            in server.client.get("/legacy/", headers=forwarded).text
        )
        for forged in ("//evil.example", "/../..", '/"><script>', "/a b"):
            text = server.client.get("/legacy/", headers={**forwarded, "X-Forwarded-Prefix": forged}).text
            assert "https://pypi.example/legacy/ " in text
    with serving(root, token=server.token) as server:
        assert "pypi.example" not in server.client.get("/legacy/", headers=forwarded).text, (
            "the header is ignored without a trusted proxy"
        )


def test_a_proxys_prefix_is_in_answers_for_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Addresses of a staged set and hints of refusals start at the host, so they contain the prefix."""
    root = tmp_path_factory.mktemp("answers") / "root"
    forwarded = {"X-Forwarded-Prefix": "/wheels/gpu"}
    hints = {
        "/absent/simple/": "(existing views: %s/simple/, %s/cu130/simple/, ",
        "/cu130/simple/answer-pkg/": "(see %s/cu130-torch2.11/simple/)",
        "/absent/requirements.lock": "(%s/sets/ lists the sets)",
        "/absent/pylock.toml": "(%s/sets/ lists the sets and their files)",
        "/absent": "(%s/ and %s/simple/ list the projects)",
        "/stage/absent": "(create it with PUT %s/stage/absent)",
        "/records/absent": "(%s/board/ lists the builds)",
    }
    with serving(root, "--allow-new", "--trusted-proxy", "127.0.0.1") as server:
        client, auth = server.client, ("__token__", server.token)
        assert server.upload(*wheel("answer_pkg", "1.0+cu130.torch2.11")).status_code == 200
        for headers, prefix in ((forwarded, "/wheels/gpu"), ({}, ""), ({"X-Forwarded-Prefix": "//evil.example"}, "")):
            name = f"set-{len(prefix)}-{len(headers)}"
            state = client.put(f"/stage/{name}", json={"expect": []}, auth=auth, headers=headers).json()
            assert state["upload"] == f"{prefix}/stage/{name}/legacy/"
            assert state["preview"].startswith(f"{prefix}/preview/")
            assert server.upload(
                *wheel("answer_pkg", f"1.0+{name.replace('-', '.')}"), path=f"/stage/{name}/legacy/"
            ).is_success
            assert client.get(f"/stage/{name}", auth=auth, headers=headers).json()["upload"] == state["upload"]
            state = client.post(f"/stage/{name}/publish", auth=auth, headers=headers).json()
            assert state["simple"] == f"{prefix}/{name}/simple/"
            for path, hint in hints.items():
                answer = client.get(path, headers=headers, auth=auth)
                assert answer.status_code == 404, path
                assert hint.replace("%s", prefix) in answer.text, path
            posted = client.post("/simple/", headers=headers)
            assert f"upload to {prefix}/legacy/ (twine" in posted.text
    with serving(root, token=server.token) as server:
        assert server.client.get(f"/stage/{name}", auth=auth, headers=forwarded).json()["simple"] == f"/{name}/simple/"


def test_a_network_of_proxies_is_trusted_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("network") / "root"
    with serving(root, "--trusted-proxy", "127.0.0.0/8", "--trusted-proxy", "10.1.0.0/16") as server:
        server.client.get("/health", headers={"X-Forwarded-For": "6.6.6.6, 203.0.113.7, 10.1.2.3"})
        server.requests()
        assert server.access_log.read_text().startswith("203.0.113.7 ")
    for wrong in ("localhost", "10.1.2.3/16", "10.0.0.0/40"):
        process = run_index(root, "serve", "--port", "0", "--trusted-proxy", wrong, check=False)
        assert process.returncode == 2
        assert wrong in process.stderr


def test_log_lines_cannot_be_forged(hosted: Server) -> None:
    headers = {"User-Agent": 'a" 200 "b', "Range": 'bytes=0-" 200 1 "x'}
    hosted.client.get("/simple/x%0a127.0.0.1 - - forged/", headers=headers)
    hosted.client.get("/health", headers={"User-Agent": "a\x85127.0.0.1 - - forged".encode("latin-1")})
    first, second = hosted.requests()[-2:]
    assert (first.status, first.span) == (404, "bytes=0-' 200 1 'x")
    assert (second.target, second.status) == ("/health", 200)


def test_tls(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(folder / "root", "--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem")) as server:
        import ssl

        context = ssl.create_default_context(cafile=folder / "cert.pem")
        assert httpx.get(server.url + "/health", verify=context).text == "ok\n"


def test_one_server_for_each_root(hosted: Server) -> None:
    process = run_index(hosted.root, "serve", "--port", "0", check=False)
    assert process.returncode == 4
    assert "another server already serves" in process.stderr


def test_the_server_ends_when_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("end") / "root") as server:
        stop(server.process)
        assert server.process.returncode == 0


def test_bind_is_loopback_unless_told(hosted: Server) -> None:
    assert hosted.url.startswith("http://127.0.0.1:")
    header = base64.b64encode(b"x:y").decode()
    assert hosted.client.post("/legacy/", headers={"Authorization": f"Basic {header}"}).status_code == 401


def test_what_clients_send_does_not_fill_the_memory(shared: Server) -> None:
    """Responses are cached by page, media type and coding; other headers and queries add no entry."""
    name = wheel("memory_pkg")
    assert shared.upload(*name).status_code == 200

    def ask(count: int) -> None:
        for number in range(count):
            junk = f"{number:06}" + "x" * 30_000
            headers = {"Accept": f"{JSON}, x/{number}", "Accept-Encoding": f"gzip, x{number}", "If-None-Match": f'"{junk}"'}
            assert shared.client.get(f"/simple/memory-pkg/?x={number}", headers=headers).status_code == 200
            assert shared.client.get("/simple/memory-pkg/", headers=headers).status_code == 200

    ask(50)
    before = resident(shared)
    ask(1500)
    assert resident(shared) - before < 12 << 20


def resident(server: Server) -> int:
    """Bytes of the server's memory."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert match
    return int(match[1]) << 10


def test_pages_of_the_whole_store_are_made_once_per_change_and_off_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    real = ProjectPages.first

    def counted(self: ProjectPages, request: Request) -> Response:
        threads.append(threading.current_thread().name)
        return real(self, request)

    monkeypatch.setattr(ProjectPages, "first", counted)
    application = build(Store(root=tmp_path / "root"), ServeOptions())

    async def ask() -> None:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            first = await client.get("/")
            for _ in range(3):
                assert (await client.get("/")).content == first.content
            assert (await client.get("/", headers={"If-None-Match": first.headers["etag"]})).status_code == 304
            assert len(threads) == 1
            assert "http://y" in (await client.get("/", headers={"Host": "y"})).text, "the address is that of the request"
            run_index(tmp_path / "root", "import", str(tmp_path / "wheels"))
            await asyncio.sleep(0.01)
            assert "fresh-pkg" in (await client.get("/")).text
            assert len(threads) == 3

    (tmp_path / "wheels").mkdir()
    name, content = wheel("fresh_pkg")
    (tmp_path / "wheels" / name).write_bytes(content)
    asyncio.run(ask())
    application.service.close()
    assert all(name.startswith("web_thread") for name in threads)
