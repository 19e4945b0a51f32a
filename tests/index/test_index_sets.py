"""Views of one store, atomic publication of sets, mirrored locks, records and their facts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from index_kit import JSON, Server, make_token, run_index, run_json, serving, wheel

from index.serving.assembly import build
from index.serving.service import ServeOptions
from index.simple_api import views
from index.simple_api.views import Listed, View
from index.store.catalogue import Catalogue
from index.store.files import Store

AARCH64 = "cp311-cp311-manylinux_2_34_aarch64"


def preview_of(server: Server, name: str) -> str:
    sets = run_json(server.root, "stage", "list")
    return next(f"/preview/{item['preview']}" for item in sets if item["name"] == name)


def test_a_view_for_each_cuda(shared: Server) -> None:
    for version in ("1.0+cu124", "1.0+cu130", "1.0+cu.12.8.torch.2.11", "1.0"):
        assert shared.upload(*wheel("cuda_pkg", version, AARCH64, requires=("torch==2.11.*",))).status_code == 200
    for cuda, local in (("cu124", "cu124"), ("cu130", "cu130"), ("cu128", "cu.12.8.torch.2.11")):
        names = shared.filenames("cuda-pkg", prefix=f"/{cuda}-torch2.11")
        assert names == [f"cuda_pkg-1.0+{local}-{AARCH64}.whl"], "its requirements pin this torch"
        assert shared.filenames("cuda-pkg", prefix=f"/{cuda}") == []
    assert len(shared.filenames("cuda-pkg")) == 4
    listed = next(item for item in shared.page("cuda-pkg").json()["files"] if "+cu130" in item["filename"])
    assert (listed["_cuda"], listed["_torch"], listed["_glibc"]) == ("13.0", "2.11", "2.34")
    item = shared.page("cuda-pkg", prefix="/cu130-torch2.11").json()["files"][0]
    assert shared.client.get("/cu130-torch2.11/simple/cuda-pkg/" + item["url"]).status_code == 200
    projects = shared.client.get("/cu130-torch2.11/simple/", headers={"Accept": JSON}).json()["projects"]
    assert projects == [{"name": "cuda-pkg"}]


def test_a_view_for_each_cuda_and_torch(server: Server, tmp_path: Path) -> None:
    """pip installs the highest local version, so a view must not contain wheels for two torch versions."""
    locals_ = ("", "+cu130", "+cu130.torch2.10", "+cu130.torch2.11", "+torch2.11", "+cu124torch2.11")
    for local in locals_:
        assert server.upload(*wheel("stack_pkg", f"1.0{local}", requires=("torch",))).status_code == 200
    for view, shown in (
        ("/cu130", ["+cu130"]),
        ("/cu130-torch2.10", ["+cu130", "+cu130.torch2.10"]),
        ("/cu130-torch2.11", ["+cu130", "+cu130.torch2.11", "+torch2.11"]),
        ("/cu124-torch2.11", ["+torch2.11", "+cu124torch2.11"]),
        ("", list(locals_)),
    ):
        assert server.filenames("stack-pkg", prefix=view) == [f"stack_pkg-1.0{local}-py3-none-any.whl" for local in shown]

    for name in ("cu131", "cu130-torch2.12", "cu130-torch", "absent"):
        answer = server.client.get(f"/{name}/simple/stack-pkg/", headers={"Accept": JSON})
        assert answer.status_code == 404
        assert "/simple/, /cu124/simple/, /cu124-torch2.11/simple/, /cu130/simple/, /cu130-torch2.10/simple/" in answer.text
    assert server.upload(*wheel("bound_pkg", "1.0+cu130.torch2.11")).status_code == 200
    for view in ("cu130", "cu130-torch2.10"):
        answer = server.client.get(f"/{view}/simple/bound-pkg/", headers={"Accept": JSON})
        assert answer.status_code == 404
        assert "see /cu130-torch2.11/simple/" in answer.text

    assert server.upload(*wheel("torch", "2.10.0")).status_code == 200
    for view, local in (("cu130", "+cu130"), ("cu130-torch2.10", "+cu130.torch2.10")):
        subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "install", "--no-cache-dir", "--no-deps",
             "--disable-pip-version-check", "--target", str(tmp_path / view),
             "--index-url", f"{server.url}/{view}/simple/", "stack_pkg"],
            check=True, capture_output=True,
        )  # fmt: skip
        assert (tmp_path / view / f"stack_pkg-1.0{local}.dist-info").is_dir()

    run_index(server.root, "export", str(tmp_path / "tree"))
    page = tmp_path / "tree" / "cu130-torch2.11" / "simple" / "stack-pkg" / "index.json"
    assert page.read_bytes() == server.page("stack-pkg", prefix="/cu130-torch2.11").content


def test_nightlies_are_in_their_own_view_alone(shared: Server) -> None:
    assert shared.upload(*wheel("night_pkg", "1.0.dev1"), path="/nightly/legacy/").status_code == 200
    assert shared.filenames("night-pkg") == []
    assert shared.filenames("night-pkg", prefix="/nightly") == ["night_pkg-1.0.dev1-py3-none-any.whl"]


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
    assert "not a staged set" in late.text


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


# --- mirror -----------------------------------------------------------------------------------------------------------------


def lock_line(name: str, version: str, content: bytes) -> str:
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A third-party index: another instance of ours, with a library and its dependency."""
    with serving(tmp_path_factory.mktemp("upstream") / "root", "--allow-new") as server:
        assert server.upload(*wheel("third_lib", "3.0", requires=("third_dep>=1",))).status_code == 200
        assert server.upload(*wheel("third_dep", "1.5")).status_code == 200
        assert server.upload(*wheel("third_dep", "1.6")).status_code == 200
        yield server


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_sets_view_is_closed_and_complete(shared: Server, upstream: Server, tmp_path: Path, how: str) -> None:
    name = f"closed-{how}"
    ours = wheel(f"our_{how}", "1.0", requires=("third_lib",))
    assert shared.upload(*ours).status_code == 200
    assert shared.upload(*wheel("elsewhere_pkg", "1.0")).status_code == 200
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# a lock\n"
        + lock_line(f"our_{how}", "1.0", ours[1])
        + lock_line("third-lib", "3.0", wheel("third_lib", "3.0", requires=("third_dep>=1",))[1])
        + lock_line("third-dep", "1.5", wheel("third_dep", "1.5")[1])
    )
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    options = ["--link"] if how == "link" else []
    mirrored = run_json(shared.root, "mirror", str(lock), "--set", name, *options, env=env)
    word = {"copy": "copied", "link": "linked"}[how]
    assert [(item["name"], item["how"]) for item in mirrored] == [
        (f"our-{how}", "ours"),
        ("third-lib", word),
        ("third-dep", word),
    ]
    again = run_json(shared.root, "mirror", str(lock), "--set", name, *options, env=env)
    assert [item["how"] for item in again] == ["ours", "kept", "kept"]
    run_index(shared.root, "stage", "publish", name)

    view = shared.client.get(f"/{name}/simple/", headers={"Accept": JSON}).json()["projects"]
    assert [item["name"] for item in view] == [f"our-{how}", "third-dep", "third-lib"], "only the names of the lock"
    assert shared.filenames("third-lib") == [], "mirrored files are visible only in their set"
    assert shared.filenames("third-lib", prefix="/cu130") == []
    assert shared.filenames("third-dep", prefix=f"/{name}") == ["third_dep-1.5-py3-none-any.whl"], "only the locked version"
    item = shared.page("third-dep", prefix=f"/{name}").json()["files"][0]
    assert item["url"].startswith(upstream.url) == (how == "link")
    assert item["core-metadata"]
    assert item["size"] > 0

    upstream.forget()
    target = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "install", "--no-cache-dir", "--target", str(target),
         "--disable-pip-version-check",
         "--index-url", f"{shared.url}/{name}/simple/", f"our_{how}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert sorted(path.name for path in target.glob("*.dist-info")) == [
        f"our_{how}-1.0.dist-info",
        "third_dep-1.5.dist-info",
        "third_lib-3.0.dist-info",
    ]
    assert bool(upstream.requests()) == (how == "link"), "copies do not require upstream"


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


def no_lock(server: Server, name: str, gone: str) -> None:
    """A lock without that project would install less than the set, and with --no-deps without an error."""
    answer = server.client.get(f"/{name}/requirements.lock")
    assert answer.status_code == 404
    assert f"no longer has files of {gone}," in answer.text


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


def test_a_lock_that_upstream_cannot_fulfil(shared: Server, upstream: Server, tmp_path: Path) -> None:
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    lock = tmp_path / "requirements.lock"
    lock.write_text(lock_line("third-dep", "1.5", b"other bytes"))
    process = run_index(shared.root, "mirror", str(lock), "--set", "failing", check=False, env=env)
    assert process.returncode == 10
    assert "third-dep 1.5" in process.stderr
    lock.write_text(lock_line("no-such", "1.5", b"x"))
    assert "no project no-such" in run_index(shared.root, "mirror", str(lock), "--set", "failing", check=False, env=env).stderr
    for wrong in ("third-dep>=1\n", "third-dep==1.5\n", "third-dep @ https://x/y.whl\n"):
        lock.write_text(wrong)
        assert run_index(shared.root, "mirror", str(lock), "--set", "failing", check=False, env=env).returncode == 3


def test_an_upstream_that_sends_other_bytes_is_caught(shared: Server, upstream: Server, tmp_path: Path) -> None:
    name, content = wheel("bitrot_lib", "1.0")
    assert upstream.upload(name, content).status_code == 200
    digest = hashlib.sha256(content).hexdigest()
    stored = upstream.root / "files" / digest[:2] / digest
    stored.chmod(0o644)
    stored.write_bytes(bytes(len(content)))
    lock = tmp_path / "requirements.lock"
    lock.write_text(lock_line("bitrot-lib", "1.0", content))
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    process = run_index(shared.root, "mirror", str(lock), "--set", "rotten", check=False, env=env)
    assert process.returncode == 11
    assert shared.filenames("bitrot-lib", prefix=preview_of(shared, "rotten")) == []


def mirrored(server: Server, upstream: Server, folder: Path, name: str, *lines: str) -> list[dict[str, object]]:
    """`index mirror` of a lock of these lines."""
    lock = folder / "requirements.lock"
    lock.write_text("".join(lines))
    mirrored = run_json(
        server.root, "mirror", str(lock), "--set", name, env={"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    )
    assert isinstance(mirrored, list)
    return mirrored


LIB = wheel("third_lib", "3.0", requires=("third_dep>=1",))[1]
DEP, DEP_16 = wheel("third_dep", "1.5")[1], wheel("third_dep", "1.6")[1]


def test_a_set_whose_mirroring_died_is_not_published(shared: Server, upstream: Server, tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    absent = lock_line("no-such", "1.0", b"x")
    lock.write_text(lock_line("third-dep", "1.5", DEP) + absent + lock_line("third-lib", "3.0", LIB))
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    assert run_index(shared.root, "mirror", str(lock), "--set", "halfway", check=False, env=env).returncode == 10
    process = run_index(shared.root, "stage", "publish", "halfway", check=False)
    assert process.returncode == 2
    assert "lacks 2 of 3 wheels: no-such==1.0 of its lock; third-lib==3.0 of its lock" in process.stderr
    mirrored(shared, upstream, tmp_path, "halfway", lock_line("third-dep", "1.5", DEP), lock_line("third-lib", "3.0", LIB))
    run_index(shared.root, "stage", "publish", "halfway")


def test_a_new_lock_takes_the_place_of_the_old_one(shared: Server, upstream: Server, tmp_path: Path) -> None:
    ours = wheel("replaced_pkg", "1.0")
    assert shared.upload(*ours).status_code == 200
    mirrored(
        shared, upstream, tmp_path, "relocked", lock_line("third-dep", "1.5", DEP), lock_line("replaced-pkg", "1.0", ours[1])
    )
    preview = preview_of(shared, "relocked")
    assert shared.filenames("replaced-pkg", prefix=preview)
    mirrored(shared, upstream, tmp_path, "relocked", lock_line("third-dep", "1.6", DEP_16))
    assert shared.filenames("third-dep", prefix=preview) == ["third_dep-1.6-py3-none-any.whl"]
    assert shared.filenames("replaced-pkg", prefix=preview) == []


def test_a_set_takes_several_locks_each_from_its_index(shared: Server, upstream: Server, tmp_path: Path) -> None:
    """As in `builder set`: mirror wheels of a separate index first, then the lock of everything; repeat after publishing."""
    with serving(tmp_path / "elsewhere", "--allow-new") as elsewhere:
        own = {name: wheel(name, "1.0") for name in ("own_a", "own_b")}
        for item in own.values():
            assert elsewhere.upload(*item).status_code == 200
        lines = {name: lock_line(name.replace("_", "-"), "1.0", content) for name, (_, content) in own.items()}
        locks = {f"{name}.lock": (line, elsewhere) for name, line in lines.items()}
        locks["requirements.lock"] = ("".join(lines.values()) + lock_line("third-dep", "1.5", DEP), upstream)
        for state in ("staged", "published"):
            for name, (text, index) in locks.items():
                (tmp_path / name).write_text(text)
                env = {"GRACEFARM_PYTHON_INDEX": index.url + "/simple/"}
                run_index(shared.root, "mirror", str(tmp_path / name), "--set", "several", env=env)
            if state == "staged":
                run_index(shared.root, "stage", "publish", "several")
    assert [shared.filenames(name, prefix="/several") for name in ("own-a", "own-b", "third-dep")] == [
        ["own_a-1.0-py3-none-any.whl"],
        ["own_b-1.0-py3-none-any.whl"],
        ["third_dep-1.5-py3-none-any.whl"],
    ]


def test_mirroring_changes_no_published_set(shared: Server, upstream: Server, tmp_path: Path) -> None:
    first = lock_line("third-dep", "1.5", DEP)
    mirrored(shared, upstream, tmp_path, "fixed-set", first)
    run_index(shared.root, "stage", "publish", "fixed-set")
    before = shared.page("third-dep", prefix="/fixed-set").text
    lock = tmp_path / "requirements.lock"
    for lines in (lock_line("third-dep", "1.6", DEP_16), first + lock_line("third-lib", "3.0", LIB)):
        lock.write_text(lines)
        env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
        process = run_index(shared.root, "mirror", str(lock), "--set", "fixed-set", check=False, env=env)
        assert process.returncode == 2
        assert "fixed-set is published" in process.stderr
    assert shared.page("third-dep", prefix="/fixed-set").text == before
    assert shared.filenames("third-lib", prefix="/fixed-set") == []
    assert [item["how"] for item in mirrored(shared, upstream, tmp_path, "fixed-set", first)] == ["kept"]


def test_a_damaged_copy_is_unlisted_and_mirroring_again_mends_it(shared: Server, upstream: Server, tmp_path: Path) -> None:
    line = lock_line("third-lib", "3.0", LIB) + lock_line("third-dep", "1.6", DEP_16)
    mirrored(shared, upstream, tmp_path, "mended-set", line)
    run_index(shared.root, "stage", "publish", "mended-set")
    page = shared.page("third-lib", prefix="/mended-set").json()
    url = "/mended-set/simple/third-lib/" + page["files"][0]["url"]
    digest = hashlib.sha256(LIB).hexdigest()
    stored = shared.root / "files" / digest[:2] / digest
    stored.chmod(0o644)
    stored.write_bytes(bytes(len(LIB)))
    assert run_index(shared.root, "fsck", "--set-aside", check=False).returncode == 11
    assert shared.filenames("third-lib", prefix="/mended-set") == [], "files known to be damaged are not listed"
    no_lock(shared, "mended-set", "third-lib")
    assert [item["how"] for item in mirrored(shared, upstream, tmp_path, "mended-set", line)] == ["copied", "kept"]
    assert shared.page("third-lib", prefix="/mended-set").json() == page
    assert shared.client.get(url).content == LIB


def test_a_mirrored_file_can_be_withdrawn(shared: Server, upstream: Server, tmp_path: Path) -> None:
    name, line = "third_dep-1.6-py3-none-any.whl", lock_line("third-dep", "1.6", DEP_16)
    for number in (1, 2):
        mirrored(shared, upstream, tmp_path, f"withdrawn-{number}", line, lock_line("third-lib", "3.0", LIB))
    run_index(shared.root, "stage", "publish", "withdrawn-1")
    page = shared.page("third-dep", prefix="/withdrawn-1").json()
    url = "/withdrawn-1/simple/third-dep/" + page["files"][0]["url"]
    assert run_index(shared.root, "withdraw", "no_such-1.0-py3-none-any.whl", check=False).returncode == 2
    assert "withdrawn-1" in run_index(shared.root, "withdraw", name, "--reason", "it mines").stdout
    assert shared.page("third-dep", prefix="/withdrawn-1").status_code == 404
    assert "third-dep" not in shared.client.get("/withdrawn-1/simple/").text
    assert shared.client.get(url).status_code == 410
    assert shared.filenames("third-lib", prefix="/withdrawn-1"), "the others stay"
    no_lock(shared, "withdrawn-1", "third-dep")
    assert "third-dep==1.6 of its lock" in run_index(shared.root, "stage", "publish", "withdrawn-2", check=False).stderr
    lock = tmp_path / "requirements.lock"
    lock.write_text(line)
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    again = run_index(shared.root, "mirror", str(lock), "--set", "withdrawn-3", check=False, env=env)
    assert again.returncode == 2
    assert "was withdrawn from this index" in again.stderr
    run_index(shared.root, "withdraw", name, "--undo")
    assert shared.page("third-dep", prefix="/withdrawn-1").json() == page
    assert "third-dep==1.6" in shared.client.get("/withdrawn-1/requirements.lock").text
    assert shared.client.get(url).content == DEP_16


@contextmanager
def liar(files: list[dict[str, object]], content: bytes) -> Iterator[tuple[str, list[str]]]:
    """An upstream with configurable statements about its files; it records the Accept-Encoding of each download."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, kind = content, "application/octet-stream"
            if self.path.startswith("/simple/"):
                page = {"meta": {"api-version": "1.1"}, "name": "lied", "versions": [], "files": files}
                body, kind = json.dumps(page).encode(), JSON
            else:
                asked.append(self.headers.get("Accept-Encoding", ""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("filename", "more", "code", "words"),
    [
        ("../../lied-1.0-py3-none-any.whl", {}, 10, "lists a locked file"),
        ("a/lied-1.0-py3-none-any.whl", {}, 10, "lists a locked file"),
        ("other-1.0-py3-none-any.whl", {}, 10, "of lied 1.0"),
        ("lied-2.0-py3-none-any.whl", {}, 10, "of lied 1.0"),
        ("lied-1.0-py3-none-any.whl", {"size": 100}, 11, "more than the 100 bytes"),
    ],
)
def test_an_upstream_that_lies_is_caught(
    shared: Server, tmp_path: Path, filename: str, more: dict[str, object], code: int, words: str
) -> None:
    content = wheel("lied", "1.0")[1]
    entry = {"filename": filename, "url": "/file", "hashes": {"sha256": hashlib.sha256(content).hexdigest()}, **more}
    lock = tmp_path / "requirements.lock"
    lock.write_text(lock_line("lied", "1.0", content))
    with liar([entry], content) as (url, _):
        env = {"GRACEFARM_PYTHON_INDEX": url + "/simple/"}
        process = run_index(shared.root, "mirror", str(lock), "--set", "lied-set", check=False, env=env)
    assert process.returncode == code, process.stderr
    assert words in process.stderr
    assert shared.filenames("lied", prefix=preview_of(shared, "lied-set")) == []
    assert not list((shared.root / "staging").iterdir())


def test_a_copy_keeps_the_time_of_the_original(shared: Server, tmp_path: Path) -> None:
    name, content = wheel("timed", "1.0")
    entry = {"filename": name, "url": "/file", "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
            "size": len(content), "upload-time": "2024-03-01T10:20:30.5Z"}  # fmt: skip
    lock = tmp_path / "requirements.lock"
    lock.write_text(lock_line("timed", "1.0", content))
    with liar([entry], content) as (url, asked):
        run_index(shared.root, "mirror", str(lock), "--set", "timed-set", env={"GRACEFARM_PYTHON_INDEX": url + "/simple/"})
    assert asked == ["identity"]
    item = shared.page("timed", prefix=preview_of(shared, "timed-set")).json()["files"][0]
    assert item["upload-time"] == "2024-03-01T10:20:30.500000Z"


# --- records ----------------------------------------------------------------------------------------------------------------


def test_the_farms_record_inside_a_wheel_gives_its_facts(shared: Server) -> None:
    inside = {"build_id": "b1", "stack": {"name": "cu130", "cuda": "13.0", "torch": "2.11.0", "sm": ["90"], "glibc": "2.35"}}
    folder = "fact_pkg-1.0.dist-info"
    answer = shared.upload(*wheel("fact_pkg", "1.0", AARCH64, files={f"{folder}/gracefarm.json": json.dumps(inside).encode()}))
    assert answer.status_code == 200
    item = shared.page("fact-pkg").json()["files"][0]
    assert (item["_cuda"], item["_torch"], item["_sm"], item["_glibc"]) == ("13.0", "2.11.0", ["90"], "2.34"), (
        "the tag is measured, the stack is an upper bound"
    )
    assert shared.filenames("fact-pkg", prefix="/cu130")
    assert shared.client.get("/simple/fact-pkg/" + item["_record"]).json() == inside


def test_a_record_that_comes_later_gives_facts_too(shared: Server) -> None:
    name, content = wheel("later_pkg", "1.0", AARCH64)
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("later-pkg", prefix="/cu126") == []
    record = {
        "id": "later-1",
        "recipe": "later_cu126",
        "name": "later-pkg",
        "outcome": "published",
        "facts": {"cuda": "12.6", "sm": ["90", "90a"]},
        "outputs": {"sha256": hashlib.sha256(content).hexdigest()},
    }
    auth = ("__token__", shared.token)
    assert shared.client.put("/records/later-1", json=record).status_code == 401
    assert shared.client.put("/records/later-1", json=record, auth=auth).status_code == 200
    assert shared.client.put("/records/later-1/log", content=b"the log\n", auth=auth).status_code == 200
    assert shared.filenames("later-pkg", prefix="/cu126") == [name]
    item = shared.page("later-pkg").json()["files"][0]
    assert item["_sm"] == ["90", "90a"]
    assert shared.client.get("/simple/later-pkg/" + item["_record"]).json() == record
    assert shared.client.get("/simple/later-pkg/" + item["_record"] + "/log").text == "the log\n"


def test_records_of_failed_builds_are_kept(shared: Server) -> None:
    auth = ("__token__", shared.token)
    record = {
        "id": "failed-1",
        "recipe": "broken",
        "stack": "cu130",
        "outcome": "failed",
        "cause": "nvcc: out of memory",
        "seconds": 61.5,
    }
    assert shared.client.put("/records/failed-1", json=record, auth=auth).status_code == 200
    assert shared.client.get("/records/failed-1").json() == record
    for identifier, body in (("failed-1", b"not json"), ("other", json.dumps(record).encode()), ("failed-1", b"[]")):
        assert shared.client.put(f"/records/{identifier}", content=body, auth=auth).status_code in (400, 404), identifier
    assert shared.client.get("/records/none").status_code == 404


def test_a_token_for_a_project_puts_no_other_projects_record(shared: Server) -> None:
    token = make_token(shared.root, "--project", "mine-pkg")
    auth = ("__token__", token)
    assert shared.client.put("/records/mine-1", json={"recipe": "mine_pkg"}, auth=auth).status_code == 200
    assert shared.client.put("/records/mine-1/log", content=b"log", auth=auth).status_code == 200
    assert (
        shared.client.put("/records/theirs-1", json={"recipe": "theirs"}, auth=("__token__", shared.token)).status_code == 200
    )
    for path, content in (("theirs-1", b'{"recipe": "mine_pkg"}'), ("theirs-1/log", b"x"), ("new-1", b'{"recipe": "theirs"}')):
        assert shared.client.put(f"/records/{path}", content=content, auth=auth).status_code == 403, path


def record_of(name: str, content: bytes, **more: object) -> dict[str, object]:
    return {"recipe": name, "outcome": "built", "wheel": {"sha256": hashlib.sha256(content).hexdigest()}, **more}


def test_a_record_moves_no_other_projects_wheel(shared: Server) -> None:
    """A token for one project names a wheel of another project, whose facts, view and page do not change."""
    name, content = wheel("victim_pkg", "1.0+cu130", AARCH64)
    assert shared.upload(name, content).status_code == 200
    mine = ("__token__", make_token(shared.root, "--project", "mine-p"))
    stolen = record_of("mine-p", content, facts={"cuda": "11.8"})
    assert shared.client.put("/records/stolen-1", json=stolen, auth=mine).status_code == 200
    assert shared.filenames("victim-pkg", prefix="/cu130") == [name]
    assert shared.filenames("victim-pkg", prefix="/cu118") == []
    assert "_record" not in shared.page("victim-pkg").json()["files"][0]


def test_a_wheel_that_names_a_foreign_build_is_not_of_it(shared: Server) -> None:
    auth = ("__token__", shared.token)
    real = wheel("real_pkg", "1.0", files={"real_pkg-1.0.dist-info/gracefarm.json": b'{"build_id": "real-1"}'})
    assert shared.upload(*real).status_code == 200
    gates = {"verdicts": [{"gate": "smoke", "status": "passed", "summary": "proven on a GPU"}]}
    assert shared.client.put("/records/real-1", json=record_of("real-pkg", real[1], **gates), auth=auth).status_code == 200
    for name in ("other_pkg", "real_pkg"):
        version = "1.0" if name == "other_pkg" else "2.0"
        inside = {f"{name}-{version}.dist-info/gracefarm.json": b'{"build_id": "real-1"}'}
        fake = wheel(name, version, files=inside)
        assert shared.upload(*fake).status_code == 200
        assert "proven on a GPU" not in shared.client.get(f"/wheel/{fake[0]}/").text
    assert "proven on a GPU" in shared.client.get(f"/wheel/{real[0]}/").text


def test_a_record_that_names_its_wheel_lets_no_other_be_of_its_build(shared: Server) -> None:
    """The forged wheel comes first; the record that follows names another wheel."""
    auth = ("__token__", shared.token)
    inside = {"early_pkg-2.0.dist-info/gracefarm.json": b'{"build_id": "early-1"}'}
    fake, real = wheel("early_pkg", "2.0", files=inside), wheel("early_pkg", "1.0")
    for item in (fake, real):
        assert shared.upload(*item).status_code == 200
    gates = {"verdicts": [{"gate": "smoke", "status": "passed", "summary": "proven on a GPU"}]}
    assert shared.client.put("/records/early-1", json=record_of("early-pkg", real[1], **gates), auth=auth).status_code == 200
    assert "proven on a GPU" in shared.client.get(f"/wheel/{real[0]}/").text
    assert "proven on a GPU" not in shared.client.get(f"/wheel/{fake[0]}/").text


def test_a_token_for_a_set_puts_records_of_its_wheels_alone(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "record-set")
    token = make_token(shared.root, "--set", "record-set")
    auth = ("__token__", token)
    member, outside = wheel("member_pkg"), wheel("outside_pkg", "1.0+cu130", AARCH64)
    assert shared.upload(*member, path="/stage/record-set/legacy/", token=token).status_code == 200
    assert shared.upload(*outside).status_code == 200
    good = record_of("member-pkg", member[1], facts={"sm": ["90"]})
    assert shared.client.put("/records/member-1", json=good, auth=auth).status_code == 200
    assert shared.client.put("/records/member-1/log", content=b"log", auth=auth).status_code == 200
    bad = record_of("outside-pkg", outside[1], facts={"cuda": "11.8"})
    for path, body in (("outside-1", json.dumps(bad).encode()), ("failed-2", b'{"recipe": "x"}'), ("outside-1/log", b"x")):
        assert shared.client.put(f"/records/{path}", content=body, auth=auth).status_code == 403, path
    assert shared.filenames("outside-pkg", prefix="/cu130")


def test_a_staged_build_is_as_hidden_as_its_wheel(shared: Server, tmp_path: Path) -> None:
    run_index(shared.root, "stage", "create", "quiet")
    inside = {"quiet_pkg-1.0.dist-info/gracefarm.json": b'{"build_id": "quiet-1", "recipe": "quiet-pkg", "outcome": "built"}'}
    name, content = wheel("quiet_pkg", "1.0", files=inside)
    assert shared.upload(name, content, path="/stage/quiet/legacy/").status_code == 200
    auth = ("__token__", shared.token)
    for path, body in (("", json.dumps(record_of("quiet-pkg", content)).encode()), ("/log", b"log")):
        assert shared.client.put(f"/records/quiet-1{path}", content=body, auth=auth).status_code == 200
    places = ("/records/quiet-1", "/records/quiet-1/log", "/board/quiet-1/")
    run_index(shared.root, "export", str(tmp_path / "before"))
    assert [shared.client.get(place).status_code for place in places] == [404, 404, 404]
    assert "quiet-" not in shared.client.get("/board/").text + shared.client.get("/changes").text
    assert not [path for path in (tmp_path / "before").rglob("*") if "quiet" in path.name]
    preview = preview_of(shared, "quiet")
    item = shared.page("quiet-pkg", prefix=preview).json()["files"][0]
    assert shared.client.get(f"{preview}/simple/quiet-pkg/{item['_record']}").json()["recipe"] == "quiet-pkg"
    assert shared.client.get(f"{preview}/simple/quiet-pkg/{item['_record']}/log").text == "log"
    assert shared.client.get(f"{preview}/records/stolen-1").status_code == 404
    run_index(shared.root, "stage", "publish", "quiet")
    assert [shared.client.get(place).status_code for place in places] == [200, 200, 200]


ODD = {
    "cuda with a path": {"facts": {"cuda": "13.0/x"}},
    "cuda with a patch": {"facts": {"cuda": "13.0.1"}},
    "infinite seconds": {"seconds": float("inf")},
    "seconds of 400 digits": {"seconds": int("9" * 400)},
    "seconds that are true": {"seconds": True},
    "text for a time": {"stages": [{"name": "compile", "wall_s": "long", "peak_memory": "much", "note": ["x"]}]},
    "a list for a verdict": {"verdicts": [{"gate": "x", "status": ["passed"], "summary": {}, "details": 3}]},
    "details that are not text": {"verdicts": [{"gate": "x", "details": [1, None, "told"]}]},
    "odd sm": {"facts": {"sm": ["../x", 90, None, {"a": 1}]}},
    "odd torch": {"facts": {"torch": "2.11/../x"}},
    "numbers for names": {"version": 3, "stack": [1], "inputs": [], "failure": 7, "finished": {}},
}


def put_odd(server: Server, odd: dict[str, object]) -> tuple[str, str]:
    """A wheel, and the record of a failed build with this defect; returns the names of both."""
    tag = hashlib.sha256(repr(odd).encode()).hexdigest()[:8]
    name, content = wheel(f"odd_{tag}", "1.0", AARCH64)
    assert server.upload(name, content).status_code == 200
    record = record_of(f"odd-{tag}", content, **{"outcome": "failed", **odd})
    body = json.dumps(record).replace("Infinity", "1e999")
    auth = ("__token__", server.token)
    assert server.client.put(f"/records/odd-{tag}", content=body.encode(), auth=auth).status_code == 200
    return f"odd-{tag}", name


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_record_breaks_no_page(shared: Server, odd: dict[str, object]) -> None:
    project, name = put_odd(shared, odd)
    for path in ("/", "/board/", f"/board/{project}/", f"/wheel/{name}/", f"/project/{project}/", "/sets/"):
        assert shared.client.get(path).status_code == 200, path
    if odd == ODD["cuda with a patch"]:
        assert shared.filenames(project, prefix="/cu130") == [name], "a patch release belongs to its CUDA version"


def test_odd_records_break_no_export(server: Server, tmp_path: Path) -> None:
    for odd in ODD.values():
        put_odd(server, odd)
    run_index(server.root, "export", str(tmp_path / "static"))
    assert len(list((tmp_path / "static" / "board").iterdir())) > len(ODD)


def test_half_a_surrogate_pair_is_refused(shared: Server) -> None:
    answer = shared.client.put("/records/half-1", content=b'{"recipe": "\\ud800"}', auth=("__token__", shared.token))
    assert answer.status_code == 400
    assert "surrogate" in answer.text
    whole = b'{"recipe": "\\ud83d\\ude00"}'
    assert shared.client.put("/records/half-2", content=whole, auth=("__token__", shared.token)).status_code == 200


def test_a_nightly_becomes_a_release(shared: Server) -> None:
    name, content = wheel("promoted_pkg")
    assert shared.upload(name, content, path="/nightly/legacy/").status_code == 200
    assert shared.filenames("promoted-pkg") == []
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("promoted-pkg") == [name]
    assert shared.filenames("promoted-pkg", prefix="/nightly") == []
    assert shared.upload(name, content, path="/nightly/legacy/").status_code == 200
    assert shared.filenames("promoted-pkg") == [name], "a release does not become a nightly again"


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
