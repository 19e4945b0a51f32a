"""Names of wheels: the local version that follows what is measured, and the build tag of a rebuild."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from builder.flow import publishing
from builder.planning import local_version
from builder.planning.settings import load
from builder.proof import build_tag, publish, record
from builder.proof.record import Publication, Record
from gracefarm.errors import PublishError

WHEEL = "thing-1.0+cu130.torch2.11-cp311-cp311-manylinux_2_34_aarch64.whl"


@pytest.mark.parametrize(
    ("version", "cuda", "torch", "wanted"),
    [
        ("1.7.0", "13.0", "2.11.0", "1.7.0+cu130.torch2.11"),
        ("1.7.0", "12.4", None, "1.7.0+cu124"),
        ("1.7.0", None, "2.4.0", "1.7.0+torch2.4"),
        ("1.7.0", None, None, "1.7.0"),
        ("2.8.3+hdim64.128", "13.0", "2.11.0", "2.8.3+hdim64.128.cu130.torch2.11"),
        ("3.2.0+git755d4164", None, None, "3.2.0+git755d4164"),
    ],
)
def test_the_local_version_says_what_a_wheel_depends_on(
    version: str, cuda: str | None, torch: str | None, wanted: str
) -> None:
    assert local_version.named(version, cuda, torch) == wanted
    assert local_version.could_be(Version(wanted), version, cuda or "13.0", torch or "2.11.0")


def test_stacks_of_another_cuda_or_torch_give_other_versions() -> None:
    stacks = [("13.0", "2.11.0"), ("13.2", "2.11.0"), ("13.0", "2.1.1"), ("12.4", "2.4.0")]
    assert len({local_version.named("1.0", *stack) for stack in stacks}) == len(stacks)
    assert not local_version.could_be(Version("1.0+cu124"), "1.0", "13.0", "2.11.0")


@pytest.mark.parametrize(
    ("built", "version", "appends"),
    [
        ("2.6.1.post2+cu130", "2.6.1.post2", None),
        ("2.8.3+cu12torch2.6cxx11abiFALSE", "2.8.3", None),
        ("2.1.2+pt26cu124", "2.1.2", None),
        ("2.8.3+hdim64.128", "2.8.3+hdim64.128", None),
        ("2.8.3+hdim64.128.cu130", "2.8.3+hdim64.128", None),
        ("1.0+d20261129", "1.0", "d20261129"),
        ("1.0+D_2026", "1.0", "d.2026"),
        ("1.0.0", "1.0", None),
    ],
)
def test_what_upstream_appends_about_cuda_and_torch_is_replaced(built: str, version: str, appends: str | None) -> None:
    assert local_version.is_of(built, version, appends)


@pytest.mark.parametrize(
    ("built", "version"),
    [
        ("1.1", "1.0"),
        ("1.0+g1234567", "1.0"),
        ("1.0+d20261129", "1.0"),
        ("3.2.0", "3.2.0+git755d4164"),
        ("3.2.0+git755d41644", "3.2.0+git755d4164"),
        ("1.0rc1+cu130", "1.0"),
        ("nonsense", "1.0"),
        ("", "1.0"),
    ],
)
def test_another_commit_or_version_is_not_taken_for_the_recipes(built: str, version: str) -> None:
    assert not local_version.is_of(built, version)


def test_a_name_with_a_build_tag_and_back() -> None:
    for name in (WHEEL, WHEEL.replace(".whl", "-cu130_sm90.whl"), "thing-1.0-py3-none-any.whl"):
        again = build_tag.tagged(name, 12)
        assert build_tag.split(again) == (name, 12)
        assert build_tag.tagged(again, 0) == name
        assert build_tag.split(name) == (name, 0)
    assert parse_wheel_filename(build_tag.tagged(WHEEL, 3))[2] == (3, "")
    assert Tag("cp311", "cp311", "manylinux_2_34_aarch64") in parse_wheel_filename(build_tag.tagged(WHEEL, 3))[3]


def test_the_tag_is_the_next_one_of_that_very_name() -> None:
    other = WHEEL.replace("cp311", "cp313")
    assert build_tag.choose(WHEEL, "a", {}) == (WHEEL, None)
    assert build_tag.choose(WHEEL, "a", {other: "b"}) == (WHEEL, None)
    first, second = build_tag.tagged(WHEEL, 1), build_tag.tagged(WHEEL, 2)
    assert build_tag.choose(WHEEL, "a", {WHEEL: "b"}) == (first, WHEEL)
    assert build_tag.choose(WHEEL, "a", {first: "c", WHEEL: "b"}) == (second, first)
    tenth = build_tag.tagged(WHEEL, 10)
    assert build_tag.choose(WHEEL, "a", {tenth: "d", first: "c"}) == (build_tag.tagged(WHEEL, 11), tenth)


def test_bytes_that_are_there_keep_the_name_that_they_have() -> None:
    first = build_tag.tagged(WHEEL, 1)
    assert build_tag.choose(WHEEL, "a", {WHEEL: "b", first: "a", build_tag.tagged(WHEEL, 2): "c"}) == (first, None)


def test_the_error_after_the_last_name_has_only_names_that_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index here is a fake: it shows no files and refuses every name, as if deleted files had all of them."""
    tried: list[str] = []

    def refuse(named: Path, url: str, _login: publish.Login | None) -> Publication:
        tried.append(named.name)
        raise publish.TakenError(f"{url} refused {named.name}: File already exists", remedy="")

    monkeypatch.setattr(publish, "offered", lambda *_arguments: {})
    monkeypatch.setattr(publish, "upload", refuse)
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"a wheel")
    built = Record(
        build_id="a",
        recipe="thing",
        name="thing",
        version="1.0",
        stack="bare",
        inputs={},
        outcome="built",
        finished=record.now(),
    )
    with pytest.raises(PublishError) as error:
        publishing.upload_wheel(built, wheel, "http://index.test/legacy/", load(), None)
    assert tried == [build_tag.tagged(WHEEL, number) for number in range(publishing.MAX_TAGS)]
    assert f"under {len(tried)} names, up to {tried[-1]}: " in error.value.cause
    assert build_tag.tagged(WHEEL, len(tried)) not in error.value.cause
