"""The wheel must carry CUDA 12.4's own tools: a build that only skipped their download imports just as well."""

import subprocess
from pathlib import Path

import triton

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for name in ("ptxas", "cuobjdump", "nvdisasm"):
    assert (tools / name).is_file(), f"{name} is not in the wheel"
head = (tools / "ptxas").read_bytes()[:20]
assert head[:4] == b"\x7fELF", "ptxas is no program"
assert head[18:20] == b"\xb7\x00", "ptxas is not for aarch64"
try:
    said = subprocess.run([tools / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
except OSError as error:
    # Emulated without binfmt, the kernel starts no program of the target.
    print(f"ptxas not run: {error}")
else:
    assert "release 12.4" in said, said
    print(said.strip().splitlines()[-1])
