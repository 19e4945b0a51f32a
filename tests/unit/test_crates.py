"""Cargo.lock, the folder of unpacked crates, and cargo's configuration."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from builder.fetch import crates
from builder.planning import cargo_lock, packages, recipe, stack
from builder.planning.plan import Plan
from builder.planning.recipe import LoadedRecipe, Recipe
from builder.planning.settings import Settings
from builder.planning.stack import Arch
from builder.proof import provenance, sbom
from builder.proof.record import BuiltFile, Record
from builder.toolchains import choice, rust
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import ConfigError, DigestError, FetchError, SourceError
from gracefarm.files import sha256_file
from tests.integration import crates_kit

REPOSITORY = Path(__file__).parent.parent.parent
SHA = "a" * 64
INDEX = cargo_lock.INDEXES[0]
MANIFEST = '[package]\nname = "leaf"\nversion = "1.0.0+x"\nlicense = "MIT/Apache-2.0"\n'


def entry(name: str, version: str, source: str | None = INDEX, checksum: str | None = SHA) -> str:
    lines = ["[[package]]", f'name = "{name}"', f'version = "{version}"']
    lines += [f'source = "{source}"'] if source else []
    lines += [f'checksum = "{checksum}"'] if checksum else []
    return "\n".join([*lines, ""])


def read(tmp_path: Path, text: str) -> list[cargo_lock.Crate]:
    (tmp_path / "Cargo.lock").write_text(text)
    return cargo_lock.read(tmp_path / "Cargo.lock", "Cargo.lock of thing")


def loaded(tmp_path: Path, **build: object) -> LoadedRecipe:
    data = Recipe.model_validate(
        {
            "name": "thing",
            "version": "1.0",
            "license": "MIT",
            "source": {"kind": "sdist", "name": "thing", "version": "1.0", "sha256": SHA},
            "build": {"cuda": False, "rust": True, **build},
            "smoke": {"imports": ["thing"]},
        }
    )
    return LoadedRecipe(folder=tmp_path / "recipes" / "thing", data=data, patches=(), smoke_script=None)


def planned(tmp_path: Path, host: Arch = Arch.X86_64, target: Arch = Arch.AARCH64, **build: object) -> Plan:
    return choice.make_plan(loaded(tmp_path, **build), stack.load(REPOSITORY / "stacks", "cu130"), host, target)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    mirrors = {f"{cargo_lock.REGISTRY}/": f"{(tmp_path / 'mirror').as_uri()}/"}
    return Settings(home=tmp_path / "home", project=REPOSITORY, mirrors=mirrors)


def mirrored(tmp_path: Path) -> tuple[Path, str]:
    """A source tree that requires one crate of a mirror, and the checksum of the crate."""
    files: dict[str, str | bytes] = {"Cargo.toml": MANIFEST, "src/lib.rs": "pub fn one() {}\n"}
    checksum = sha256_file(crates_kit.write(tmp_path / "mirror", "leaf-1.0.0+x", files))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "Cargo.lock").write_text(entry("own", "1.0.0", None, None) + entry("leaf", "1.0.0+x", checksum=checksum))
    return tree, checksum


# --- Cargo.lock --------------------------------------------------------------------------------------------------------------


def test_crates_have_addresses_and_packages_of_the_source_do_not_count(tmp_path: Path) -> None:
    (crate,) = read(tmp_path, "version = 4\n" + entry("own", "0.1.0", None, None) + entry("zstd-sys", "2.0.10+zstd.1.5.6"))
    assert crate.url == "https://static.crates.io/crates/zstd-sys/zstd-sys-2.0.10%2Bzstd.1.5.6.crate"
    assert (crate.title, crate.folder) == ("zstd-sys 2.0.10+zstd.1.5.6", "zstd-sys-2.0.10+zstd.1.5.6")
    assert crate.purl == "pkg:cargo/zstd-sys@2.0.10%2Bzstd.1.5.6"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (entry("far", "1.0.0", "git+https://example.org/far#abc", None), "takes far 1.0.0 from a git repository, git"),
        (
            entry("far", "1.0.0", "registry+https://example.org/index"),
            "takes far 1.0.0 from a registry other than crates.io, registry",
        ),
        (entry("old", "1.0.0", checksum=None), "has no checksum of old 1.0.0"),
        (entry("../up", "1.0.0"), "name of ../up 1.0.0 is not valid"),
        (entry("up", "1/../../2"), "version of up 1/../../2 is not valid"),
        (entry("short", "1.0.0", checksum="abc"), "sha256 of short 1.0.0 is not valid"),
        ("[[package", "cannot be read"),
        ("package = 1", "cannot be read"),
        (f'[[package]]\nsource = "{INDEX}"', "cannot be read"),
    ],
)
def test_a_lock_with_other_packages_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(tmp_path, text)
    assert caught.value.cause.startswith("Cargo.lock of thing")
    assert words in caught.value.cause
    assert caught.value.remedy


# --- the folder of crates ----------------------------------------------------------------------------------------------------


def test_each_crate_gets_a_folder_with_its_checksum_and_licence(tmp_path: Path, settings: Settings) -> None:
    tree, checksum = mirrored(tmp_path)
    said: list[str] = []
    for _ in range(2):  # a second run replaces the folder
        (crate,) = crates.vendor(loaded(tmp_path), tree, tmp_path / "crates", settings, say=said.append)
    assert (crate.sha256, crate.license) == (checksum, "MIT OR Apache-2.0")
    folder = tmp_path / "crates" / "leaf-1.0.0+x"
    assert (folder / "src" / "lib.rs").read_text() == "pub fn one() {}\n"
    assert json.loads((folder / ".cargo-checksum.json").read_text()) == {"files": {}, "package": checksum}
    assert said[0] == "1 crate of crates.io: each sha256 matches Cargo.lock"


def test_a_recipe_without_rust_has_no_crates(tmp_path: Path, settings: Settings) -> None:
    assert crates.vendor(loaded(tmp_path, rust=False), tmp_path, tmp_path / "crates", settings) == ()
    assert not (tmp_path / "crates").exists()


def test_another_checksum_names_the_crate(tmp_path: Path, settings: Settings) -> None:
    tree, _ = mirrored(tmp_path)
    (tree / "Cargo.lock").write_text(entry("leaf", "1.0.0+x"))
    with pytest.raises(DigestError, match=r"^crate leaf 1\.0\.0\+x: .* is pinned$"):
        crates.vendor(loaded(tmp_path), tree, tmp_path / "crates", settings)


def test_a_crate_that_the_registry_does_not_have_is_named(tmp_path: Path, settings: Settings) -> None:
    tree, _ = mirrored(tmp_path)
    (tree / "Cargo.lock").write_text(entry("gone", "1.0.0"))
    with pytest.raises(FetchError, match=r"^crate gone 1\.0\.0 does not exist"):
        crates.vendor(loaded(tmp_path), tree, tmp_path / "crates", settings)


def test_a_source_without_cargo_lock_is_refused_with_a_remedy(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(SourceError, match=r"the source of thing has no Cargo.lock") as caught:
        crates.vendor(loaded(tmp_path), tmp_path / "tree", tmp_path / "crates", settings)
    assert "cargo generate-lockfile" in caught.value.remedy
    assert "recipes/thing/patches" in caught.value.remedy


@pytest.mark.parametrize(
    ("locks", "build", "pyproject", "found"),
    [
        (["Cargo.lock", "fuzz/Cargo.lock"], {}, "", ["Cargo.lock"]),
        (["Cargo.lock"], {"subdirectory": "bindings/python"}, "", ["Cargo.lock"]),
        (["Cargo.lock", "core/Cargo.lock"], {}, "[tool.maturin]\nmanifest-path = 'core/Cargo.toml'", ["core/Cargo.lock"]),
        (["Cargo.lock"], {}, "[tool.maturin]\nmanifest-path = 'core/Cargo.toml'", ["Cargo.lock"]),
        (["src/a/Cargo.lock", "src/b/Cargo.lock"], {}, "", ["src/a/Cargo.lock", "src/b/Cargo.lock"]),
    ],
    ids=["top", "workspace", "manifest-path", "workspace of manifest-path", "extensions"],
)
def test_the_lock_of_the_project_is_found(
    tmp_path: Path, locks: list[str], build: dict[str, str], pyproject: str, found: list[str]
) -> None:
    tree = tmp_path / "tree"
    project = tree / build.get("subdirectory", ".")
    for path in (*locks, "pyproject.toml"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).touch()
    project.mkdir(parents=True, exist_ok=True)
    (project / "pyproject.toml").write_text(pyproject)
    (tmp_path / "Cargo.lock").touch()  # outside of the source
    assert [str(lock.relative_to(tree)) for lock in crates.find(loaded(tmp_path, **build), tree)] == found


# --- configuration, build id, documents --------------------------------------------------------------------------------------


def test_cargo_has_the_fetched_crates_as_its_only_source_and_both_linkers(tmp_path: Path) -> None:
    cross, native = planned(tmp_path), planned(tmp_path, Arch.AARCH64)
    config = tomllib.loads(rust.text(cross))
    assert config["source"] == {"crates-io": {"replace-with": "fetched"}, "fetched": {"directory": "/build/crates"}}
    assert config["net"] == {"offline": True}
    assert config["build"] == {"target": "aarch64-unknown-linux-gnu"}
    assert {name: table["linker"] for name, table in config["target"].items()} == {
        "x86_64-unknown-linux-gnu": "x86_64-linux-gnu-gcc",
        "aarch64-unknown-linux-gnu": "aarch64-linux-gnu-gcc",
    }
    assert rust.variables(cross)["CARGO_BUILD_TARGET"] == "aarch64-unknown-linux-gnu"
    assert rust.variables(cross)["PYO3_CROSS_LIB_DIR"] == "/usr/lib/python3.11"
    assert "build" not in tomllib.loads(rust.text(native))
    assert not [name for name in rust.variables(native) if name.startswith("PYO3") or name == "CARGO_BUILD_TARGET"]


@pytest.mark.parametrize(("host", "target"), [(Arch.X86_64, Arch.AARCH64), (Arch.AARCH64, Arch.AARCH64)])
def test_only_the_root_of_a_recipe_with_rust_has_rust(tmp_path: Path, host: Arch, target: Arch) -> None:
    with_rust, plain = planned(tmp_path, host, target), planned(tmp_path, host, target, rust=False)
    assert with_rust.build_id != plain.build_id
    assert "rust" in with_rust.inputs
    assert "rust" not in plain.inputs
    assert "rust" not in plain.inputs["recipe"]["build"]  # type: ignore[index]
    have, before = (set(packages.of_root(plan.stack, host, target)) for plan in (with_rust, plain))
    assert before < have
    added = {f"{deb.name}:{deb.arch}" for deb in have - before}
    assert {f"rustc-web:{host.debian}", f"cargo-web:{host.debian}", f"libstd-rust-web-dev:{target.debian}"} <= added


def test_a_stack_without_rust_is_refused(tmp_path: Path) -> None:
    base = stack.load(REPOSITORY / "stacks", "cu130")
    assert base.data.root is not None
    bare = replace(base, data=base.data.model_copy(update={"root": base.data.root.model_copy(update={"rust": None})}))
    with pytest.raises(ConfigError, match="stack cu130 has no Rust"):
        _ = choice.make_plan(loaded(tmp_path), bare, Arch.X86_64, Arch.AARCH64).build_id


def test_a_container_has_no_rust(tmp_path: Path) -> None:
    base = stack.load(REPOSITORY / "stacks", "cu130")
    with pytest.raises(ConfigError, match="thing requires Rust, but --toolchain container has no Rust"):
        choice.make_plan(
            loaded(tmp_path), base, Arch.X86_64, Arch.AARCH64, ContainerToolchain(engine="podman", cibuildwheel="0")
        )


def test_sbom_and_provenance_list_the_crates(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    known = (
        cargo_lock.Crate(name="leaf", version="1.0.0+x", sha256=SHA, license="MIT OR Apache-2.0"),
        cargo_lock.Crate(name="other", version="2.0.0", sha256="b" * 64),
    )
    text = sbom.of(plan, 1_700_000_000, "1.0", known)
    listed = [package for package in json.loads(text)["packages"] if package["SPDXID"].startswith("SPDXRef-crate-")]
    assert [package["licenseDeclared"] for package in listed] == ["MIT OR Apache-2.0", "NOASSERTION"]
    assert listed[0]["externalRefs"][0]["referenceLocator"] == "pkg:cargo/leaf@1.0.0%2Bx"
    assert listed[0]["checksums"] == [{"algorithm": "SHA256", "checksumValue": SHA}]
    assert sbom.render(json.loads(json.dumps(plan.inputs)), sbom.read(text)[1]) == text
    record = Record(
        build_id=plan.build_id,
        recipe="thing",
        name="thing",
        version="1.0",
        stack="cu130",
        inputs=plan.inputs,
        outcome="built",
        wheel=BuiltFile(filename="thing.whl", sha256=SHA, size=1),
        crates=known,
        finished="2026-11-29T00:00:00+00:00",
    )
    definition = provenance.statement(record, "urn:x")["predicate"]["buildDefinition"]
    assert {"name": "leaf", "uri": "pkg:cargo/leaf@1.0.0%2Bx", "digest": {"sha256": SHA}} in definition["resolvedDependencies"]
    assert Record.model_validate(record.model_dump(mode="json")) == record
    assert "crates" not in record.model_copy(update={"crates": ()}).model_dump(mode="json")


def test_the_committed_recipes_do_not_require_rust() -> None:
    names = recipe.names(REPOSITORY / "recipes")
    assert not [name for name in names if recipe.load(REPOSITORY / "recipes", name).data.build.rust]
