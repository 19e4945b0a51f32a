"""`index export`: static files are the pages of the live server, and nginx serves them in the same way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from index_kit import AARCH64, JSON, Server, run_index, run_json, serving, wheel

from index.simple_api.negotiate import Format
from index.simple_api.views import View
from index.store.catalogue import Catalogue
from index.web import export
from index.web.export import StaticExport


def filled(server: Server) -> None:
    assert server.upload(*wheel("one_pkg", "1.0")).status_code == 200
    assert server.upload(*wheel("one_pkg", "1.0+cu130", AARCH64)).status_code == 200
    assert server.upload(*wheel("two_pkg", "1.0")).status_code == 200


def test_the_export_is_the_live_pages(server: Server, tmp_path: Path) -> None:
    filled(server)
    target = tmp_path / "static"
    run_index(server.root, "export", str(target))
    for form, accept in (("json", JSON), ("html", "text/html")):
        for path in ("simple", "simple/one-pkg", "cu130/simple/one-pkg"):
            live = server.client.get(f"/{path}/", headers={"Accept": accept, "Accept-Encoding": "identity"}).content
            assert (target / path / f"index.{form}").read_bytes() == live
    item = server.page("one-pkg").json()["files"][0]
    file = (target / "simple" / "one-pkg" / item["url"]).resolve()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == item["hashes"]["sha256"]
    assert file.with_name(file.name + ".metadata").exists()


def test_the_export_is_incremental(server: Server, tmp_path: Path) -> None:
    filled(server)
    target = tmp_path / "static"
    first = run_json(server.root, "export", str(target))
    assert run_json(server.root, "export", str(target)) == {"written": 0, "kept": first["written"], "removed": 0}
    untouched = (target / "simple" / "two-pkg" / "index.json").stat().st_mtime_ns
    assert server.upload(*wheel("one_pkg", "2.0")).status_code == 200
    run_index(server.root, "delete", "one-pkg", "1.0", "--yes")
    report = run_json(server.root, "export", str(target))
    assert report["written"] > 0
    assert report["removed"] == 4, "the wheel, its metadata, its page and that page's gzip"
    assert (target / "simple" / "two-pkg" / "index.json").stat().st_mtime_ns == untouched
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    assert run_index(server.root, "export", str(tmp_path / "other"), check=False).returncode == 3


def test_staged_sets_are_not_exported(server: Server, tmp_path: Path) -> None:
    run_index(server.root, "stage", "create", "secret")
    assert server.upload(*wheel("secret_pkg"), path="/stage/secret/legacy/").status_code == 200
    run_index(server.root, "export", str(tmp_path / "static"))
    assert not [path for path in (tmp_path / "static").rglob("*") if "secret" in path.name]


def test_an_export_renders_only_what_changed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(server)
    target = tmp_path / "static"
    run_index(server.root, "export", str(target))
    rendered: list[str] = []
    real = export.render

    def counted(catalogue: Catalogue, view: View, project: str, form: Format, base_url: str | None) -> bytes:
        rendered.append(project)
        return real(catalogue, view, project, form, base_url)

    monkeypatch.setattr(export, "render", counted)
    assert server.upload(*wheel("two_pkg", "2.0")).status_code == 200
    run_index(server.root, "export", str(target))
    assert set(rendered) == {"two-pkg", ""}
    (target / "simple" / "one-pkg" / "index.json").unlink()
    run_index(server.root, "export", str(target))
    assert (target / "simple" / "one-pkg" / "index.json").exists(), "removed files are written again"
    for change in (("yank", "one-pkg", "1.0"), ("status", "one-pkg", "deprecated"), ("delete", "one-pkg", "1.0", "--yes")):
        run_index(server.root, *change)
        run_index(server.root, "export", str(target))
        fresh = tmp_path / f"fresh-{change[0]}"
        run_index(server.root, "export", str(fresh))
        assert tree_of(target) == tree_of(fresh), change


def tree_of(folder: Path) -> dict[str, bytes]:
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in contents.items() if not path.startswith(".gracefarm")}


def test_an_export_is_of_one_moment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that is published between the export of files and pages is in neither."""
    filled(server)
    real = StaticExport.add_records

    def slow(*arguments: Any) -> None:
        assert server.upload(*wheel("late_pkg")).status_code == 200
        real(*arguments)

    monkeypatch.setattr(StaticExport, "add_records", slow)
    run_index(server.root, "export", str(tmp_path / "static"))
    held = [str(path) for path in (tmp_path / "static").rglob("*") if "late" in path.name]
    assert held == []
    assert "late" not in (tmp_path / "static" / "index.html").read_text()


def test_what_is_quarantined_leaves_the_export_and_its_page_offers_nothing(server: Server, tmp_path: Path) -> None:
    filled(server)
    target = tmp_path / "static"
    run_index(server.root, "export", str(target))
    assert list(target.glob("files/*/two_pkg*"))
    run_index(server.root, "status", "two-pkg", "quarantined", "--reason", "it mines")
    run_index(server.root, "export", str(target))
    assert not list(target.glob("files/*/two_pkg*"))
    assert list(target.glob("files/*/one_pkg*"))
    page = server.client.get(f"/wheel/{wheel('two_pkg')[0]}/").text
    assert "it mines" in page
    for word in ("Download", "pip install", ".metadata"):
        assert word not in page
    assert (target / "wheel" / wheel("two_pkg")[0] / "index.html").read_text().count("Download") == 0


@contextmanager
def nginx(tree: Path, folder: Path) -> Iterator[httpx.Client]:
    """nginx serves an export on a socket in the folder."""
    for parent in (tree, tree.parent, *tree.parent.parents):
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    part = (tree / "nginx.conf").read_text()
    part = part.replace("__LISTEN__", f"unix:{folder}/n.sock").replace("__ROOT__", str(tree))
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;"
        f" events {{}} http {{ access_log off; client_body_temp_path {folder}/b; {part} }}"
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-e", str(folder / "error.log")])
    try:
        for _ in range(200):
            if (folder / "n.sock").exists():
                break
            threading.Event().wait(0.05)
        with httpx.Client(transport=httpx.HTTPTransport(uds=f"{folder}/n.sock"), base_url="http://nginx") as client:
            yield client
    finally:
        process.terminate()
        process.wait(10)


PUBLIC = "https://wheels.example"
FORMS = re.compile(r"(  <h3 id=\"finder\">.*?</form>|<form class=\"search\".*?</form>)\n", re.DOTALL)
"Forms, which an export omits because they require a running server."


def follow(client: httpx.Client, start: list[str], accept: str) -> dict[str, httpx.Response]:
    """Every address that the pages link to, with the response."""
    answers: dict[str, httpx.Response] = {}
    todo = list(start)
    while todo:
        path = todo.pop()
        if path in answers:
            continue
        answer = answers[path] = client.get(path, headers={"Accept": accept, "Accept-Encoding": "identity"})
        assert answer.status_code == 200, (path, answer.status_code)
        links: list[str] = []
        if answer.headers["content-type"].startswith("text/html"):
            links = [unescape(link) for link in re.findall(r'<(?:a|link|script)[^>]* (?:href|src)="([^"#]+)', answer.text)]
        elif answer.headers["content-type"] == JSON:
            for item in answer.json().get("files", []):
                links += [item["url"], item["url"] + ".metadata", *([item["_record"]] if "_record" in item else [])]
            links += [f"{item['name']}/" for item in answer.json().get("projects", [])]
        todo += [str(httpx.URL("http://x" + path).join(link).raw_path, "ascii") for link in links if "://" not in link]
    return answers


def same(live: httpx.Client, static: httpx.Client, tree: Path) -> int:
    """Both serve the same pages, files, records and logs, and the tree has no other files. Return the count."""
    count = 0
    reached: set[str] = set()
    for first, accept in (
        (["/", "/sets/", "/board/", "/spring/requirements.lock"], "text/html"),
        (["/simple/", "/cu130/simple/", "/spring/simple/"], JSON),
    ):
        there = follow(static, first, accept)
        here = follow(live, first, accept)
        # The finder's link to all wheels is the page itself.
        assert set(there) == set(here)
        for path, answer in there.items():
            assert (
                FORMS.sub("", here[path].text) == answer.text
                if "text/html" in answer.headers["content-type"]
                else (here[path].content == answer.content)
            ), path
            assert here[path].headers["content-type"] == answer.headers["content-type"], path
            assert here[path].headers["cache-control"].split(",")[0] in answer.headers["cache-control"] or "/files/" in path
            assert answer.headers["etag"]
        reached |= {unquote(path) for path in there}
        count += len(there)
    ends = re.compile(r"(index\.(json|html))?(\.gz|\.zst)?\Z")
    held = {"/" + str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    unknown = {path for path in held if path not in reached and ends.sub("", path) not in reached}
    unknown = {path for path in unknown if not path.startswith("/records/")} - {"/nginx.conf", "/.gracefarm-export.json"}
    assert unknown == set(), "no page links to it"
    return count


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: see system-packages-test.txt")
def test_nginx_serves_the_export_as_the_live_server_does(tmp_path: Path) -> None:
    tree, folder = tmp_path / "static", tmp_path / "nginx"
    folder.mkdir()
    with serving(tmp_path / "root", "--allow-new", "--url", PUBLIC) as server:
        auth = ("__token__", server.token)
        filled(server)
        inside = {"build_id": "b1", "inputs": {"stack": {"cuda": "13.0", "sm": ["90"]}, "target": "aarch64"}}
        built = wheel("built_pkg", "1.0+cu130", AARCH64, files={
            "built_pkg-1.0+cu130.dist-info/gracefarm.json": json.dumps(inside).encode()})  # fmt: skip
        assert server.upload(*built).status_code == 200
        assert server.client.put("/records/b1/log", content=b"the log\n", auth=auth).status_code == 200
        matrix = {"name": "default", "made": "2026-11-29T01:00:00Z", "cells": []}
        assert server.client.put("/matrix/default", json=matrix, auth=auth).status_code == 200
        digest, ran = "ab" * 32, {"filename": built[0], "sha256": hashlib.sha256(built[1]).hexdigest()}
        certificate = {"device_digest": digest, "sm": "90", "gpu": "H100", "certified": "2026-11-28T00:00:00Z", "wheel": ran}
        assert server.client.put(f"/certificates/{digest}", json=certificate, auth=auth).status_code == 200
        run_index(server.root, "stage", "create", "spring")
        run_index(server.root, "stage", "add", "spring", built[0])
        run_index(server.root, "stage", "publish", "spring")
        run_index(server.root, "export", str(tree), "--url", PUBLIC)
        with nginx(tree, folder) as static:
            first = same(server.client, static, tree)
            assert first > 30
            page = static.get("/simple/built-pkg/", headers={"Accept": JSON}).json()
            record = httpx.URL("http://nginx/simple/built-pkg/").join(page["files"][0]["_record"])
            assert static.get(record).json() == inside
            assert static.get(f"{record}/log").text == "the log\n"
            assert static.get("/matrix/default").json() == matrix
            assert static.get(f"/certificates/{digest}").json() == certificate
            item = server.page("one-pkg").json()["files"][-1]
            span = static.get("/simple/one-pkg/" + item["url"], headers={"Range": "bytes=0-9"})
            assert (span.status_code, "immutable" in span.headers["cache-control"]) == (206, True)
            assert "default-src 'none'" in static.get("/").headers["content-security-policy"]
            assert PUBLIC in static.get("/project/built-pkg/").text
            assert static.get("/", headers={"Accept-Encoding": "gzip"}).headers["content-encoding"] == "gzip"

            gone = "/simple/one-pkg/" + server.page("one-pkg").json()["files"][0]["url"]
            assert server.upload(*wheel("new_pkg", "1.0")).status_code == 200
            run_index(server.root, "delete", "one-pkg", "1.0", "--yes")
            run_index(server.root, "delete", "two-pkg", "1.0", "--yes")
            failed = {"recipe": "broken", "stack": "cu130", "outcome": "failed", "failure": {"cause": "no memory"}}
            assert server.client.put("/records/b2", json=failed, auth=auth).status_code == 200
            report = run_json(server.root, "export", str(tree), "--url", PUBLIC)
            assert report["kept"] > report["written"] > 0, "only changes are written"
            assert report["removed"] > 0
            same(server.client, static, tree)
            assert "no memory" in static.get("/board/").text
            for path in (gone, "/project/two-pkg/", "/simple/two-pkg/", "/wheel/two_pkg-1.0-py3-none-any.whl/", "/records/no"):
                assert static.get(path).status_code == 404, path
