"""What an index learns of a build beside its wheel: record and log, of failed builds too; other indexes work as before."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from builder.flow import run
from builder.planning.stack import host_arch
from builder.proof import publish, record
from tests import projects
from tests.conftest import Farm
from tests.integration.fetch_kit import pypiserver

NATIVE = host_arch().value


def credentials(token: str) -> dict[str, str]:
    return {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}


def build_id(farm: Farm) -> str:
    return str(json.loads(farm.run("show", "tiny", "--json").out)["build_id"])


def test_the_index_gets_record_and_log_of_a_published_build_and_of_a_failed_one(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("print('hello from the build')\nreturn wheel(wheel_directory)"))
    with run.local_index(farm.settings) as (url, token):
        command = ("build", "tiny", "--target", NATIVE, "--publish", f"{url}/legacy/")
        done = farm.run(*command, **credentials(token))
        assert done.code == 0, done.said
        assert "record and log to" in done.said
        first = build_id(farm)
        kept = httpx.get(f"{url}/records/{first}").json()
        assert (kept["outcome"], kept["build_id"]) == ("built", first)
        assert "hello from the build" in httpx.get(f"{url}/records/{first}/log").text

        farm.recipe("tiny", projects.backend("raise RuntimeError('on purpose')"), version="2.0")
        assert farm.run(*command, **credentials(token)).code == 21
        second = build_id(farm)
        assert second != first
        assert httpx.get(f"{url}/records/{second}").json()["outcome"] == "failed"
        assert "RuntimeError: on purpose" in httpx.get(f"{url}/board/").text


def test_a_record_that_did_not_arrive_is_sent_with_the_next_build(farm: Farm) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with run.local_index(farm.settings) as (url, token):
        command = ("build", "tiny", "--target", NATIVE, "--publish", f"{url}/legacy/")
        assert farm.run(*command, **credentials(token)).code == 0
        again = farm.run(*command, **credentials("wrong"))
        assert again.code == 0, again.said
        assert "the record was not published: " in again.said
        assert "401" in again.said
        assert "wrong" not in again.said
        assert "record and log to" in farm.run(*command, **credentials(token)).said


def test_another_index_takes_the_wheel_and_no_record(farm: Farm, tmp_path: Path) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with pypiserver(tmp_path) as url:
        done = farm.run("build", "tiny", "--target", NATIVE, "--publish", url, **credentials("any"))
    assert done.code == 0, done.said
    assert "the record was not published" in done.said
    assert [path.name for path in tmp_path.glob("*.whl")] == ["tiny-1.0-py3-none-any.whl"]


def forget_publications(farm: Farm) -> None:
    (place,) = (farm.settings.home / "builds").glob("*/record.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"published": []}))


def test_killed_after_the_upload_the_same_command_finds_it_published(farm: Farm, tmp_path: Path) -> None:
    """pypiserver, like the Python index, takes no file twice."""
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    with pypiserver(tmp_path) as url:
        command = ("build", "tiny", "--target", NATIVE, "--publish", url, "--json")
        killed = subprocess.Popen(
            [sys.executable, "-m", "builder", *command],
            env=projects.environment({**farm.environment, **credentials("any")}),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while not list(tmp_path.glob("*.whl")):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
        killed.communicate(timeout=30)
        forget_publications(farm)  # where the record was quicker than the kill
        again = farm.run(*command, **credentials("any"))
        assert again.code == 0, again.said
        assert [publication["url"] for publication in json.loads(farm.run("show", "tiny", "--json").out)["published"]] == [url]


def rebuilt(farm: Farm, url: str, token: str, marker: str) -> dict[str, str]:
    """Publish another build of the same version; what its record says of that."""
    farm.recipe("tiny", projects.backend(f'return wheel(wheel_directory, files={{"tiny/more.py": b"{marker}"}})'))
    done = farm.run("build", "tiny", "--target", NATIVE, "--publish", url, **credentials(token))
    assert done.code == 0, done.said
    (publication,) = json.loads(farm.run("show", "tiny", "--json").out)["published"]
    return {"filename": "", "reason": "", **publication}


def digests(url: str) -> dict[str, str]:
    page = httpx.get(f"{url}/simple/tiny/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}).json()
    return {file["filename"]: file["hashes"]["sha256"] for file in page["files"]}


def test_a_rebuild_of_a_published_version_gets_the_next_build_tag_and_says_why(farm: Farm, tmp_path: Path) -> None:
    with run.local_index(farm.settings) as (url, token):
        assert rebuilt(farm, f"{url}/legacy/", token, "one")["filename"] == ""
        before = digests(url)
        first = build_id(farm)
        second = rebuilt(farm, f"{url}/legacy/", token, "two")
        assert second["filename"] == "tiny-1.0-1-py3-none-any.whl"
        there = f"tiny-1.0-py3-none-any.whl exists with other bytes (sha256 {before['tiny-1.0-py3-none-any.whl'][:16]}"
        assert (
            f"{there}, from build {first[:16]}); inputs that changed since that build: recipe.source.sha256"
            in second["reason"]
        )
        assert rebuilt(farm, f"{url}/legacy/", token, "three")["filename"] == "tiny-1.0-2-py3-none-any.whl"
        after = digests(url)
        assert {name: after[name] for name in before} == before, "a published file never changes"
        assert len(set(after.values())) == 3
        pip = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir", "--dest", str(tmp_path)]
        subprocess.run([*pip, "--index-url", f"{url}/simple/", "tiny"], check=True, capture_output=True)
        assert [path.name for path in tmp_path.iterdir()] == ["tiny-1.0-2-py3-none-any.whl"]

        # The bytes of the second one, published by a machine that does not know that they are there.
        farm.recipe("tiny", projects.backend('return wheel(wheel_directory, files={"tiny/more.py": b"two"})'))
        place = record.path(farm.settings, json.loads(farm.run("plan", "tiny", "--target", NATIVE, "--json").out)["build_id"])
        place.write_text(json.dumps(json.loads(place.read_text()) | {"published": []}))
        done = farm.run("build", "tiny", "--target", NATIVE, "--publish", f"{url}/legacy/", **credentials(token))
        assert done.code == 0, done.said
        assert "tiny-1.0-1-py3-none-any.whl to" in done.said
        assert digests(url) == after


def test_a_name_that_a_staged_set_holds_is_passed_over(farm: Farm) -> None:
    """The file cannot be seen, so only the upload's answer shows it."""
    with run.local_index(farm.settings) as (url, token):
        put = httpx.put(f"{url}/stage/soon", json={"expect": ["tiny==1.0"]}, auth=("__token__", token))
        assert put.is_success, put.text
        assert rebuilt(farm, f"{url}/stage/soon/legacy/", token, "one")["filename"] == ""
        assert httpx.get(f"{url}/simple/tiny/").status_code == 404
        second = rebuilt(farm, f"{url}/legacy/", token, "two")
        assert second["filename"] == "tiny-1.0-1-py3-none-any.whl"
        assert "tiny-1.0-py3-none-any.whl exists or existed with other bytes" in second["reason"]


def test_another_index_keeps_its_file_and_gets_a_build_tag_too(farm: Farm, tmp_path: Path) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    (tmp_path / "tiny-1.0-py3-none-any.whl").write_bytes(b"another wheel")
    with pypiserver(tmp_path) as url:
        done = farm.run("build", "tiny", "--target", NATIVE, "--publish", url, **credentials("any"))
    assert done.code == 0, done.said
    assert (tmp_path / "tiny-1.0-py3-none-any.whl").read_bytes() == b"another wheel"
    assert (tmp_path / "tiny-1.0-1-py3-none-any.whl").is_file()


@pytest.mark.parametrize(
    ("upload", "record"),
    [
        ("/legacy/", "/records/7"),
        ("/nightly/legacy/", "/records/7"),
        ("/stage/gh200/legacy/", "/records/7"),
        ("/", "/records/7"),
        ("", "/records/7"),
        ("/team/legacy/", "/team/records/7"),
    ],
)
def test_records_go_beside_the_upload_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, upload: str, record: str
) -> None:
    asked: list[str] = []

    def put(_client: httpx.Client, url: str, **_more: object) -> httpx.Response:
        asked.append(url)
        return httpx.Response(201)

    monkeypatch.setattr(httpx.Client, "put", put)
    (tmp_path / "record.json").write_text("{}")
    assert (
        publish.send_record(tmp_path / "record.json", tmp_path / "log.txt", "7", f"http://index.test:80{upload}", None) is None
    )
    assert asked == [f"http://index.test:80{record}"]


def test_an_address_that_is_none_is_an_answer_and_no_exception(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{}")
    said = publish.send_record(tmp_path / "record.json", tmp_path / "log.txt", "7", "http://127.0.0.1:port/legacy/", None)
    assert said is not None
    assert "port" in said


def test_of_a_log_that_is_too_long_the_index_gets_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("begin\n" + "x" * 200 + "\nend\n")
    assert publish.end_of(log) == log.read_bytes()
    monkeypatch.setattr(publish, "MAX_LOG", 100)
    kept = publish.end_of(log)
    assert len(kept) == 100
    assert kept.startswith(b"# the first part of this log was removed")
    assert kept.endswith(b"end\n")
