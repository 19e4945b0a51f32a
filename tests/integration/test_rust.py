"""Recipes that require Rust: their crates are fetched by the checksums in Cargo.lock, and cargo uses only these."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from builder.planning.cargo_lock import INDEXES, REGISTRY
from builder.planning.settings import load
from gracefarm.files import sha256_file
from tests import projects
from tests.conftest import Farm
from tests.integration import crates_kit
from tests.integration.test_build import record_of

BUILD = {"cuda": False, "memory_per_job": "1GiB", "rust": True, "requires": ["maturin"]}
LEAF = f'[[package]]\nname = "leaf"\nversion = "1.0.0"\nsource = "{INDEXES[0]}"\nchecksum = "CHECKSUM"\n'

FFI = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools", "setuptools-rust"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny_ffi"
version = "1.0"
[tool.setuptools]
packages = []
[[tool.setuptools-rust.ext-modules]]
target = "tiny_ffi"
path = "rust/Cargo.toml"
binding = "NoBinding"
""",
    "rust/Cargo.toml": """
[package]
name = "tiny_ffi"
version = "1.0.0"
edition = "2021"
[lib]
crate-type = ["cdylib"]
[dependencies]
pyo3-ffi = { version = "0.17", features = ["extension-module"] }
""",
    "rust/src/lib.rs": """
use pyo3_ffi::*;
use std::ptr;

#[no_mangle]
pub unsafe extern "C" fn PyInit_tiny_ffi() -> *mut PyObject {
    let definition = PyModuleDef {
        m_base: PyModuleDef_HEAD_INIT,
        m_name: c"tiny_ffi".as_ptr(),
        m_doc: ptr::null(),
        m_size: 0,
        m_methods: ptr::null_mut(),
        m_slots: ptr::null_mut(),
        m_traverse: None,
        m_clear: None,
        m_free: None,
    };
    let module = PyModule_Create(Box::into_raw(Box::new(definition)));
    PyModule_AddIntConstant(module, c"answer".as_ptr(), if cfg!(target_arch = "aarch64") { 42 } else { 0 });
    module
}
""",
}
"A project of setuptools-rust that requires fewer crates than pyo3."
FFI_CRATES = ("libc", "once_cell", "pyo3-build-config", "pyo3-ffi", "target-lexicon")


def mirrored(folder: str) -> dict[str, str]:
    return {"GRACEFARM_MIRRORS": f"{REGISTRY}/={folder}/"}


# --- fetch -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    """A crate in a mirror."""
    files: dict[str, str | bytes] = {"Cargo.toml": '[package]\nname = "leaf"\nversion = "1.0.0"\n', "src/lib.rs": ""}
    return crates_kit.write(tmp_path / "mirror", "leaf-1.0.0", files)


def fetched(farm: Farm, lock: str | None, mirror: str) -> projects.Done:
    source: dict[str, str | bytes] = {"Cargo.toml": "", **({"Cargo.lock": lock} if lock is not None else {})}
    farm.recipe("thing", source, build={"cuda": False, "rust": True})
    return farm.run("fetch", "thing", **mirrored(mirror))


def test_fetch_brings_the_crates_of_cargo_lock_and_plan_names_their_server(farm: Farm, leaf: Path, tmp_path: Path) -> None:
    done = fetched(farm, LEAF.replace("CHECKSUM", sha256_file(leaf)), (tmp_path / "mirror").as_uri())
    assert done.code == 0, done.said
    assert "1 crate of crates.io: each sha256 matches Cargo.lock" in done.said
    stored = farm.settings.home / "store" / "sha256" / sha256_file(leaf)[:2] / sha256_file(leaf)
    assert stored.read_bytes() == leaf.read_bytes()
    planned = farm.run("plan", "thing")
    assert f"to fetch {REGISTRY}/: the crates in the source's Cargo.lock" in planned.said, planned.said


def test_a_crate_with_another_checksum_is_a_digest_error_that_names_it(farm: Farm, leaf: Path, tmp_path: Path) -> None:
    done = fetched(farm, LEAF.replace("CHECKSUM", "d" * 64), (tmp_path / "mirror").as_uri())
    assert (done.code, "error: crate leaf 1.0.0: " in done.said) == (11, True), done.said


def test_an_unreachable_registry_is_a_fetch_error_that_names_the_crate_and_the_setting(farm: Farm) -> None:
    done = fetched(farm, LEAF.replace("CHECKSUM", "e" * 64), "http://127.0.0.1:9")
    assert (done.code, "error: crate leaf 1.0.0: " in done.said) == (10, True), done.said
    assert "GRACEFARM_MIRRORS='https://static.crates.io/=REPLACEMENT'" in done.said


def test_a_missing_lock_and_a_git_dependency_are_source_errors(farm: Farm) -> None:
    done = fetched(farm, None, "http://127.0.0.1:9")
    assert (done.code, "error: the source of thing has no Cargo.lock" in done.said) == (13, True), done.said
    done = fetched(farm, LEAF.replace(INDEXES[0], "git+https://example.org/leaf#abc"), "http://127.0.0.1:9")
    assert (done.code, "takes leaf 1.0.0 from a git repository" in done.said) == (13, True), done.said


# --- build -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A folder with pyo3 and the crates that it requires."""
    folder = tmp_path_factory.mktemp("crates")
    crates_kit.fill(folder / "mirror", folder / "scratch", load().model_copy(update={"home": shared_home}))
    return folder / "mirror"


@pytest.mark.slow
def test_maturin_and_pyo3_build_for_aarch64(farm: Farm, mirror: Path) -> None:
    source = projects.tree("tiny_rust")
    source["Cargo.lock"] = crates_kit.locked(crates_kit.text(source, "Cargo.lock"), mirror)
    folder = farm.recipe("tiny_rust", source, build=BUILD)
    (folder / "smoke.py").write_text("import tiny_rust\nprint(tiny_rust.answer(), tiny_rust.machine())\n")
    locked = farm.run("lock", "tiny_rust")
    assert locked.code == 0, locked.said
    done = farm.run("build", "tiny_rust", **mirrored(mirror.as_uri()))
    assert done.code == 0, done.said + farm.run("log", "tiny_rust").out
    record = record_of(farm, "tiny_rust")
    assert record["smoke"]["script"] == "42 aarch64\n"  # type: ignore[index]
    assert {crate["name"] for crate in record["crates"]} >= {"pyo3", "syn", "libc"}  # type: ignore[attr-defined]
    wheel = Path(done.out.strip())
    assert wheel.name.startswith("tiny_rust-1.0-cp311-cp311-manylinux")
    with zipfile.ZipFile(wheel) as contents:
        sbom = json.loads(contents.read("tiny_rust-1.0.dist-info/sboms/gracefarm.spdx.json"))
    pyo3 = next(package for package in sbom["packages"] if package["name"] == "pyo3")
    assert pyo3["externalRefs"][0]["referenceLocator"] == "pkg:cargo/pyo3@0.17.3"
    assert pyo3["licenseDeclared"] == "Apache-2.0"


@pytest.mark.slow
def test_setuptools_rust_builds_for_aarch64(farm: Farm, mirror: Path) -> None:
    blocks = crates_kit.text(projects.tree("tiny_rust"), "Cargo.lock").split("\n\n")
    lock = [blocks[0], *(block for block in blocks if any(f'name = "{name}"\n' in block for name in FFI_CRATES))]
    lock.append('[[package]]\nname = "tiny_ffi"\nversion = "1.0.0"\ndependencies = [\n "pyo3-ffi",\n]\n')
    source: dict[str, str | bytes] = {**FFI, "rust/Cargo.lock": crates_kit.locked("\n\n".join(lock), mirror)}
    folder = farm.recipe("tiny_ffi", source, build={**BUILD, "requires": ["setuptools-rust"]})
    (folder / "smoke.py").write_text("import tiny_ffi\nprint(tiny_ffi.answer)\n")
    assert farm.run("lock", "tiny_ffi").code == 0
    done = farm.run("build", "tiny_ffi", **mirrored(mirror.as_uri()))
    assert done.code == 0, done.said + farm.run("log", "tiny_ffi").out
    record = record_of(farm, "tiny_ffi")
    assert record["smoke"]["script"] == "42\n"  # type: ignore[index]
    assert [crate["name"] for crate in record["crates"]] == [*FFI_CRATES]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_error_of_rustc_is_the_cause(farm: Farm) -> None:
    source = projects.tree("tiny_rust")
    source["Cargo.toml"] = crates_kit.text(source, "Cargo.toml").partition("[dependencies]")[0]
    source["Cargo.lock"] = 'version = 4\n\n[[package]]\nname = "tiny_rust"\nversion = "1.0.0"\n'
    source["pyproject.toml"] = crates_kit.text(source, "pyproject.toml").partition("[tool.maturin]")[0]
    source["src/lib.rs"] = "pub fn broken() -> u32 { missing() }\n"
    farm.recipe("broken", source, build=BUILD)
    assert farm.run("lock", "broken").code == 0
    done = farm.run("build", "broken")
    assert (done.code, "failed: error[E0425]: cannot find function `missing`" in done.said) == (21, True), done.said
