"""Maintenance of a store while it is in use: fsck, gc, prune, import, backup."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import httpx
import pytest
from index_kit import AARCH64, Server, run_index, run_json, serving, start, stop, wheel

from index.store import upkeep
from index.store.catalogue import open_catalogue
from index.store.files import Store


def stored(server: Server, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    return server.root / "files" / digest[:2] / digest


def test_fsck_finds_what_is_damaged(server: Server) -> None:
    good, bad = wheel("good_pkg"), wheel("bad_pkg")
    for item in (good, bad):
        assert server.upload(*item).status_code == 200
    assert json.loads(run_index(server.root, "fsck", "--json").stdout.splitlines()[-1])["damaged"] == []
    path = stored(server, bad[1])
    path.chmod(0o644)
    path.write_bytes(bytes(len(bad[1])))
    process = run_index(server.root, "fsck", check=False)
    assert process.returncode == 11
    assert bad[0] in process.stderr
    assert good[0] not in process.stderr


def test_what_fsck_sets_aside_can_be_uploaded_again(server: Server) -> None:
    name, content = wheel("mend_pkg")
    assert server.upload(name, content).status_code == 200
    assert server.upload(*wheel("other_pkg")).status_code == 200
    path = stored(server, content)
    path.chmod(0o644)
    path.write_bytes(bytes(len(content)))
    assert run_index(server.root, "fsck", "--set-aside", check=False).returncode == 11
    assert server.filenames("mend-pkg") == [], "files known to be damaged are not listed"
    assert server.filenames("other-pkg")
    assert server.upload(name, content).status_code == 200
    assert server.filenames("mend-pkg") == [name]
    assert run_json(server.root, "fsck")["damaged"] == []
    assert server.client.get(f"/packages/{name}").content == content


def test_gc_frees_what_nothing_names(server: Server) -> None:
    kept, gone = wheel("kept_pkg"), wheel("gone_pkg")
    for item in (kept, gone):
        assert server.upload(*item).status_code == 200
    run_index(server.root, "delete", "gone-pkg", "1.0", "--yes")
    assert stored(server, gone[1]).exists()
    assert run_json(server.root, "gc")["files"] == 2, "the wheel and its metadata"
    assert not stored(server, gone[1]).exists()
    assert run_json(server.root, "fsck")["damaged"] == []
    assert server.client.get(f"/packages/{kept[0]}").content == kept[1]


def test_prune_keeps_the_newest_of_each_variant(server: Server) -> None:
    for day in range(1, 5):
        for local in ("cu124", "cu130"):
            item = wheel("night_pkg", f"1.0.dev{day}+{local}", AARCH64)
            assert server.upload(*item, path="/nightly/legacy/").status_code == 200
    assert server.upload(*wheel("night_pkg", "0.9")).status_code == 200
    assert len(run_json(server.root, "prune", "--keep", "2", "--dry-run")) == 4
    assert len(server.filenames("night-pkg", prefix="/nightly")) == 8
    run_index(server.root, "prune", "--keep", "2")
    assert server.filenames("night-pkg", prefix="/nightly") == [
        f"night_pkg-1.0.dev{day}+{local}-{AARCH64}.whl" for day in (3, 4) for local in ("cu124", "cu130")
    ]
    assert server.filenames("night-pkg") == ["night_pkg-0.9-py3-none-any.whl"]


def test_import_takes_a_folder_of_pypiserver(tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    (folder / "sub").mkdir(parents=True)
    for number, item in enumerate((wheel("in_pkg"), wheel("in_pkg", "2.0"))):
        (folder / ("sub" if number else ".") / item[0]).write_bytes(item[1])
    (folder / "broken_pkg-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    process = run_index(tmp_path / "root", "import", str(folder), check=False)
    assert process.returncode == 50
    assert "2 imported, 0 already stored, 1 refused" in process.stdout
    assert "broken_pkg-1.0-py3-none-any.whl" in process.stdout
    (folder / "broken_pkg-1.0-py3-none-any.whl").unlink()
    assert "0 imported, 2 already stored" in run_index(tmp_path / "root", "import", str(folder)).stdout
    with serving(tmp_path / "root") as server:
        assert server.filenames("in-pkg") == [wheel("in_pkg")[0], wheel("in_pkg", "2.0")[0]]


def test_gc_keeps_nobody_waiting(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads continue while many files are removed slowly, and none of their files is removed."""
    names = [wheel("kept_pkg", f"1.{number}") for number in range(8)]
    catalogue, store = open_catalogue(server.root / "catalogue" / "catalogue.db"), Store(root=server.root)
    for number in range(60):
        content = f"unreferenced {number}".encode()
        store.add_bytes(content, hashlib.sha256(content).hexdigest())
    real = Path.unlink

    def slow(path: Path, missing_ok: bool = False) -> None:
        if path.parent.parent == store.files:
            threading.Event().wait(0.05)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", slow)
    result: list[tuple[int, int]] = []
    worker = threading.Thread(target=lambda: result.append(upkeep.gc(store, catalogue, "test")))
    worker.start()
    begin = time.monotonic()
    for item in names:
        assert server.upload(*item).status_code == 200
    waited, going = time.monotonic() - begin, worker.is_alive()
    worker.join()
    catalogue.close()
    assert going, "the uploads finished first"
    assert waited < 3
    assert result[0][0] == 60
    assert len(server.filenames("kept-pkg")) == 8
    assert run_json(server.root, "fsck")["damaged"] == []


def test_a_start_leaves_what_a_running_command_writes(server: Server) -> None:
    store = Store(root=server.root)
    stop(server.process)
    with store.using_staging():
        young, old = store.new_staging(), store.new_staging()
        for path in (young, old):
            path.write_bytes(b"half")
        os.utime(old, (0, 0))
        assert store.sweep() == 1
        assert (young.exists(), old.exists()) == (True, False)
    assert store.sweep() == 1
    assert not young.exists()


# --- backup -----------------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_folder_made_while_it_runs_is_whole(server: Server, tmp_path: Path) -> None:
    """As in docs/howto/index-operation.md: copy the catalogue first, then the files, while uploads continue."""
    confirmed: list[str] = []
    finished = threading.Event()

    def upload() -> None:
        number = 0
        with httpx.Client(base_url=server.url) as client:
            mine = Server(**{**vars(server), "client": client})
            while not finished.is_set():
                name, content = wheel("backup_pkg", f"1.{number}")
                assert mine.upload(name, content).status_code == 200
                confirmed.append(name)
                number += 1

    worker = threading.Thread(target=upload)
    worker.start()
    try:
        while len(confirmed) < 30:
            finished.wait(0.01)
        before = list(confirmed)
        copy = tmp_path / "copy"
        copy.mkdir()
        shutil.copytree(server.root / "catalogue", copy / "catalogue")
        shutil.copytree(server.root / "files", copy / "files")
        while len(confirmed) < len(before) + 20:
            finished.wait(0.01)
    finally:
        finished.set()
        worker.join()
    with serving(copy) as restored:
        assert set(before) <= set(restored.filenames("backup-pkg"))
        assert run_json(copy, "fsck")["damaged"] == []


def test_a_copy_made_in_the_wrong_order_lists_nothing_that_is_not_there(server: Server, tmp_path: Path) -> None:
    early, late = wheel("order_pkg", "1.0"), wheel("order_pkg", "2.0")
    assert server.upload(*early).status_code == 200
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(server.root / "files", copy / "files")
    assert server.upload(*late).status_code == 200
    shutil.copytree(server.root / "catalogue", copy / "catalogue")
    with serving(copy) as restored:
        assert restored.filenames("order-pkg") == [early[0]]
        assert restored.upload(*late).status_code == 200
        assert restored.filenames("order-pkg") == [early[0], late[0]]
        assert run_json(copy, "fsck")["damaged"] == []


def test_files_that_are_not_mounted_stop_the_start(server: Server, tmp_path: Path) -> None:
    assert server.upload(*wheel("mount_pkg")).status_code == 200
    stop(server.process)
    (server.root / "files").rename(tmp_path / "away")
    process = start(server.root)
    assert process.stdout is not None
    with process.stdout:
        text = process.stdout.read()
    assert process.wait(20) == 3
    assert "mount the disk with the files" in text


def test_a_ruined_catalogue_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "root" / "catalogue").mkdir(parents=True)
    (tmp_path / "root" / "catalogue" / "catalogue.db").write_bytes(b"no database " * 1000)
    process = run_index(tmp_path / "root", "stats", check=False)
    assert process.returncode == 3
    assert "the database of the index, cannot be read" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_catalogue_of_the_first_index_becomes_one_of_this(tmp_path: Path) -> None:
    """An upgraded catalogue has every table, column and view of a new one."""
    shapes = []
    for name in ("new", "old"):
        path = tmp_path / name / "catalogue.db"
        catalogue = open_catalogue(path)
        if name == "old":
            catalogue.close()
            old = sqlite3.connect(path)
            for statement in (
                "DROP VIEW public_record", "DROP TABLE pin", "ALTER TABLE mirrored DROP COLUMN lost",
                "ALTER TABLE mirrored DROP COLUMN withdrawn", "ALTER TABLE record DROP COLUMN project",
                "ALTER TABLE record DROP COLUMN wheels", "ALTER TABLE token DROP COLUMN hashed",
                "DROP TABLE matrix", "DROP TABLE certificate",
                "DROP TABLE variants_json", "DROP TABLE set_pylock",
                "DROP TABLE minted", "DROP TABLE spent",
                "DROP TABLE publisher", "ALTER TABLE file DROP COLUMN variant",
                "ALTER TABLE file DROP COLUMN defects", "ALTER TABLE mirrored DROP COLUMN defects",
                "ALTER TABLE release_set DROP COLUMN without", "ALTER TABLE file DROP COLUMN provenance_sha256",
                "ALTER TABLE token DROP COLUMN minted", "ALTER TABLE mirrored DROP COLUMN serves_metadata",
                "UPDATE meta SET value = '1' WHERE key = 'schema'",
                "INSERT INTO record (id, recipe, updated) VALUES ('a', 'Flash_Attn', '')",
            ):  # fmt: skip
                old.execute(statement)
            old.commit()
            old.close()
            catalogue = open_catalogue(path)
            row = catalogue.row("SELECT project FROM public_record")
            assert row is not None
            assert row["project"] == "flash-attn"
            assert catalogue.row("SELECT hashed FROM token") is None
        tables = [row["name"] for row in catalogue.rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        shapes.append({table: {row["name"] for row in catalogue.rows(f"PRAGMA table_info({table})")} for table in tables})
        catalogue.close()
    assert shapes[0] == shapes[1]
