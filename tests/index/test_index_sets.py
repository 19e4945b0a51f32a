"""Sets of wheels: they are staged, published at once when they are complete, and installed from their lock."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from index_kit import AARCH64, JSON, Server, make_token, no_lock, preview_of, run_index, run_json, wheel

from index.serving.assembly import build
from index.serving.service import ServeOptions
from index.simple_api import views
from index.simple_api.views import Listed, View
from index.store.catalogue import Catalogue
from index.store.files import Store


def test_a_set_appears_at_once_and_only_when_complete(shared: Server) -> None:
    expect = ["--expect", "one_pkg==1.0 cp311 aarch64", "--expect", "two_pkg==1.0"]
    run_index(shared.root, "stage", "create", "spring", *expect)
    upload = "/stage/spring/legacy/"
    assert shared.upload(*wheel("one_pkg", "1.0+cu130", AARCH64), path=upload).status_code == 200
    preview = preview_of(shared, "spring")
    assert shared.filenames("one-pkg", prefix=preview) == [f"one_pkg-1.0+cu130-{AARCH64}.whl"]
    assert "no-cache" in shared.page("one-pkg", prefix=preview).headers["cache-control"]
    assert shared.filenames("one-pkg") == []
    assert shared.page("one-pkg", prefix="/spring").status_code == 404
    assert shared.client.get("/spring/requirements.lock").status_code == 404
    assert "one-pkg==1.0+cu130" in shared.client.get(f"{preview}/requirements.lock").text
    assert shared.page("one-pkg", prefix="/preview/guess").status_code == 404
    assert shared.client.get(f"/packages/one_pkg-1.0+cu130-{AARCH64}.whl").status_code == 404
    assert "one_pkg" not in shared.client.get("/changes").text

    refused = run_index(shared.root, "stage", "publish", "spring", check=False)
    assert refused.returncode == 2
    assert "lacks 1 of 2 wheels: two_pkg==1.0" in refused.stderr
    assert shared.filenames("one-pkg") == []

    assert shared.upload(*wheel("two_pkg"), path=upload).status_code == 200
    run_index(shared.root, "stage", "publish", "spring")
    for prefix in ("", "/spring", "/cu130"):
        assert shared.filenames("one-pkg", prefix=prefix) == [f"one_pkg-1.0+cu130-{AARCH64}.whl"]
    assert shared.client.get("/spring/simple/", headers={"Accept": JSON}).json()["projects"] == [
        {"name": "one-pkg"},
        {"name": "two-pkg"},
    ]
    assert shared.page("one-pkg", prefix=preview).status_code == 404, "the preview ends with the stage"
    assert shared.client.get(f"{preview}/requirements.lock").status_code == 404
    late = shared.upload(*wheel("two_pkg", "1.1"), path=upload)
    assert late.status_code == 400
    assert "is staged: it does not exist, or it is published or dropped" in late.text


def test_a_nightly_set_is_in_the_nightly_view_and_its_own(shared: Server, tmp_path: Path) -> None:
    (tmp_path / "matrix").write_text("# what it must hold\ndusk_pkg==1.0.dev1\n\ndawn_pkg==1.0.dev1  # and this\n")
    run_index(shared.root, "stage", "create", "dusk", "--nightly", "--matrix", str(tmp_path / "matrix"))
    since = run_json(shared.root, "log")[-1]["serial"]  # type: ignore[index]
    assert shared.upload(*wheel("dusk_pkg", "1.0.dev1"), path="/stage/dusk/legacy/").status_code == 200
    assert "lacks 1 of 2 wheels: dawn_pkg==1.0.dev1" in run_index(shared.root, "stage", "publish", "dusk", check=False).stderr
    assert shared.upload(*wheel("dawn_pkg", "1.0.dev1"), path="/stage/dusk/legacy/").status_code == 200
    run_index(shared.root, "stage", "publish", "dusk")
    for prefix, there in (("/nightly", True), ("/dusk", True), ("", False)):
        assert bool(shared.filenames("dusk-pkg", prefix=prefix)) == there
    later = [line.split()[3] for line in run_index(shared.root, "log", "--since", str(since)).stdout.splitlines()]
    assert later == ["file.upload", "file.upload", "set.publish", "file.show", "file.show"]


def test_a_wheel_of_the_wrong_python_does_not_complete_a_set(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "wrong", "--expect", "wrong_pkg==1.0 cp312,cp311 aarch64")
    assert shared.upload(*wheel("wrong_pkg", "1.0", AARCH64), path="/stage/wrong/legacy/").status_code == 200
    refused = run_index(shared.root, "stage", "publish", "wrong", check=False)
    assert "lacks 1 of 2 wheels: wrong_pkg==1.0 cp312 aarch64" in refused.stderr


def test_a_dropped_set_leaves_nothing(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "dropped")
    name, content = wheel("drop_pkg")
    assert shared.upload(name, content, path="/stage/dropped/legacy/").status_code == 200
    preview = preview_of(shared, "dropped")
    run_index(shared.root, "stage", "drop", "dropped")
    assert shared.page("drop-pkg", prefix=preview).status_code == 404
    assert shared.upload(*wheel("drop_pkg", requires_python=None)).status_code == 200, "the name was never public"


def test_staged_names_are_reserved(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "reserve")
    assert shared.upload(*wheel("res_pkg"), path="/stage/reserve/legacy/").status_code == 200
    assert shared.upload(*wheel("res_pkg", requires_python=None)).status_code == 400
    assert shared.upload(*wheel("res_pkg")).status_code == 200, "a public upload of the same bytes shows the file"
    assert shared.filenames("res-pkg") == ["res_pkg-1.0-py3-none-any.whl"]


@pytest.mark.parametrize("name", ["cu130", "cu130-torch2.11", "simple", "files", "Upper", "a/b", "..", "nightly", "-x"])
def test_set_names_that_would_hide_something_are_refused(shared: Server, name: str) -> None:
    process = (
        run_index(shared.root, "stage", "create", "--", name, check=False)
        if name.startswith("-")
        else run_index(shared.root, "stage", "create", name, check=False)
    )
    assert process.returncode == 2


def test_an_empty_set_is_not_published(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "empty")
    assert "is empty" in run_index(shared.root, "stage", "publish", "empty", check=False).stderr


def test_a_sets_lock_is_installed_from_its_index(server: Server, tmp_path: Path) -> None:
    run_index(server.root, "stage", "create", "whole")
    for name, content in (wheel("part_one"), wheel("part_two", "2.0", requires=("part-one",))):
        assert server.upload(name, content, path="/stage/whole/legacy/").status_code == 200
    run_index(server.root, "stage", "publish", "whole")
    answer = server.client.get("/whole/requirements.lock")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    options = [
        "--require-hashes",
        "--no-deps",
        "--index-url",
        f"{server.url}/whole/simple/",
        "--target",
        str(tmp_path / "here"),
    ]
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", *options, "-r", f"{server.url}/whole/requirements.lock"]
    process = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in (tmp_path / "here").glob("part_*")} >= {"part_one", "part_two"}
    run_index(server.root, "export", str(tmp_path / "tree"))
    assert (tmp_path / "tree" / "whole" / "requirements.lock").read_text() == answer.text

    run_index(server.root, "stage", "create", "twice")
    for version in ("1.0", "1.1"):
        assert server.upload(*wheel("part_twice", version), path="/stage/twice/legacy/").status_code == 200
    run_index(server.root, "stage", "publish", "twice")
    answer = server.client.get("/twice/requirements.lock")
    assert answer.status_code == 404
    assert "several versions of part-twice (1.0, 1.1)" in answer.text
    run_index(server.root, "export", str(tmp_path / "tree"))
    assert not (tmp_path / "tree" / "twice" / "requirements.lock").exists()
    for page in (server.client.get("/sets/").text, (tmp_path / "tree" / "sets" / "index.html").read_text()):
        assert "/whole/requirements.lock" in page
        assert "/twice/requirements.lock" not in page
        assert "several versions of part-twice" in page
    for prefix in ("", "cu130/", "absent/"):
        assert server.client.get(f"/{prefix}requirements.lock").status_code == 404


def test_a_set_that_lost_a_project_has_no_lock(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "shrunk")
    for name in ("shrunk_a", "shrunk_b", "shrunk_c"):
        assert shared.upload(*wheel(name), path="/stage/shrunk/legacy/").status_code == 200
    run_index(shared.root, "delete", "shrunk-c", "1.0", "--yes")
    run_index(shared.root, "stage", "publish", "shrunk")
    lock = shared.client.get("/shrunk/requirements.lock").text
    assert [line.split("==")[0] for line in lock.splitlines() if "==" in line] == ["shrunk-a", "shrunk-b"], "as published"
    run_index(shared.root, "delete", "shrunk-b", "1.0", "--yes")
    no_lock(shared, "shrunk", "shrunk-b")


def test_a_lock_is_of_one_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (tmp_path / "wheels").mkdir()
    for name, content in (wheel("moment_a"), wheel("moment_b")):
        (tmp_path / "wheels" / name).write_bytes(content)
    run_index(root, "import", str(tmp_path / "wheels"))
    run_index(root, "stage", "create", "now")
    run_index(root, "stage", "add", "now", *sorted(path.name for path in (tmp_path / "wheels").iterdir()))
    run_index(root, "stage", "publish", "now")
    real = views.files

    def meanwhile(catalogue: Catalogue, view: View, project: str) -> list[Listed]:
        if project == "moment-a":
            run_index(root, "delete", "moment-b", "1.0", "--yes")
        return real(catalogue, view, project)

    monkeypatch.setattr(views, "files", meanwhile)
    application = build(Store(root=root), ServeOptions())

    async def ask() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://x") as client:
            return (await client.get("/now/requirements.lock")).text

    lock = asyncio.run(ask())
    application.service.close()
    assert "moment-a==1.0" in lock
    assert "moment-b==1.0" in lock


def test_a_deleted_name_is_not_freed_by_dropping_its_set(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "forgetful")
    name, content = wheel("deleted_pkg")
    assert shared.upload(name, content, path="/stage/forgetful/legacy/").status_code == 200
    run_index(shared.root, "delete", "deleted-pkg", "1.0", "--yes")
    run_index(shared.root, "stage", "drop", "forgetful")
    answer = shared.upload(name, content)
    assert answer.status_code == 400
    assert "cannot be reused" in answer.text


# --- over HTTP --------------------------------------------------------------------------------------------------------------


def test_a_set_is_opened_filled_and_published_over_http(shared: Server) -> None:
    auth = ("__token__", shared.token)
    matrix = {"expect": ["far_pkg==1.0 cp311 aarch64", "far_dep==2.0"]}
    opened = shared.client.put("/stage/autumn", json=matrix, auth=auth)
    assert opened.status_code == 200, opened.text
    assert opened.json()["missing"] == matrix["expect"]
    assert shared.client.put("/stage/autumn", json=matrix, auth=auth).status_code == 200, "repeating the same is allowed"
    other = shared.client.put("/stage/autumn", json={"expect": ["far_pkg==1.0"]}, auth=auth)
    assert (other.status_code, "has a different matrix" in other.text) == (400, True)

    assert shared.upload(*wheel("far_pkg", "1.0", AARCH64), path=opened.json()["upload"]).status_code == 200
    refused = shared.client.post("/stage/autumn/publish", auth=auth)
    assert (refused.status_code, "lacks 1 of 2 wheels: far_dep==2.0" in refused.text) == (400, True)
    assert shared.filenames("far-pkg") == []

    assert shared.upload(*wheel("far_dep", "2.0"), path=opened.json()["upload"]).status_code == 200
    state = shared.client.get("/stage/autumn", auth=auth).json()
    digest = hashlib.sha256(wheel("far_dep", "2.0")[1]).hexdigest()
    assert (state["missing"], state["files"]["far_dep-2.0-py3-none-any.whl"]) == ([], digest)
    shown = shared.client.post("/stage/autumn/publish", auth=auth)
    assert (shown.status_code, shown.json()["state"], shown.json()["simple"]) == (200, "published", "/autumn/simple/")
    assert shared.filenames("far-pkg", prefix="/autumn") == [f"far_pkg-1.0-{AARCH64}.whl"]
    assert "is published" in shared.client.post("/stage/autumn/publish", auth=auth).text


def test_a_dropped_set_is_not_opened_again_over_http(shared: Server) -> None:
    auth = ("__token__", shared.token)
    run_index(shared.root, "stage", "create", "fallen")
    run_index(shared.root, "stage", "drop", "fallen")
    answer = shared.client.put("/stage/fallen", json={"expect": []}, auth=auth)
    assert (answer.status_code, "was dropped" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"expect": "a"}', b'{"expect": [1]}', b'{"expect": ["a b c d"]}', b"[" * 100_000]
)
def test_a_matrix_that_cannot_be_read_is_refused(shared: Server, body: bytes) -> None:
    answer = shared.client.put("/stage/unread", content=body, auth=("__token__", shared.token))
    assert answer.status_code == 400, answer.text
    assert shared.client.get("/stage/unread", auth=("__token__", shared.token)).status_code == 404


def test_who_may_stage_over_http(shared: Server) -> None:
    def put(name: str, *auth: str) -> int:
        return shared.client.put(f"/stage/{name}", json={"expect": []}, auth=tuple(auth) or None).status_code  # type: ignore[arg-type]

    assert put("guarded") == 401
    assert put("guarded", "__token__", make_token(shared.root, "--project", "far-pkg")) == 403
    scoped = make_token(shared.root, "--set", "guarded")
    assert put("other-set", "__token__", scoped) == 403
    assert put("guarded", "__token__", scoped) == 200
    assert shared.client.get("/stage/guarded").status_code == 401, "the preview address is secret"
