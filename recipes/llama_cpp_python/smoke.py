"""The package and its six libraries load, with the backend for CUDA; the kernels need a GPU (smoke_gpu.py).

libggml-cuda is linked with libcuda.so.1, the driver's. If the driver is missing, an empty stand-in is compiled that has the
names which the library asks for, so that the loader resolves all other ones for real. So the recipe does not import the
package.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401 whose CUDA libraries are the stack's

MEMORY = ("Create", "Release", "Map", "Unmap", "SetAccess", "AddressReserve", "AddressFree", "GetAllocationGranularity")
NAMES = ("cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", *(f"cuMem{name}" for name in MEMORY))
LOADED = ["llama_cpp"]


def stand_in(folder: Path) -> Path:
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in NAMES))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    return library


try:
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
except OSError:
    with tempfile.TemporaryDirectory() as name:
        ctypes.CDLL(str(stand_in(Path(name))), mode=ctypes.RTLD_GLOBAL)

import llama_cpp  # noqa: E402 after the driver

folder = Path(llama_cpp.__file__).parent / "lib"
for library in ("ggml-base", "ggml-cpu", "ggml-cuda", "ggml", "llama", "mtmd"):
    ctypes.CDLL(str(folder / f"lib{library}.so"))
assert ctypes.CDLL(str(folder / "libggml-cuda.so")).ggml_backend_cuda_reg
llama_cpp.llama_backend_init()
said = llama_cpp.llama_print_system_info().decode()
assert "CUDA : ARCHS = " in said, said
assert llama_cpp.llama_context_default_params().n_ctx == 512, "the structures have another layout than the library's"
assert llama_cpp.llama_model_default_params().use_mmap, "the structures have another layout than the library's"
print(f"llama.cpp says: {said.strip()}")
