"""What the nvcc in front keeps of a package's command line, adds to it, and refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from builder.data.toolchain import schedule
from tests.conftest import REPOSITORY

NVCC = REPOSITORY / "builder" / "data" / "toolchain" / "nvcc"


def nvcc(tmp_path: Path, *arguments: str, **variables: str) -> tuple[list[str], str]:
    """What the wrapper passes on, and what it says."""
    real = tmp_path / "nvcc"
    real.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    real.chmod(0o755)
    done = subprocess.run(
        [NVCC, *arguments],
        env={**os.environ, "GRACEFARM_NVCC": str(real), "GRACEFARM_SM": "90", "CUDA_HOME": "/cuda", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


HARD_CODED = [
    "-gencode",
    "arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-arch=sm_75",
    "--gpu-architecture",
    "sm_100",
]


def test_nvcc_keeps_exactly_the_stacks_list(tmp_path: Path) -> None:
    passed, said = nvcc(tmp_path, "-c", "a b.cu", *HARD_CODED, "-DX=a b", "-o", "a.o")
    assert [argument for argument in passed if "arch" in argument or "sm_" in argument] == [
        "-gencode=arch=compute_90,code=sm_90"
    ]
    assert passed[:5] == ["-c", "a b.cu", "-DX=a b", "-o", "a.o"]
    assert "-I/cuda/include" in passed
    assert said == "gracefarm: nvcc a b.cu: dropped sm_80 sm_75 sm_100, compiles for sm_90\n"


@pytest.mark.parametrize("named", [("-ccbin", "gcc"), ("-ccbin=gcc",), ("--compiler-bindir", "gcc"), ()])
def test_nvcc_names_the_cross_compiler_alone(tmp_path: Path, named: tuple[str, ...]) -> None:
    passed, _ = nvcc(tmp_path, *named, "-c", "a.cu", GRACEFARM_CCBIN="aarch64-linux-gnu-g++")
    assert "gcc" not in " ".join(passed).replace("aarch64-linux-gnu-g++", "")
    assert passed[passed.index("-ccbin") + 1] == "aarch64-linux-gnu-g++"
    assert passed.count("-ccbin") == 1


def test_a_native_build_keeps_the_compiler_it_names(tmp_path: Path) -> None:
    passed, _ = nvcc(tmp_path, "-ccbin", "gcc", "-c", "a.cu")
    assert passed[passed.index("-ccbin") + 1] == "gcc"


def test_sm_extra_is_for_its_sources_alone(tmp_path: Path) -> None:
    extra = {"GRACEFARM_SM_EXTRA": "hopper/*.cu=90a"}
    passed, _ = nvcc(tmp_path, "-c", "/build/source/hopper/x.cu", **extra)
    assert "-gencode=arch=compute_90a,code=sm_90a" in passed
    passed, _ = nvcc(tmp_path, "-c", "/build/source/other.cu", **extra)
    assert "-gencode=arch=compute_90a,code=sm_90a" not in passed


def test_questions_pass_unchanged(tmp_path: Path) -> None:
    assert nvcc(tmp_path, "--version")[0] == ["--version"]


def compiled_for(passed: list[str]) -> list[str]:
    """The outputs of a call, as sm_90 or compute_90."""
    return [word.rpartition("=")[2] for word in passed if word.startswith("-gencode")]


@pytest.mark.parametrize(
    ("asked", "dropped"),
    [
        (["--generate-code=arch=compute_90,code=[sm_90]"], None),
        (["--generate-code=arch=compute_90,code=[compute_90,sm_90]"], "compute_90"),
        (["-gencode=arch=compute_80,code=sm_80", "-gencode", 'arch=compute_90,code="sm_90,compute_90"'], "sm_80 compute_90"),
        (["-arch=sm_90"], None),
        (["-arch=native"], "native"),
        (["-arch=compute_90", "-code=sm_90,sm_100"], "sm_100"),
        (["-arch", "compute_75"], "compute_75"),
    ],
)
def test_the_log_names_what_is_dropped_and_nothing_that_is_compiled(
    tmp_path: Path, asked: list[str], dropped: str | None
) -> None:
    passed, said = nvcc(tmp_path, "-c", "a.cu", *asked)
    assert compiled_for(passed) == ["sm_90"]
    assert said == (f"gracefarm: nvcc a.cu: dropped {dropped}, compiles for sm_90\n" if dropped else "")


def test_all_pythons_get_the_same_text_of_file_macros(tmp_path: Path) -> None:
    passed, _ = nvcc(tmp_path, "-c", "a.cu", GRACEFARM_PYTHON_INCLUDE="/usr/include/python3.13t")
    assert passed[passed.index("-Xcompiler") + 1] == "-fmacro-prefix-map=/env/lib/python3.13t/=/env/lib/python3/"
    assert "-Xcompiler" not in nvcc(tmp_path, "-c", "a.cu", GRACEFARM_PYTHON_INCLUDE="")[0]


def test_ptx_is_included_for_the_architecture_that_was_chosen(tmp_path: Path) -> None:
    asked = ["-gencode=arch=compute_80,code=compute_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    passed, said = nvcc(tmp_path, "-c", "a.cu", *asked, GRACEFARM_SM="90 100", GRACEFARM_PTX="90")
    assert compiled_for(passed) == ["sm_90", "sm_100", "compute_90"]
    assert "dropped compute_80," in said


@pytest.mark.parametrize(
    ("sm", "asked", "lowered"),
    [
        ("90", "-gencode=arch=compute_90a,code=sm_90a", "90a"),
        ("90", "-gencode arch=compute_90a,code=[sm_90a,compute_90a]", "90a"),
        ("90", "-arch=sm_90a", "90a"),
        ("80 90", "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=sm_90", "90a"),
        ("100", "-gencode=arch=compute_100f,code=sm_100f", "100f"),
        ("100f", "-gencode=arch=compute_100a,code=sm_100a", "100a"),
        ("90a", "-gencode=arch=compute_90a,code=sm_90a", None),
        ("90a", "-gencode=arch=compute_90,code=sm_90", None),
        ("100a", "-gencode=arch=compute_100f,code=sm_100f", None),
        ("90", "-gencode=arch=compute_100a,code=sm_100a", None),
    ],
)
def test_code_that_asks_for_90a_is_never_lowered_to_90_in_silence(
    tmp_path: Path, sm: str, asked: str, lowered: str | None
) -> None:
    call = ["-c", "csrc/hopper.cu", *asked.split()]
    if lowered is None:
        assert compiled_for(nvcc(tmp_path, *call, GRACEFARM_SM=sm)[0]) == [f"sm_{value}" for value in sm.split()]
        return
    with pytest.raises(subprocess.CalledProcessError) as refused:
        nvcc(tmp_path, *call, GRACEFARM_SM=sm)
    assert (refused.value.returncode, refused.value.stdout) == (1, "")
    said = refused.value.stderr.splitlines()[-1]
    assert said.startswith("gracefarm: error: ")
    for part in (f"csrc/hopper.cu asks for sm_{lowered}", f'["{lowered}"]', f"--sm {lowered}", "allow_sm_fallback = true"):
        assert part in said
    passed, said = nvcc(tmp_path, *call, GRACEFARM_SM=sm, GRACEFARM_SM_FALLBACK="yes")
    assert compiled_for(passed) == [f"sm_{value}" for value in sm.split()]
    extra = f"csrc/*.cu={lowered}"
    assert f"sm_{lowered}" in compiled_for(nvcc(tmp_path, *call, GRACEFARM_SM=sm, GRACEFARM_SM_EXTRA=extra)[0])


def test_flags_of_device_code_on_host_code_and_on_a_link_are_no_request(tmp_path: Path) -> None:
    assert compiled_for(nvcc(tmp_path, "-c", "a.cpp", "-arch=sm_90a")[0]) == ["sm_90"]
    assert compiled_for(nvcc(tmp_path, "-dlink", "a.o", "-arch=sm_90a")[0]) == ["sm_90"]
    # What some sources are compiled for is linked for, too.
    extra = {"GRACEFARM_SM_EXTRA": "hopper/*.cu=90a,100a"}
    assert compiled_for(nvcc(tmp_path, "-dlink", "a.o", "-arch=sm_90a", **extra)[0]) == ["sm_90", "sm_90a"]
    with pytest.raises(subprocess.CalledProcessError):
        nvcc(tmp_path, "-x", "cu", "-c", "a.cpp", "-arch=sm_90a")


@pytest.mark.parametrize(
    ("glob", "source", "matches"),
    [
        ("hopper/*.cu", "/build/source/hopper/x.cu", True),
        ("hopper/*.cu", "/build/source/a/hopper/b/x.cu", True),
        ("hopper", "/build/source/hopper/b/x.cu", True),
        ("csrc/hopper/", "/build/source/csrc/hopper/x.cu", True),
        ("hop*", "/build/source/csrc/hopper/x.cu", True),
        ("hopper", "/build/source/other/../hopper/x.cu", True),
        ("other", "/build/source/other/../hopper/x.cu", False),
        ("source", "/build/source/hopper/x.cu", False),
        ("hopper", "/build/source/xhopper/x.cu", False),
        ("a b/*.cu", "/build/source/a b/x.cu", True),
    ],
)
def test_a_glob_of_sm_extra_and_of_unit_memory_names_files_and_folders(
    tmp_path: Path, glob: str, source: str, matches: bool
) -> None:
    variables = {"GRACEFARM_UNITS": "/build/units.jsonl", "GRACEFARM_SM_EXTRA": f"nothing=100\n{glob}=90a"}
    passed, _ = nvcc(tmp_path, "-c", source, **variables)
    assert ("sm_90a" in compiled_for(passed)) is matches
    name = os.path.relpath(source, "/build/source")
    assert schedule.named(name, glob) is matches
    plan = {"peaks": {}, "declared": {glob: 9}, "per_job": 4}
    assert schedule.peak_of(name, plan) == (9 if matches else 4)


def test_nvcc_says_that_the_toolkit_is_cuda_home(tmp_path: Path) -> None:
    """The question of CMake's and torch's FindCUDAToolkit; the compiler's exit code stays."""
    real = tmp_path / "real"
    real.write_text(
        "#!/bin/sh\necho '#$ _SPACE_= '\necho '#$ TOP=/toolchain/nvidia/cu13/bin/..' >&2\necho fatal >&2\nexit 2\n"
    )
    real.chmod(0o755)
    asked = subprocess.run(
        [NVCC, "-v", "__cmake_determine_cuda"],
        env={**os.environ, "GRACEFARM_NVCC": str(real), "GRACEFARM_SM": "90", "CUDA_HOME": "/cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 2
    assert asked.stderr.splitlines() == ["#$ _SPACE_= ", "#$ TOP=/cuda", "fatal"]
