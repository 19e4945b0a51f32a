"""The store of device code as the builder sees it: where it is, what its keys stand on, what a record says of it."""

from __future__ import annotations

import ast
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from builder.compiling import units
from builder.data.toolchain import device
from builder.data.toolchain.device_store import Result, get, put
from builder.planning.ground import Ground
from builder.planning.settings import Settings
from builder.planning.stack import host_arch
from builder.toolchains import device_store
from gracefarm.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.unit.plan_kit import NAME, project
from tests.unit.test_ccache import made

__all__ = ["project"]


def ground(folder: Path) -> Ground:
    """A root and compilers of one byte each."""
    files = ["compiler/nvidia/cu13/nvvm/bin/cicc", "compiler/nvidia/cu13/bin/ptxas", "compiler/nvidia/cu13/bin/nvcc"]
    files += [f"root/lib/{host_arch().triplet}/{name}" for name in ("libc.so.6", "libm.so.6")]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")
    return Ground(
        root=folder / "root", environment=folder, packages=folder, compiler=folder / "compiler", title="", folders=()
    )


@pytest.mark.parametrize(("name", "counts"), [("cicc", True), ("ptxas", True), ("libm.so.6", True), ("nvcc", False)])
def test_other_compilers_find_nothing_of_the_old_ones(tmp_path: Path, name: str, counts: bool) -> None:
    """nvcc only makes the options, which are in the keys."""
    own = ground(tmp_path)
    before = device_store.compilers_digest(own)
    assert device_store.compilers_digest(replace(own, title="elsewhere", environment=tmp_path / "other")) == before
    (place,) = tmp_path.rglob(name)
    place.write_text("2")
    assert (device_store.compilers_digest(own) != before) is counts


def test_only_scripts_that_make_device_code_change_the_keys(tmp_path: Path) -> None:
    """A changed comment in `ninja` or `nvcc` must not empty every store."""
    own, scripts = ground(tmp_path), tmp_path / "scripts"
    shutil.copytree(REPOSITORY / "builder" / "data" / "toolchain", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    before = device_store.compilers_digest(own)
    assert device_store.compilers_digest(own, scripts) == before
    counted = set()
    for script in scripts.iterdir():
        content = script.read_bytes()
        script.write_bytes(content + b"# changed\n")
        if device_store.compilers_digest(own, scripts) != before:
            counted.add(script.name)
        script.write_bytes(content)
    modules = {
        node.module for node in ast.walk(ast.parse((scripts / "device.py").read_text())) if isinstance(node, ast.ImportFrom)
    }
    ours = {f"{module.rpartition('.')[2]}.py" for module in modules if module and module.startswith("builder.")}
    assert counted == {"device.py", *ours}


def test_a_recipe_has_its_own_folder_and_a_bound(project: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project=project)
    (store,) = device_store.mounts(made(project), settings)
    assert (store.source, store.writable) == (tmp_path / "home" / "device" / NAME, True)
    with pytest.raises(ConfigError, match="setting 'device_store': 'much' is not a size"):
        device_store.mounts(made(project), settings.model_copy(update={"device_store": "much"}))
    assert device_store.enabled(settings)
    assert not device_store.enabled(settings.model_copy(update={"device_store": "off"}))


def test_the_newest_entries_stay_within_the_bound(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, project=tmp_path, device_store="4KiB")
    folder = device_store.folder(settings, "tiny") / "ab"
    folder.mkdir(parents=True)
    for number in range(1, 7):
        (folder / f"entry{number}").write_bytes(bytes(1024))
        os.utime(folder / f"entry{number}", (number * 10_000, number * 10_000))
    for name, used in (("old", 50_000), ("new", 59_000)):
        (folder / f".{name}.partial").write_bytes(bytes(10))
        os.utime(folder / f".{name}.partial", (used, used))
    device_store.trim(settings.model_copy(update={"device_store": "off"}), "tiny")
    assert len(list(folder.iterdir())) == 8
    device_store.trim(settings, "tiny")
    assert sorted(path.name for path in folder.iterdir()) == [".new.partial", "entry4", "entry5", "entry6"]
    device_store.trim(settings, "never built")


def test_a_record_counts_what_each_key_found() -> None:
    passes = [
        {
            "pass": "cicc",
            "outcome": "text",
            "cpu_s": 0.1,
            "wall_s": 0.1,
            "saved": {"cpu_s": 30, "wall_s": 31, "peak_memory": 9},
        },
        {"pass": "cicc", "outcome": "nvvm", "cpu_s": 2, "wall_s": 2, "saved": {"cpu_s": 20, "wall_s": 21, "peak_memory": 9}},
        {"pass": "cicc", "outcome": "option -g", "cpu_s": 5, "wall_s": 5, "saved": {}},
        {"pass": "ptxas", "outcome": "ptx", "cpu_s": 0.1, "wall_s": 0.1, "saved": {"cpu_s": 4, "wall_s": 4, "peak_memory": 9}},
        {"pass": "ptxas", "outcome": "miss", "cpu_s": 3, "wall_s": 3, "saved": {}},
        {"pass": "fatbinary", "outcome": "always runs", "cpu_s": 0.3, "wall_s": 0.3, "saved": {}},
    ]
    table = {"unit": "a.cu", "outcome": "off", "wall_s": 1, "cpu_s": 1, "peak_memory": 1, "device": passes}
    note = units.Note.model_validate(table)
    found = units.device_statistics([note])
    assert found is not None
    assert (found.text, found.nvvm, found.ptx, found.misses, found.not_kept) == (1, 1, 1, 1, {"option -g": 1})
    assert units.device_title(found) == (
        "device code: 3 passes from the store (1 by text, 1 by NVVM code, 1 by PTX), 1 compiled; 1 x option -g; "
        "10 CPU s used, about 54 CPU s saved"
    )
    assert units.device_statistics([note.model_copy(update={"device": ()})]) is None


@pytest.mark.parametrize(
    ("kept", "runs"),
    [(None, 1), (b"kernel(zeroext)", 0), (b"other(zeroext)", 1)],
    ids=["no entry", "the entry of a cell for aarch64", "a wrong entry"],
)
def test_a_kept_code_saves_the_second_front_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes | None, runs: int
) -> None:
    """Each entry gives the same result."""
    ran = []

    def front_end(_call: device.Call, arguments: list[str], _scratch: str) -> Result:
        assert set(device.UNSIGNED) <= set(arguments)
        Path(arguments[arguments.index("-o") + 1]).write_bytes(b"kernel(zeroext)")
        ran.append(arguments)
        return Result(cost={"cpu_s": 5.0})

    def equal(one: bytes, other: bytes) -> bool:
        return one.replace(b"signext", b"zeroext") == other.replace(b"signext", b"zeroext")

    monkeypatch.setenv("GRACEFARM_DEVICE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(device, "front_end", front_end)
    monkeypatch.setattr(device, "differ_only_in_extension", equal)
    (tmp_path / "unit.bc").write_bytes(b"kernel(signext)")
    if kept is not None:
        put("ab", Result(files={"bc": kept}))
    unit = Result(cost={"cpu_s": 4.0})
    call = device.Call(options=[], names={}, source="")
    assert device.same_for_hosts(call, [], str(tmp_path), unit, "ab") == b"kernel(zeroext)"
    assert (tmp_path / "unit.bc").read_bytes() == b"kernel(zeroext)"
    assert (len(ran), unit.cost["cpu_s"]) == (runs, 4.0 + 5.0 * runs)
    found = get("ab")
    assert found is not None
    assert found.files["bc"] == b"kernel(zeroext)"


def test_an_aarch64_cell_keeps_its_code_unless_units_call_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACEFARM_DEVICE_STORE", str(tmp_path / "store"))
    (tmp_path / "unit.bc").write_bytes(b"kernel(zeroext)")
    linked = device.Call(options=[device.LINKED[0]], names={}, source="")
    assert device.same_for_hosts(linked, device.UNSIGNED, str(tmp_path), Result(), "ab") == b"kernel(zeroext)"
    assert get("ab") is None
    own = device.Call(options=[], names={}, source="")
    assert device.same_for_hosts(own, device.UNSIGNED, str(tmp_path), Result(), "ab") == b"kernel(zeroext)"
    assert get("ab") == Result(files={"bc": b"kernel(zeroext)"})
