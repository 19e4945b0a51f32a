"""The source tree of a build: the unpacked source with the recipe's files and patches, and one time for all files."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

from builder.fetch import Fetched, archive
from builder.fetch.git import GitError, enclosing, run_git
from builder.fetch.urls import shown
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.sources import File, GitSource
from gracefarm.console import Say, silent
from gracefarm.errors import SourceError
from gracefarm.files import atomic_directory, full_disk, remove_tree


def unpack(recipe: LoadedRecipe, fetched: Fetched, into: Path, source_date_epoch: int, say: Say = silent) -> Path:
    """Create the tree at `into` (an existing one is replaced) and return it; it is complete or absent.

    The top folder of an archive is removed. A git tree gets a `.git` with one commit, so that `git rev-parse HEAD` and
    `git describe --always` work; it has no tags, since tags can move. Then the recipe's files are added and its patches
    applied, in order. Finally every time is set to `source_date_epoch` (seconds since 1970) and every mode to 644 or 755.
    A file of the recipe whose digest is unknown is left out. `say` gets one line for each part.

    Raises:
        SourceError: an archive is unsafe or cannot be read, the path of a file exists already, or a patch does not apply.
        HostError: git is required (for a git source or a patch) and not installed.
        DiskFullError: no space left.
    """
    remove_tree(into)
    with full_disk(into.parent), atomic_directory(into) as tree:
        repositories = _populate(recipe.data, fetched, tree)
        say(f"source of {recipe.data.name} {recipe.data.version}")
        _place_trees(recipe.data, fetched, tree, say)
        _place_files(recipe.data, fetched, tree, say)
        for patch in recipe.patches:
            _apply(patch, tree, recipe)
            say(f"patch {patch.name} applies")
        substitute(recipe.data, tree, say)
        for text in recipe.data.wheel.licenses:
            if not any(Path(text).is_relative_to(place) for place in _left_out(recipe.data, fetched)):
                _require_text(recipe.data, tree, text)
                say(f"licence {text} exists")
        _settle(tree, source_date_epoch, [place / ".git" for place in repositories])
        for place in repositories:
            _refresh(place)
    return into


def _left_out(recipe: Recipe, fetched: Fetched) -> list[str]:
    """Paths of files whose digest is unknown, and of trees that are not built."""
    unknown = [file.path for file in recipe.files if file.sha256_unknown]
    return [*unknown, *(taken.path for taken in recipe.trees if taken.path not in fetched.trees)]


def pack(tree: Path, into: Path, moment: int) -> None:
    """Keep the patched source, as it is before the build changes it, without the folders of git."""
    remove_tree(into)
    into.mkdir(parents=True)
    with (into / "source.tar").open("wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(tree.rglob("*")):
            inside = path.relative_to(tree)
            if ".git" not in inside.parts:
                tar.add(path, str(inside), recursive=False, filter=lambda info: _anonymous(info, moment))


def finish(packed: Path, wheel: Path, into: Path, moment: int) -> Path:
    """Write the kept source as an sdist with the wheel's name and version, and the wheel's METADATA as PKG-INFO."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata)
    top = "-".join(wheel.name.split("-")[:2])
    final = into / f"{top}.tar.gz"
    with (
        tarfile.open(packed / "source.tar") as plain,
        final.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=moment) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for info in plain:
            info.pax_headers = {}  # they contain long names, and the library prefers them to the new name
            info.name = f"{top}/{info.name}"
            info.linkname = f"{top}/{info.linkname}" if info.islnk() else info.linkname
            tar.addfile(info, plain.extractfile(info) if info.isreg() else None)
        info = _anonymous(tarfile.TarInfo(f"{top}/PKG-INFO"), moment)
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    return final


def _anonymous(info: tarfile.TarInfo, moment: int) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = moment
    info.mode = 0o755 if info.isdir() or info.mode & stat.S_IXUSR else 0o644
    return info


def source_date_epoch(recipe: Recipe, fetched: Fetched) -> int:
    """SOURCE_DATE_EPOCH of the build, in seconds since 1970: the time of the commit, or the newest time in the archive.

    It is between 1980 and 2107, the times that a wheel can hold.

    Raises:
        SourceError: the archive cannot be read.
    """
    if isinstance(recipe.source, GitSource):
        show = ["show", "--no-patch", "--format=%ct", recipe.source.commit]
        seconds = run_git(show, cwd=fetched.source, config=fetched.source.parent / "config")
        return archive.clamp(int(seconds))
    return archive.newest_mtime(fetched.source, _title(recipe))


def _title(recipe: Recipe) -> str:
    return f"source of {recipe.name} {recipe.version}"


def _populate(recipe: Recipe, fetched: Fetched, tree: Path) -> list[Path]:
    """Fill the tree; return the folders that are git work trees."""
    places, checkouts = [], []
    if isinstance(recipe.source, GitSource):
        _export(fetched.source, recipe.source.commit, tree)
        places.append(tree)
        for path, module in sorted(recipe.source.submodules.items()):
            # A parent sorts before its submodules.
            _, inner = enclosing(path, recipe.source.submodules)
            checkouts.append((path, module.commit, f"submodule {inner}"))
    else:
        archive.extract(fetched.source, tree, _title(recipe), strip=True)
    checkouts += [(pinned.path, pinned.commit, f"repository {pinned.path}") for pinned in recipe.repositories]
    for path, commit, title in checkouts:
        archive.make_parents(tree / path, tree, title)
        _export(fetched.repositories[commit], commit, tree / path)
        places.append(tree / path)
    return places


def _export(repository: Path, commit: str, into: Path) -> None:
    """Check out a commit from the store into a separate repository, so that a build cannot access the store's objects."""
    config = repository.parent / "config"
    into.mkdir(exist_ok=True)
    try:
        run_git(["init", "--quiet"], cwd=into, config=config)
        address = str(repository.resolve())
        fetch = ["fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--depth", "1", "--", address, commit]
        run_git(fetch, cwd=into, config=config)
        run_git(["checkout", "--quiet", "--detach", commit, "--"], cwd=into, config=config)
    except GitError as error:
        raise SourceError(
            f"commit {commit} cannot be checked out: {str(error).strip()}",
            remedy=f"remove {repository}, then repeat the command",
        ) from error


def _place_trees(recipe: Recipe, fetched: Fetched, tree: Path, say: Say) -> None:
    for taken in recipe.trees:
        place = tree / taken.path
        if taken.path not in fetched.trees:
            say(f"tree {taken.path} is left out: recipe {taken.recipe} builds it")
            continue
        archive.make_parents(place, tree, f"tree {taken.path} of {recipe.name}")
        if place.exists() or place.is_symlink():
            raise SourceError(
                f"tree {taken.path} of {recipe.name}: the source already has a file or folder with this path",
                remedy="give the tree a different path in [[trees]]",
            )
        shutil.copytree(fetched.trees[taken.path], place, symlinks=True)
        say(f"tree {taken.path} of recipe {taken.recipe}")


def _place_files(recipe: Recipe, fetched: Fetched, tree: Path, say: Say) -> None:
    for file in recipe.files:
        if file.sha256_unknown is not None:
            say(f"file {file.path} from {shown(file.origin)} is left out: its digest is unknown ({file.sha256_unknown})")
            continue
        _place_file(recipe, file, fetched, tree)
        say(f"file {file.path}")


def _place_file(recipe: Recipe, file: File, fetched: Fetched, tree: Path) -> None:
    place, name = tree / file.path, f"file {file.path} of {recipe.name}"
    archived = file.unpack or bool(file.members)
    archive.make_parents(place / "member" if archived else place, tree, name)
    origin = fetched.files[file.sha256] if file.sha256 else None
    if file.members and origin:
        archive.extract_members(origin, place, name, file.members)
        return
    if file.unpack and origin:
        archive.extract(origin, place, name, strip=False)
        return
    if place.is_symlink() or place.exists():
        raise SourceError(
            f"{name}: the source already has a file or folder with this path",
            remedy="choose a different path, or change the existing file with a patch",
        )
    if origin:
        shutil.copyfile(origin, place)
    else:
        place.write_text(file.text or "")


def keep_licenses(recipe: Recipe, tree: Path, into: Path) -> None:
    """Copy the licence texts that the recipe names into the folder `into`, before the build changes the source."""
    remove_tree(into)
    for text in recipe.wheel.licenses:
        (into / text).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / text, into / text)


def _require_text(recipe: Recipe, tree: Path, text: str) -> None:
    place = tree / text
    if not place.resolve().is_relative_to(tree.resolve()) or not place.is_file() or not place.stat().st_size:
        raise SourceError(
            f"licence {text} of {recipe.name}: the source has no such file",
            remedy="correct `licenses` of [wheel] in the recipe",
        )


def substitute(recipe: Recipe, tree: Path, say: Say = silent) -> None:
    """Replace the texts that the recipe names in the tree.

    Raises:
        SourceError: a file does not exist, or does not have the text as often as the recipe states.
    """
    remedy = "correct [[substitutions]] in the recipe for the pinned source"
    for substitution in recipe.substitutions:
        place, title = tree / substitution.path, f"substitution in {substitution.path} of {recipe.name}"
        if place.is_symlink() or not place.is_file() or not place.resolve().is_relative_to(tree.resolve()):
            raise SourceError(f"{title}: no such file in the source", remedy=remedy)
        try:
            text = place.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{title}: the file is not UTF-8", remedy="write a patch instead") from error
        if (count := text.count(substitution.find)) != substitution.count:
            wanted = f"{substitution.find.strip()!r} occurs {count} times, but the recipe states {substitution.count}"
            raise SourceError(f"{title}: {wanted}", remedy=remedy)
        place.write_text(text.replace(substitution.find, substitution.replace))
        say(f"substitution in {substitution.path}: {count} {'occurrence' if count == 1 else 'occurrences'}")


def _apply(patch: Path, tree: Path, recipe: LoadedRecipe) -> None:
    """Run `git apply`: exact context, all of a patch or nothing, never through a link.

    Without a repository: in a repository around the tree, git would silently skip every file, and the attributes of a
    repository in the tree would count.
    """
    try:
        run_git(["apply", "--whitespace=nowarn", "--", str(patch.resolve())], cwd=tree, environment={"GIT_DIR": os.devnull})
    except GitError as error:
        raise SourceError(
            f"patch {patch.name} of {recipe.key} does not apply: {_where(patch, str(error))}",
            remedy=f"change the patch for the pinned {recipe.data.name} {recipe.data.version}, or remove it",
        ) from error


def _where(patch: Path, message: str) -> str:
    """File and hunk that do not apply, from git's `patch failed: FILE:LINE` and the patch; else git's message."""
    failed = re.search(r"^error: patch failed: (.*):(\d+)$", message, re.MULTILINE)
    if failed is None:
        return "; ".join(
            line.removeprefix("error: ") for line in message.splitlines() if line.startswith(("error:", "fatal:"))
        )
    file, line = failed[1], int(failed[2])
    hunks = _hunks(patch, file)
    for number, hunk in enumerate(hunks, 1):
        if int(hunk[1]) == line:
            return f"{file}, hunk {number} of {len(hunks)} ({hunk[0]})"
    return f"{file} at line {line}"


def _hunks(patch: Path, file: str) -> list[re.Match[str]]:
    """The headers of a file's hunks, each with its first line."""
    hunks, changed = [], ""
    for line in patch.read_text(errors="replace").splitlines():
        if line.startswith("--- "):
            changed = line[4:].split("\t")[0].partition("/")[2]
        elif changed == file and (header := re.match(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", line)):
            hunks.append(header)
    return hunks


def _settle(tree: Path, moment: int, besides: list[Path]) -> None:
    """Set one time, and mode 644 or 755, for everything except the folders `besides`; links are not followed."""
    for folder, folders, files in os.walk(tree):
        folders[:] = [name for name in folders if Path(folder, name) not in besides]
        # Setting a time does not change another time, so the order does not matter.
        for name in (*folders, *files):
            _stamp(Path(folder, name), moment)
    _stamp(tree, moment)


def _stamp(path: Path, moment: int) -> None:
    mode = path.lstat().st_mode
    if not stat.S_ISLNK(mode):
        path.chmod(0o755 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o644)
    os.utime(path, (moment, moment), follow_symlinks=False)


def _refresh(place: Path) -> None:
    """Update git's index with the new times: otherwise `git describe --dirty` would read all files again."""
    try:
        run_git(["update-index", "-q", "--refresh"], cwd=place)
    except GitError:
        # The exit code reports a patched file, which is expected.
        return
