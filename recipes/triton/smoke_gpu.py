"""Kernels compiled by the wheel's own ptxas against plain torch on random input: elementwise, a reduction, a product."""

import torch
import triton
import triton.language as tl


@triton.jit
def scaled_sum(x, y, out, count, BLOCK: tl.constexpr):  # noqa: N803 as triton writes its constants
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    tl.store(out + place, 2 * tl.load(x + place, inside) + tl.load(y + place, inside), inside)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    row = tl.load(x + tl.program_id(0) * columns + place, place < columns, other=-float("inf"))
    weights = tl.exp(row - tl.max(row, 0))
    tl.store(out + tl.program_id(0) * columns + place, weights / tl.sum(weights, 0), place < columns)


@triton.jit
def product(a, b, out, SIZE: tl.constexpr):  # noqa: N803
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(out + rows * SIZE + columns, tl.dot(tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)))


COMPARISONS = []


def close(name, found, expected, tolerance):
    error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed are {tolerance:.0e}"
    COMPARISONS.append({"name": name, "error": error, "tolerance": tolerance})


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
x, y = (torch.randn(100_003, device="cuda") for _ in range(2))
out = torch.empty_like(x)
scaled_sum[(triton.cdiv(x.numel(), 1024),)](x, y, out, x.numel(), BLOCK=1024)
close("scaled_sum", out, 2 * x + y, 1e-5)

x = torch.randn(17, 1000, device="cuda")
out = torch.empty_like(x)
softmax[(17,)](x, out, 1000, BLOCK=1024)
close("softmax", out, torch.softmax(x, 1), 1e-5)

for dtype in (torch.float16, torch.bfloat16):
    a, b = (torch.randn(64, 64, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty(64, 64, device="cuda")
    product[(1,)](a, b, out, SIZE=64)
    close(f"product {dtype}", out, a.float() @ b.float(), 1e-3)
    assert not torch.allclose(out, b.float() @ a.float(), atol=1e-3, rtol=1e-3), "any product would do"
NEGATIVE_CONTROL = "the product in the other order is refused"
print("scaled_sum, softmax and product on", torch.cuda.get_device_name(), "agree with torch")
