"""The engine's extensions, imported by name, and its table of options, which deploy writes its command line from.

`import aphrodite` swallows the ImportError of _C and _moe_C. _C is linked with libcuda.so.1, the driver's: where there is
none, an empty stand-in is compiled that has the names which _C asks for, so that the loader resolves all other ones for real.
"""

import argparse
import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401 whose libraries the extensions need

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

from aphrodite.engine.args_tools import AsyncEngineArgs  # noqa: E402 after what it would swallow the failure of

parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(prog="aphrodite"))
options = sorted(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
print("options " + json.dumps(options))
for wanted in ("--tensor-parallel-size", "--pipeline-parallel-size", "--kv-cache-dtype"):
    if wanted not in options:
        sys.exit(f"the engine's table of options has no {wanted}")
