"""What the pinned recipes say as data: gaps, seeds, checked substitutions, our requirements, the gates of the stack."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from builder.compiling import pep517
from builder.fetch import archive, fill, source
from builder.ground import torch_facts, wheels
from builder.planning import gaps, packages, pins, recipe, stack
from builder.planning.recipe import Recipe, Smoke, Substitution
from builder.planning.sources import File
from builder.planning.stack import Arch
from builder.proof.embed import name_licenses, require
from builder.toolchains import choice
from builder.toolchains.container import ContainerToolchain
from gracefarm.errors import CompileError, ConfigError, RootError, SourceError
from tests.conftest import REPOSITORY
from tests.gaps_kit import put_back

DIGEST = "0" * 64
METADATA = """\
Metadata-Version: 2.1
Name: engine
Requires-Dist: torch==2.4.0
Requires-Dist: triton>=2.2.1; platform_system == "Linux"
Requires-Dist: aphrodite-flash-attn==2.6.1.post2; platform_machine == "x86_64"
Requires-Dist: Triton==1; extra == "old"
Provides-Extra: old

Requires-Dist: triton, says the text.
"""


def test_requirements_of_our_own_replace_the_packages_and_leave_extras_and_text_alone() -> None:
    said = require(METADATA, {"triton": "triton==3.2.0+git1", "aphrodite-flash-attn": "aphrodite-flash-attn==2.6.1.post2"})
    head, _, body = said.partition("\n\n")
    assert [line for line in head.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: torch==2.4.0",
        'Requires-Dist: Triton==1; extra == "old"',
        "Requires-Dist: aphrodite-flash-attn==2.6.1.post2",
        "Requires-Dist: triton==3.2.0+git1",
    ]
    assert body == "Requires-Dist: triton, says the text.\n"
    assert require(METADATA, {}) == METADATA


def test_a_requirement_is_added_where_the_package_has_none() -> None:
    assert require("Name: a\n\ntext\n", {"b": "b==1"}) == "Name: a\nRequires-Dist: b==1\n\ntext\n"


@pytest.mark.parametrize(
    "table",
    [
        {"url": "https://a/b"},
        {"url": "https://a/b", "sha256": DIGEST, "sha256_unknown": "why"},
        {"url": "https://a/b", "text": "c", "sha256": DIGEST},
        {"text": "c", "sha256": DIGEST},
        {"text": "c", "unpack": True},
        {},
    ],
)
def test_a_file_has_one_origin_and_a_download_one_digest(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        File.model_validate({"path": "a", **table})


def test_the_reason_for_a_gap_does_not_enter_the_build_id() -> None:
    ids = []
    for reason in ("one", "another"):
        loaded = recipe.load(REPOSITORY / "recipes", "triton")
        files = tuple(
            file.model_copy(update={"sha256_unknown": reason}) if file.sha256_unknown else file for file in loaded.data.files
        )
        changed = recipe.LoadedRecipe(
            folder=loaded.folder, data=loaded.data.model_copy(update={"files": files}), patches=(), smoke_script=None
        )
        base = stack.load(REPOSITORY / "stacks", "cu124")
        ids.append(choice.make_plan(changed, base, Arch.AARCH64, Arch.AARCH64).build_id)
    assert ids[0] == ids[1]


def test_a_filled_gap_keeps_what_stands_around_it(tmp_path: Path) -> None:
    place = tmp_path / "recipe.toml"
    place.write_text('# head\nname = "a"\n\n[[files]]\nurl = "https://a/b" # far\nsha256_unknown = "no" # later\npath = "c"\n')
    gap = gaps.Gap(file=place, table=("files",), entry={"path": "c"}, what="c", url="https://a/b", reason="no")
    fill.write(gap, DIGEST)
    wanted = f'# head\nname = "a"\n\n[[files]]\nurl = "https://a/b" # far\nsha256 = "{DIGEST}" # later\npath = "c"\n'
    assert place.read_text() == wanted


def substituted(tmp_path: Path, text: str, *wanted: Substitution) -> str:
    (tmp_path / "setup.py").write_text(text)
    table = {"kind": "sdist", "name": "a", "version": "1", "sha256": DIGEST}
    data = Recipe.model_validate(
        {
            "name": "a",
            "version": "1",
            "license": "MIT",
            "source": table,
            "substitutions": wanted,
            "smoke": Smoke(imports=("a",)),
        }
    )
    source.substitute(data, tmp_path)
    return (tmp_path / "setup.py").read_text()


def test_a_substitution_that_does_not_find_its_text_as_often_as_it_says_is_an_error(tmp_path: Path) -> None:
    one = Substitution(path="setup.py", find="b", replace="c")
    assert substituted(tmp_path, "abd", one) == "acd"
    for text in ("ad", "abbd"):
        with pytest.raises(SourceError, match="times, but the recipe states 1"):
            substituted(tmp_path, text, one)
    with pytest.raises(SourceError, match="no such file"):
        substituted(tmp_path, "abd", Substitution(path="other.py", find="b", replace="c"))


def test_a_substitution_does_not_follow_a_link_out_of_the_tree(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("b")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError):
        substituted(tmp_path / "tree", "", Substitution(path="link", find="b", replace="c"))
    assert (tmp_path / "outside").read_text() == "b"


def test_single_members_of_an_archive_go_to_places_of_their_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.bz2", "w:bz2") as tar:
        for name in ("bin/ptxas", "bin/other", "include/crt/a.h", "include-not/b.h"):
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            tar.addfile(member, io.BytesIO())
    into = tmp_path / "into"
    into.mkdir()
    archive.extract_members(tmp_path / "a.tar.bz2", into, "tools", {"bin/ptxas": "p/bin/ptxas", "include": "c/include"})
    assert sorted(str(entry.relative_to(into)) for entry in into.rglob("*") if entry.is_file()) == [
        "c/include/crt/a.h",
        "p/bin/ptxas",
    ]
    assert (into / "p/bin/ptxas").stat().st_mode & 0o111
    with pytest.raises(SourceError, match="has no 'lib'"):
        archive.extract_members(tmp_path / "a.tar.bz2", into, "tools", {"lib": "lib"})


def test_a_stack_with_a_gap_says_so_before_anything_is_fetched(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    put_back(tmp_path)
    loaded = stack.load(tmp_path / "stacks", "cu124")
    found = pins.wheels(loaded, Arch.AARCH64)
    with pytest.raises(ConfigError, match="is unknown") as caught:
        wheels.require_digests(loaded, found)
    assert caught.value.repeat == "builder lock cu124 --digests"


@pytest.mark.parametrize(("cuda", "right"), [("'12.4'", True), ("None", False), ("'12.1'", False)])
def test_the_stack_of_the_pinned_builds_takes_torch_for_cuda_12_4_alone(tmp_path: Path, cuda: str, right: bool) -> None:
    """Trap 3 for the stack itself: the Python index's wheel has the same version and is the CPU build."""
    loaded = stack.load(REPOSITORY / "stacks", "cu124")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.4.0'\ndebug = False\ncuda = {cuda}\n")
    if right:
        torch_facts.check(loaded, tmp_path)
        return
    with pytest.raises(RootError, match=r"the stack requires a torch for CUDA 12\.4"):
        torch_facts.check(loaded, tmp_path)


@pytest.mark.parametrize(
    ("name", "requires", "forgotten"),
    [
        ("triton", ["setuptools>=40.8.0", "wheel", "cmake>=3.18", "ninja>=1.11.1", "pybind11>=2.13.1"], "pybind11"),
        ("aphrodite", ["cmake>=3.26", "ninja", "packaging", "setuptools>=49.4.0", "torch==2.4.0", "wheel"], "wheel"),
        ("flash_attn", ["packaging", "psutil", "ninja", "wheel"], "psutil"),
    ],
)
def test_trap_4_the_stack_has_what_the_pinned_projects_ask_for(
    tmp_path: Path, name: str, requires: list[str], forgotten: str
) -> None:
    """As their pyproject.toml says, and of flash_attn what its setup.py imports and names in setup_requires."""
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    loaded, base = recipe.load(REPOSITORY / "recipes", name), stack.load(tmp_path / "stacks", "cu124")
    place = tmp_path / loaded.data.build.subdirectory / "pyproject.toml"
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"[build-system]\nrequires = {json.dumps(requires)}\n")
    pep517.check_requirements(choice.make_plan(loaded, base, Arch.X86_64, Arch.AARCH64), tmp_path)
    kept = [line for line in base.requirements_lock.read_text().splitlines() if not line.startswith(f"{forgotten}==")]
    base.requirements_lock.write_text("\n".join(kept))
    text = (base.folder / "stack.toml").read_text()
    (base.folder / "stack.toml").write_text(re.sub(rf'^    "{forgotten}.*\n', "", text, flags=re.MULTILINE))
    base = stack.load(tmp_path / "stacks", "cu124")
    with pytest.raises(CompileError, match=rf"requires '{forgotten}.*' \(stack cu124 has no such package\)"):
        pep517.check_requirements(choice.make_plan(loaded, base, Arch.X86_64, Arch.AARCH64), tmp_path)


def test_the_compiler_from_debian_is_pinned_for_both_hosts() -> None:
    loaded = stack.load(REPOSITORY / "stacks", "cu124")
    for host in Arch:
        (one,) = packages.of_toolkit(loaded, host)
        assert one.version.startswith("12.4.131")
        assert one.arch == host.debian
    assert packages.toolkit_digest(loaded, Arch.X86_64) != packages.toolkit_digest(loaded, Arch.AARCH64)
    assert packages.toolkit_digest(stack.load(REPOSITORY / "stacks", "cu130"), Arch.X86_64) is None


@pytest.mark.parametrize("host", list(Arch))
@pytest.mark.parametrize("package", ["libc6-dev", "libc6-dev-arm64-cross"])
def test_trap_6_a_root_with_headers_that_cuda_12_4_cannot_read_is_refused_by_the_plan(
    tmp_path: Path, host: Arch, package: str
) -> None:
    shutil.copytree(REPOSITORY / "stacks", tmp_path / "stacks")
    loaded = recipe.load(REPOSITORY / "recipes", "aphrodite")
    for name, reads in (("cu124", False), ("cu130", True)):
        base = stack.load(tmp_path / "stacks", name)
        choice.make_plan(loaded, base, host, Arch.AARCH64)
        text = base.root_lock.read_text()
        base.root_lock.write_text(re.sub(rf'(name = "{package}", .*version = ")2\.36', r"\g<1>2.41", text))
        if reads or (package != "libc6-dev" and host is Arch.AARCH64):  # which needs no cross compiler's
            choice.make_plan(loaded, base, host, Arch.AARCH64)
            continue
        with pytest.raises(
            ConfigError, match=rf"CUDA 12\.4 cannot read the headers of glibc 2\.41 .*root of this stack has {package}:"
        ):
            choice.make_plan(loaded, base, host, Arch.AARCH64)
        # triton compiles no CUDA; a container has its own headers.
        choice.make_plan(recipe.load(REPOSITORY / "recipes", "triton"), base, host, Arch.AARCH64)
        choice.make_plan(loaded, base, host, Arch.AARCH64, ContainerToolchain(engine="podman", cibuildwheel="4"))


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_the_pages_count_the_digests_that_are_not_known() -> None:
    triton, base = recipe.load(REPOSITORY / "recipes", "triton"), stack.load(REPOSITORY / "stacks", "cu124")
    to_build = len(gaps.of_recipe(triton)) + len(gaps.of_stack(base))
    pages = {
        name: (REPOSITORY / name).read_text()
        for name in ("README.md", "docs/howto/pinned.md", "docs/reference/sets.md", "docs/howto/llama-405b.md")
    }
    assert f"There are {NUMBERS[to_build + len(gaps.of_images(base))]} unknown digests: " in pages["docs/howto/pinned.md"]
    assert f"The sha256 of {NUMBERS[to_build]} files is still unknown" in " ".join(pages["README.md"].split())
    assert f"{NUMBERS[to_build]} digests are unknown" in pages["docs/reference/sets.md"]
    assert f"{NUMBERS[to_build]} digests are still unknown" in " ".join(pages["docs/howto/llama-405b.md"].split())


def test_tools_of_debian_are_those_that_the_stacks_toolchain_lock_has() -> None:
    (file,) = [file for file in recipe.load(REPOSITORY / "recipes", "triton").data.files if file.deb]
    locked = packages.of_toolkit(stack.load(REPOSITORY / "stacks", "cu124"), Arch.AARCH64)
    assert (file.deb, file.sha256) in {(deb.path, deb.sha256) for deb in locked}
    assert file.suite == "trixie"


@pytest.mark.parametrize(
    "table",
    [
        {"name": "a", "sha256": DIGEST},
        {"deb": "pool/a_1_arm64.deb", "sha256": DIGEST},
        {"deb": "pool/a.deb", "suite": "trixie", "sha256": DIGEST},
        {"name": "a", "version": "1", "sha256_unknown": "why"},
        {"url": "https://a/b", "name": "a", "version": "1", "sha256": DIGEST},
        {"url": "https://a/b", "sha256": DIGEST, "license": "GPL"},
        {"url": "https://a/b", "sha256_unknown": "why", "witness": [{"source": "a", "value": DIGEST}]},
        {"url": "https://a/b", "sha256": DIGEST, "witness": [{"source": "a", "value": "1" * 64}]},
        {"url": "https://a/b", "sha256_unknown": "why", "accepted": {"date": "2026-11-29", "url": "https://a/b"}},
    ],
)
def test_a_files_origin_licence_and_evidence_are_checked(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        File.model_validate({"path": "a", **table})


def test_licence_files_are_named_where_the_metadata_has_that_field() -> None:
    new, old = "Metadata-Version: 2.4\nName: a\nLicense-File: b\n\ntext\n", "Metadata-Version: 2.1\nName: a\n\ntext\n"
    assert name_licenses(new, ["c/L", "b"]) == new.replace("File: b\n", "File: b\nLicense-File: c/L\n")
    assert name_licenses(new, ["b"]) == new
    assert name_licenses(old, ["b"]) == old
    assert name_licenses("Metadata-Version: x\n\n", ["b"]) == "Metadata-Version: x\n\n"


def test_the_engines_long_pole_is_declared() -> None:
    build = recipe.load(REPOSITORY / "recipes", "aphrodite").data.build
    assert max(build.unit_seconds, key=build.unit_seconds.__getitem__) == "gptq_marlin.cu"


@pytest.mark.parametrize(
    ("name", "objects_name"), [("aphrodite", "aphrodite_objects"), ("flash_attn", "flash_attn_fork_objects")]
)
def test_a_recipe_for_objects_has_the_pins_and_settings_of_the_whole_one(name: str, objects_name: str) -> None:
    own, objects = (
        recipe.load(REPOSITORY / folder, key).data for folder, key in (("recipes", name), ("tests/recipes", objects_name))
    )
    for field in ("name", "version", "license", "source", "repositories"):
        assert getattr(objects, field) == getattr(own, field)
    assert objects.build.environment == own.build.environment
    assert objects.build.cmake.items() >= own.build.cmake.items()
    assert objects.build.cmake.keys() - own.build.cmake.keys() <= {"CMAKE_MODULE_PATH"}
    assert objects.wheel.sm_extra.items() <= own.wheel.sm_extra.items()


def test_the_pinned_recipes_name_commits_and_digests_alone() -> None:
    commits = {"triton": "755d4164", "flash_attn": "49b45ed4", "aphrodite": "8b8d2ce7"}
    for name, commit in commits.items():
        data = recipe.load(REPOSITORY / "recipes", name).data
        assert data.source.kind == "git"
        assert data.source.commit.startswith(commit)
        assert all(file.sha256 or file.sha256_unknown or file.text for file in data.files)
    assert data.wheel.requires["triton"] == f"triton=={recipe.load(REPOSITORY / 'recipes', 'triton').data.version}"
    flash = recipe.load(REPOSITORY / "recipes", "flash_attn").data
    assert data.wheel.requires["aphrodite-flash-attn"] == f"aphrodite-flash-attn=={flash.version}"


def test_a_file_is_for_builds_on_one_architecture_where_the_recipe_says_so(tmp_path: Path) -> None:
    """A native generator on x86_64, the target's on aarch64; the other one's digest is not a gap of a build."""
    folder = tmp_path / "thing"
    folder.mkdir()
    text = 'name = "thing"\nversion = "1"\nlicense = "MIT"\n[source]\nkind = "sdist"\nname = "a"\nversion = "1"\n'
    text += f'sha256 = "{DIGEST}"\n'
    for arch in Arch:
        text += f'[[files]]\nurl = "https://a.example/{arch}"\nsha256_unknown = "why"\npath = "tool"\nhost = "{arch}"\n'
    (folder / "recipe.toml").write_text(f'{text}[build]\ncuda = false\n[smoke]\nimports = ["thing"]\n')
    loaded, base = recipe.load(tmp_path, "thing"), stack.load(REPOSITORY / "stacks", "cu130")
    assert [gap.url for gap in gaps.of_recipe(loaded)] == ["https://a.example/aarch64", "https://a.example/x86_64"]
    plans = {host: choice.make_plan(loaded, base, host, Arch.AARCH64) for host in Arch}
    for host, planned in plans.items():
        (gap,) = planned.gaps
        assert gap.url == f"https://a.example/{host}"
        fill.write(gap, DIGEST.replace("0", str(len(host))))
    filled = recipe.load(tmp_path, "thing").data.files
    assert [(file.host, file.sha256) for file in filled] == [(host, DIGEST.replace("0", str(len(host)))) for host in Arch]
    assert list(recipe.load(tmp_path, "thing").for_host(Arch.X86_64).data.parts) == ["file https://a.example/x86_64"]


def test_triton_executes_programs_of_the_target_out_of_llvms_archive_alone() -> None:
    """Recipe llvm has the generator for the machine that builds."""
    loaded = recipe.load(REPOSITORY / "recipes", "triton")
    assert loaded.for_host(Arch.X86_64).data.binfmt
    from_source = loaded.with_trees(("llvm",)).for_host(Arch.X86_64).data
    assert not from_source.binfmt
    assert [tree.recipe for tree in from_source.trees] == ["llvm"]
    assert not [file for file in from_source.files if file.url and "llvm-builds" in file.url]
    assert gaps.of_recipe(loaded.with_trees(("llvm",)).for_host(Arch.X86_64)) == []


def test_the_tree_of_llvm_is_checked_for_what_triton_links_for_aarch64() -> None:
    """From CMakeLists.txt and bin/CMakeLists.txt at 755d4164: translations, code of the targets, and the programs in bin."""
    translations = ("MLIRNVVMToLLVMIRTranslation", "MLIRROCDLToLLVMIRTranslation")
    targets = ("AArch64AsmParser", "AArch64CodeGen", "AMDGPUAsmParser", "AMDGPUCodeGen", "NVPTXCodeGen")
    programs = ("MLIROptLib", "MLIRReduceLib", "MLIRLspServerLib", "LLVMOption")
    tree = recipe.load(REPOSITORY / "recipes", "llvm").data.tree
    assert tree is not None
    wanted = {f"lib/lib{name}.a" for name in (*translations, *(f"LLVM{name}" for name in targets), *programs)}
    assert {path for path in tree.holds if path.endswith(".a")} == wanted
