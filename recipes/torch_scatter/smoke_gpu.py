"""Every reduction, forward and backward, on the GPU against torch's scatter_reduce in double precision, on random inputs.

Each floating-point type, and sources of one dimension and of two: segment_csr and segment_coo have kernels for each.
"""

import torch
from torch_scatter import gather_coo, gather_csr, scatter, segment_coo, segment_csr

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"Relative to the largest value. Sums of the half types are rounded after each addition, in an order that differs between runs."
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


torch.manual_seed(0)
index = torch.randint(0, 100, (4096,), device="cuda").sort().values
bounds = torch.searchsorted(index, torch.arange(101, device="cuda"))
FUNCTIONS = {
    "scatter": lambda source, reduce: scatter(source, index, dim=0, dim_size=100, reduce=reduce),
    "segment_csr": lambda source, reduce: segment_csr(source, bounds, reduce=reduce),
    "segment_coo": lambda source, reduce: segment_coo(source, index, dim_size=100, reduce=reduce),
}
for dtype, tolerance in TOLERANCES.items():
    for width in ((), (64,)):
        source = torch.randn(4096, *width, device="cuda", dtype=dtype, requires_grad=True)
        exact = source.detach().double().requires_grad_()
        everywhere = index.reshape(-1, *[1] * len(width)).expand(-1, *width)
        for mine, theirs in (("sum", "sum"), ("mean", "mean"), ("min", "amin"), ("max", "amax")):
            empty = torch.zeros(100, *width, device="cuda", dtype=torch.float64)
            expected = empty.scatter_reduce(0, everywhere, exact, theirs, include_self=False)
            gradient = torch.randn_like(expected).to(dtype)
            (reference,) = torch.autograd.grad(expected, exact, gradient.double())
            for name, function in FUNCTIONS.items():
                actual = function(source, mine)
                close(f"{name} {mine} {dtype}", actual, expected, tolerance)
                # Half types have equal extremes, and each side gives another of them the gradient.
                if mine in ("sum", "mean") or dtype in (torch.float64, torch.float32):
                    (grad,) = torch.autograd.grad(actual, source, gradient)
                    close(f"{name} {mine} backward {dtype}", grad, reference, tolerance)
            flipped = scatter(source, index.flip(0), dim=0, dim_size=100, reduce=mine)
            assert not torch.allclose(expected, flipped.double(), atol=tolerance, rtol=tolerance), "any order would do"
        rows = torch.randn(100, *width, device="cuda", dtype=dtype)
        for gathered in (gather_csr(rows, bounds), gather_coo(rows, index)):
            assert torch.equal(gathered, rows[index]), f"rows of {dtype} are gathered in another order"
NEGATIVE_CONTROL = "the sum over the reversed index is refused"
COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
print("scatter, segment_csr and segment_coo on", torch.cuda.get_device_name(), "agree with torch, forward and backward")
