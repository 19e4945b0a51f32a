"""The grouped product on the GPU, forward and backward, against one product per group in single precision, on random inputs.

Sizes of the groups on the CPU and on the GPU, which different code prepares; equal and unequal groups, empty ones; both
layouts of the weights. Tolerance: the rounding of the result to bfloat16.
"""

import itertools

import torch
from grouped_gemm import ops

worst = {}
"By what was compared: the largest error, and the tolerance."
TOLERANCE = 8e-3


def close(name, found, expected):
    """Relative to the largest value."""
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.float() - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{name}: off by {error:.2e} of the largest value, allowed are {TOLERANCE:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, TOLERANCE))[0]), TOLERANCE)


def reference(a, b, sizes, transposed):
    parts = zip(a.split(sizes), b.mT if transposed else b, strict=True)
    return torch.cat([part @ weight for part, weight in parts])


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
count = 0
GROUPS = ([128] * 4, [1, 500, 3, 264], [0, 129, 0, 383, 0], [7])
for sizes, transposed, device in itertools.product(GROUPS, (False, True), ("cpu", "cuda")):
    a = torch.randn(sum(sizes), 256, device="cuda").bfloat16().requires_grad_()
    shape = (len(sizes), 192, 256) if transposed else (len(sizes), 256, 192)
    b = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
    wide = [tensor.detach().float().requires_grad_() for tensor in (a, b)]
    found = ops.gmm(a, b, torch.tensor(sizes, device=device), transposed)
    expected = reference(*wide, sizes, transposed)
    where = f"sizes on the {device.upper()}"
    close(f"product, {where}", found, expected)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, (a, b), gradient)
    references = torch.autograd.grad(expected, wide, gradient.float())
    for name, result, exact in zip(("a", "b"), results, references, strict=True):
        close(f"gradient of {name}, {where}", result, exact)
    empty = [place for place, size in enumerate(sizes) if size == 0]
    assert not results[1][empty].any(), "the gradient of an empty group is not zero"
    count += 1

# The comparison can fail: groups of other sizes take other weights.
a, b = torch.randn(512, 256, device="cuda").bfloat16(), torch.randn(4, 256, 192, device="cuda").bfloat16()
try:
    close("", ops.gmm(a, b, torch.tensor([129, 127, 128, 128])), reference(a.float(), b.float(), [128] * 4, False))
except AssertionError:
    NEGATIVE_CONTROL = "the product with a row in another group is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{count} cases on {torch.cuda.get_device_name()} agree with torch, forward and backward")
else:
    raise AssertionError("the comparison accepts groups of other sizes")
