"""`index mirror`: files of other indexes in a set, by their locked digests."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from index_kit import JSON, Server, no_lock, preview_of, run_index, run_json, serving, wheel


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
    mirrored(shared, upstream, tmp_path, "repaired-set", line)
    run_index(shared.root, "stage", "publish", "repaired-set")
    page = shared.page("third-lib", prefix="/repaired-set").json()
    url = "/repaired-set/simple/third-lib/" + page["files"][0]["url"]
    digest = hashlib.sha256(LIB).hexdigest()
    stored = shared.root / "files" / digest[:2] / digest
    stored.chmod(0o644)
    stored.write_bytes(bytes(len(LIB)))
    assert run_index(shared.root, "fsck", "--set-aside", check=False).returncode == 11
    assert shared.filenames("third-lib", prefix="/repaired-set") == [], "files known to be damaged are not listed"
    no_lock(shared, "repaired-set", "third-lib")
    assert [item["how"] for item in mirrored(shared, upstream, tmp_path, "repaired-set", line)] == ["copied", "kept"]
    assert shared.page("third-lib", prefix="/repaired-set").json() == page
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
        ("lied-1.0-py3-none-any.whl", {"size": 100}, 11, "sends more than 100 bytes"),
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
