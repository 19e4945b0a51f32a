"""Sdists by the simple API: from real indexes on loopback, from a folder, and one from the configured index itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from builder.fetch import fetch, fetch_sdist, fill, store_path
from builder.planning import gaps, recipe, stack
from builder.planning.settings import Settings, load
from builder.planning.sources import SdistSource
from gracefarm.errors import ConfigError, DigestError, FetchError
from tests.conftest import REPOSITORY
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Served, Server, sha256

MARK = "the-setup-script-ran"
SETUP = f"import pathlib; pathlib.Path({MARK!r}).touch(); raise SystemExit(9)\n"
SDIST = fetch_kit.tarball(
    {"thing-1.0/setup.py": SETUP, "thing-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"}
)


@pytest.fixture
def server() -> Iterator[Server]:
    with fetch_kit.running() as running:
        running.served["/files/thing-1.0.tar.gz"] = Served(SDIST)
        yield running


@pytest.fixture
def settings(tmp_path: Path, server: Server) -> Settings:
    return Settings(home=tmp_path / "home", project=tmp_path, python_index=f"{server.url}/simple/")


def source(version: str = "1.0", digest: str = sha256(SDIST), name: str = "Thing") -> SdistSource:
    return SdistSource(kind="sdist", name=name, version=version, sha256=digest)


def page(server: Server, *links: str) -> None:
    """The project's page in the index's HTML."""
    anchors = "".join(f"<a {link}</a><br>" for link in links)
    server.served["/simple/thing/"] = Served(f"<!DOCTYPE html><html><body>{anchors}</body></html>".encode(), "text/html")


def link(file: str = "thing-1.0.tar.gz", digest: str = sha256(SDIST), more: str = "") -> str:
    return f'href="../../files/{file}{"#sha256=" + digest if digest else ""}" {more}>{file}'


def test_sdist_by_name_version_and_digest_then_without_network(server: Server, settings: Settings) -> None:
    page(server, link("thing-0.9.tar.gz", "0" * 64), link(), link("thing-1.0-py3-none-any.whl", "1" * 64))
    place = fetch_sdist(source(), settings)
    assert place == store_path(settings, sha256(SDIST))
    assert place.read_bytes() == SDIST
    asked = len(server.asked)
    assert fetch_sdist(source(), settings) == place
    assert len(server.asked) == asked


def test_nothing_of_the_sdist_runs(
    server: Server, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page(server, link())
    fetch_sdist(source(), settings)
    assert list(tmp_path.rglob(MARK)) == []
    # The mark is a real one: pip, which only downloads, leaves it.
    index = [
        "--index-url",
        f"{server.url}/simple/",
        "--no-deps",
        "--no-build-isolation",
        "--no-cache-dir",
        "--no-binary",
        ":all:",
    ]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    marks = tmp_path / "marks"
    marks.mkdir()
    setup = SETUP.replace(f"pathlib.Path({MARK!r})", f"pathlib.Path({str(marks / MARK)!r})")
    marked = fetch_kit.tarball({"thing-1.0/setup.py": setup})
    server.served["/files/thing-1.0.tar.gz"] = Served(marked)
    page(server, link(digest=sha256(marked)))
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--isolated", *index, "thing==1.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert pip.returncode != 0
    assert (marks / MARK).exists(), pip.stdout + pip.stderr


def test_absent_project(server: Server, settings: Settings) -> None:
    with pytest.raises(FetchError, match="has no such project") as caught:
        fetch_sdist(source(), settings)
    assert "GRACEFARM_PYTHON_INDEX" in caught.value.remedy


def test_absent_version_names_those_that_exist(server: Server, settings: Settings) -> None:
    page(server, link("thing-0.9.tar.gz"), link("thing-1.1.tar.gz"))
    with pytest.raises(FetchError, match="not this version") as caught:
        fetch_sdist(source(), settings)
    assert "0.9, 1.1" in caught.value.remedy


def test_version_without_an_sdist(server: Server, settings: Settings) -> None:
    page(server, link("thing-1.0-py3-none-any.whl"))
    with pytest.raises(FetchError, match=r"no sdist of this version, only thing-1\.0-py3-none-any\.whl"):
        fetch_sdist(source(), settings)


def test_yanked_sdist_with_its_reason(server: Server, settings: Settings) -> None:
    page(server, link(more='data-yanked="it eats data"'))
    with pytest.raises(FetchError, match=r"was yanked from the index .*: it eats data"):
        fetch_sdist(source(), settings)
    assert not store_path(settings, sha256(SDIST)).exists()


def test_sdist_with_another_digest_is_not_even_downloaded(server: Server, settings: Settings) -> None:
    page(server, link())
    with pytest.raises(DigestError) as caught:
        fetch_sdist(source(digest="0" * 64), settings)
    assert sha256(SDIST) in caught.value.cause
    assert [request.path for request in server.asked] == ["/simple/thing/"]


def test_index_that_lies_about_the_digest(server: Server, settings: Settings) -> None:
    page(server, link(digest="0" * 64))
    with pytest.raises(DigestError):
        fetch_sdist(source(digest="0" * 64), settings)
    assert not store_path(settings, "0" * 64).exists()


def test_index_without_digests_is_checked_all_the_same(server: Server, settings: Settings) -> None:
    page(server, link(digest=""))
    assert fetch_sdist(source(), settings).read_bytes() == SDIST
    with pytest.raises(DigestError):
        fetch_sdist(source(digest="0" * 64), settings)


def test_unreachable_index(settings: Settings) -> None:
    with fetch_kit.Server() as closed:
        port = closed.server_address[1]
    gone = Settings(home=settings.home, project=settings.project, python_index=f"http://user:s3cret@127.0.0.1:{port}/simple")
    with pytest.raises(FetchError, match=r"cannot be used: .*refused") as caught:
        fetch_sdist(source(), gone)
    assert "GRACEFARM_PYTHON_INDEX" in caught.value.remedy
    assert "s3cret" not in caught.value.cause


def test_index_in_trouble_is_asked_again(server: Server, settings: Settings) -> None:
    page(server, link())
    server.served["/simple/thing/"].statuses = [503]
    assert fetch_sdist(source(), settings).exists()


def test_what_is_no_index_says_so(server: Server, settings: Settings) -> None:
    server.served["/simple/thing/"] = Served(b"\x89PNG", "image/png")
    with pytest.raises(FetchError, match="is not the address of a simple API"):
        fetch_sdist(source(), settings)


def test_index_credentials_open_its_files_too_and_are_not_shown(server: Server, settings: Settings) -> None:
    page(server, link())
    for served in server.served.values():
        served.password = "s3cret"
    with pytest.raises(FetchError, match="401"):
        fetch_sdist(source(), settings)
    index = server.url.replace("//", "//user:s3cret@") + "/simple"
    mine = Settings(home=settings.home, project=settings.project, python_index=index)
    with pytest.raises(FetchError, match="not this version") as caught:
        fetch_sdist(source("3"), mine)
    assert "s3cret" not in caught.value.cause + caught.value.remedy
    assert fetch_sdist(source(), mine).read_bytes() == SDIST


def test_index_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my index" / "thing"
    folder.mkdir(parents=True)
    (folder / "thing-1.0.tar.gz").write_bytes(SDIST)
    (folder / "index.html").write_text(f'<a href="thing-1.0.tar.gz#sha256={sha256(SDIST)}">thing-1.0.tar.gz</a>')
    settings = Settings(home=tmp_path / "home", project=tmp_path, python_index=folder.parent.as_uri())
    assert fetch_sdist(source(), settings).read_bytes() == SDIST
    with pytest.raises(FetchError, match="no such project"):
        fetch_sdist(source(name="other", digest="0" * 64), settings)


def test_pypiserver(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "thing-1.0.tar.gz").write_bytes(SDIST)
    with fetch_kit.pypiserver(packages, "--disable-fallback") as url:
        settings = Settings(home=tmp_path / "home", project=tmp_path, python_index=f"{url}simple/")
        assert fetch_sdist(source(), settings).read_bytes() == SDIST
        with pytest.raises(FetchError, match="no such project"):
            fetch_sdist(source(name="other", digest="0" * 64), settings)


def test_causal_conv1d_from_the_configured_index(tmp_path: Path) -> None:
    settings = load().model_copy(update={"home": tmp_path})
    pinned = "3202758494eaa7b597ce1c282dfa188889506bfcb92cad3c407d26736bfcd32b"
    place = fetch_sdist(source("1.7.0", pinned, "causal_conv1d"), settings)
    assert sha256(place.read_bytes()) == pinned


@pytest.mark.parametrize("accepted", [None, date(2026, 11, 29)])
def test_an_sdist_whose_digest_is_not_known_is_a_gap_that_a_lock_fills_from_the_index(
    server: Server, settings: Settings, tmp_path: Path, accepted: date | None
) -> None:
    page(server, link())
    folder = tmp_path / "recipes" / "thing"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        'name = "thing"\nversion = "1.0"\nlicense = "MIT"\n\n[source]\nkind = "sdist"\nname = "thing"\nversion = "1.0"\n'
        'sha256_unknown = "not looked up" # yet\n\n[smoke]\nimports = ["thing"]\n'
    )
    loaded = recipe.load(tmp_path / "recipes", "thing")
    (gap,) = gaps.of_recipe(loaded)
    assert (gap.what, gap.url, gap.reason) == ("source", "pkg:pypi/thing@1.0", "not looked up")
    with pytest.raises(ConfigError, match="is unknown: not looked up"):
        fetch(loaded.data, settings)
    base = stack.load(REPOSITORY / "stacks", "cu130")
    filled = fill.fill([gap], base, settings, accepted=accepted)
    assert (filled.failed, filled.digests) == ((), ((gap, sha256(SDIST)),))
    known = recipe.load(tmp_path / "recipes", "thing").data.source
    assert isinstance(known, SdistSource)
    assert (known.sha256, known.accepted is not None) == (sha256(SDIST), accepted is not None)
    assert f'sha256 = "{sha256(SDIST)}" # yet' in (folder / "recipe.toml").read_text()
    assert gaps.of_recipe(recipe.load(tmp_path / "recipes", "thing")) == []


def test_the_digest_of_an_sdist_that_differs_from_what_its_index_says_is_not_accepted(
    server: Server, settings: Settings, tmp_path: Path
) -> None:
    page(server, link(digest="0" * 64))
    gap = gaps.Gap(
        file=tmp_path / "recipe.toml", table=("source",), entry={}, what="source", url="pkg:pypi/thing@1.0", reason="x"
    )
    filled = fill.fill([gap], stack.load(REPOSITORY / "stacks", "cu130"), settings, accepted=date(2026, 11, 29))
    (error,) = filled.failed
    assert isinstance(error, DigestError)
    assert f"has sha256 {sha256(SDIST)}" in error.cause
