"""The tree that a recipe builds instead of a wheel: checked, and kept by build id for other recipes."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from builder.fetch import Fetched
from builder.planning.plan import Plan
from builder.planning.settings import Settings
from builder.proof import record
from gracefarm.errors import CompileError
from gracefarm.files import atomic_directory, remove_tree, sha256_file


def with_trees(fetched: Fetched, plan: Plan, settings: Settings) -> Fetched:
    """The fetched files of a plan, with the trees that are built."""
    places = zip(plan.recipe.data.trees, plan.trees, strict=True)
    built = {tree.path: record.tree_path(settings, source.build_id) for tree, source in places}
    present = {path: place for path, place in built.items() if place.is_dir()}
    for place in present.values():
        place.touch()  # `builder clean --keep` removes the least recently used trees first
    return replace(fetched, trees=present)


def keep(output: Path, plan: Plan, settings: Settings, epoch: int) -> str:
    """Move a finished tree to its final folder, complete or not at all; return its digest.

    Every file gets the time `epoch` and mode 644 or 755, as in a source tree.

    Raises:
        CompileError: a file that the recipe lists in `holds` is missing, or a link leads out of the tree.
    """
    tree = plan.recipe.data.tree
    assert tree is not None
    lacking = [name for name in tree.holds if not (output / name).exists()]
    strays = [path for path in sorted(output.rglob("*")) if path.is_symlink() and not _inside(path, output)]
    if lacking or strays:
        what = (
            f"has no {', '.join(lacking)}"
            if lacking
            else f"has a link that leads out of the tree: {strays[0].relative_to(output)}"
        )
        raise CompileError(
            f"the tree of {plan.recipe.key} {what}",
            remedy="correct `commands` or `holds` of [tree] in the recipe; the commands must install into $OUT",
            repeat=plan.repeat,
        )
    final = record.tree_path(settings, plan.build_id)
    remove_tree(final)  # left by a build whose record was deleted
    final.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(final) as folder:
        for entry in sorted(output.iterdir()):
            shutil.move(entry, folder / entry.name)
        names = sorted(folder.rglob("*"))
        for path in names:
            _settle(path, epoch)
        return digest(folder, names)


def digest(folder: Path, names: Sequence[Path]) -> str:
    """Hex sha256 of the paths, modes, and contents or link targets of these files of a tree."""
    whole = hashlib.sha256()
    for path in names:
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode):
            content = str(path.readlink()) if stat.S_ISLNK(mode) else sha256_file(path)
            whole.update(f"{path.relative_to(folder)}\0{bool(mode & stat.S_IXUSR)}\0{content}\n".encode())
    return whole.hexdigest()


def _inside(link: Path, folder: Path) -> bool:
    return not link.readlink().is_absolute() and link.resolve().is_relative_to(folder.resolve())


def _settle(path: Path, moment: int) -> None:
    mode = path.lstat().st_mode
    if not stat.S_ISLNK(mode):
        path.chmod(0o755 if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else 0o644)
    os.utime(path, (moment, moment), follow_symlinks=False)
