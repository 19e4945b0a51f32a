"""The audit of shared libraries: copies in the wheel, repair by auditwheel, and symbols that the loader must find."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest

from builder import audit, elf
from builder.planning.recipe import Bundled
from tests import audit_kit
from tests.audit_kit import failed, module
from tests.integration.gates_kit import CORE, FOO, TARGET, Bench, bench, build_path, by_gate, copied_library, cu130, draft

__all__ = ["bench", "cu130"]


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
    assert (
        f"{CORE} has no RPATH to libhelper.so: the wheel must load its copy of libhelper.so first"
        in by_gate(noted)["symbols"].details
    )
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
