"""Load vllm's extensions by name, and read its table of options, since `import vllm` loads neither.

The extensions are linked with libcuda.so.1 of the driver. Without a driver, an empty stub replaces it, and functions are bound
lazily. So this proves that all other libraries exist, and that all data symbols and versions fit.
"""

import argparse
import ctypes
import json
import os
import site
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401 loads libraries that the extensions need

PACKAGE = Path(site.getsitepackages()[0]) / "vllm"

try:
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
except OSError:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", library]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
for place in sorted(PACKAGE.rglob("*.so")):
    ctypes.CDLL(str(place), mode=os.RTLD_LAZY)
    print(f"loaded {place.relative_to(PACKAGE)}")

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402 after the extensions, whose failure it would ignore
from vllm.platforms import current_platform  # noqa: E402

if not current_platform.device_type:
    current_platform.device_type = "cuda"  # vllm derives it from the driver, which the table of options does not need
parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(prog="vllm"))
options = sorted(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
print("options " + json.dumps(options))
for wanted in ("--tensor-parallel-size", "--pipeline-parallel-size"):
    if wanted not in options:
        sys.exit(f"vllm's table of options has no {wanted}")
