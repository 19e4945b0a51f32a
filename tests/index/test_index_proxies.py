"""The index behind proxies: which client address and which prefix it believes."""

from __future__ import annotations

import pytest
from index_kit import run_index, serving, wheel


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
        "/cu130/simple/answer-pkg/": "(use one of these addresses: %s/cu130-torch2.11/simple/)",
        "/absent/requirements.lock": "(open the page %s/sets/ of this index, which lists the sets)",
        "/absent/pylock.toml": "(open the page %s/sets/ of this index, which lists the sets and their files)",
        "/absent": "(open the page %s/simple/ of this index, which lists the projects)",
        "/stage/absent": "(create the set with PUT %s/stage/absent)",
        "/records/absent": "(open the page %s/board/ of this index, which lists the builds)",
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
