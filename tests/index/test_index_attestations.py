"""Attestations (PEP 740): real ones by Sigstore, from the test data of pypi-attestations, intact and damaged."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pypi_attestations
import pytest
from index_kit import Server, run_index, sdist, serving, wheel
from pypi_attestations import Attestation, AttestationType, Provenance
from pypi_simple import PyPISimple

from builder.fetch import simple
from builder.planning.settings import load
from gracefarm.variants import SCHEMA
from index.errors import RefusedError
from index.trust.attestations import AttestationVerifier

SOURCE = "pypi_attestations-0.0.30.tar.gz"
SHA256 = "14ff13c76bbef02a483c2b77532da02bfd746b5141b881f355e06b9807434423"
FILE = "pypi_attestations-0.0.19.tar.gz"
GITLAB_FILE = "gitlab_oidc_project-0.0.3.tar.gz"
PUBLISH, BUILT = f"{FILE}.publish.attestation", f"{FILE}.slsa.attestation"
HTML = "application/vnd.pypi.simple.v1+html"
ADDRESS = "https://index.example.com"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def assets() -> dict[str, bytes]:
    """The files of test/assets in that package's source."""
    page = simple.project_page("pypi-attestations", load().index_url or simple.DEFAULT_INDEX, None)
    url = next(file.url for file in page.packages if file.filename == SOURCE)
    archive = httpx.get(url, follow_redirects=True).content
    assert hashlib.sha256(archive).hexdigest() == SHA256
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        wanted = [member for member in members if "/test/assets/" in member.name and member.isfile()]
        return {Path(member.name).name: members.extractfile(member).read() for member in wanted}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An index that knows its address, and the publishers of those files."""
    root = tmp_path_factory.mktemp("attested") / "root"
    run_index(root, "publisher", "add", "pypi-attestations", "gitlab", "another/group", ".gitlab-ci.yml")
    run_index(root, "publisher", "add", "pypi-attestations", "github", "trailofbits/pypi-attestations", "release.yml")
    run_index(root, "publisher", "add", "gitlab-oidc-project", "gitlab", "facutuesca/gitlab-oidc-project", ".gitlab-ci.yml")
    with serving(root, "--allow-new", "--sigstore-offline", "--url", ADDRESS) as server:
        yield server


def upload(server: Server, assets: dict[str, bytes], *attestations: object, filename: str = FILE) -> httpx.Response:
    return server.upload(filename, assets[filename], form={"attestations": json.dumps(attestations)})


def listed(server: Server, project: str) -> Document:
    (entry,) = server.page(project).json()["files"]
    return dict(entry)


def changed(document: Document, path: tuple[str | int, ...], value: object) -> Document:
    """A copy with one value in it replaced."""
    document = copy.deepcopy(document)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


def flipped(document: Document, *path: str) -> Document:
    """A copy with one bit of one base64 text changed."""
    value: Any = document
    for key in path:
        value = value[key]
    raw = bytearray(base64.b64decode(value))
    raw[len(raw) // 2] ^= 1
    return changed(document, path, base64.b64encode(raw).decode())


def with_another_subject(document: Document) -> Document:
    statement = json.loads(base64.b64decode(document["envelope"]["statement"]))
    statement["subject"][0]["digest"]["sha256"] = "0" * 64
    return changed(document, ("envelope", "statement"), base64.b64encode(json.dumps(statement).encode()).decode())


def test_damaged_attestations_are_refused_with_the_file(attested: Server, assets: dict[str, bytes]) -> None:
    good, built = json.loads(assets[PUBLISH]), json.loads(assets[BUILT])
    log = ("verification_material", "transparency_entries", 0)
    bad: list[tuple[list[object], str]] = [
        ([flipped(good, "envelope", "signature")], "invalid signature"),
        ([flipped(good, "envelope", "statement")], "is not valid"),
        ([with_another_subject(good)], "is not valid"),
        ([flipped(good, "verification_material", "certificate")], "is not valid"),
        ([changed(good, (*log, "integratedTime"), "1500000000")], "is not valid"),
        ([changed(good, (*log, "inclusionPromise"), None)], "is not valid"),
        ([changed(good, (*log, "inclusionProof", "treeSize"), "1")], "is not valid"),
        ([changed(good, ("verification_material", "transparency_entries"), [])], "are malformed"),
        ([changed(good, ("version",), 2)], "are malformed"),
        ([built, flipped(good, "envelope", "signature")], "invalid signature"),
        ([good, good], "two attestations have the type"),
        ([good, built, good], "3 attestations"),
        ([], "0 attestations"),
        ([{}], "are malformed"),
        (["hello"], "are malformed"),
        ([json.loads(assets[f"{GITLAB_FILE}.publish.attestation"])], "is not valid"),
    ]
    for attestations, reason in bad:
        answer = upload(attested, assets, *attestations)
        assert answer.status_code == 400, attestations
        assert reason in answer.text
    for text in ("hello", "[" * 1000, '"' + "\\ud800" + '"'):
        assert attested.upload(FILE, assets[FILE], form={"attestations": text}).status_code == 400
    assert attested.filenames("pypi-attestations") == [], "a refused attestation refuses the file"


def test_attestations_of_a_variant_wheel_are_refused(tmp_path: Path) -> None:
    """Their subject is the file name, which pypi_attestations cannot parse. Without attestations the wheel is accepted."""
    document = {"$schema": SCHEMA, "default-priorities": {"namespace": ["nvidia"]}, "variants": {"null": {}}}
    content = wheel("foo", files={"foo-1.0.dist-info/variant.json": json.dumps(document).encode()})[1]
    plain = "foo-1.0-py3-none-any.whl"
    for filename in (plain.replace(".whl", "-cu130_sm90.whl"), plain.replace("-py3", "-1-py3").replace(".whl", "-null.whl")):
        with pytest.raises(RefusedError, match=f"cannot verify attestations of {filename}"):
            AttestationVerifier(offline=True).provenance("[]", filename, "0" * 64, [])
    with serving(tmp_path / "root", "--allow-new", "--variants") as server:
        answer = server.upload("foo-1.0-py3-none-any-null.whl", content, form={"attestations": "[{}]"})
        assert answer.status_code == 400
        assert "names of variant wheels" in answer.text
        assert server.upload("foo-1.0-py3-none-any-null.whl", content).status_code == 200


def test_good_attestations_are_served_as_the_files_provenance(attested: Server, assets: dict[str, bytes]) -> None:
    good, built = json.loads(assets[PUBLISH]), json.loads(assets[BUILT])
    assert upload(attested, assets, good, built).status_code == 200
    entry = listed(attested, "pypi-attestations")
    assert entry["provenance"] == f"{ADDRESS}/files/{entry['hashes']['sha256']}/{FILE}.provenance"
    assert f'data-provenance="{entry["provenance"]}"' in attested.page("pypi-attestations", accept=HTML).text

    answer = attested.client.get(entry["provenance"].removeprefix(ADDRESS))
    assert answer.headers["content-type"] == "application/vnd.pypi.integrity.v1+json"
    provenance = Provenance.model_validate_json(answer.content)
    (bundle,) = provenance.attestation_bundles
    assert bundle.publisher.model_dump(exclude_none=True) == {
        "kind": "GitHub",
        "repository": "trailofbits/pypi-attestations",
        "workflow": "release.yml",
    }
    # A client can verify it again with only what the index serves.
    own = pypi_attestations.Distribution(name=FILE, digest=hashlib.sha256(assets[FILE]).hexdigest())
    types = {attestation.verify(bundle.publisher, own, offline=True)[0] for attestation in bundle.attestations}
    assert types == {kind.value for kind in AttestationType}
    assert bundle.attestations[0] == Attestation.model_validate(good), "the bytes are unchanged"

    assert upload(attested, assets, good).status_code == 200
    assert attested.client.get(entry["provenance"].removeprefix(ADDRESS)).content == answer.content, (
        "stored attestations do not change"
    )
    shown = attested.client.get(f"/wheel/{FILE}/").text
    assert f'href="../../files/{entry["hashes"]["sha256"]}/{FILE}.provenance"' in shown

    with PyPISimple(attested.url + "/simple/") as client:
        (package,) = client.get_project_page("pypi-attestations").packages
        assert package.provenance_url == entry["provenance"]


def test_a_file_that_is_there_gets_its_attestations_later_and_once(attested: Server, assets: dict[str, bytes]) -> None:
    good = json.loads(assets[f"{GITLAB_FILE}.publish.attestation"])
    assert attested.upload(GITLAB_FILE, assets[GITLAB_FILE]).status_code == 200
    entry = listed(attested, "gitlab-oidc-project")
    path = f"/files/{entry['hashes']['sha256']}/{GITLAB_FILE}.provenance"
    assert "provenance" not in entry
    assert attested.client.get(path).status_code == 404
    for _ in range(2):
        assert upload(attested, assets, good, filename=GITLAB_FILE).status_code == 200
    assert listed(attested, "gitlab-oidc-project")["provenance"] == ADDRESS + path
    (bundle,) = Provenance.model_validate(attested.client.get(path).json()).attestation_bundles
    assert bundle.publisher.kind == "GitLab"
    assert run_index(attested.root, "fsck").returncode == 0
    run_index(attested.root, "gc")
    assert attested.client.get(path).status_code == 200, "gc keeps files that a page links to"


@pytest.mark.parametrize("client", ["twine", "uv"])
def test_real_clients_upload_attestations(client: str, assets: dict[str, bytes], tmp_path: Path) -> None:
    """Both clients send the attestation files in the folder of the distribution."""
    root, dist = tmp_path / "root", tmp_path / "dist"
    dist.mkdir()
    for name in (GITLAB_FILE, f"{GITLAB_FILE}.publish.attestation"):
        (dist / name).write_bytes(assets[name])
    run_index(root, "publisher", "add", "gitlab-oidc-project", "gitlab", "facutuesca/gitlab-oidc-project", ".gitlab-ci.yml")
    with serving(root, "--sigstore-offline", "--url", ADDRESS) as server:
        url = f"{server.url}/legacy/"
        command = {
            "twine": ["twine", "upload", "--attestations", "--non-interactive", "--repository-url", url],
            "uv": ["uv", "publish", "--publish-url", url],
        }[client]
        secrets = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": server.token, "UV_PUBLISH_TOKEN": server.token}
        files = [str(path) for path in sorted(dist.iterdir())]
        process = subprocess.run(
            [sys.executable, "-m", *command, *files],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **secrets},
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert listed(server, "gitlab-oidc-project")["provenance"].endswith(f"/{GITLAB_FILE}.provenance")


def test_a_project_without_publishers_takes_no_attestations(attested: Server, assets: dict[str, bytes]) -> None:
    filename, content = sdist("nobody_trusted", "1.0")
    form = {"attestations": json.dumps([json.loads(assets[PUBLISH])])}
    answer = attested.upload(filename, content, form=form)
    assert answer.status_code == 400
    assert "`index publisher add`" in answer.text
    assert attested.upload(filename, content).status_code == 200


def test_the_service_that_cannot_be_reached_is_named(
    tmp_path: Path, assets: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --sigstore-offline the server fetches Sigstore's current keys; here Sigstore is unreachable."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "root"
    run_index(root, "publisher", "add", "pypi-attestations", "github", "trailofbits/pypi-attestations", "release.yml")
    with serving(root) as server:
        answer = upload(server, assets, json.loads(assets[PUBLISH]))
        assert answer.status_code == 424
        assert "tuf-repo-cdn.sigstore.dev" in answer.text
        assert "--sigstore-offline" in answer.text
        assert server.filenames("pypi-attestations") == []


def test_a_service_that_hangs_holds_up_no_other_upload(
    tmp_path: Path, assets: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy to Sigstore accepts connections and does not respond; more uploads wait for it than there are workers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "root"
    run_index(root, "publisher", "add", "pypi-attestations", "github", "trailofbits/pypi-attestations", "release.yml")
    with socket.create_server(("127.0.0.1", 0)) as proxy, ThreadPoolExecutor(6) as publishers:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with serving(root, "--allow-new") as server:
            waiting = [publishers.submit(upload, server, assets, json.loads(assets[PUBLISH])) for _ in range(6)]
            proxy.settimeout(60)
            connection = proxy.accept()[0]
            assert server.upload(*wheel("plain", "1.0")).status_code == 200
            assert not any(publishing.done() for publishing in waiting), "the upload waited for the timeout of Sigstore"
            proxy.close()
            connection.close()
            assert {publishing.result().status_code for publishing in waiting} == {424}


def test_an_export_has_the_provenance(attested: Server, assets: dict[str, bytes], tmp_path: Path) -> None:
    upload(attested, assets, json.loads(assets[PUBLISH]))
    run_index(attested.root, "export", str(tmp_path / "tree"), "--url", "https://static.example.com")
    page = json.loads((tmp_path / "tree" / "simple" / "pypi-attestations" / "index.json").read_text())
    address = page["files"][0]["provenance"]
    assert address.startswith("https://static.example.com/files/")
    Provenance.model_validate_json((tmp_path / "tree" / address.removeprefix("https://static.example.com/")).read_bytes())
