"""`builder fetch`, and files of a recipe that come from the Python index or from Debian's archive."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder.fetch import fetch, source
from builder.planning.settings import Settings
from builder.planning.sources import File
from gracefarm.errors import DigestError, FetchError, SourceError
from tests.conftest import Farm
from tests.integration import fetch_kit
from tests.integration.fetch_kit import Repository, sha256

PATCH = "--- a/setup.py\n+++ b/setup.py\n@@ -1 +1 @@\n-sm = 80\n+sm = 90\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project=tmp_path)


def of_files(tmp_path: Path, settings: Settings, *files: dict[str, object]) -> Path:
    """The source tree of a small repository with these further files in it."""
    repository = Repository(tmp_path / "thing")
    pinned = repository.source(repository.commit({"setup.py": ""}))
    recipe = fetch_kit.recipe(pinned, files=tuple(map(File.model_validate, files)))
    fetched = fetch(recipe.data, settings)
    return source.unpack(recipe, fetched, tmp_path / "tree", source.source_date_epoch(recipe.data, fetched))


def shape(farm: Farm, tmp_path: Path, find: str = "threads = 1\n", **changed: object) -> tuple[str, str, str]:
    """A recipe with all that fetch looks at: submodule, checkout, patch, substitution, licence, gap.

    Its commit, the tree of that, and the commit of what is inside.
    """
    inner, outer = Repository(tmp_path / "inner"), Repository(tmp_path / "outer")
    commit = inner.commit({"LICENSE.txt": "BSD\n"})
    outer.git("submodule", "--quiet", "add", inner.url, "csrc/inner")
    top = outer.commit({"setup.py": "sm = 80\n", "build.py": "threads = 1\n"})
    pinned = {"url": "https://up.example/inner", "commit": commit, "license": "BSD-3-Clause"}
    tables: dict[str, object] = {
        "source": {
            "kind": "git",
            "url": "https://up.example/outer",
            "commit": top,
            "tree": outer.tree(top),
            "submodules": {"csrc/inner": pinned},
        },
        "repositories": [pinned | {"path": "deps/inner"}],
        "files": [
            {"url": "https://gone.example/llvm.zip", "sha256_unknown": "out of reach", "path": "seed/llvm", "unpack": True},
            {"text": "1\n", "path": "seed/version.txt"},
        ],
        "substitutions": [{"path": "build.py", "find": find, "replace": "threads = 2\n"}],
        "wheel": {"licenses": ["csrc/inner/LICENSE.txt"]},
    }
    farm.recipe("shape", {}, **(tables | changed))
    patches = farm.settings.project / "recipes/shape/patches"
    patches.mkdir()
    (patches / "0001-sm-90.patch").write_text(PATCH)
    return top, outer.tree(top), commit


def mirrors(tmp_path: Path) -> dict[str, str]:
    return {"GRACEFARM_MIRRORS": f"https://up.example/={tmp_path.as_uri()}/"}


def test_fetch_says_a_line_for_each_part_also_while_a_digest_is_unknown(farm: Farm, tmp_path: Path) -> None:
    top, tree, inner = shape(farm, tmp_path)
    done = farm.run("fetch", "shape", "--json", **mirrors(tmp_path))
    assert done.code == 0, done.said
    *events, result = [json.loads(line) for line in done.out.splitlines()]
    lines = [event["text"] for event in events if event["event"] == "step"]
    assert lines == [
        f"https://up.example/outer: commit {top}, tree {tree}, as pinned",
        f"submodule csrc/inner: commit {inner}, as pinned",
        "submodule csrc/inner: the tree of its parent repository has the same commit",
        f"repository deps/inner: commit {inner}, as pinned",
        "source of shape 1.0",
        "file seed/llvm from https://gone.example/llvm.zip is left out: its digest is unknown (out of reach)",
        "file seed/version.txt",
        "patch 0001-sm-90.patch applies",
        "substitution in build.py: 1 occurrence",
        "licence csrc/inner/LICENSE.txt exists",
    ]
    assert result["recipe"] == "shape"
    assert [gap["url"] for gap in result["gaps"]] == ["https://gone.example/llvm.zip"]
    assert not list(farm.settings.home.glob("fetched/*")), "the tree was only for reading"
    people = farm.run("fetch", "shape", **mirrors(tmp_path))
    assert "all pinned files were fetched and match their pins; 1 file with an unknown digest was skipped" in people.out


def test_fetch_names_what_does_not_fit_and_goes_on_to_the_next_recipe(farm: Farm, tmp_path: Path) -> None:
    shape(farm, tmp_path, find="threads = 3\n")
    farm.recipe("tiny", {"setup.py": ""})
    done = farm.run("fetch", "shape", "tiny", **mirrors(tmp_path))
    assert done.code == 50, done.said
    assert "'threads = 3' occurs 0 times, but the recipe states 1" in done.said
    assert "tiny: all pinned files were fetched and match their pins" in done.out
    alone = farm.run("fetch", "shape", **mirrors(tmp_path))
    assert alone.code == 13, alone.said


def test_a_build_unpacks_and_patches_before_it_asks_for_root_or_environment(farm: Farm, tmp_path: Path) -> None:
    """Neither the index nor Debian is reached, and nothing is there: a source that does not fit is still what is named."""
    shape(farm, tmp_path, find="threads = 3\n", files=[], stack="bare")
    empty = tmp_path / "empty"
    nowhere = {"GRACEFARM_DEBIAN_MIRROR": "http://127.0.0.1:9/debian", "GRACEFARM_PYTHON_INDEX": "http://127.0.0.1:9/simple"}
    done = farm.run("build", "shape", GRACEFARM_HOME=str(empty), **nowhere, **mirrors(tmp_path))
    assert done.code == 13, done.said
    assert "'threads = 3' occurs 0 times" in done.said
    assert {path.name for path in empty.iterdir()} <= {"builds", "git", "locks", "store"}, "nothing but what was fetched"


def test_a_licence_text_that_the_source_lacks_ends_the_fetch(farm: Farm, tmp_path: Path) -> None:
    shape(farm, tmp_path, files=[])
    place = farm.settings.project / "recipes/shape/recipe.toml"
    place.write_text(place.read_text().replace("csrc/inner/LICENSE.txt", "csrc/inner/COPYING"))
    done = farm.run("fetch", "shape", **mirrors(tmp_path))
    assert done.code == 13, done.said
    assert "licence csrc/inner/COPYING of shape: the source has no such file" in done.said


def index_of(folder: Path, *rows: tuple[str, bytes, str]) -> str:
    """A simple index in a folder: file name, bytes and further attributes of its link."""
    page = folder / "simple" / "some-tools"
    page.mkdir(parents=True)
    for name, data, _ in rows:
        (page / name).write_bytes(data)
    links = (f'<a href="{name}#sha256={sha256(data)}" {attributes}>{name}</a>' for name, data, attributes in rows)
    (page / "index.html").write_text("".join(links))
    return f"file://{folder}/simple/"


def wheel_of(text: str) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as opened:
        opened.writestr("some/bin/tool", text)
        opened.writestr("some/include/a.h", "")
    return raw.getvalue()


def test_a_file_of_the_python_index_is_chosen_by_its_digest_among_those_of_its_version(
    tmp_path: Path, settings: Settings
) -> None:
    arm, x86 = wheel_of("arm"), wheel_of("x86")
    names = [f"some_tools-12.4.99-py3-none-manylinux2014_{arch}.whl" for arch in ("x86_64", "aarch64")]
    url = index_of(tmp_path, (names[0], x86, ""), (names[1], arm, ""), ("some_tools-12.5-py3-none-any.whl", b"new", ""))
    settings = settings.model_copy(update={"index_url": url})
    entry: dict[str, object] = {"name": "some-tools", "version": "12.4.99", "sha256": sha256(arm), "path": "seed"}
    tree = of_files(
        tmp_path, settings, entry | {"members": {"some/bin/tool": ["bin/tool", "again/tool"], "some/include": "inc"}}
    )
    assert (tree / "seed/bin/tool").read_text() == (tree / "seed/again/tool").read_text() == "arm"
    assert (tree / "seed/inc/a.h").exists()


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (
            {"sha256": "0" * 64},
            DigestError,
            "has no file with sha256 0000.*, only these files: some_tools-12.4.99-py3-none-any.whl",
        ),
        ({"version": "12.5"}, FetchError, "has the project, but not this version"),
        ({"name": "other-tools"}, FetchError, "has no such project"),
        ({"version": "12.6", "sha256": sha256(b"yanked")}, FetchError, r"was yanked from the index .*: broken"),
    ],
)
def test_a_file_that_the_python_index_does_not_have_so(
    tmp_path: Path, settings: Settings, changed: dict[str, str], error: type[Exception], words: str
) -> None:
    data = wheel_of("any")
    url = index_of(
        tmp_path,
        ("some_tools-12.4.99-py3-none-any.whl", data, ""),
        ("some_tools-12.6-py3-none-any.whl", b"yanked", 'data-yanked="broken"'),
    )
    entry: dict[str, object] = {
        "name": "some-tools",
        "version": "12.4.99",
        "sha256": sha256(data),
        "path": "seed.whl",
    } | changed
    with pytest.raises(error, match=words):
        of_files(tmp_path, settings.model_copy(update={"index_url": url}), entry)


def test_members_of_a_debian_package_of_the_named_suites_mirror(tmp_path: Path, settings: Settings) -> None:
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        "Package: tools\nVersion: 1.0\nArchitecture: arm64\nMaintainer: a\nDescription: b\n"
    )
    (content / "usr/bin").mkdir(parents=True)
    (content / "usr/bin/tool").write_text("tool")
    (content / "usr/bin/tool").chmod(0o755)
    deb = tmp_path / "debian/pool/tools_1.0_arm64.deb"
    deb.parent.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", content, deb], check=True, capture_output=True)
    settings = settings.model_copy(update={"debian_mirror": f"file://{tmp_path}/debian"})
    entry: dict[str, object] = {
        "deb": "pool/tools_1.0_arm64.deb",
        "suite": "trixie",
        "sha256": sha256(deb.read_bytes()),
        "path": "seed",
    }
    tree = of_files(tmp_path, settings, entry | {"members": {"usr/bin/tool": "tool/bin/tool"}})
    assert (tree / "seed/tool/bin/tool").read_text() == "tool"
    assert (tree / "seed/tool/bin/tool").stat().st_mode & 0o111


def test_a_broken_debian_package_is_named(tmp_path: Path, settings: Settings) -> None:
    data = b"!<arch>\ndebian-binary   1700000000  0     0     100644  4         `\n2.0\nnothing more"
    (tmp_path / "tools_1.0_arm64.deb").write_bytes(data)
    settings = settings.model_copy(update={"debian_mirror": f"file://{tmp_path}"})
    entry: dict[str, object] = {
        "deb": "tools_1.0_arm64.deb",
        "suite": "trixie",
        "sha256": sha256(data),
        "path": "seed",
        "unpack": True,
    }
    with pytest.raises(SourceError, match="file seed of thing cannot be unpacked: dpkg-deb: error"):
        of_files(tmp_path, settings, entry)
