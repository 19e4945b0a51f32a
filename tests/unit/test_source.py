"""Source trees: hostile archives are refused, patches apply exactly or say where not, times and modes are alike."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from builder.fetch import Fetched, source
from builder.planning.sources import File, FileSource
from gracefarm.errors import HostError, SourceError
from tests.integration.fetch_kit import recipe, tarball

MOMENT = 1_700_000_000
OUTSIDE = "gracefarm-was-here"


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode, member.size, member.mtime = kind, link, mode, size, MOMENT
    return member


def tar_of(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        tar.addfile(info("thing-1/setup.py"))
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return buffer.getvalue()


def zip_of(*members: tuple[str, int, str]) -> bytes:
    """Names, modes and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, mode, text in (("thing-1/setup.py", 0o100644, ""), *members):
            member = zipfile.ZipInfo(name, (2023, 11, 14, 22, 13, 20))
            member.external_attr = mode << 16
            opened.writestr(member, text)
    return buffer.getvalue()


def unpack(
    tmp_path: Path, archive: bytes, *, files: dict[str, tuple[bytes, bool]] | None = None, patches: tuple[str, ...] = ()
) -> Path:
    """The tree of a recipe with that archive, further files (path: content, unpack) and patches."""
    (tmp_path / "source").write_bytes(archive)
    tables, places = [], {}
    for number, (path, (content, unpacked)) in enumerate((files or {}).items()):
        digest = f"{number:064x}"
        tables.append(File(url="https://far.invalid/x", sha256=digest, path=path, unpack=unpacked))
        places[digest] = tmp_path / f"file{number}"
        places[digest].write_bytes(content)
    written = []
    for number, text in enumerate(patches, 1):
        written.append(tmp_path / f"000{number}-change.patch")
        written[-1].write_text(text)
    pinned = FileSource(kind="file", url="https://far.invalid/x", sha256="0" * 64)
    loaded = recipe(pinned, files=tuple(tables), patches=tuple(written))
    return source.unpack(loaded, Fetched(source=tmp_path / "source", files=places), tmp_path / "into" / "tree", MOMENT)


@pytest.mark.parametrize(
    "archive",
    [
        tarball({"thing-1/setup.py": "a", "thing-1/pkg/b.py": "b"}),
        zip_of(("thing-1/pkg/", 0o40755, ""), ("thing-1/pkg/b.py", 0o100644, "b")),
    ],
    ids=["tar", "zip"],
)
def test_top_folder_goes_and_times_and_modes_are_set(tmp_path: Path, archive: bytes) -> None:
    before = os.umask(0o077)
    try:
        tree = unpack(tmp_path, archive)
    finally:
        os.umask(before)
    assert tree == tmp_path / "into" / "tree"
    assert (tree / "pkg" / "b.py").read_text() == "b"
    assert {path.stat().st_mtime for path in (tree, *tree.rglob("*"))} == {MOMENT}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tree.rglob("*") if path.is_file()} == {0o644}
    assert stat.S_IMODE((tree / "pkg").stat().st_mode) == 0o755


def test_archive_without_one_top_folder_stays_as_it_is(tmp_path: Path) -> None:
    tree = unpack(tmp_path, tarball({"setup.py": "", "pkg/b.py": ""}))
    assert sorted(path.name for path in tree.iterdir()) == ["pkg", "setup.py"]


def test_executables_links_and_repeated_members_come_as_they_are(tmp_path: Path) -> None:
    members = (
        info("thing-1/run", mode=0o755, size=3),
        info("thing-1/again", tarfile.LNKTYPE, "thing-1/run"),
        info("thing-1/pkg/up", tarfile.SYMTYPE, "../run"),
        info("thing-1/twice", size=1),
        info("thing-1/twice", size=2),
    )
    tree = unpack(tmp_path, tar_of(*members))
    assert os.access(tree / "run", os.X_OK)
    assert (tree / "again").read_text() == (tree / "pkg" / "up").read_text() == "xxx"
    assert (tree / "pkg" / "up").readlink() == Path("../run")
    assert (tree / "twice").read_text() == "xx"


HOSTILE = {
    "traversal": (tar_of(info(f"thing-1/../../../{OUTSIDE}")), "leads out of the source tree"),
    "absolute": (tar_of(info(f"/tmp/{OUTSIDE}")), "leads out of the source tree"),
    "zip traversal": (zip_of((f"../../{OUTSIDE}", 0o100644, "")), "leads out of the source tree"),
    "zip absolute": (zip_of((f"/tmp/{OUTSIDE}", 0o100644, "")), "leads out of the source tree"),
    "link out": (tar_of(info("thing-1/l", tarfile.SYMTYPE, "../../etc")), "outside the tree"),
    "absolute link": (tar_of(info("thing-1/l", tarfile.SYMTYPE, "/etc/passwd")), "outside the tree"),
    "zip link out": (zip_of(("thing-1/l", 0o120777, "../../../etc")), "outside the tree"),
    "link above the stripped folder": (tar_of(info("thing-1/l", tarfile.SYMTYPE, "../x")), "outside the tree"),
    "chain of links out": (
        tar_of(info("thing-1/d/up", tarfile.SYMTYPE, ".."), info("thing-1/l", tarfile.SYMTYPE, "d/up/../x")),
        "outside the tree",
    ),
    "write through a link": (
        tar_of(info("thing-1/l", tarfile.SYMTYPE, "../.."), info(f"thing-1/l/{OUTSIDE}")),
        "goes through 'l'",
    ),
    "zip write through a link": (
        zip_of(("thing-1/l", 0o120777, "../.."), (f"thing-1/l/{OUTSIDE}", 0o100644, "")),
        "goes through 'l'",
    ),
    "hard link out": (tar_of(info("thing-1/h", tarfile.LNKTYPE, "/etc/passwd")), "not a file of the archive"),
    "device": (tar_of(info("thing-1/null", tarfile.CHRTYPE)), "device or a pipe"),
    "pipe": (tar_of(info("thing-1/pipe", tarfile.FIFOTYPE)), "device or a pipe"),
    "zip device": (zip_of(("thing-1/null", 0o20666, "")), "device or a pipe"),
    "set-user-id": (tar_of(info("thing-1/su", mode=0o4755)), "set-user-id"),
    "zip set-group-id": (zip_of(("thing-1/su", 0o102755, "")), "set-user-id or set-group-id"),
    "no archive": (b"#!/bin/sh\n", "is not a tar archive, a zip"),
    "cut off": (tarball({"thing-1/a": os.urandom(9000).hex()})[:-4000], "cannot be unpacked"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    archive, words = HOSTILE[name]
    with pytest.raises(SourceError, match=words) as caught:
        unpack(tmp_path, archive)
    assert "source of thing 1.0" in caught.value.cause
    assert caught.value.remedy
    assert list((tmp_path / "into").iterdir()) == []
    assert not list(tmp_path.rglob(OUTSIDE))
    assert not Path("/tmp", OUTSIDE).exists()


def test_old_tree_goes(tmp_path: Path) -> None:
    (tmp_path / "into" / "tree" / "stale").mkdir(parents=True)
    assert not (unpack(tmp_path, tarball({"thing-1/a": ""})) / "stale").exists()


def test_files_are_put_in_place_and_a_patch_may_change_them(tmp_path: Path) -> None:
    files = {
        "third_party/one.h": (b"one\n", False),
        "third_party/lib": (tarball({"lib-2/include/two.h": "two"}), True),
    }
    patch = "--- a/third_party/one.h\n+++ b/third_party/one.h\n@@ -1 +1 @@\n-one\n+changed\n"
    tree = unpack(tmp_path, tarball({"thing-1/setup.py": ""}), files=files, patches=(patch,))
    assert (tree / "third_party/one.h").read_text() == "changed\n"
    assert (tree / "third_party/lib/lib-2/include/two.h").read_text() == "two"
    assert (tmp_path / "file0").read_text() == "one\n", "the store's file is not the tree's"


@pytest.mark.parametrize("unpacked", [False, True])
def test_file_on_a_place_that_is_taken(tmp_path: Path, unpacked: bool) -> None:
    content = tarball({"setup.py": ""}) if unpacked else b""
    place = "." if unpacked else "setup.py"
    with pytest.raises(SourceError, match=r"the source already has a file or folder|overwrites an existing file"):
        unpack(tmp_path, tarball({"thing-1/setup.py": "", "thing-1/b": ""}), files={place: (content, unpacked)})


@pytest.mark.parametrize("unpacked", [False, True])
def test_file_never_goes_through_a_link_of_the_source(tmp_path: Path, unpacked: bool) -> None:
    archive = tar_of(info("thing-1/d/x"), info("thing-1/l", tarfile.SYMTYPE, "d"))
    with pytest.raises(SourceError, match="goes through 'l'"):
        unpack(tmp_path, archive, files={"l/file": (tarball({"a": ""}), unpacked)})


LINES = "".join(f"line {number}\n" for number in range(1, 41))
GOOD = "--- a/text\n+++ b/text\n@@ -1,2 +1,2 @@\n-line 1\n+first\n line 2\n"
SECOND_BAD = GOOD + "@@ -20,3 +20,3 @@ def f():\n line 20\n-line XX\n+other\n line 22\n"


def test_patches_apply_in_their_order(tmp_path: Path) -> None:
    then = "--- a/text\n+++ b/text\n@@ -1,2 +1,2 @@\n-first\n+second\n line 2\n"
    tree = unpack(tmp_path, tarball({"thing-1/text": LINES}), patches=(GOOD, then))
    assert (tree / "text").read_text().startswith("second\nline 2\n")
    assert {path.stat().st_mtime for path in (tree, tree / "text")} == {MOMENT}


def test_patch_that_does_not_apply_names_patch_file_and_hunk(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        unpack(tmp_path, tarball({"thing-1/text": LINES}), patches=(GOOD.replace("line 2", "line 2"), SECOND_BAD))
    assert caught.value.cause == "patch 0002-change.patch of thing does not apply: text, hunk 1 of 2 (@@ -1,2 +1,2 @@)"
    assert "change the patch" in caught.value.remedy
    with pytest.raises(SourceError) as caught:
        unpack(tmp_path, tarball({"thing-1/text": LINES}), patches=(SECOND_BAD,))
    assert "text, hunk 2 of 2 (@@ -20,3 +20,3 @@)" in caught.value.cause
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (GOOD.replace("text", "none"), "none: No such file"),
        ("no patch at all\n", "No valid patches"),
        ("--- /dev/null\n+++ b/../../outside\n@@ -0,0 +1 @@\n+x\n", "invalid path"),
    ],
)
def test_patch_that_cannot_be_used(tmp_path: Path, patch: str, words: str) -> None:
    with pytest.raises(SourceError, match=f"0001-change.patch of thing does not apply: .*{words}"):
        unpack(tmp_path, tarball({"thing-1/text": LINES, "thing-1/b": ""}), patches=(patch,))


def test_patch_is_exact_and_never_guesses(tmp_path: Path) -> None:
    """patch(1) would apply this one with fuzz."""
    fuzzy = "--- a/text\n+++ b/text\n@@ -10,3 +10,3 @@\n line ten\n-line 11\n+changed\n line 12\n"
    with pytest.raises(SourceError, match="does not apply"):
        unpack(tmp_path, tarball({"thing-1/text": LINES, "thing-1/b": ""}), patches=(fuzzy,))


def test_patch_applies_inside_somebody_elses_repository(tmp_path: Path) -> None:
    """There, git apply does not touch the files of a patch that git made, and reports success."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    patch = "diff --git a/text b/text\n" + GOOD
    tree = unpack(tmp_path, tarball({"thing-1/text": LINES, "thing-1/b": ""}), patches=(patch,))
    assert (tree / "text").read_text().startswith("first\n")


def test_patch_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="git is not installed"):
        unpack(tmp_path, tarball({"thing-1/text": LINES}), patches=(GOOD,))


@pytest.mark.parametrize(
    ("archive", "moment"),
    [
        (tarball({"thing-1/a": ""}, mtime=1_600_000_000), 1_600_000_000),
        (tar_of(info("thing-1/a")), MOMENT),
        (zip_of(), MOMENT),
        (tarball({"thing-1/a": ""}, mtime=0), 315_532_800),
        (tarball({"thing-1/a": ""}, mtime=1 << 40), 4_354_819_198),
    ],
    ids=["tar", "newest", "zip", "before any zip", "after any zip"],
)
def test_now_is_the_newest_time_in_the_archive(
    tmp_path: Path, archive: bytes, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    (tmp_path / "source").write_bytes(archive)
    pinned = recipe(FileSource(kind="file", url="https://far.invalid/x", sha256="0" * 64))
    assert source.source_date_epoch(pinned.data, Fetched(source=tmp_path / "source")) == moment
