"""Forward, backward and the one-step update on the GPU against the package's plain torch references, on random inputs.

Every type, every width with a separate kernel, both memory layouts, with and without activation. Tolerances: single precision
with fast exponentials, and rounding of the result for the two half types.
"""

import itertools

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref

worst = {}
"By what was compared: the largest error, and the tolerance."
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def close(name, found, expected, tolerance):
    """Relative to the largest value, since gradients are sums of a thousand terms."""
    assert found.dtype == expected.dtype
    assert torch.isfinite(found).all()
    scale = expected.abs().max()
    assert scale > 0
    error = ((found - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


torch.manual_seed(0)
count = 0
for dtype, width, activation, last in itertools.product(TOLERANCES, (2, 3, 4), (None, "silu"), (False, True)):
    tolerance = TOLERANCES[dtype]
    x = torch.randn(2, 515, 256, device="cuda", dtype=dtype).transpose(1, 2)
    x = (x if last else x.contiguous()).detach().requires_grad_()
    weight = torch.randn(256, width, device="cuda", requires_grad=True)
    bias = torch.randn(256, device="cuda", requires_grad=True)
    found = causal_conv1d_fn(x, weight, bias, activation=activation)
    expected = causal_conv1d_ref(x, weight, bias, activation=activation)
    close(f"forward {dtype}", found, expected, tolerance)
    gradient = torch.randn_like(expected)
    grads = torch.autograd.grad(found, (x, weight, bias), gradient)
    references = torch.autograd.grad(expected, (x, weight, bias), gradient)
    for grad, reference in zip(grads, references, strict=True):
        close(f"gradients {dtype}", grad, reference, tolerance)
    count += 1

for dtype, width in itertools.product(TOLERANCES, (2, 3, 4)):
    state = torch.randn(4, 256, width, device="cuda", dtype=dtype)
    step = torch.randn(4, 256, device="cuda", dtype=dtype)
    weight, bias = torch.randn(256, width, device="cuda", dtype=dtype), torch.randn(256, device="cuda", dtype=dtype)
    own, theirs = state.clone(), state.clone()
    found = causal_conv1d_update(step, own, weight, bias, activation="silu")
    expected = causal_conv1d_update_ref(step, theirs, weight, bias, activation="silu")
    close(f"update {dtype}", found, expected, TOLERANCES[dtype])
    assert torch.equal(own, theirs), "the state after the update is another"
    count += 1

# The comparison can fail: a convolution that sees the future is another one.
x = torch.randn(2, 256, 64, device="cuda")
weight = torch.randn(256, 4, device="cuda")
try:
    close("", causal_conv1d_fn(x, weight), causal_conv1d_ref(x.flip(-1), weight).flip(-1), 1e-3)
except AssertionError:
    NEGATIVE_CONTROL = "a convolution that sees the future is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{count} comparisons on {torch.cuda.get_device_name()} agree with torch, forward, backward and update")
else:
    raise AssertionError("the comparison accepts a convolution that sees the future")
