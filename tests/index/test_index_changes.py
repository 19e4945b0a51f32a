"""Changes to stored projects: yank, delete, status, and the feed that announces each change to mirrors."""

from __future__ import annotations

import pytest
from index_kit import Server, run_index, serving, wheel


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
