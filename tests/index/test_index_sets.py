"""Views over one store, sets that appear at once, mirrored locks, records and their facts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from index_kit import JSON, Server, make_token, run_index, run_json, serving, wheel

AARCH64 = "cp311-cp311-manylinux_2_34_aarch64"


def preview_of(server: Server, name: str) -> str:
    found = run_json(server.root, "stage", "list")
    return next(f"/preview/{item['preview']}" for item in found if item["name"] == name)


def test_a_view_for_each_cuda(shared: Server) -> None:
    for version in ("1.0+cu124", "1.0+cu130", "1.0+cu.12.8.torch.2.11", "1.0"):
        assert shared.upload(*wheel("cuda_pkg", version, AARCH64, requires=("torch==2.11.*",))).status_code == 200
    assert shared.filenames("cuda-pkg", prefix="/cu124") == [f"cuda_pkg-1.0+cu124-{AARCH64}.whl"]
    assert shared.filenames("cuda-pkg", prefix="/cu130") == [f"cuda_pkg-1.0+cu130-{AARCH64}.whl"]
    assert shared.filenames("cuda-pkg", prefix="/cu128") == [f"cuda_pkg-1.0+cu.12.8.torch.2.11-{AARCH64}.whl"]
    assert len(shared.filenames("cuda-pkg")) == 4
    found = next(item for item in shared.page("cuda-pkg").json()["files"] if "+cu130" in item["filename"])
    assert (found["_cuda"], found["_torch"], found["_glibc"]) == ("13.0", "2.11", "2.34")
    item = shared.page("cuda-pkg", prefix="/cu130").json()["files"][0]
    assert shared.client.get("/cu130/simple/cuda-pkg/" + item["url"]).status_code == 200
    assert shared.client.get("/cu130/simple/", headers={"Accept": JSON}).json()["projects"] == [{"name": "cuda-pkg"}]


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
    assert shared.page("one-pkg", prefix="/preview/guess").status_code == 404
    assert shared.client.get(f"/packages/one_pkg-1.0+cu130-{AARCH64}.whl").status_code == 404
    assert "one_pkg" not in shared.client.get("/changes").text

    refused = run_index(shared.root, "stage", "publish", "spring", check=False)
    assert refused.returncode == 2
    assert "lacks 1 of 2: two_pkg==1.0" in refused.stderr
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
    late = shared.upload(*wheel("two_pkg", "1.1"), path=upload)
    assert late.status_code == 400
    assert "not a staged set" in late.text


def test_a_wheel_of_the_wrong_python_does_not_complete_a_set(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "wrong", "--expect", "wrong_pkg==1.0 cp312,cp311 aarch64")
    assert shared.upload(*wheel("wrong_pkg", "1.0", AARCH64), path="/stage/wrong/legacy/").status_code == 200
    refused = run_index(shared.root, "stage", "publish", "wrong", check=False)
    assert "lacks 1 of 2: wrong_pkg==1.0 cp312 aarch64" in refused.stderr


def test_a_dropped_set_leaves_nothing(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "dropped")
    name, content = wheel("drop_pkg")
    assert shared.upload(name, content, path="/stage/dropped/legacy/").status_code == 200
    preview = preview_of(shared, "dropped")
    run_index(shared.root, "stage", "drop", "dropped")
    assert shared.page("drop-pkg", prefix=preview).status_code == 404
    assert shared.upload(*wheel("drop_pkg", requires_python=None)).status_code == 200, "nobody has seen the name"


def test_staged_names_are_reserved(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "reserve")
    assert shared.upload(*wheel("res_pkg"), path="/stage/reserve/legacy/").status_code == 200
    assert shared.upload(*wheel("res_pkg", requires_python=None)).status_code == 400
    assert shared.upload(*wheel("res_pkg")).status_code == 200, "the same bytes, uploaded for everybody, are shown"
    assert shared.filenames("res-pkg") == ["res_pkg-1.0-py3-none-any.whl"]


@pytest.mark.parametrize("name", ["cu130", "simple", "files", "Upper", "a/b", "..", "nightly", "-x"])
def test_set_names_that_would_hide_something_are_refused(shared: Server, name: str) -> None:
    done = (
        run_index(shared.root, "stage", "create", "--", name, check=False)
        if name.startswith("-")
        else run_index(shared.root, "stage", "create", name, check=False)
    )
    assert done.returncode == 2


def test_an_empty_set_is_not_published(shared: Server) -> None:
    run_index(shared.root, "stage", "create", "empty")
    assert "is empty" in run_index(shared.root, "stage", "publish", "empty", check=False).stderr


# --- mirror -----------------------------------------------------------------------------------------------------------------


def lock_line(name: str, version: str, content: bytes) -> str:
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Somebody else's index: another instance of ours, with a library and its dependency."""
    with serving(tmp_path_factory.mktemp("upstream") / "root", "--allow-new") as found:
        assert found.upload(*wheel("third_lib", "3.0", requires=("third_dep>=1",))).status_code == 200
        assert found.upload(*wheel("third_dep", "1.5")).status_code == 200
        assert found.upload(*wheel("third_dep", "1.6")).status_code == 200
        yield found


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
    done = run_json(shared.root, "mirror", str(lock), "--set", name, *options, env=env)
    word = {"copy": "copied", "link": "linked"}[how]
    assert [(item["name"], item["how"]) for item in done] == [(f"our-{how}", "ours"), ("third-lib", word), ("third-dep", word)]
    again = run_json(shared.root, "mirror", str(lock), "--set", name, *options, env=env)
    assert [item["how"] for item in again] == ["ours", "kept", "kept"]
    run_index(shared.root, "stage", "publish", name)

    view = shared.client.get(f"/{name}/simple/", headers={"Accept": JSON}).json()["projects"]
    assert [item["name"] for item in view] == [f"our-{how}", "third-dep", "third-lib"], "the lock's names and no other"
    assert shared.filenames("third-lib") == [], "what is mirrored for a set is visible there alone"
    assert shared.filenames("third-lib", prefix="/cu130") == []
    assert shared.filenames("third-dep", prefix=f"/{name}") == ["third_dep-1.5-py3-none-any.whl"], "the locked version alone"
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
    assert bool(upstream.requests()) == (how == "link"), "copies need nobody else"


def test_a_lock_that_upstream_cannot_fulfil(shared: Server, upstream: Server, tmp_path: Path) -> None:
    env = {"GRACEFARM_PYTHON_INDEX": upstream.url + "/simple/"}
    lock = tmp_path / "requirements.lock"
    lock.write_text(lock_line("third-dep", "1.5", b"other bytes"))
    done = run_index(shared.root, "mirror", str(lock), "--set", "failing", check=False, env=env)
    assert done.returncode == 10
    assert "third-dep 1.5" in done.stderr
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
    done = run_index(shared.root, "mirror", str(lock), "--set", "rotten", check=False, env=env)
    assert done.returncode == 11
    assert shared.filenames("bitrot-lib", prefix=preview_of(shared, "rotten")) == []


# --- records ----------------------------------------------------------------------------------------------------------------


def test_the_farms_record_inside_a_wheel_gives_its_facts(shared: Server) -> None:
    inside = {"build_id": "b1", "stack": {"name": "cu130", "cuda": "13.0", "torch": "2.11.0", "sm": ["90"], "glibc": "2.35"}}
    folder = "fact_pkg-1.0.dist-info"
    answer = shared.upload(*wheel("fact_pkg", "1.0", AARCH64, files={f"{folder}/gracefarm.json": json.dumps(inside).encode()}))
    assert answer.status_code == 200
    item = shared.page("fact-pkg").json()["files"][0]
    assert (item["_cuda"], item["_torch"], item["_sm"], item["_glibc"]) == ("13.0", "2.11.0", ["90"], "2.34"), (
        "the tag is measured, the stack a bound"
    )
    assert shared.filenames("fact-pkg", prefix="/cu130")
    assert shared.client.get("/simple/fact-pkg/" + item["_record"]).json() == inside


def test_a_record_that_comes_later_gives_facts_too(shared: Server) -> None:
    name, content = wheel("later_pkg", "1.0", AARCH64)
    assert shared.upload(name, content).status_code == 200
    assert shared.filenames("later-pkg", prefix="/cu126") == []
    record = {
        "id": "later-1",
        "recipe": "later",
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
