"""Every reduction, forward and backward, on the GPU against torch's scatter_reduce on random inputs and random gradients."""

import torch
from torch_scatter import gather_csr, scatter, segment_csr

TOLERANCE = 1e-7
"Relative to the largest value; all are doubles, since the order of atomic additions differs between runs."
COMPARISONS = []


def close(name, found, expected):
    assert torch.isfinite(found).all()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{name}: off by {error:.2e} of the largest value"
    COMPARISONS.append({"name": name, "error": error, "tolerance": TOLERANCE})


torch.manual_seed(0)
index = torch.randint(0, 100, (4096,), device="cuda").sort().values
bounds = torch.searchsorted(index, torch.arange(101, device="cuda"))
wide = index[:, None].expand(-1, 64)
for mine, theirs in (("sum", "sum"), ("mean", "mean"), ("min", "amin"), ("max", "amax")):
    source = torch.randn(4096, 64, device="cuda", dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(100, 64, device="cuda", dtype=torch.float64)
    expected = empty.scatter_reduce(0, wide, source, theirs, include_self=False)
    gradient = torch.randn_like(expected)
    (reference,) = torch.autograd.grad(expected, source, gradient)
    for name, actual in (
        ("scatter", scatter(source, index, dim=0, dim_size=100, reduce=mine)),
        ("segment_csr", segment_csr(source, bounds, reduce=mine)),
    ):
        close(f"{name} {mine}", actual, expected)
        (grad,) = torch.autograd.grad(actual, source, gradient)
        close(f"{name} {mine} backward", grad, reference)
    assert not torch.allclose(expected, scatter(source, index.flip(0), dim=0, dim_size=100, reduce=mine)), "any order would do"
assert torch.equal(gather_csr(empty + torch.arange(100.0, device="cuda")[:, None], bounds)[:, 0], index.double())
NEGATIVE_CONTROL = "the sum over the reversed index is refused"
print("scatter and segment_csr on", torch.cuda.get_device_name(), "agree with torch, forward and backward")
