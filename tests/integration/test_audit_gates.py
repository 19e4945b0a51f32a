"""Every gate of the audit has a real wheel that only this gate refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import audit
from builder.audit import variant
from builder.audit.policy import asked_by
from builder.planning.recipe import Recipe
from gracefarm.errors import AuditError
from gracefarm.variants import Variant
from tests import audit_kit
from tests.audit_kit import Draft, failed, module
from tests.integration.gates_kit import (
    CORE,
    FOO,
    TEXT,
    Bench,
    bench,
    build_path,
    by_gate,
    copied_library,
    cu130,
    cuda_draft,
    draft,
    versioned,
)

__all__ = ["bench", "cu130"]


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


def disguised_library(bench: Bench) -> Draft:
    """A CUDA library's soname under an innocent file name."""
    one = draft(bench.core("plain.so", module()))
    one.files["demo/plugin.so"] = bench.core("plugin.so", FOO, "-Wl,-soname,libcudart.so.13")
    return one


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


REFUSED: dict[Callable[[Bench], Draft], tuple[str, str]] = {
    wrong_record: ("wheel", "demo/__init__.py differs from RECORD"),
    stowaway: ("wheel", "demo/extra.py is not in RECORD"),
    wrong_version: ("wheel", "has version 1.1, but the recipe has 1.0"),
    unsaid_cuda: ("wheel", "has version 1.0, but its content requires version 1.0+cu130 (demo/kernels.so has device code)"),
    feigned_torch: ("wheel", "has version 1.0+cu130.torch2.11, but its content requires version 1.0+cu130"),
    unsaid_torch: ("wheel", f"but its content requires version 1.0+torch2.11 ({CORE} needs libtorch_cpu.so)"),
    other_torch: ("wheel", "has version 1.0+torch2.4, but its content requires version 1.0+torch2.11"),
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
    lost_label: ("variant", "the file name has no label, but .dist-info has 1 file named variant.json"),
    missing_symbol: ("symbols", "undefined symbol nobody_defines_me"),
    too_new_symbol: ("symbols", "needs version FOO_2 of libfoo.so.1; the stack has only versions up to FOO_1"),
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
