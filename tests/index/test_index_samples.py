"""A root written by the commit 7ac15b8 can be served, checked, exported and changed (tests/samples/README.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_kit import REPOSITORY, Server, run_index, run_json, serving, wheel

SAMPLE = REPOSITORY / "tests" / "samples" / "7ac15b8" / "index"
TOKEN = "gf_dPYmRXE-lBoZuXmtkb90_YM6sha-LWD_fQuGcy-5SEc"
BUILT = "d6b759acbf96182aeb34397ea431c0775de2d03d6404bbe705aadb980f358882"
FAILED = "e7c47943047387d445c008f1aac8088b5a8361d6f65188fa145d1526f1cdb91a"
TINY_C = "tiny_c-1.0-cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64.whl"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(SAMPLE, tmp_path / "root")


@pytest.fixture
def old(root: Path) -> Iterator[Server]:
    with serving(root, token=TOKEN) as server:
        yield server


def test_every_file_is_there_and_whole(root: Path) -> None:
    report = run_json(root, "fsck")
    assert isinstance(report, dict)
    assert (report["files"], report["damaged"]) == (15, [])
    stats = run_json(root, "stats")
    assert isinstance(stats, dict)
    assert {row["project"]: (row["releases"], row["files"]) for row in stats["projects"]} == {
        "demo-pkg": (2, 3),
        "late-pkg": (1, 1),
        "set-pkg": (1, 1),
        "tiny-c": (1, 1),
    }


def test_the_pages_say_what_they_said(old: Server) -> None:
    page = old.page("demo-pkg").json()
    assert page["project-status"] == {"status": "archived", "reason": "set_pkg replaces it"}
    assert {file["filename"]: file["yanked"] for file in page["files"]} == {
        "demo_pkg-1.0-py3-none-any.whl": "broken on aarch64",
        "demo_pkg-1.1-py3-none-any.whl": False,
        "demo_pkg-1.1.tar.gz": False,
    }
    for file in page["files"]:
        content = old.client.get(f"/simple/demo-pkg/{file['url']}").content
        assert hashlib.sha256(content).hexdigest() == file["hashes"]["sha256"]
    assert old.filenames("tiny-c") == [TINY_C]
    assert old.filenames("tiny-c", prefix="/tiny") == [TINY_C]
    assert old.filenames("set-pkg", prefix="/tiny") == ["set_pkg-2.0-py3-none-any.whl"]
    assert old.filenames("late-pkg") == [], "its set is staged and not published"
    people = old.client.get("/tiny-c/", headers={"Accept": "text/html"}, follow_redirects=True)
    assert people.status_code == 200
    assert TINY_C in people.text


def test_the_builds_are_shown_with_their_logs(old: Server) -> None:
    built, failed = (old.client.get(f"/records/{build_id}").json() for build_id in (BUILT, FAILED))
    assert (built["outcome"], built["wheel"]["filename"]) == ("built", TINY_C)
    assert (failed["outcome"], failed["failure"]["exit_code"]) == ("failed", 21)
    assert "RuntimeError: on purpose" in old.client.get(f"/records/{FAILED}/log").text


def test_its_token_and_its_password_upload_and_what_is_published_stays(old: Server) -> None:
    assert [token["name"] for token in _listed(old.root, "token", "list")] == ["test", "ada"]
    assert old.upload(*wheel("set_pkg", "2.1")).status_code == 200
    name, content = wheel("set_pkg", "2.2")
    form = {":action": "file_upload", "protocol_version": "1", "filetype": "bdist_wheel", "name": "set_pkg", "version": "2.2"}
    files = {"content": (name, content, "application/octet-stream")}
    assert old.client.post("/legacy/", data=form, files=files, auth=("ada", "analytical")).status_code == 200
    assert old.client.post("/legacy/", data=form, files=files, auth=("ada", "wrong")).status_code == 401
    changed = old.upload(*wheel("set_pkg", "2.0", files={"set_pkg/__init__.py": b"changed = 1\n"}))
    assert "a published file never changes" in changed.text
    assert old.filenames("set-pkg") == [f"set_pkg-2.{number}-py3-none-any.whl" for number in range(3)]


def test_a_set_that_was_staged_is_published(old: Server) -> None:
    sets = {row["name"]: row["state"] for row in _listed(old.root, "stage", "list")}
    assert sets == {"tiny": "published", "later": "staged"}
    run_index(old.root, "stage", "publish", "later")
    assert old.filenames("late-pkg", prefix="/later") == ["late_pkg-0.1-py3-none-any.whl"]
    assert old.filenames("late-pkg") == ["late_pkg-0.1-py3-none-any.whl"]


def test_the_audit_log_goes_on(root: Path) -> None:
    run_index(root, "unyank", "demo-pkg", "1.0")
    log = run_index(root, "log").stdout
    for action in ("token.create", "project.host", "record.put", "file.upload", "file.yank", "set.publish", "file.unyank"):
        assert action in log, action


def test_it_is_exported(root: Path, tmp_path: Path) -> None:
    run_index(root, "export", str(tmp_path / "tree"))
    page = json.loads((tmp_path / "tree" / "simple" / "tiny-c" / "index.json").read_text())
    (file,) = page["files"]
    exported = tmp_path / "tree" / "simple" / "tiny-c" / file["url"]
    assert hashlib.sha256(exported.read_bytes()).hexdigest() == file["hashes"]["sha256"]


def _listed(root: Path, *arguments: str) -> list[dict[str, str]]:
    rows = run_json(root, *arguments)
    assert isinstance(rows, list)
    return rows
