"""Every gate has a real wheel that no other gate refuses; the objects come from the compilers of the project's root."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder import audit, elf
from builder.audit import Policy, Verdict, variant
from builder.audit.policy import asked_by
from builder.ground import environment, root
from builder.planning import driver, stack
from builder.planning.recipe import Bundled, Recipe
from builder.planning.settings import load
from builder.planning.stack import Arch, LoadedStack
from builder.proof import embed
from gracefarm import variants
from gracefarm.errors import AuditError, WheelError
from gracefarm.variants import Variant
from tests import audit_kit
from tests.audit_kit import Compiler, Draft, failed, module
from tests.conftest import REPOSITORY

CORE = "demo/_core.cpython-311-aarch64-linux-gnu.so"
TEXT = "demo-1.0.dist-info/licenses/csrc/cutlass/LICENSE.txt"
TARGET = Arch.AARCH64

FOO = "int foo(void) { return 1; }\n"
FOO_VERSIONS = "FOO_1 { global: foo; local: *; };\n"
NEWER = "int foo(void) { return 1; } int foo2(void) { return 2; }\n"
NEWER_VERSIONS = "FOO_1 { global: foo; local: *; }; FOO_2 { global: foo2; } FOO_1;\n"
DRIVER = "int cuInit(unsigned f) { return f; } int cuReadMind(unsigned f) { return f; }\n"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A stack with a root, an environment that holds one library, and a compiler."""

    compiler: Compiler
    policy: Policy
    toolchain: Path

    def core(self, name: str, source: str, *options: str) -> bytes:
        """An extension module; one name always stands for the same source and options, and is compiled once."""
        path = self.compiler.folder / name
        return (path if path.is_file() else self.compiler.link(name, source, *options)).read_bytes()

    def kernels(self, *sms: str) -> bytes:
        """A library with device code for those sm values, compiled once."""
        path = self.compiler.folder / f"gpu_{'_'.join(sms)}.so"
        if not path.is_file():
            options = ("-Xlinker", "libcudart.so.13")
            audit_kit.nvcc(self.toolchain, self.compiler.root, TARGET, audit_kit.KERNEL, path, sms, *options)
        return path.read_bytes()


@pytest.fixture(scope="module")
def cu130() -> LoadedStack:
    return stack.load(REPOSITORY / "stacks", "cu130")


@pytest.fixture(scope="module")
def bench(cu130: LoadedStack, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    settings = load()
    base = root.ensure(cu130, stack.host_arch(), TARGET, settings)
    tools = environment.ensure_toolchain(cu130, stack.host_arch(), settings)
    compiler = Compiler(root=base, target=TARGET, folder=tmp_path_factory.mktemp("objects"))
    (compiler.folder / "foo.map").write_text(FOO_VERSIONS)
    (compiler.folder / "newer.map").write_text(NEWER_VERSIONS)
    foo = compiler.link("libfoo.so.1", FOO, "-Wl,-soname,libfoo.so.1", "-Wl,--version-script,foo.map")
    compiler.link("newer.so", NEWER, "-Wl,-soname,libfoo.so.1", "-Wl,--version-script,newer.map")
    compiler.link("driver.so", DRIVER, "-Wl,-soname,libcuda.so.1")
    torch = compiler.link("libtorch_cpu.so", "int is_torch(void) { return 1; }\n", "-Wl,-soname,libtorch_cpu.so")
    cudart = compiler.link("libcudart.so.13", audit_kit.STAND_IN_CUDART, "-Wl,-soname,libcudart.so.13")
    libraries = {"acme/lib/libfoo.so.1": foo, "nvidia/cu13/lib/libcudart.so.13": cudart, "torch/lib/libtorch_cpu.so": torch}
    site = audit_kit.site_packages(tmp_path_factory.mktemp("site"), libraries)
    policy = Policy(
        driver_headers=driver.headers(tools),
        target=TARGET, glibc="2_34", cuda="13.0", torch="2.11.0", sm=("90",), name="demo", version="1.0",
        build_paths=("/build",),
        site_packages=site, root=base, cuobjdump=next(iter(sorted(tools.glob("nvidia/*/bin/cuobjdump")))),
        parts={"submodule csrc/cutlass": "BSD-3-Clause"}, licenses=("csrc/cutlass/LICENSE.txt",),
    )  # fmt: skip
    return Bench(compiler=compiler, policy=policy, toolchain=tools)


def draft(core: bytes) -> Draft:
    return Draft(files={"demo/__init__.py": b"", CORE: core, TEXT: b"Redistribution and use"})


def by_gate(verdicts: tuple[Verdict, ...]) -> dict[str, Verdict]:
    return {verdict.gate: verdict for verdict in verdicts}


def test_an_honest_wheel_passes_every_gate_that_applies(bench: Bench, tmp_path: Path) -> None:
    wheel = draft(bench.core("good.so", module("foo()", before="int foo(void);"), "libfoo.so.1", "-lm")).pack(tmp_path)

    verdicts = audit.audit(wheel, bench.policy)

    assert tuple(verdict.gate for verdict in verdicts) == audit.GATES
    assert {verdict.gate: verdict.status for verdict in verdicts} == {
        **dict.fromkeys(audit.GATES, "passed"),
        "cubins": "not applicable",
        "variant": "not applicable",
    }
    assert "no CUDA device code" in by_gate(verdicts)["cubins"].summary
    resolved = by_gate(verdicts)["symbols"].details[0]
    assert "libfoo.so.1 (environment)" in resolved
    assert "(interpreter)" in resolved
    audit.require(verdicts)


def wrong_record(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.record = audit_kit.record({**one.files, "demo/__init__.py": b"other"}, "demo-1.0.dist-info")
    return one


def no_licence_text(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    del one.files[TEXT]
    return one


def stowaway(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.unrecorded = {"demo/extra.py": b"print('hello')\n"}
    return one


def wrong_version(bench: Bench) -> Draft:
    return versioned(draft(bench.core("plain.so", module())), "1.1")


def versioned(one: Draft, version: str) -> Draft:
    info = f"demo-{one.version}.dist-info/"
    one.files = {name.replace(info, f"demo-{version}.dist-info/"): data for name, data in one.files.items()}
    one.version = version
    return one


def unsaid_cuda(bench: Bench) -> Draft:
    return versioned(cuda_draft(bench, "90"), "1.0")


def feigned_torch(bench: Bench) -> Draft:
    return versioned(cuda_draft(bench, "90"), "1.0+cu130.torch2.11")


def unsaid_torch(bench: Bench) -> Draft:
    return draft(bench.core("torched.so", module("is_torch()", before="int is_torch(void);"), "libtorch_cpu.so"))


def other_torch(bench: Bench) -> Draft:
    return versioned(unsaid_torch(bench), "1.0+torch2.4")


def wrong_label(bench: Bench) -> Draft:
    return labelled(cuda_draft(bench, "90"), "cu130_sm100", sm_arch=["100_real"])


def wrong_property(bench: Bench) -> Draft:
    return labelled(cuda_draft(bench, "90"), "cu130_sm90", sm_arch=["100_real"])


def lost_label(bench: Bench) -> Draft:
    one = labelled(cuda_draft(bench, "90"), "cu130_sm90", sm_arch=["90_real"])
    one.label = ""
    return one


def labelled(one: Draft, label: str, **features: list[str]) -> Draft:
    properties = {"nvidia": {"cuda_version_lower_bound": ["13.0"], **features}}
    of = Variant(label=label, properties=properties, shared=json.dumps(variant.SHARED, sort_keys=True))
    one.files[f"demo-{one.version}.dist-info/variant.json"] = variant.document(of)
    one.label = label
    return one


def other_metadata(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.metadata = "Metadata-Version: 2.1\nName: demo\nVersion: 1.0+cu124\n"
    return one


def foreign_object(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.files["demo/helper.so"] = audit_kit.with_machine(bench.core("helper.so", FOO), 62)
    return one


def old_python(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.files["demo/_core.cpython-310-aarch64-linux-gnu.so"] = one.files.pop(CORE)
    return one


def false_tag(bench: Bench) -> Draft:
    """pthread_create has been GLIBC_2.34's since libpthread went into libc; the tag says 2.17."""
    return draft(bench.core("thread.so", module("pthread_create(0, 0, 0, 0)", before="#include <pthread.h>")))


def young_glibc(bench: Bench) -> Draft:
    """arc4random came with glibc 2.36: the tag is true and above the stack's floor, which the root's own libc is not."""
    one = draft(bench.core("random.so", module("arc4random()", before="#include <stdlib.h>")))
    one.tag = "cp311-cp311-manylinux_2_36_aarch64"
    return one


def linux_tag(bench: Bench) -> Draft:
    one = draft(bench.core("plain.so", module()))
    one.tag = "cp311-cp311-linux_aarch64"
    return one


def copied_library(bench: Bench) -> Draft:
    """The stack's libfoo, carried along under the name that auditwheel would give it."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/libfoo-0123abcd.so.1"] = (bench.compiler.folder / "libfoo.so.1").read_bytes()
    return one


def disguised_library(bench: Bench) -> Draft:
    """A CUDA library's soname under an innocent file name."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/plugin.so"] = bench.core("plugin.so", FOO, "-Wl,-soname,libcudart.so.13")
    return one


def build_path(bench: Bench) -> Draft:
    return draft(bench.core("path.so", module(), "-Wl,-rpath,$ORIGIN:/build/src/lib"))


def old_style_build_path(bench: Bench) -> Draft:
    return draft(bench.core("oldpath.so", module(), "-Wl,--disable-new-dtags,-rpath,/usr/local/cuda/lib64"))


def small_pages(bench: Bench) -> Draft:
    return draft(bench.core("small.so", module(), "-Wl,-z,max-page-size=4096"))


def patched_alignment(bench: Bench) -> Draft:
    return draft(audit_kit.with_alignment(bench.core("plain.so", module()), 16384))


def extra_cubin(bench: Bench) -> Draft:
    return cuda_draft(bench, "90", "100")


def missing_cubin(bench: Bench) -> Draft:
    return cuda_draft(bench, "100")


def ptx(bench: Bench) -> Draft:
    return cuda_draft(bench, "90", "90+ptx")


def missing_symbol(bench: Bench) -> Draft:
    return draft(bench.core("lost.so", module("nobody_defines_me()", before="int nobody_defines_me(void);")))


def too_new_symbol(bench: Bench) -> Draft:
    """Linked against a libfoo that is newer than the stack's; auditwheel knows nothing of libfoo's versions."""
    return draft(bench.core("new.so", module("foo() + foo2()", before="int foo(void); int foo2(void);"), "newer.so"))


def unknown_driver_symbol(bench: Bench) -> Draft:
    source = module("cuInit(0) + cuReadMind(0)", before="int cuInit(unsigned); int cuReadMind(unsigned);")
    return draft(bench.core("driven.so", source, "driver.so"))


def second_cxx_runtime(bench: Bench) -> Draft:
    """What -static-libstdc++ leaves in an extension of torch: everything is resolved, and exceptions crash."""
    source = module(before="void __cxa_throw(void *a, void *b, void (*c)(void *)) { (void)a, (void)b, (void)c; }")
    return draft(bench.core("runtime.so", source, "-Wl,--no-as-needed", "-l:libstdc++.so.6"))


def cuda_draft(bench: Bench, *sms: str) -> Draft:
    """A module beside a library with device code."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/kernels.so"] = bench.kernels(*sms)
    return versioned(one, "1.0+cu130")


REFUSED: dict[Callable[[Bench], Draft], tuple[str, str]] = {
    wrong_record: ("wheel", "demo/__init__.py differs from RECORD"),
    stowaway: ("wheel", "demo/extra.py is not in RECORD"),
    wrong_version: ("wheel", "has version 1.1, but the recipe has 1.0"),
    unsaid_cuda: ("wheel", "has version 1.0, but its content requires 1.0+cu130 (demo/kernels.so has device code)"),
    feigned_torch: ("wheel", "has version 1.0+cu130.torch2.11, but its content requires 1.0+cu130"),
    unsaid_torch: ("wheel", f"but its content requires 1.0+torch2.11 ({CORE} needs libtorch_cpu.so)"),
    other_torch: ("wheel", "has version 1.0+torch2.4, but its content requires 1.0+torch2.11"),
    other_metadata: ("wheel", "METADATA has Version: 1.0+cu124"),
    foreign_object: ("elf-machine", "demo/helper.so is for x86_64 (64 bit), not aarch64"),
    old_python: ("python-abi", "is for CPython 310"),
    false_tag: (
        "platform-tag",
        "manylinux_2_17_aarch64 is false: the wheel requires manylinux_2_34 for pthread_create@GLIBC_2.34",
    ),
    young_glibc: ("platform-tag", "requires manylinux_2_36 for arc4random@GLIBC_2.36 of"),
    linux_tag: ("platform-tag", "linux_aarch64 does not name a glibc level"),
    copied_library: ("grafted", "the stack's environment has libfoo.so.1"),
    disguised_library: ("grafted", "libcudart.so.13 is a library of torch or CUDA"),
    no_licence_text: ("licence", "the text csrc/cutlass/LICENSE.txt is not in .dist-info/licenses"),
    build_path: ("rpath", "RUNPATH /build/src/lib"),
    old_style_build_path: ("rpath", "RPATH /usr/local/cuda/lib64"),
    small_pages: ("alignment", "4096 bytes"),
    patched_alignment: ("alignment", "16384 bytes"),
    extra_cubin: ("cubins", "cubins for sm_100, which was not requested"),
    missing_cubin: ("cubins", "has no cubin for sm_90"),
    ptx: ("cubins", "has PTX for sm_90"),
    wrong_label: ("variant", "the label is cu130_sm100, but cu130_sm90 was measured"),
    wrong_property: ("variant", "{'nvidia': {'cuda_version_lower_bound': ['13.0'], 'sm_arch': ['90_real']}} was measured"),
    lost_label: ("variant", "the file name has no label, and .dist-info 1 variant.json"),
    missing_symbol: ("symbols", "undefined symbol nobody_defines_me"),
    too_new_symbol: ("symbols", "needs version FOO_2 of libfoo.so.1; the stack has up to FOO_1"),
    unknown_driver_symbol: ("symbols", "undefined symbol cuReadMind"),
    second_cxx_runtime: ("symbols", "has its own C++ runtime and is loaded with libstdc++.so.6"),
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_bad_wheel_is_refused_by_its_gate_alone(make: Callable[[Bench], Draft], bench: Bench, tmp_path: Path) -> None:
    gate, words = REFUSED[make]
    wheel = make(bench).pack(tmp_path)

    verdicts = audit.audit(wheel, bench.policy)

    assert failed(verdicts) == [gate]
    assert words in " ".join(by_gate(verdicts)[gate].details)
    with pytest.raises(AuditError, match=gate):
        audit.require(verdicts)


def test_every_gate_has_a_wheel_that_it_alone_refuses() -> None:
    assert {gate for gate, _words in REFUSED.values()} == set(audit.GATES)


def test_a_submodule_or_repository_without_a_declared_licence_is_refused(bench: Bench, tmp_path: Path) -> None:
    wheel = draft(bench.core("plain.so", module())).pack(tmp_path)
    asked = asked_by(
        Recipe.model_validate(
            {
                "name": "demo",
                "version": "1.0",
                "license": "MIT",
                "source": {
                    "kind": "git",
                    "url": "https://far.invalid/demo",
                    **dict.fromkeys(("commit", "tree"), "a" * 40),
                    "submodules": {"csrc/a": {"url": "https://far.invalid/a", "commit": "a" * 40}},
                },
                "repositories": [{"url": "https://far.invalid/b", "commit": "b" * 40, "path": "b", "license": "BSD-3-Clause"}],
                "files": [{"url": "https://far.invalid/c", "sha256": "c" * 64, "path": "c"}, {"text": "ours", "path": "d"}],
                "build": {"cuda": False},
                "smoke": {"imports": ["demo"]},
            }
        ),
        bench.policy,
    )
    verdicts = audit.audit(wheel, asked)
    assert failed(verdicts) == ["licence"]
    verdict = by_gate(verdicts)["licence"]
    assert [part.partition(" has no")[0] for part in verdict.details if "no declared licence" in part] == [
        "submodule csrc/a",
        "file https://far.invalid/c",
    ]
    assert verdict.details[-1] == "repository b: BSD-3-Clause"
    assert by_gate(audit.audit(wheel, dataclasses.replace(asked, parts={})))["licence"].status == "not applicable"


def test_the_size_gate_counts_bytes(bench: Bench, tmp_path: Path) -> None:
    wheel = draft(bench.core("plain.so", module())).pack(tmp_path)
    size = wheel.stat().st_size
    assert failed(audit.audit(wheel, dataclasses.replace(bench.policy, max_size=size))) == []
    assert failed(audit.audit(wheel, dataclasses.replace(bench.policy, max_size=size - 1))) == ["wheel"]


@pytest.mark.parametrize(
    ("sms", "label", "architectures"),
    [
        (("90",), "cu130_sm90", ["90_real"]),
        (("90", "100"), "cu130_sm90_sm100", ["90_real", "100_real"]),
        (("90a",), "cu130_sm90a", ["90_real"]),
        (("100f",), "cu130_sm100f", ["100_real"]),
        (("90", "90+ptx"), "cu130_sm90_ptx90", ["90_real", "90_virtual"]),
    ],
)
def test_a_label_says_what_is_measured(
    bench: Bench, tmp_path: Path, sms: tuple[str, ...], label: str, architectures: list[str]
) -> None:
    plain = cuda_draft(bench, *sms).pack(tmp_path)
    real = tuple(sm for sm in sms if "ptx" not in sm)
    policy = dataclasses.replace(bench.policy, sm=real, ptx="90" if len(real) < len(sms) else None)
    wheel = embed.label(plain, policy, 1_700_000_000, tmp_path / "labelled")
    assert wheel.name == plain.name.replace(".whl", f"-{label}.whl")
    said = variants.parse(audit_kit.member(wheel, "demo-1.0+cu130.dist-info/variant.json"), label)
    assert said.properties == {"nvidia": {"cuda_version_lower_bound": ["13.0"], "sm_arch": architectures}}
    verdicts = audit.audit(wheel, policy)
    assert failed(verdicts) == []
    assert by_gate(verdicts)["variant"].status == "passed"


def test_a_wheel_without_cuda_is_the_variant_that_every_machine_may_take(bench: Bench, tmp_path: Path) -> None:
    plain = draft(bench.core("plain.so", module())).pack(tmp_path)
    wheel = embed.label(plain, bench.policy, 1_700_000_000, tmp_path / "labelled")
    assert wheel.name.endswith("-null.whl")
    assert failed(audit.audit(wheel, bench.policy)) == []


def test_code_for_one_device_alone_cannot_be_labelled(bench: Bench, tmp_path: Path) -> None:
    """100_real would be taken for 10.3 too, which sm_100a does not run on."""
    plain = cuda_draft(bench, "100a").pack(tmp_path)
    with pytest.raises(WheelError, match="sm_100a runs only on that device"):
        embed.label(plain, bench.policy, 1_700_000_000, tmp_path / "labelled")


def test_cubins_as_asked_pass_and_are_counted(bench: Bench, tmp_path: Path) -> None:
    wheel = cuda_draft(bench, "90").pack(tmp_path)
    verdict = by_gate(audit.audit(wheel, bench.policy))["cubins"]
    assert verdict.status == "passed"
    assert verdict.details == ("demo/kernels.so: 1 for sm_90",)


def test_an_extra_sm_counts_when_the_recipe_declares_it_and_must_then_be_there(bench: Bench, tmp_path: Path) -> None:
    both = cuda_draft(bench, "90", "100").pack(tmp_path / "both")
    plain = cuda_draft(bench, "90").pack(tmp_path / "plain")
    policy = dataclasses.replace(bench.policy, sm_extra={"hopper/*.cu": ("100",)})
    assert failed(audit.audit(both, policy)) == []
    verdicts = audit.audit(plain, policy)
    assert failed(verdicts) == ["cubins"]
    assert "no object has it" in by_gate(verdicts)["cubins"].summary


def test_a_cuda_recipe_without_device_code_and_a_plain_one_with_it_are_refused(bench: Bench, tmp_path: Path) -> None:
    without = draft(bench.core("plain.so", module())).pack(tmp_path / "without")
    with_code = cuda_draft(bench, "90").pack(tmp_path / "with")
    assert failed(audit.audit(without, dataclasses.replace(bench.policy, needs_cubins=True))) == ["cubins"]
    verdicts = audit.audit(with_code, dataclasses.replace(bench.policy, sm=None))
    assert failed(verdicts) == ["cubins"]
    assert "the recipe has cuda = false" in by_gate(verdicts)["cubins"].summary


def test_device_code_that_cuobjdump_cannot_read_is_refused(bench: Bench, tmp_path: Path) -> None:
    one = cuda_draft(bench, "90")
    data = bytearray(one.files["demo/kernels.so"])
    at = data.index(bytes.fromhex("50ed55ba"))  # the fatbin's magic
    data[at : at + 64] = b"\xff" * 64
    one.files["demo/kernels.so"] = bytes(data)
    verdicts = audit.audit(one.pack(tmp_path), bench.policy)
    assert "cubins" in failed(verdicts)


def test_a_third_party_file_passes_as_declared_and_only_so(bench: Bench, tmp_path: Path) -> None:
    one = copied_library(bench)
    path = "demo/libfoo-0123abcd.so.1"
    wheel = one.pack(tmp_path)
    right = Bundled(path=path, sha256=hashlib.sha256(one.files[path]).hexdigest(), license="MIT")

    def refused_with(*bundled: Bundled) -> list[str]:
        return failed(audit.audit(wheel, dataclasses.replace(bench.policy, bundled=bundled)))

    assert refused_with(right) == []
    assert refused_with(right.model_copy(update={"sha256": "0" * 64})) == ["grafted"]
    assert refused_with(right, right.model_copy(update={"path": "demo/gone.so"})) == ["grafted"]


def test_what_auditwheel_grafts_is_refused(bench: Bench, tmp_path: Path) -> None:
    """libbz2 is in the root and on no manylinux list: auditwheel copies it into the wheel, as it would copy any of them."""
    bz2 = next(iter(sorted(bench.compiler.root.glob(f"usr/lib/{TARGET.triplet}/libbz2.so.1.0"))))
    shutil.copyfile(bz2.resolve(), bench.compiler.folder / "libbz2.so.1.0")
    source = module("BZ2_bzlibVersion() != 0", before="const char *BZ2_bzlibVersion(void);")
    one = draft(bench.core("bz2.so", source, "libbz2.so.1.0"))
    one.tag = "cp311-cp311-linux_aarch64"

    wheel = audit.repair(one.pack(tmp_path / "built"), bench.policy, tmp_path / "repaired")

    verdicts = audit.audit(wheel, bench.policy)
    assert failed(verdicts) == ["grafted"]
    assert "demo.libs/libbz2" in by_gate(verdicts)["grafted"].summary


def test_repair_measures_the_tag_cleans_the_paths_and_keeps_the_pages(bench: Bench, tmp_path: Path) -> None:
    source = module("foo() + pthread_create(0, 0, 0, 0)", before="#include <pthread.h>\nint foo(void);")
    one = draft(bench.core("built.so", source, "libfoo.so.1", "-Wl,-rpath,$ORIGIN/../acme/lib:/build/some/where"))
    one.tag = "cp311-cp311-linux_aarch64"
    built = one.pack(tmp_path / "built")
    assert b"/build/some/where" in one.files[CORE]

    wheel = audit.repair(built, bench.policy, tmp_path / "repaired")

    assert wheel.name == "demo-1.0-cp311-cp311-manylinux_2_34_aarch64.whl"
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]
    assert failed(audit.audit(wheel, bench.policy)) == []
    content = audit_kit.member(wheel, CORE)
    assert b"/build/some" not in content
    (tmp_path / "core.so").write_bytes(content)
    found = elf.read(tmp_path / "core.so")
    assert found.search == ("$ORIGIN/../acme/lib",)
    assert found.needed[0] == "libfoo.so.1"
    assert all(segment.align >= audit_kit.PAGE for segment in found.segments)


def test_repair_gives_the_same_bytes_twice(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    one = build_path(bench)
    one.tag = "cp311-cp311-linux_aarch64"
    built = one.pack(tmp_path / "built")
    first = audit.repair(built, bench.policy, tmp_path / "first")
    (tmp_path / "moved").mkdir()
    second = audit.repair(Path(shutil.copy(built, tmp_path / "moved")), bench.policy, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()
    assert first.name == second.name


def test_a_module_sees_what_it_needs_and_the_interpreter_but_no_other_module(bench: Bench, tmp_path: Path) -> None:
    """Python loads extension modules with RTLD_LOCAL: a sibling's symbols are not there, a needed library's are."""
    helper = bench.core("libhelper.so", "int helper(void) { return 3; }\n", "-Wl,-soname,libhelper.so")
    source = module("helper()", before="int helper(void);")
    needing = draft(bench.core("needing.so", source, "libhelper.so", "-Wl,-rpath,$ORIGIN"))
    needing.files["demo/libhelper.so"] = helper
    hoping = draft(bench.core("hoping.so", source))
    hoping.files["demo/libhelper.so"] = helper
    lost = draft(bench.core("pathless.so", source, "libhelper.so"))
    lost.files["demo/libhelper.so"] = helper
    noted = audit.audit(lost.pack(tmp_path / "lost"), bench.policy)
    assert failed(noted) == []
    assert f"{CORE} has no RPATH to libhelper.so: the wheel must load its own copy first" in by_gate(noted)["symbols"].details
    found = audit.audit(needing.pack(tmp_path / "needing"), bench.policy)
    assert failed(found) == []
    assert "has no RPATH" not in " ".join(by_gate(found)["symbols"].details)
    assert failed(audit.audit(hoping.pack(tmp_path / "hoping"), bench.policy)) == ["symbols"]


def test_a_needed_library_may_use_symbols_of_what_loads_it(bench: Bench, tmp_path: Path) -> None:
    """The loader looks in the scope of the object that Python opened: a callback defined there is found from below."""
    below = bench.core(
        "libbelow.so", "int callback(void); int below(void) { return callback(); }\n", "-Wl,-soname,libbelow.so"
    )
    source = module(
        "below()", before='int below(void); __attribute__((visibility("default"))) int callback(void) { return 5; }'
    )
    one = draft(bench.core("above.so", source, "libbelow.so", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"))
    one.files["demo/libbelow.so"] = below
    assert failed(audit.audit(one.pack(tmp_path / "above"), bench.policy)) == []
    lone = draft(bench.core("plain.so", module()))
    lone.files["demo/libbelow.so"] = below
    verdicts = audit.audit(lone.pack(tmp_path / "lone"), bench.policy)
    assert "libbelow.so: undefined symbol callback" in by_gate(verdicts)["symbols"].summary


def test_a_weak_symbol_is_reported_and_not_refused(bench: Bench, tmp_path: Path) -> None:
    source = module("maybe ? maybe() : 0", before="__attribute__((weak)) int maybe(void);")
    verdict = by_gate(audit.audit(draft(bench.core("weak.so", source)).pack(tmp_path), bench.policy))["symbols"]
    assert verdict.status == "passed"
    assert f"{CORE}: weak maybe is undefined" in verdict.details


def test_a_needed_library_that_nobody_has_is_named(bench: Bench, tmp_path: Path) -> None:
    bench.compiler.link("nowhere.so", FOO, "-Wl,-soname,libnowhere.so.7")
    one = draft(bench.core("seeking.so", module("foo()", before="int foo(void);"), "nowhere.so"))
    verdicts = by_gate(audit.audit(one.pack(tmp_path), bench.policy))
    assert "libnowhere.so.7, which is neither in the wheel nor in the stack" in verdicts["symbols"].summary
    assert "libnowhere.so.7" in verdicts["platform-tag"].summary


def test_without_cudas_headers_the_driver_counts_as_absent(bench: Bench, tmp_path: Path) -> None:
    one = draft(bench.core("cuinit.so", module("cuInit(0)", before="int cuInit(unsigned);"), "driver.so")).pack(tmp_path)
    assert failed(audit.audit(one, bench.policy)) == []
    verdicts = audit.audit(one, dataclasses.replace(bench.policy, driver_headers=None))
    assert failed(verdicts) == ["symbols"]
    assert "no cuda.h that declares its functions" in by_gate(verdicts)["symbols"].summary
