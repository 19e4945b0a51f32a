"""The selective scan on the GPU, forward and backward, against the package's reference in plain torch, on random inputs.

Every type; real and complex states; B and C constant, variable and of several groups; with and without gate; lengths within
one chunk of the kernel and over several. Tolerances: single precision with fast exponentials, and the rounding of the half
types.
"""

import itertools

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    """Relative to the largest value, since gradients are sums of thousands of terms."""
    assert torch.isfinite(torch.view_as_real(found) if found.is_complex() else found).all(), f"{name}: not finite"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def inputs(dtype, is_complex, groups, length, gated):
    """Of one layer with 2 sequences, 24 channels and 8 states."""
    weights = torch.complex64 if is_complex else torch.float32
    rates = -0.5 * torch.rand(24, 8, device="cuda", dtype=torch.float32).to(weights)
    if is_complex:
        rates = rates + 1j * torch.randn(24, 8, device="cuda")
    shape = {0: (24, 8), 1: (2, 8, length * (1 + is_complex)), 2: (2, 2, 8, length * (1 + is_complex))}[groups]
    into, out = (torch.randn(shape, device="cuda", dtype=dtype if groups else weights) for _ in range(2))
    u, z = (torch.randn(2, 24, length, device="cuda", dtype=dtype) for _ in range(2))
    delta = (0.5 * torch.rand(2, 24, length, device="cuda")).to(dtype)
    past, bias = torch.randn(24, device="cuda"), 0.5 * torch.rand(24, device="cuda")
    tensors = {
        "u": u,
        "delta": delta,
        "A": rates,
        "B": into,
        "C": out,
        "D": past,
        "z": z if gated else None,
        "delta_bias": bias,
    }
    return {name: tensor if tensor is None else tensor.detach().requires_grad_() for name, tensor in tensors.items()}


torch.manual_seed(0)
count, backward = 0, 0
cases = itertools.product(TOLERANCES, (False, True), (0, 1, 2), (1, 128, 511, 2049), (False, True))
for dtype, is_complex, groups, length, gated in cases:
    own = inputs(dtype, is_complex, groups, length, gated)
    theirs = {name: tensor if tensor is None else tensor.detach().clone().requires_grad_() for name, tensor in own.items()}
    found, state = selective_scan_fn(**own, delta_softplus=True, return_last_state=True)
    expected, last = selective_scan_ref(**theirs, delta_softplus=True, return_last_state=True)
    name = f"{'complex' if is_complex else 'real'} {dtype}"
    close(f"forward {name}", found, expected, TOLERANCES[dtype])
    # The kernel multiplies by a constant B after the scan, so the state that it returns lacks this factor.
    close(f"last state {name}", state if groups else state * own["B"], last, TOLERANCES[dtype])
    count += 1
    if is_complex:  # upstream does not test gradients of complex states
        continue
    backward += 1
    gradient = torch.randn_like(expected)
    wanted = [name for name, tensor in own.items() if tensor is not None]
    results = torch.autograd.grad(found, [own[part] for part in wanted], gradient)
    references = torch.autograd.grad(expected, [theirs[part] for part in wanted], gradient)
    for part, result, reference in zip(wanted, results, references, strict=True):
        if part == "A" and length == 1:  # the first step does not use A
            continue
        close(f"gradient of {part} {name}", result, reference, 2 * TOLERANCES[dtype])

# The comparison can fail: a scan from the end to the start is another one.
own = inputs(torch.float32, False, 1, 512, False)
backwards = {**own, "u": own["u"].flip(-1)}
try:
    close("", selective_scan_fn(**own), selective_scan_ref(**backwards).flip(-1), 2e-3)
except AssertionError:
    NEGATIVE_CONTROL = "a scan from the end to the start is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{count} cases on {torch.cuda.get_device_name()} agree with torch forward, and {backward} of them also backward")
else:
    raise AssertionError("the comparison accepts a scan in the other direction")
