"""Import the engine's extensions by name, and read its table of options, from which deploy writes its command line.

`import aphrodite` ignores the ImportError of _C and _moe_C. _C is linked with libcuda.so.1 of the driver. Without a driver, a
stub with the symbols that _C needs is compiled, so that the loader resolves all other symbols.
"""

import argparse
import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401 loads libraries that the extensions need

NAMES = ("cuTensorMapEncodeTiled", "cuPointerGetAttribute", "cuGetErrorString", "cuGetErrorName", "cuDriverGetVersion")
LOADED = ["aphrodite._core_C", "aphrodite._moe_C", "aphrodite._C"]

try:
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
except OSError:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in NAMES)
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", library]
        subprocess.run(command, check=True, text=True, input=source)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
for name in LOADED:
    importlib.import_module(name)
    print(f"{name} loaded")

from aphrodite.engine.args_tools import AsyncEngineArgs  # noqa: E402 after the extensions, whose failure it would ignore

parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(prog="aphrodite"))
options = sorted(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
print("options " + json.dumps(options))
for wanted in ("--tensor-parallel-size", "--pipeline-parallel-size", "--kv-cache-dtype"):
    if wanted not in options:
        sys.exit(f"the engine's table of options has no {wanted}")
