"""Three kernels through the whole compiler: to PTX and, by the ptxas that the wheel carries, to a cubin for each architecture.

No GPU and no torch is needed. The wheel must carry CUDA's own tools: a build that only skipped their download imports just as
well. GRACEFARM_SM names the architectures, GRACEFARM_EMULATOR what runs ptxas where the kernel does not.
"""

import os
import struct
import subprocess
import tempfile
from pathlib import Path

EMULATOR, ARCHITECTURES = os.environ.get("GRACEFARM_EMULATOR", ""), os.environ.get("GRACEFARM_SM", "90").split()
SCRATCH = Path(tempfile.mkdtemp())
os.environ["TRITON_CACHE_DIR"] = str(SCRATCH / "cache")

import triton  # noqa: E402 it reads where its cache is
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for name in ("ptxas", "cuobjdump", "nvdisasm"):
    assert (TOOLS / name).is_file(), f"{name} is not in the wheel"
head = (TOOLS / "ptxas").read_bytes()[:20]
assert head[:4] == b"\x7fELF", "ptxas is not an ELF program"
assert head[18:20] == b"\xb7\x00", "ptxas is not for aarch64"
if EMULATOR:
    # Triton starts ptxas itself, and where the target is emulated no kernel does.
    script = SCRATCH / "ptxas"
    script.write_text(f'#!/bin/sh\nexec {EMULATOR} {TOOLS / "ptxas"} "$@"\n')
    script.chmod(0o755)
    os.environ["TRITON_PTXAS_PATH"] = str(script)


@triton.jit
def scaled_sum(x, y, out, count, BLOCK: tl.constexpr):  # noqa: N803 as triton writes its constants
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(out + place, 2 * tl.load(x + place, inside) + tl.load(y + place, inside), inside)


@triton.jit
def row_maximum(x, out, columns, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * columns + place, place < columns, other=-float("inf"))
    tl.store(out + tl.program_id(0), tl.max(row, 0))


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):  # noqa: N803
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(out + rows * SIZE + columns, tl.dot(tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)))


KERNELS = (
    (scaled_sum, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "count": "i32", "BLOCK": "constexpr"}, {"BLOCK": 1024}),
    (row_maximum, {"x": "*fp32", "out": "*fp32", "columns": "i32", "BLOCK": "constexpr"}, {"BLOCK": 1024}),
    (product, {"a": "*fp16", "b": "*fp16", "out": "*fp32", "SIZE": "constexpr"}, {"SIZE": 64}),
)
EXPECTED = {"scaled_sum": "fma.rn.f32", "row_maximum": "shfl.sync.bfly"}
"An instruction of the PTX that the kernel is about."
MATRIX = {"80": "mma.sync", "86": "mma.sync", "89": "mma.sync", "90": "wgmma.mma_async"}


def check(kernel, signature, constants, sm):
    """Compile for one architecture; the PTX is of that and does what it should, the cubin is for CUDA's machine."""
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sm), 32))
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    assert f".target sm_{sm}" in ptx, ptx[:200]
    wanted = EXPECTED.get(kernel.__name__) or MATRIX.get(sm)
    assert wanted is None or wanted in ptx, f"{kernel.__name__} for sm_{sm} has no {wanted}"
    assert cubin[:4] == b"\x7fELF", f"ptxas made no cubin of {kernel.__name__}"
    (machine,) = struct.unpack("<H", cubin[18:20])
    assert machine == 190, f"EM_CUDA is 190, the cubin says {machine}"
    assert kernel.__name__.encode() in cubin
    return f"{kernel.__name__} sm_{sm}: {len(cubin)} bytes"


version = subprocess.run([*EMULATOR.split(), TOOLS / "ptxas", "--version"], capture_output=True, text=True, check=True).stdout
print(version.strip().splitlines()[-1])
for architecture in ARCHITECTURES:
    number = architecture.rstrip("af")
    print("; ".join(check(*entry, number) for entry in KERNELS))
