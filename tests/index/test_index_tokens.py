"""Tokens: an upload requires one, and a token has a scope and an end."""

from __future__ import annotations

import pytest
from index_kit import Server, make_token, run_index, serving, wheel


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
