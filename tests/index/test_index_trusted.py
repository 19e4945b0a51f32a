"""Trusted publishing (PEP 807): exchange of an identity token for a short-lived upload token."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from index_kit import Server, run_index, run_json, sdist, serving, wheel
from issuer_kit import SHARED, OwnIssuer, certify, issuing

from builder.flow import publishing
from builder.planning.settings import load
from builder.proof import publish, record, trusted
from gracefarm.console import Console
from gracefarm.errors import PublishError
from index.errors import UnauthenticatedError, UnreachableError
from index.trust.identity import IssuerKeys

ADD = ("publisher", "add")


@pytest.fixture(scope="module")
def issuer() -> Iterator[OwnIssuer]:
    with issuing() as running:
        yield running


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory, issuer: OwnIssuer) -> Iterator[Server]:
    """An index in which the workflow may upload only to the project `ours`."""
    root = tmp_path_factory.mktemp("trusting") / "root"
    run_index(root, *ADD, "ours", "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
    run_index(root, "host", "theirs")
    with serving(root, "--writes-per-second", "100000") as server:
        yield server


def audience_of(server: Server) -> str:
    return str(server.client.get("/_/oidc/audience").json()["audience"])


def mint(server: Server, text: str) -> httpx.Response:
    return server.client.post("/_/oidc/mint-token", json={"token": text})


def secret_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def test_discovery_leads_to_a_token_for_the_project_alone(trusting: Server, issuer: OwnIssuer) -> None:
    found = trusting.client.get("/.well-known/pytp", params={"discover": "/legacy/"})
    assert found.headers["content-type"] == "application/vnd.pypi.pytp.v1+json"
    endpoints = found.json()
    assert {httpx.URL(endpoints[key]).netloc for key in ("audience-endpoint", "token-mint-endpoint")} == {
        httpx.URL(trusting.url).netloc
    }
    audience = trusting.client.get(endpoints["audience-endpoint"]).json()["audience"]
    minted = trusting.client.post(endpoints["token-mint-endpoint"], json={"token": issuer.token(audience)})
    secret = secret_of(minted)
    assert 15 * 60 <= minted.json()["expires"] - time.time() <= 6 * 3600, "PEP 807 says so"

    assert trusting.upload(*wheel("ours", "1.0"), token=secret).status_code == 200
    assert trusting.upload(*wheel("ours", "1.1"), token=secret).status_code == 200
    other = trusting.upload(*wheel("theirs", "1.0"), token=secret)
    assert (other.status_code, other.text) == (
        403,
        f"the token 'github:{issuer.repository}/nightly.yml' is only for ours, not for theirs (use a token for theirs)\n",
    )
    record = trusting.client.put("/records/one", json={"recipe": "theirs"}, auth=("__token__", secret))
    assert record.status_code == 403
    assert trusting.client.put("/records/two", json={"recipe": "ours"}, auth=("__token__", secret)).status_code == 200
    rows: Any = run_json(trusting.root, "log")
    assert "ours-1.0-py3-none-any.whl" in [row["subject"] for row in rows if row["actor"].startswith("token:github:farm")]


@pytest.mark.parametrize("path", ["", "/", "/legacy/", "/nightly/legacy/", "/stage/a/legacy/", "/simple/", "/elsewhere/"])
def test_discovery_knows_the_paths_of_uploads(trusting: Server, path: str) -> None:
    answer = trusting.client.get("/.well-known/pytp", params={"discover": path})
    assert answer.status_code == (200 if path == "/" or path.endswith("legacy/") else 404)
    if answer.status_code == 404:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 404


def test_an_index_that_trusts_nobody_has_no_trusted_publishing(server: Server, issuer: OwnIssuer) -> None:
    assert server.client.get("/.well-known/pytp", params={"discover": "/legacy/"}).status_code == 404
    assert server.client.get("/_/oidc/audience").status_code == 404
    assert mint(server, issuer.token("x")).status_code == 404


def test_only_its_own_media_type_is_answered(trusting: Server) -> None:
    for accept, status in (("text/html", 406), ("application/vnd.pypi.pytp.v1+json", 200), ("*/*", 200), ("", 200)):
        answer = trusting.client.get("/_/oidc/audience", headers={"Accept": accept})
        assert answer.status_code == status, accept


def forged(issuer: OwnIssuer, audience: str) -> str:
    """Signed with the public key as a shared secret. PyJWT refuses this, so the test signs by hand."""
    import hashlib
    import hmac

    def part(document: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=")

    text = part({"alg": "HS256", "typ": "JWT", "kid": "first"}) + b"." + part(issuer.claims(audience))
    mac = hmac.new(issuer.public_pem, text, hashlib.sha256).digest()
    return (text + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


def damaged(issuer: OwnIssuer, audience: str) -> str:
    """The claims of another project with the signature of the first."""
    head, _, signature = issuer.token(audience).split(".")
    body = base64.urlsafe_b64encode(json.dumps(issuer.claims(audience, repository_id="1")).encode()).rstrip(b"=").decode()
    return f"{head}.{body}.{signature}"


def by_another_key(issuer: OwnIssuer, audience: str) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return jwt.encode(issuer.claims(audience), key, algorithm="RS256", headers={"kid": "first"})


now = time.time
BAD: dict[str, tuple[int, str, Callable[[OwnIssuer, str], str]]] = {
    "wrong audience": (401, "Audience doesn't match", lambda issuer, _: issuer.token("pypi")),
    "several audiences": (401, "Invalid claim format", lambda issuer, audience: issuer.token("x", aud=[audience, "pypi"])),
    "no audience": (401, '"aud" claim', lambda issuer, audience: issuer.token(audience, aud=None)),
    "expired": (401, "expired", lambda issuer, audience: issuer.token(audience, exp=int(now()) - 60)),
    "no end": (401, '"exp" claim', lambda issuer, audience: issuer.token(audience, exp=None)),
    "not valid yet": (401, "not yet valid", lambda issuer, audience: issuer.token(audience, nbf=int(now()) + 600)),
    "no jti": (401, '"jti" claim', lambda issuer, audience: issuer.token(audience, jti=None)),
    "unsigned": (401, "", lambda issuer, audience: jwt.encode(issuer.claims(audience), "", "none", {"kid": "first"})),
    "signed with the public key": (401, "", forged),
    "another algorithm": (
        401,
        "",
        lambda issuer, audience: jwt.encode(issuer.claims(audience), issuer.key, "RS512", {"kid": "first"}),
    ),
    "a published secret": (
        401,
        "alg value is not allowed",
        lambda issuer, audience: jwt.encode(issuer.claims(audience), SHARED, "HS256", {"kid": "shared"}),
    ),
    "another key": (401, "Signature verification failed", by_another_key),
    "a key that the issuer does not have": (
        401,
        "Unable to find a signing key",
        lambda issuer, audience: jwt.encode(issuer.claims(audience), issuer.key, "RS256", {"kid": "second"}),
    ),
    "changed": (401, "Signature verification failed", damaged),
    "another issuer": (
        401,
        "no publisher with the issuer",
        lambda issuer, audience: issuer.token(audience, iss="https://x.test"),
    ),
    "no token": (401, "it is malformed", lambda _issuer, _audience: "gf_hello"),
    "too long": (401, "too long", lambda issuer, audience: issuer.token(audience, sub="x" * 20000)),
    "another repository": (
        403,
        "no project of this index trusts the repository farm/other",
        lambda issuer, audience: issuer.token(audience, repository="farm/other"),
    ),
    "another workflow": (
        403,
        "no project of this index trusts",
        lambda issuer, audience: issuer.token(
            audience, job_workflow_ref="farm/wheels/.github/workflows/pull.yml@refs/heads/nightly.yml"
        ),
    ),
    "a workflow with another spelling": (
        403,
        "no project of this index trusts",
        lambda issuer, audience: issuer.token(
            audience, job_workflow_ref="farm/wheels/.github/workflows/Nightly.yml@refs/heads/main"
        ),
    ),
    "a workflow of another repository": (
        403,
        "no project of this index trusts",
        lambda issuer, audience: issuer.token(
            audience, job_workflow_ref="evil/wheels/.github/workflows/nightly.yml@refs/heads/main"
        ),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_good_is_refused_with_its_reason(trusting: Server, issuer: OwnIssuer, kind: str) -> None:
    status, reason, make = BAD[kind]
    answer = mint(trusting, make(issuer, audience_of(trusting)))
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert reason in problem["detail"]
    assert problem["errors"][0]["description"] == problem["detail"], "twine and uv read this field"
    assert "token" not in problem


def test_an_identity_token_is_good_once(trusting: Server, issuer: OwnIssuer) -> None:
    text = issuer.token(audience_of(trusting))
    assert mint(trusting, text).status_code == 200
    again = mint(trusting, text)
    assert again.status_code == 401
    assert "exchanged before" in again.json()["detail"]


def test_a_token_can_be_given_back(trusting: Server, issuer: OwnIssuer) -> None:
    secret = secret_of(mint(trusting, issuer.token(audience_of(trusting))))
    assert trusting.upload(*wheel("ours", "8.0"), token=secret).status_code == 200
    for text in (secret, secret, trusting.token, "x"):
        assert trusting.client.post("/_/oidc/burn-token", json={"token": text}).status_code == 202
    assert trusting.upload(*wheel("ours", "8.1"), token=secret).status_code == 401
    assert trusting.upload(*wheel("ours", "8.1")).status_code == 200, "it does not revoke a stored token"


def test_what_is_no_request_for_a_token_is_refused(trusting: Server, issuer: OwnIssuer) -> None:
    for body in (b"", b"[]", b"{}", b'{"token": 7}', b"[" * 60000, json.dumps({"token": "x" * 70000}).encode()):
        assert trusting.client.post("/_/oidc/mint-token", content=body).status_code == 400, body[:20]
    wanted = {"token": issuer.token(audience_of(trusting)), "features": ["single-use-token"]}
    refused = trusting.client.post("/_/oidc/mint-token", json=wanted)
    assert (refused.status_code, refused.json()["status"]) == (400, 400)


def test_a_repository_that_was_made_again_is_another_one(tmp_path: Path, issuer: OwnIssuer) -> None:
    root = tmp_path / "root"
    add = (*ADD, "ours", "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
    run_index(root, *add)
    with serving(root) as server:
        audience = audience_of(server)
        assert mint(server, issuer.token(audience)).status_code == 200
        stolen = mint(server, issuer.token(audience, repository_id="815"))
        assert stolen.status_code == 403
        assert "the numeric id differs" in stolen.json()["detail"]
        run_index(root, "publisher", "remove", "ours", issuer.repository)
        run_index(root, *add)
        assert mint(server, issuer.token(audience, repository_id="815")).status_code == 200


def test_a_token_ends_when_its_publisher_is_removed(tmp_path: Path, issuer: OwnIssuer) -> None:
    root = tmp_path / "root"
    for project in ("ours", "more"):
        run_index(root, *ADD, project, "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
    with serving(root) as server:
        secret = secret_of(mint(server, issuer.token(audience_of(server))))
        assert server.upload(*wheel("ours", "1.0"), token=secret).status_code == 200
        assert server.upload(*wheel("more", "1.0"), token=secret).status_code == 200
        run_index(root, "publisher", "remove", "ours", issuer.repository)
        assert server.upload(*wheel("ours", "2.0"), token=secret).status_code == 403
        assert server.upload(*wheel("more", "2.0"), token=secret).status_code == 200
        run_index(root, "publisher", "remove", "more", issuer.repository)
        assert server.upload(*wheel("more", "3.0"), token=secret).status_code == 403, (
            "a token without a publisher covers nothing"
        )


def test_an_environment_may_be_asked_for(tmp_path: Path, issuer: OwnIssuer) -> None:
    root = tmp_path / "root"
    add = (*ADD, "ours", "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
    run_index(root, *add, "--environment", "Release")
    with serving(root) as server:
        audience = audience_of(server)
        assert mint(server, issuer.token(audience)).status_code == 403
        assert mint(server, issuer.token(audience, environment="staging")).status_code == 403
        assert mint(server, issuer.token(audience, environment="release")).status_code == 200


def test_gitlab_has_other_claims(tmp_path: Path, issuer: OwnIssuer) -> None:
    root = tmp_path / "root"
    run_index(root, *ADD, "ours", "gitlab", "group/sub/wheels", "ci/night.yml", "--issuer", issuer.url)
    host = issuer.url.removeprefix("http://")
    job = {
        "project_path": "group/sub/wheels",
        "project_id": "7",
        "ci_config_ref_uri": f"{host}/group/sub/wheels//ci/night.yml@refs/heads/main",
        "repository": None,
        "job_workflow_ref": None,
    }
    with serving(root) as server:
        audience = audience_of(server)
        assert mint(server, issuer.token(audience, **job)).status_code == 200
        other = {**job, "ci_config_ref_uri": f"{host}/group/sub/wheels//night.yml@refs/heads/main"}
        assert mint(server, issuer.token(audience, **other)).status_code == 403


def test_an_issuer_that_does_not_answer_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with issuing() as gone:
        run_index(root, *ADD, "ours", "github", gone.repository, "nightly.yml", "--issuer", gone.url)
    with serving(root) as server:
        answer = mint(server, gone.token(audience_of(server)))
    assert answer.status_code == 424
    assert gone.url in answer.json()["detail"]
    assert answer.headers["retry-after"]


@pytest.mark.parametrize("way", ["reset", "no object", "no keys"])
def test_an_issuer_that_has_no_keys_to_give_is_asked_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = IssuerKeys()
    with issuing() as issuer:
        issuer.resetting = way == "reset"
        document = {"no object": "not an object", "no keys": {"keys": []}}.get(way)
        if document is not None:
            monkeypatch.setattr(issuer, "answer", answering_keys(issuer, document))
        for _ in range(3):
            with pytest.raises(UnreachableError, match=re.escape(issuer.url)):
                keys.claims(issuer.token("us"), {issuer.url}, "us")
    assert issuer.requests == ["/.well-known/openid-configuration", "/keys"]


def answering_keys(issuer: OwnIssuer, keys: object) -> Callable[[str, str | None], object]:
    """The responses of an issuer, except its keys."""
    real = issuer.answer
    return lambda target, authorization: keys if target == "/keys" else real(target, authorization)


def test_keys_that_are_kept_are_good_while_their_issuer_is_down() -> None:
    """Also if a token causes a request for a key that does not exist. PyJWT 2.10 to 2.12 drop their cached keys then."""
    keys = IssuerKeys()
    with issuing() as issuer:
        keys.claims(issuer.token("us"), {issuer.url}, "us")
        issuer.resetting = True
        stranger = jwt.encode(issuer.claims("us"), issuer.key, algorithm="RS256", headers={"kid": "unknown"})
        with pytest.raises((UnreachableError, UnauthenticatedError)):
            keys.claims(stranger, {issuer.url}, "us")
        assert keys.claims(issuer.token("us"), {issuer.url}, "us")["iss"] == issuer.url


def test_an_issuer_that_hangs_holds_up_no_upload(tmp_path: Path) -> None:
    """Any client may send unsigned tokens of the issuer: here more of them than the index has threads of each kind."""
    root = tmp_path / "root"
    with issuing() as issuer, ThreadPoolExecutor(8) as strangers:
        run_index(root, *ADD, "ours", "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
        with serving(root, "--writes-per-second", "100000") as server:
            issuer.answering.clear()
            unsigned = jwt.encode({"iss": issuer.url}, None, algorithm="none")
            address = f"{server.url}/_/oidc/mint-token"
            waiting = [strangers.submit(httpx.post, address, json={"token": unsigned}, timeout=60) for _ in range(8)]
            while not issuer.requests:
                time.sleep(0.01)
            assert server.upload(*wheel("ours", "1.0")).status_code == 200
            assert not any(exchange.done() for exchange in waiting), "the upload waited for the timeout of the issuer"
            issuer.answering.set()
            assert {exchange.result().status_code for exchange in waiting} == {401}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("p", "github", "farm", "night.yml"), "not a repository of github"),
        (("p", "github", "https://github.test/farm/x", "night.yml"), "not a repository of github"),
        (("p", "github", "farm/x", ".github/workflows/night.yml"), "not a workflow of github"),
        (("p", "gitlab", "farm/x", "night.sh"), "not a workflow of gitlab"),
        (("p", "github", "farm/x", "night.yml", "--issuer", "http://10.0.0.1"), "not an https address"),
    ],
)
def test_a_publisher_that_cannot_be_is_refused(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    done = run_index(tmp_path / "root", *ADD, *arguments, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert run_json(tmp_path / "root", "publisher", "list") == []


def test_the_builder_publishes_without_a_token(
    tmp_path: Path, trusting: Server, issuer: OwnIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the nightly workflow: the wheel by twine, then its record, in the environment of a GitHub job."""
    for name in ("TWINE_USERNAME", "TWINE_PASSWORD", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    filename, content = wheel("ours", "5.0")
    file, document = tmp_path / filename, tmp_path / "record.json"
    file.write_bytes(content)
    document.write_text(json.dumps({"recipe": "ours"}))
    url = f"{trusting.url}/legacy/"
    assert publish.credentials(url) is None, "no job"
    with pytest.raises(PublishError):
        publish.upload(file, url, None)
    for name, value in issuer.job().items():
        monkeypatch.setenv(name, value)
    login = publish.credentials(url)
    publish.upload(file, url, login)
    assert filename in trusting.filenames("ours")
    assert publish.send_record(document, tmp_path / "no-log", "nightly-1", url, login) is None
    assert trusting.client.get("/records/nightly-1").json() == {"recipe": "ours"}

    monkeypatch.setattr(issuer, "repository", "farm/fork")
    with pytest.raises(PublishError, match="no project of this index trusts the repository farm/fork"):
        publish.credentials(url)
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    with pytest.raises(PublishError) as caught:
        publish.credentials(url)
    assert "id-token: write" in caught.value.remedy


def test_one_publish_exchanges_one_identity_token(
    tmp_path: Path, trusting: Server, issuer: OwnIssuer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the environment of a GitLab job, which has one identity token and cannot request another."""
    for name in ("TWINE_USERNAME", "TWINE_PASSWORD", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    audience = audience_of(trusting)
    monkeypatch.setenv("GITLAB_CI", "true")
    monkeypatch.setenv(re.sub(r"[^A-Z0-9]", "_", audience.upper()) + "_ID_TOKEN", issuer.token(audience))
    settings = load().model_copy(update={"home": tmp_path})
    dist = record.folder(settings, "nightly-2") / "dist"
    dist.mkdir(parents=True)
    filename, content = wheel("ours", "6.0")
    (dist / filename).write_bytes(content)
    (dist / "ours-6.0.tar.gz").write_bytes(sdist("ours", "6.0")[1])
    built = record.Record(
        build_id="nightly-2",
        recipe="ours",
        name="ours",
        version="6.0",
        stack="cu130",
        inputs={},
        outcome="built",
        wheel=record.product(dist / filename),
        finished=record.now(),
    )
    record.write(built, settings)
    url = f"{trusting.url}/legacy/"
    publishing.publish_build(built, url, settings, Console())
    assert {filename, "ours-6.0.tar.gz"} <= set(trusting.filenames("ours"))
    assert trusting.client.get("/records/nightly-2").json()["recipe"] == "ours"

    publishing.send_failure("nightly-2", url, settings, Console())
    assert "the record was not published: the index does not issue an upload token to this job" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [b"<html>Welcome</html>", b"{}", b"[]", b"5", b"null", b'{"audience-endpoint": 5, "token-mint-endpoint": []}', b"\xff"],
)
def test_an_index_whose_every_address_answers_has_no_such_tokens(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.Client, "get", lambda *_, **__: httpx.Response(200, content=answer))
    assert trusted.upload_token("https://index.test/legacy/") is None


def test_uv_publishes_without_a_token(tmp_path: Path, issuer: OwnIssuer) -> None:
    """The real uv in the environment of a GitHub job. uv requires https."""
    root = tmp_path / "root"
    for name in ("ours", "more"):
        run_index(root, *ADD, name, "github", issuer.repository, "nightly.yml", "--issuer", issuer.url)
        filename, content = wheel(name, "3.0")
        (tmp_path / filename).write_bytes(content)
    certificates = certify(tmp_path)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SSL_CERT_FILE": str(certificates.root), **issuer.job()}
    with serving(root, "--tls-cert", str(certificates.certificate), "--tls-key", str(certificates.key)) as server:
        command = [sys.executable, "-m", "uv", "publish", "--trusted-publishing", "always"]
        command += ["--publish-url", f"https://localhost:{server.port}/legacy/", *map(str, tmp_path.glob("*.whl"))]
        process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert process.returncode == 0, process.stderr
        assert server.filenames("ours") == ["ours-3.0-py3-none-any.whl"]
        assert server.filenames("more") == ["more-3.0-py3-none-any.whl"]
        requests = server.requests()
        assert [line.target for line in requests if line.status >= 400] == []
        assert "/_/oidc/burn-token" in [line.target for line in requests]
        tokens: Any = run_json(root, "token", "list")
        assert not any(row["minted"] for row in tokens), "uv revoked its token"
