"""CMake projects that find CUDA through the modules of the real torch: our nvcc says where the target's toolkit is."""

from __future__ import annotations

from pathlib import Path

from builder.box import sandbox
from tests.conftest import Farm
from tests.integration.pinned_kit import place

TORCH = "/env/lib/python3.11/site-packages/torch/share/cmake"

# torch's own FindCUDAToolkit comes before CMake's, as Caffe2Config.cmake sets it; it reads only the TOP line of nvcc.
FIND_TOOLKIT = f"""
cmake_minimum_required(VERSION 3.25)
project(t LANGUAGES CXX CUDA)
list(APPEND CMAKE_MODULE_PATH {TORCH}/Caffe2)
find_package(CUDAToolkit REQUIRED)
add_library(core OBJECT core.cpp kernel.cu)
target_link_libraries(core CUDA::cudart)
"""
# aphrodite's CMake needs USE_SABI, so CMake 3.26.
FIND_TORCH = f"""
cmake_minimum_required(VERSION 3.26)
project(t LANGUAGES CXX)
find_package(Torch REQUIRED PATHS {TORCH})
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module Development.SABIModule)
Python_add_library(sabi MODULE USE_SABI 3.8 core.cpp)
add_library(core OBJECT core.cpp)
target_link_libraries(core torch)
"""


def built(farm: Farm, stack: str, text: str, folder: Path, *sm: str) -> str:
    """CMake's output on a project and on its target `core`, in the sandbox of a build against that stack."""
    box, log = place(farm, stack, folder, sm), folder / "log.txt"
    (folder / "CMakeLists.txt").write_text(text)
    (folder / "core.cpp").write_text("#include <cublas_v2.h>\n")
    (folder / "kernel.cu").write_text("__global__ void kernel() {}\n")
    outcome = sandbox.run(box, ["sh", "-c", "cmake -S . -B b && cmake --build b --target core --verbose"], log=log)
    assert outcome.returncode == 0, log.read_text()
    return log.read_text()


def test_torchs_own_findcudatoolkit_finds_the_targets_toolkit_of_cuda_12_4(farm: Farm, tmp_path: Path) -> None:
    text = built(farm, "cu124-headers", FIND_TOOLKIT, tmp_path / "build", "80", "90a")
    assert "code=[sm_80]" in text
    assert "code=[sm_90a]" in text
    assert "dropped" not in text


def test_a_unit_of_a_project_that_finds_the_real_torch_includes_cublas(farm: Farm, tmp_path: Path) -> None:
    text = built(farm, "cu130", FIND_TORCH, tmp_path / "build", "90a", "100f")
    # torch knows no families; our nvcc compiles for the family.
    flags = "-gencode;arch=compute_90a,code=sm_90a;-gencode;arch=compute_100,code=sm_100"
    assert f"Added CUDA NVCC flags for: {flags}\n" in text
