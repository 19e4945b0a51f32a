"""vllm's extensions, loaded by name, and its table of options: `import vllm` loads neither.

The extensions are linked with libcuda.so.1, the driver's. Where there is no driver an empty stand-in takes its place and names
are resolved when they are called, so that what is proven is this: every other library is there, and all data and versions fit.
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

import torch  # noqa: F401 whose libraries the extensions need

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

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402 after what it would swallow the failure of
from vllm.platforms import current_platform  # noqa: E402

if not current_platform.device_type:
    current_platform.device_type = "cuda"  # which it tells by a driver; the table of options needs none
parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(prog="vllm"))
options = sorted(name for action in parser._actions for name in action.option_strings if name.startswith("--"))
print("options " + json.dumps(options))
for wanted in ("--tensor-parallel-size", "--pipeline-parallel-size"):
    if wanted not in options:
        sys.exit(f"vllm's table of options has no {wanted}")
