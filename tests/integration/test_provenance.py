"""SBOM, signed provenance and `builder verify`: others' tools read them, and every tampering has its sentence."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from builder.flow import run
from builder.planning.stack import host_arch
from builder.proof import provenance, sbom, signing, verify
from gracefarm.errors import ConfigError, UsageError, VerifyError
from gracefarm.files import remove_tree
from tests import projects
from tests.conftest import Farm

NATIVE = host_arch().value


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A wheel that was built and signed once, for all tests that tamper with a copy."""

    wheel: Path
    key: Path
    record: dict[str, Any]


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes its user's key."""
    monkeypatch.setenv("GRACEFARM_SETTINGS", str(tmp_path / "config" / "settings.toml"))
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    return tmp_path / "config"


@pytest.fixture(scope="module")
def signed(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    folder = tmp_path_factory.mktemp("signed")
    from tests import conftest

    make = conftest.farm.__wrapped__(shared_home)  # type: ignore[attr-defined]
    farm: Farm = next(make)
    variables = {"GRACEFARM_SETTINGS": str(folder / "settings.toml")}
    try:
        farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})
        made = farm.run("key", "create", **variables)
        assert made.code == 0, made.said
        (folder / "farm.pub").write_text(made.out)
        done = farm.run("build", "tiny_c", "--target", NATIVE, **variables)
        assert done.code == 0, done.said
        assert "signed by key" in done.said
        wheel = Path(done.out.strip())
        shutil.copytree(wheel.parent, folder / "dist")
        record = json.loads((wheel.parent.parent / "record.json").read_text())
        yield Signed(wheel=folder / "dist" / wheel.name, key=folder / "farm.pub", record=record)
    finally:
        next(make, None)


def checks(wheel: Path, key: Path | None, envelope: Path | None = None) -> dict[str, verify.WheelCheck]:
    return {check.name: check for check in verify.verify(wheel, envelope, signing.public(key) if key else None)}


def test_an_honest_wheel_passes_every_check(signed: Signed) -> None:
    found = checks(signed.wheel, signed.key)
    assert all(check.ok for check in found.values()), found
    assert list(found) == ["record", "build-id", "sbom", "provenance"]
    assert signed.record["provenance"] == json.loads(provenance.path(signed.wheel).read_text()), "the index gets it too"


def test_the_command_line_says_the_same(signed: Signed, farm: Farm) -> None:
    done = farm.run("verify", str(signed.wheel), "--key", str(signed.key))
    assert done.code == 0, done.said
    assert "ok provenance signed by key" in done.said
    bad = farm.run("verify", str(signed.wheel))
    assert bad.code == 32
    assert "not checked provenance no public key was given" in bad.said
    assert (
        "no public key was given, and this machine has no signing key remedy: run `builder key show > builder.pub`" in bad.said
    )


def test_spdx_tools_find_the_sbom_valid(signed: Signed, tmp_path: Path) -> None:
    with zipfile.ZipFile(signed.wheel) as archive:
        place = tmp_path / "sbom.spdx.json"
        place.write_bytes(archive.read(f"tiny_c-1.0.dist-info/sboms/{sbom.FILENAME}"))
    document = parse_file(str(place))
    assert [problem.validation_message for problem in validate_full_spdx_document(document)] == []
    names = {package.name for package in document.packages}
    assert {"tiny-c", "setuptools", "packaging"} <= names
    assert next(package for package in document.packages if package.spdx_id == "SPDXRef-wheel").license_declared is not None


def test_securesystemslib_opens_the_envelope_with_the_farms_key(signed: Signed) -> None:
    envelope = Envelope.from_dict(json.loads(provenance.path(signed.wheel).read_text()))
    public = signing.public(signed.key)
    key = SSlibKey(signing.key_id(public), "ed25519", "ed25519", {"public": public.public_bytes_raw().hex()})
    assert envelope.verify([key], threshold=1)
    statement = json.loads(envelope.payload)
    assert (statement["_type"], statement["predicateType"]) == (provenance.STATEMENT, provenance.PREDICATE)
    assert statement["subject"] == [
        {"name": signed.wheel.name, "digest": {"sha256": hashlib.sha256(signed.wheel.read_bytes()).hexdigest()}}
    ]
    definition = statement["predicate"]["buildDefinition"]
    source = signed.record["inputs"]["recipe"]["source"]
    assert {"sha256": source["sha256"]} in [dependency["digest"] for dependency in definition["resolvedDependencies"]]
    assert definition["externalParameters"] == {"recipe": "tiny_c", "stack": "bare", "target": NATIVE}


def test_the_sbom_is_the_same_in_every_build(farm: Farm, signed: Signed, own_settings: Path) -> None:
    """Also without a key: neither the key nor the time enters the wheel."""
    farm.recipe("tiny_c", projects.tree("tiny_c"), name="tiny-c", smoke={"imports": ["tiny_c"]})
    texts = []
    for _ in range(2):
        done = farm.run("build", "tiny_c", "--target", NATIVE)
        assert done.code == 0, done.said
        assert "not signed: run `builder key create`" in done.said
        wheel = Path(done.out.strip())
        assert not provenance.path(wheel).exists()
        texts.append(verify.read(wheel).sbom)
        remove_tree(farm.settings.home / "builds")
    assert texts[0] == texts[1]


# --- tampering ---------------------------------------------------------------------------------------------------------------


def tampered(wheel: Path, folder: Path, change: Callable[[dict[str, bytes]], None], *, mend_record: bool = True) -> Path:
    """A copy of the wheel with other content, its RECORD corrected, and the provenance of the true one beside it."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in content if name.endswith(".dist-info/RECORD"))
    change(content)
    if mend_record:
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        for name, data in content.items():
            secure = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            writer.writerow([name, "", ""] if name == record else [name, f"sha256={secure}", len(data)])
        content[record] = rows.getvalue().encode()
    place = folder / wheel.name
    with zipfile.ZipFile(place, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    shutil.copy(provenance.path(wheel), provenance.path(place))
    return place


INFO = "tiny_c-1.0.dist-info"


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def edit(content: dict[str, bytes]) -> None:
        value = json.loads(content[name])
        change(value)
        content[name] = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    return edit


def _other_source(value: Any) -> None:
    value["inputs"]["recipe"]["source"]["sha256"] = "0" * 64


def _other_package(value: Any) -> None:
    next(package for package in value["packages"] if package["SPDXID"] == "SPDXRef-source-1")["checksums"][0][
        "checksumValue"
    ] = "0" * 64


def _other_environment(value: Any) -> None:
    found = next(package for package in value["packages"] if package["name"] == "setuptools")
    found["versionInfo"], found["externalRefs"][0]["referenceLocator"] = "1.0", "pkg:pypi/setuptools@1.0"


def _other_namespace(value: Any) -> None:
    value["documentNamespace"] = "urn:gracefarm:build:" + "0" * 64


TAMPERING: dict[str, tuple[Callable[[dict[str, bytes]], None], str, str]] = {
    "another file, RECORD corrected": (
        lambda content: content.update({"tiny_c/__init__.py": b"evil = 1\n"}), "provenance", "but the signed sha256 is"),
    "inputs": (in_json(f"{INFO}/gracefarm.json", _other_source), "build-id", "the digest of the inputs in the wheel is"),
    "the SBOM's source": (in_json(f"{INFO}/sboms/{sbom.FILENAME}", _other_package), "sbom", "does not list the sources"),
    "the SBOM's environment": (
        in_json(f"{INFO}/sboms/{sbom.FILENAME}", _other_environment), "sbom", "have a different digest than the environment"),
    "the SBOM's build": (in_json(f"{INFO}/sboms/{sbom.FILENAME}", _other_namespace), "sbom", "the SBOM belongs to build 0000"),
    "no SBOM": (lambda content: content.pop(f"{INFO}/sboms/{sbom.FILENAME}"), "sbom", "the wheel has no SBOM"),
    "an SBOM from elsewhere": (
        lambda content: content.update({f"{INFO}/sboms/{sbom.FILENAME}": b"{}"}), "sbom", "gracefarm did not write the SBOM"),
    "inputs that are not inputs": (
        lambda content: content.update({f"{INFO}/gracefarm.json": b'{"build_id": "1", "inputs": []}'}), "build-id",
        "the digest of the inputs in the wheel is"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERING)
def test_what_was_changed_inside_is_named(signed: Signed, tmp_path: Path, what: str) -> None:
    change, check, words = TAMPERING[what]
    wheel = tampered(signed.wheel, tmp_path, change)  # type: ignore[arg-type]
    found = checks(wheel, signed.key)
    assert not found[check].ok
    assert words in found[check].summary
    assert not found["provenance"].ok, "whatever was changed, the signed digest is of the true wheel"
    with pytest.raises(VerifyError, match=check):
        verify.require(wheel, list(found.values()), repeat="")


def test_a_file_that_record_does_not_know_is_named(signed: Signed, tmp_path: Path) -> None:
    wheel = tampered(signed.wheel, tmp_path, lambda content: content.update({"x.py": b""}), mend_record=False)
    assert checks(wheel, signed.key)["record"].summary == "x.py is not in RECORD"


def envelope_of(signed: Signed) -> dict[str, Any]:
    found = json.loads(provenance.path(signed.wheel).read_text())
    assert isinstance(found, dict)
    return found


def test_another_key_a_changed_statement_and_another_type_are_refused(signed: Signed, tmp_path: Path) -> None:
    other = signing.create()
    (tmp_path / "other.pub").write_text(signing.pem(other))
    assert "no valid signature of key" in checks(signed.wheel, tmp_path / "other.pub")["provenance"].summary

    place = tmp_path / "changed.jsonl"
    envelope = envelope_of(signed)
    body = base64.b64decode(envelope["payload"]).replace(b'"recipe":"tiny_c"', b'"recipe":"tiny_d"')
    place.write_text(json.dumps(envelope | {"payload": base64.b64encode(body).decode()}))
    assert "or it was changed" in checks(signed.wheel, signed.key, place)["provenance"].summary

    place.write_text(json.dumps(envelope | {"payloadType": "text/plain"}))
    assert "has the type text/plain" in checks(signed.wheel, signed.key, place)["provenance"].summary
    for text, words in (("{}", "not a DSSE envelope"), ("no json", "is not JSON"), ("[]", "not a DSSE envelope")):
        place.write_text(text)
        assert words in checks(signed.wheel, signed.key, place)["provenance"].summary
    place.unlink()
    assert "there is no provenance at" in checks(signed.wheel, signed.key, place)["provenance"].summary


def resigned(signed: Signed, place: Path, change: Callable[[Any], None]) -> Path:
    """A statement that this machine's key has signed, about something else; returns the public key."""
    public = signing.create()
    private = signing.private()
    assert private is not None
    statement = json.loads(base64.b64decode(envelope_of(signed)["payload"]))
    change(statement)
    place.write_text(json.dumps(signing.envelope(provenance.PAYLOAD, json.dumps(statement).encode(), private)))
    place.with_suffix(".pub").write_text(signing.pem(public))
    return place.with_suffix(".pub")


def _of_another_build(statement: Any) -> None:
    statement["predicate"]["buildDefinition"]["internalParameters"]["buildId"] = "f" * 64


def _of_another_wheel(statement: Any) -> None:
    statement["subject"][0]["name"] = "other-1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("change", "words"),
    [(_of_another_build, "the provenance is about build ffff"), (_of_another_wheel, "but about other-1.0")],
)
def test_a_signed_statement_about_something_else_is_refused(
    signed: Signed, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    place = tmp_path / "resigned.jsonl"
    key = resigned(signed, place, change)
    assert words in checks(signed.wheel, key, place)["provenance"].summary


def test_a_wheel_of_somebody_else_is_no_wheel_of_a_farm(farm: Farm, tmp_path: Path) -> None:
    place = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("other.py", "")
    done = farm.run("verify", str(place))
    assert done.code == 32
    assert "contains no gracefarm.json" in done.said
    place.write_bytes(b"not a zip")
    assert farm.run("verify", str(place)).code == 32


# --- the key -----------------------------------------------------------------------------------------------------------------


def test_the_key_is_its_owners_alone_and_made_once(own_settings: Path) -> None:
    assert signing.private() is None
    public = signing.create()
    path = own_settings / "signing-key.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    private = signing.private()
    assert private is not None
    assert private.public_key() == public
    with pytest.raises(UsageError, match="already has a signing key"):
        signing.create()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by other users"):
        signing.private()


def test_the_key_may_come_by_the_environment_and_is_never_printed(
    own_settings: Path, monkeypatch: pytest.MonkeyPatch, farm: Farm
) -> None:
    signing.create()
    path = own_settings / "signing-key.pem"
    secret = path.read_text()
    path.unlink()
    monkeypatch.setenv(signing.VARIABLE, secret)
    assert signing.private() is not None
    shown = farm.run("key", "show", "--json")
    assert shown.code == 0, shown.said
    assert "PRIVATE" not in shown.said
    body = secret.splitlines()[1]
    broken = farm.run("key", "show", **{signing.VARIABLE: secret.replace(body, body[:-4])})
    assert broken.code == 3, broken.said
    assert body[:-4] not in broken.said
    assert "does not contain an ed25519 key" in broken.said


def test_builds_from_before_the_key_are_signed_by_name_and_the_index_gets_it(
    farm: Farm, own_settings: Path, tmp_path: Path
) -> None:
    farm.recipe("tiny", projects.backend("return wheel(wheel_directory)"))
    built = farm.run("build", "tiny", "--target", NATIVE)
    assert built.code == 0, built.said
    assert "this machine has no signing key" in farm.run("sign", "tiny").said
    assert farm.run("key", "create").code == 0
    assert farm.run("verify", "tiny").code == 32
    done = farm.run("sign", "tiny")
    assert done.code == 0, done.said
    with run.local_index(farm.settings) as (url, token):
        credentials = {"TWINE_USERNAME": "__token__", "TWINE_PASSWORD": token}
        assert farm.run("build", "tiny", "--target", NATIVE, "--publish", f"{url}/legacy/", **credentials).code == 0
        wheel = shutil.copy(built.out.strip(), tmp_path)
        record = tmp_path / "record.json"
        record.write_text(httpx.get(f"{url}/records/{verify.read(Path(wheel)).build_id}").raise_for_status().text)
    unsigned = farm.run("verify", str(wheel)).said
    assert f"there is no provenance at {wheel}.intoto.jsonl remedy: sign the build with `builder sign NAME`" in unsigned
    done = farm.run("verify", str(wheel), "--provenance", str(record))
    assert done.code == 0, done.said
