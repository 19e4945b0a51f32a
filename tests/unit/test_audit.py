"""The audit's judgement on made-up input: what needs no compiler."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import _pydantic_core

from builder import audit, elf
from builder.audit import Policy, Verdict, providers
from builder.audit.contents import Contents
from builder.audit.gates import alignment, cubins, elf_machine, platform_tag, python_abi, rpath, wheel
from builder.planning import driver
from builder.planning.stack import Arch
from gracefarm.errors import AuditError, ExitCode, WheelError
from tests.audit_kit import Draft

EMPTY = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"
"RECORD's sha256 of an empty file."
POLICY = Policy(target=Arch.AARCH64, glibc="2_34", sm=("90",))
NATIVE = Path(_pydantic_core.__file__)
"An extension module of this machine that is certainly there."


def an_object(**changes: Any) -> elf.Object:
    values: dict[str, Any] = {
        "path": Path("x.so"), "machine": "EM_AARCH64", "bits": 64, "little_endian": True, "kind": "ET_DYN",
        "interpreter": False, "segments": (), "soname": None, "needed": (), "rpath": (), "runpath": (), "fatbin": False,
        "needs": (), "references": (), "exports": exports({}),
    }  # fmt: skip
    return elf.Object(**{**values, **changes})


def exports(symbols: dict[str, tuple[int, ...]], versions: dict[int, str] | None = None) -> elf.Exports:
    return elf.Exports(symbols=symbols, versions=versions or {}, versioned=versions is not None)


def contents(objects: dict[str, elf.Object], name: str = "demo-1.0-cp311-cp311-manylinux_2_17_aarch64.whl") -> Contents:
    return Contents(wheel=Path(name), names=tuple(objects), objects=objects, damaged={})


def test_the_reader_sees_what_pyelftools_sees() -> None:
    found = elf.read(NATIVE)
    with NATIVE.open("rb") as stream:
        oracle: Any = ELFFile(stream)
        symbols = list(oracle.get_section_by_name(".dynsym").iter_symbols())
        needed = [entry.needed for entry in oracle.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        versions = {
            (need.name, version.name)
            for need, group in oracle.get_section_by_name(".gnu.version_r").iter_versions()
            for version in group
        }
    undefined = {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name}
    defined = {
        symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
    }
    assert {reference.name for reference in found.references} == undefined
    assert set(found.exports.symbols) == defined
    assert list(found.needed) == needed
    assert {(need.file, need.version) for need in found.needs} == versions
    assert {reference.version for reference in found.references} - {None} == {version for _file, version in versions}


def test_the_reader_counts_symbols_without_section_headers(tmp_path: Path) -> None:
    """The loader does not look at sections, and some tools cut them off."""
    data = bytearray(NATIVE.read_bytes())
    data[40:48] = bytes(8)  # e_shoff
    data[58:64] = bytes(6)  # e_shentsize, e_shnum, e_shstrndx
    (tmp_path / "cut.so").write_bytes(data)
    assert elf.read(tmp_path / "cut.so").exports.symbols == elf.read(NATIVE).exports.symbols


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 4096), junk=st.binary(min_size=1, max_size=64), cut=st.integers(4, 200_000))
def test_a_damaged_object_is_refused_and_nothing_worse(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, cut: int
) -> None:
    data = bytearray(NATIVE.read_bytes()[:200_000])
    data[4 + at : 4 + at + len(junk)] = junk
    path = tmp_path_factory.mktemp("fuzz") / "x.so"
    path.write_bytes(data[:cut])
    with contextlib.suppress(elf.NotElfError):
        elf.read(path)


def test_a_chain_without_end_is_not_walked_forever(tmp_path: Path) -> None:
    data = bytearray(NATIVE.read_bytes())
    with NATIVE.open("rb") as stream:
        section: Any = ELFFile(stream).get_section_by_name(".dynamic")
        number = next(at for at, entry in enumerate(section.iter_tags()) if entry.entry.d_tag == "DT_VERNEEDNUM")
        at = section["sh_offset"] + 16 * number + 8
    data[at : at + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "endless.so").write_bytes(data)
    with pytest.raises(elf.NotElfError):
        elf.read(tmp_path / "endless.so")


HIDDEN = 0x8000


@pytest.mark.parametrize(
    ("entries", "version", "met"),
    [
        ((2,), "FOO_1", True),
        ((2,), "FOO_2", False),
        ((2 | HIDDEN, 3), "FOO_1", True),  # an old version kept for old callers
        ((2 | HIDDEN, 3), None, True),
        ((3,), None, True),  # the only default version
        ((3 | HIDDEN,), None, False),  # hidden: only for callers that name it
        ((3, 4), None, False),  # two defaults: the loader takes neither
        ((1,), "FOO_2", True),  # unversioned definition in a versioned library
        ((1 | HIDDEN,), "FOO_2", False),
    ],
)
def test_versions_bind_as_in_glibc(entries: tuple[int, ...], version: str | None, met: bool) -> None:
    found = exports({"foo": entries}, {2: "FOO_1", 3: "FOO_2", 4: "FOO_3"})
    assert found.meet("foo", version) is met
    assert not found.meet("bar", version)


def test_a_library_without_versions_meets_any() -> None:
    assert exports({"foo": (1,)}).meet("foo", "FOO_9")


def test_pages_are_no_matter_on_x86_64() -> None:
    policy = Policy(target=Arch.X86_64, glibc="2_34")
    one = an_object(machine="EM_X86_64", segments=(elf.Segment(align=4096, address=0, offset=0),))
    verdict = alignment.judge(contents({"x.so": one}), policy)
    assert verdict.status == "not applicable"
    assert "4 KiB" in verdict.summary


@pytest.mark.parametrize(
    ("align", "address", "offset", "status"),
    [(65536, 65536, 0, "passed"), (131072, 131072 + 7, 7, "passed"), (4096, 65536, 0, "failed"), (65536, 69632, 0, "failed")],
)
def test_alignment_and_congruence(align: int, address: int, offset: int, status: str) -> None:
    one = an_object(segments=(elf.Segment(align=align, address=address, offset=offset),))
    assert alignment.judge(contents({"x.so": one}), POLICY).status == status


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"machine": "EM_X86_64"}, "x86_64"), ({"bits": 32}, "32 bit"), ({"little_endian": False}, "big-endian")],
)
def test_objects_of_another_machine_are_named(changes: dict[str, Any], words: str) -> None:
    verdict = elf_machine.judge(contents({"x.so": an_object(**changes)}), POLICY)
    assert verdict.status == "failed"
    assert words in verdict.summary


def test_object_files_that_nothing_loads_are_let_be() -> None:
    assert (
        elf_machine.judge(contents({"x.o": an_object(machine="EM_X86_64", kind="ET_REL")}), POLICY).status == "not applicable"
    )
    assert contents({"x.o": an_object(kind="ET_REL")}).loadable(Arch.AARCH64) == {}


@pytest.mark.parametrize(
    ("name", "tags", "words"),
    [
        ("m.cpython-311-aarch64-linux-gnu.so", "cp311-cp311", None),
        ("m.abi3.so", "cp38-abi3", None),
        ("m.so", "cp311-cp311", None),
        ("m.cpython-311-aarch64-linux-gnu.so", "cp38-abi3", "CPython 311"),
        ("m.cpython-311-x86_64-linux-gnu.so", "cp311-cp311", "x86_64-linux-gnu"),
        ("m.abi3.so", "cp312-abi3", "cannot be installed"),
        ("m.so", "cp310-cp310", "cannot be installed"),
        ("other.so", "cp311-cp311", "no PyInit_other"),
    ],
)
def test_extension_modules_fit_the_tag(name: str, tags: str, words: str | None) -> None:
    one = an_object(exports=exports({"PyInit_m": (1,)}))
    verdict = python_abi.judge(contents({f"p/{name}": one}, f"demo-1.0-{tags}-manylinux_2_17_aarch64.whl"), POLICY)
    assert verdict.status == ("failed" if words else "passed")
    assert (words or "") in verdict.summary


@pytest.mark.parametrize(
    ("entry", "fine"),
    [
        ("$ORIGIN", True), ("${ORIGIN}/../torch/lib", True), ("", False), (".", False), ("lib", False), ("/usr/lib", False),
        ("$ORIGIN/../../../build/lib", False), ("$ORIGINAL/lib", False), ("$LIB", False),
    ],
)  # fmt: skip
def test_only_entries_below_origin_are_allowed(entry: str, fine: bool) -> None:
    assert rpath.allowed(entry, ("/build",)) is fine


@pytest.mark.parametrize(
    ("claim", "level"),
    [
        ("manylinux1_aarch64", (2, 5)), ("manylinux2014_aarch64", (2, 17)), ("manylinux_2_34_aarch64", (2, 34)),
        ("linux_aarch64", None), ("manylinux_2_34_x86_64", None), ("musllinux_1_2_aarch64", None), ("any", None),
    ],
)  # fmt: skip
def test_what_a_tag_claims(claim: str, level: tuple[int, int] | None) -> None:
    assert platform_tag.claimed_level(claim, Arch.AARCH64) == level


def judged(found: dict[str, tuple[list[str], list[str]]], **changes: Any) -> Verdict:
    return cubins.compare(found, Policy(target=Arch.AARCH64, glibc="2_34", **{"sm": ("90",), **changes}))


def test_cubins_are_exactly_those_asked_for() -> None:
    assert judged({"a.so": (["90", "90"], [])}).status == "passed"
    assert judged({"a.so": (["90", "100"], []), "b.so": (["90", "100"], [])}, sm=("90", "100")).status == "passed"
    assert (
        "b.so has no cubin for sm_100" in judged({"a.so": (["90", "100"], []), "b.so": (["90"], [])}, sm=("90", "100")).summary
    )
    assert "PTX for sm_90" in judged({"a.so": (["90"], ["90"])}).summary


def test_ptx_is_exactly_what_was_asked_for_in_each_object_and_of_each_unit() -> None:
    assert judged({"a.so": (["90", "90"], ["90", "90"])}, ptx="90").status == "passed"
    assert (
        judged({"a.so": (["90", "100"], ["90"]), "b.so": (["90", "100"], ["90"])}, sm=("90", "100"), ptx="90").status
        == "passed"
    )
    assert "b.so has no PTX for sm_90" in judged({"a.so": (["90"], ["90"]), "b.so": (["90"], [])}, ptx="90").summary
    assert "from 1 translation units, but cubins from 2" in judged({"a.so": (["90", "90"], ["90"])}, ptx="90").summary
    assert "PTX for sm_80, which was not requested" in judged({"a.so": (["90"], ["80", "90"])}, ptx="90").summary


def test_a_source_that_was_not_compiled_for_all_shows_in_the_counts() -> None:
    assert "not compiled for all" in judged({"a.so": (["90", "90", "100"], [])}, sm=("90", "100")).summary


def test_sources_with_an_sm_of_their_own_may_have_it_alone() -> None:
    extra = {"hopper/*.cu": ("90a",)}
    assert judged({"a.so": (["90"], []), "hopper.so": (["90a"], [])}, sm_extra=extra).status == "passed"
    assert "no object has a cubin for sm_90" in judged({"hopper.so": (["90a"], [])}, sm_extra=extra).summary
    assert "sm_extra" in judged({"a.so": (["90"], [])}, sm_extra=extra).summary


@pytest.mark.parametrize("junk", [b"", b"not a zip", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_archive_gets_verdicts_and_no_exception(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "demo-1.0-cp311-cp311-manylinux_2_17_aarch64.whl"
    path.write_bytes(junk)
    verdicts = audit.audit(path, POLICY)
    assert [verdict.gate for verdict in verdicts] == list(audit.GATES)
    assert [verdict.status for verdict in verdicts] == ["failed"] + ["not applicable"] * (len(audit.GATES) - 1)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = Draft(files={"demo/data.bin": bytes(range(256)) * 64}).pack(tmp_path)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    verdicts = audit.audit(path, POLICY)
    assert [verdict.gate for verdict in verdicts if verdict.status == "failed"] == ["wheel"]


def test_a_damaged_object_is_the_machine_gates(tmp_path: Path) -> None:
    path = Draft(files={"demo/x.so": b"\x7fELF" + b"\xff" * 200}).pack(tmp_path)
    verdicts = {verdict.gate: verdict for verdict in audit.audit(path, POLICY)}
    assert verdicts["elf-machine"].status == "failed"
    assert "demo/x.so: not a readable ELF object" in verdicts["elf-machine"].summary


def test_an_encrypted_archive_gets_verdicts(tmp_path: Path) -> None:
    path = Draft(files={"demo/data.bin": b"1234"}).pack(tmp_path)
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1
    path.write_bytes(data)
    assert [verdict.gate for verdict in audit.audit(path, POLICY) if verdict.status == "failed"] == ["wheel"]


@pytest.mark.parametrize("name", ["demo/..", "demo/" + "x" * 300, "demo/\u00e4\n.so", "x"])
def test_an_object_under_any_name_gets_a_verdict(name: str, tmp_path: Path) -> None:
    path = Draft(files={name: b"\x7fELF" + b"\xff" * 200}).pack(tmp_path)
    assert "elf-machine" in [verdict.gate for verdict in audit.audit(path, POLICY) if verdict.status == "failed"]


def test_a_record_that_is_no_text_is_refused(tmp_path: Path) -> None:
    one = Draft(files={"demo/__init__.py": b""}, record=b"\xff\xfe,sha256=x,1\n")
    assert "RECORD cannot be read" in wheel.judge(one.pack(tmp_path), POLICY).summary


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("demo/__init__.py,md5=abc,0", "differs from RECORD"),
        ("demo/gone.py,,", "demo/gone.py is in RECORD"),
        (f"demo/__init__.py,sha256={EMPTY},x", "differs from RECORD"),
        ("junk,,\njunk,,", "twice"),
    ],
)
def test_record_is_held_against_the_content(row: str, words: str, tmp_path: Path) -> None:
    one = Draft(files={"demo/__init__.py": b""})
    one.record = f"{row}\ndemo-1.0.dist-info/RECORD,,\n".encode()
    assert words in " ".join(wheel.judge(one.pack(tmp_path), POLICY).details)


def test_a_weak_algorithm_is_refused_though_its_digest_fits(tmp_path: Path) -> None:
    digest = urlsafe_b64encode(hashlib.md5(b"", usedforsecurity=False).digest()).rstrip(b"=").decode()
    one = Draft(files={"demo/__init__.py": b""})
    one.record = f"demo/__init__.py,md5={digest},0\n".encode()
    assert "demo/__init__.py differs from RECORD" in wheel.judge(one.pack(tmp_path), POLICY).details


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wheel": "Wheel-Version: 1.0\nTag: cp311-cp311-linux_aarch64\n"}, "WHEEL has the tags cp311-cp311-linux_aarch64"),
        ({"wheel": "Wheel-Version: 2.0\nTag: cp311-cp311-manylinux_2_17_aarch64\n"}, "Wheel-Version: 2.0"),
        ({"metadata": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"}, "METADATA has Name: other"),
        ({"metadata": "Metadata-Version: 2.1\nName: demo\n"}, "METADATA has Version: None"),
        ({"folder": "other-1.0.dist-info"}, "the folder other-1.0.dist-info does not fit"),
        ({"folder": "demo-1.1.dist-info"}, "the folder demo-1.1.dist-info does not fit"),
    ],
)
def test_what_the_wheel_says_of_itself_agrees(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    path = Draft(files={"demo/__init__.py": b""}, **changes).pack(tmp_path)  # type: ignore[arg-type]
    [complaint] = wheel.judge(path, POLICY).details
    assert words in complaint


def test_a_wheel_needs_its_three_files_in_one_folder(tmp_path: Path) -> None:
    name = "demo-1.0-cp311-cp311-manylinux_2_17_aarch64.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("demo-1.0.dist-info/WHEEL", "")
    assert "has no METADATA and no RECORD" in wheel.judge(tmp_path / name, POLICY).summary
    two = Draft(files={"demo-0.9.dist-info/METADATA": b""}).pack(tmp_path / "two")
    assert "2 .dist-info folders" in wheel.judge(two, POLICY).summary


def test_a_file_that_leaves_the_wheel_is_refused(tmp_path: Path) -> None:
    assert "../up.py leads out of the wheel" in wheel.judge(Draft(files={"../up.py": b""}).pack(tmp_path), POLICY).details


def test_a_file_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = Draft(files={"demo/__init__.py": b""}).pack(tmp_path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("demo/__init__.py", b"import os\n")
    assert "demo/__init__.py occurs 2 times in the archive" in wheel.judge(path, POLICY).details


def test_there_is_only_one_wheel(tmp_path: Path) -> None:
    with pytest.raises(WheelError, match="left no wheel"):
        audit.only_wheel(tmp_path)
    (tmp_path / "a.whl").touch()
    assert audit.only_wheel(tmp_path) == tmp_path / "a.whl"
    (tmp_path / "b.whl").touch()
    with pytest.raises(WheelError, match=r"2 wheels instead of one: a\.whl, b\.whl"):
        audit.only_wheel(tmp_path)


@pytest.mark.parametrize("name", ["x.whl", "demo-1.0-py3-none-any.whl", "demo-1.0-cp311-cp311-win_amd64.whl"])
def test_a_wheel_for_no_machine_of_ours_has_no_target(name: str) -> None:
    with pytest.raises(WheelError):
        audit.target_of(Path(name))


def test_the_target_is_what_the_tag_says() -> None:
    assert audit.target_of(Path("a-1-cp38-abi3-manylinux1_x86_64.whl")) is Arch.X86_64
    assert audit.target_of(Path("a-1-cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64.whl")) is Arch.AARCH64


def test_require_names_each_gate_that_refused() -> None:
    ok = Verdict(gate="wheel", status="passed", summary="fine")
    bad = [Verdict(gate=gate, status="failed", summary=f"{gate} is bad") for gate in ("rpath", "symbols")]
    audit.require([ok])
    with pytest.raises(AuditError, match=r"2 gates: rpath \(rpath is bad\); symbols \(symbols is bad\)") as caught:
        audit.require([ok, *bad])
    assert caught.value.exit_code is ExitCode.AUDIT


def test_links_of_a_root_are_followed_inside_it(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/t").mkdir(parents=True)
    (tmp_path / "usr/lib/t/libx.so.1.2").write_bytes(b"x")
    (tmp_path / "usr/lib/t/libx.so.1").symlink_to("/usr/lib/t/libx.so.1.2")
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr/lib64").symlink_to("/lib")
    (tmp_path / "usr/lib/t/circle").symlink_to("circle")
    (tmp_path / "usr/lib/t/passwd").symlink_to("/etc/passwd")
    (tmp_path / "usr/lib/t/up").symlink_to("../../../../../../etc/passwd")
    (tmp_path / "round").symlink_to("round")
    assert providers.inside(tmp_path, "lib/t/libx.so.1") == tmp_path / "usr/lib/t/libx.so.1.2"
    assert providers.inside(tmp_path, "usr/lib64/t/libx.so.1") == tmp_path / "usr/lib/t/libx.so.1.2"
    assert providers.inside(tmp_path, "lib/t/circle") is None
    assert providers.inside(tmp_path, "round/x") is None
    assert providers.inside(tmp_path, "lib/t/passwd") is None
    assert providers.inside(tmp_path, "lib/t/up") is None


def test_torchs_and_nvidias_copies_come_before_those_of_other_packages(tmp_path: Path) -> None:
    for name in ("aaa/lib/libx.so.1", "nvidia/cu13/lib/libx.so.1", "torch/lib/libx.so.1", "zzz.libs/libown-01234567.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert providers.library_files(tmp_path)["libx.so.1"][:2] == ["torch/lib/libx.so.1", "nvidia/cu13/lib/libx.so.1"]
    assert providers.environment_sonames(tmp_path) == {"libx.so.1"}


CUDA_H = """
#if defined(__CUDA_API_VERSION_INTERNAL)
    #define cuMemAlloc    cuMemAlloc_v2
    #define cuMemcpyHtoD  __CUDA_API_PTDS(cuMemcpyHtoD_v2)
    #define CU_STREAM_LEGACY ((CUstream)0x1)
#endif
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr dst, const void *src, size_t count);
typedef CUresult (CUDAAPI *PFN_cuReadMind)(int flags);
"""


def test_the_drivers_functions_are_those_of_cudas_headers(tmp_path: Path) -> None:
    include = tmp_path / "nvidia/cu13/include"
    include.mkdir(parents=True)
    assert driver.headers(tmp_path) is None
    (include / "cuda.h").write_text(CUDA_H)
    (include / "cudaGL.h").write_text("CUresult CUDAAPI cuGLInit(void);\nCUresult CUDAAPI cuWGLGetDevice(CUdevice *device);\n")
    (include / "cudaProfilerTypedefs.h").write_text("typedef CUresult (CUDAAPI *PFN_cuProfilerStart_v4000)(void);\n")
    assert driver.headers(tmp_path) == include
    renamed = {"cuMemAlloc_v2", "cuMemcpyHtoD_v2", "cuMemcpyHtoD_v2_ptds"}
    declared = {"cuInit", "cuMemAlloc", "cuMemcpyHtoD", "cuGLInit", "cuProfilerStart"}
    assert driver.symbols(include) == declared | renamed


def test_the_toolkit_of_this_machine_comes_before_the_wheels(tmp_path: Path) -> None:
    for folder in ("toolkit/include", "site/nvidia/cu13/include"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cuda.h").touch()
    assert driver.headers(tmp_path / "site", tmp_path / "toolkit") == tmp_path / "toolkit/include"
    assert driver.headers(tmp_path / "site", tmp_path / "elsewhere") == tmp_path / "site/nvidia/cu13/include"
