"""The engine's three extensions, loaded by name, since `import aphrodite` succeeds without them; and the commit that it says.

They are loaded from their files: the package's own import also wants what the set has beside it (triton, flash-attn). _C is
linked with libcuda.so.1, the driver's: where there is no driver, an empty stand-in is compiled that has the names which _C
asks for, so that the loader resolves all other ones for real.
"""

import ctypes
import importlib.util
import re
import site
import subprocess
import sys
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch  # noqa: F401 whose libraries the extensions need

PACKAGE = Path(site.getsitepackages()[0]) / "aphrodite"
COMMIT = "8b8d2ce7e24f3ef3d949f497032b0e6a43cbd7e2"
"The tag's. A branch has the same name and another commit, and setup.py writes a placeholder where git does not answer."

NAMES = ("cuTensorMapEncodeTiled", "cuPointerGetAttribute", "cuGetErrorString", "cuGetErrorName", "cuDriverGetVersion")
LOADED = ["aphrodite._core_C", "aphrodite._moe_C", "aphrodite._C"]


def stand_in(folder: Path) -> Path:
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in NAMES))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    return library


commits = re.findall(r"\b[0-9a-f]{7,40}\b", (PACKAGE / "commit_id.py").read_text())  # whole, and a short one
if not commits or not all(map(COMMIT.startswith, commits)):
    sys.exit(f"aphrodite/commit_id.py says {', '.join(commits) or 'no commit'}, not {COMMIT}")
try:
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
except OSError:
    with tempfile.TemporaryDirectory() as name:
        ctypes.CDLL(str(stand_in(Path(name))), mode=ctypes.RTLD_GLOBAL)
for name in LOADED:
    (place,) = PACKAGE.glob(f"{name.rpartition('.')[2]}.*so")
    spec = importlib.util.spec_from_file_location(name, place, loader=ExtensionFileLoader(name, str(place)))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    print(f"{place.name} loaded")
