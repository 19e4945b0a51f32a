"""The three extensions, loaded by name: `import aphrodite` succeeds without them.

They are loaded from their files, since the package itself needs triton and flash-attn, which the set's test has and this one
has not. _C is linked with libcuda.so.1, the driver's: where there is no driver, an empty stand-in is compiled that has the
names which _C asks for, so that the loader resolves all other ones for real.
"""

import ctypes
import importlib.util
import site
import subprocess
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch  # noqa: F401 whose libraries the extensions need

PACKAGE = Path(site.getsitepackages()[0]) / "aphrodite"
NAMES = ("cuTensorMapEncodeTiled", "cuPointerGetAttribute", "cuGetErrorString", "cuGetErrorName", "cuDriverGetVersion")


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
for name in ("_core_C", "_moe_C", "_C"):
    (place,) = PACKAGE.glob(f"{name}.*so")
    loader = ExtensionFileLoader(f"aphrodite.{name}", str(place))
    spec = importlib.util.spec_from_file_location(f"aphrodite.{name}", place, loader=loader)
    importlib.util.module_from_spec(spec)
    print(f"{name} loaded")
