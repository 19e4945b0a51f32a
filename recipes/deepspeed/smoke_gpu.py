"""Optimizers, norms, quantization and token selection on the GPU against plain torch, on random inputs.

The optimizers run several steps on tensors of unequal sizes. Tolerances: single precision, and the rounding of the half types.
"""

import torch
from deepspeed.inference.v2 import kernelsinference_core_ops as core
from deepspeed.ops import random_ltd_op
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import fused_lamb_op
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.quantizer import quantizer_op
from deepspeed.ops.spatial import spatial_inference_op
from deepspeed.ops.transformer.inference import transformer_inference_op
from torch.nn import functional

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    """Relative to the largest value."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def lion(parameters, gradients, moments, rate, betas, decay):
    for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
        direction = (betas[0] * moment + (1 - betas[0]) * gradient).sign()
        parameter.mul_(1 - rate * decay).sub_(rate * direction)
        moment.mul_(betas[1]).add_((1 - betas[1]) * gradient)


torch.manual_seed(0)
SIZES = ((70_000,), (33, 65), (1,))
own = [torch.randn(size, device="cuda", requires_grad=True) for size in SIZES]
for mode, kind in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
    theirs = [tensor.detach().clone().requires_grad_() for tensor in own]
    fused = FusedAdam(own, lr=1e-2, weight_decay=0.1, adam_w_mode=mode)
    plain = kind(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for mine, other in zip(own, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        fused.step()
        plain.step()
    for mine, other in zip(own, theirs, strict=True):
        close(f"{kind.__name__}, five steps", mine, other, 1e-4)

theirs, moments = [tensor.detach().clone() for tensor in own], [torch.zeros_like(tensor) for tensor in own]
fused = FusedLion(own, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
for _ in range(5):
    for mine in own:
        mine.grad = torch.randn_like(mine)
    fused.step()
    lion(theirs, [mine.grad for mine in own], moments, 1e-2, (0.9, 0.99), 0.1)
for mine, other in zip(own, theirs, strict=True):
    close("Lion, five steps", mine, other, 1e-4)

weights, gradient = torch.randn(70_000, device="cuda"), torch.randn(70_000, device="cuda")
first, second = torch.randn(70_000, device="cuda"), torch.rand(70_000, device="cuda")
exact = [tensor.double() for tensor in (weights, gradient, first, second)]
mean, square = 0.9 * exact[2] + 0.1 * exact[1], 0.99 * exact[3] + 0.01 * exact[1] ** 2
update = mean / (square.sqrt() + 1e-6) + 0.1 * exact[0]
expected = exact[0] - 1e-2 * (exact[0].norm() / update.norm()).clamp(0.01, 10) * update
empty = torch.empty(0, device="cuda")
fused_lamb_op.lamb(weights, empty, first, second, gradient, 1e-2, 0.9, 0.99, 10.0, 0.01, 1e-6, 1.0, 1, 1, 0, 0.1)
close("LAMB, one step", weights, expected, 1e-5)

for dtype, tolerance in TOLERANCES.items():
    rows, scale, shift = (torch.randn(size, device="cuda").to(dtype) for size in ((50, 1024), (1024,), (1024,)))
    wide, weight, bias = rows.double(), scale.double(), shift.double()
    normed = functional.layer_norm(wide, (1024,), weight, bias, 1e-5)
    rooted = functional.rms_norm(wide, (1024,), weight, 1e-5)
    result = torch.empty_like(rows)
    core.layer_norm(result, rows, scale, shift, 1e-5)
    close(f"layer norm {dtype}", result, normed, tolerance)
    close(
        f"layer norm of transformers {dtype}",
        transformer_inference_op.layer_norm(rows[None], scale, shift, 1e-5)[0],
        normed,
        tolerance,
    )
    close(
        f"rms norm of transformers {dtype}", transformer_inference_op.rms_norm(rows[None], scale, 1e-5)[0], rooted, tolerance
    )
    if dtype != torch.float32:
        core.rms_norm(result, rows, scale, 1e-5)
        close(f"rms norm {dtype}", result, rooted, tolerance)
        activated = rows.clone()
        core.bias_activation(activated, shift, 2)  # SiLU
        close(f"bias and SiLU {dtype}", activated, functional.silu(wide + bias), tolerance)

half = torch.randn(4, 64, 320, device="cuda").half()
bias = torch.randn(320, device="cuda").half()
close("bias of images", spatial_inference_op.nhwc_bias_add(half, bias), half.double() + bias.double(), 1e-3)

values = torch.randn(16, 2048, device="cuda").half()
numbers, scales = quantizer_op.quantize(values, 16, 8, quantizer_op.Symmetric)
restored = quantizer_op.dequantize_fp32(numbers, scales, 16, 8, quantizer_op.Symmetric)
steps = (restored - values.float()).abs() / (values.float().abs().amax(1, keepdim=True) / 128)
assert numbers.unique().numel() > 200, "8 bits are not used"
close("8 bits, in steps", steps.max(), torch.ones((), device="cuda") * 0.75, 0.5)  # half a step; a whole one at the end

tokens = torch.randn(3, 100, 64, device="cuda").half()
chosen = torch.stack([torch.randperm(100, device="cuda")[:40] for _ in range(3)]).int()[None]
ordered = random_ltd_op.token_sort_(chosen.clone(), 100)
assert torch.equal(ordered, chosen.sort(-1).values), "the tokens are in another order"
places = ordered[0].long()[..., None].expand(-1, -1, 64)
gathered = random_ltd_op.token_gather(tokens, ordered[0].contiguous(), True)
assert torch.equal(gathered, tokens.gather(1, places)), "other tokens are gathered"
changed = random_ltd_op.token_scatter_(tokens.clone(), -gathered, ordered[0].contiguous(), True)
assert torch.equal(changed, tokens.scatter(1, places, -gathered)), "other tokens are changed"

# The comparison can fail: Adam with decay in the gradient is not AdamW.
mine = torch.randn(1000, device="cuda", requires_grad=True)
other = mine.detach().clone().requires_grad_()
mine.grad, other.grad = torch.ones_like(mine), torch.ones_like(other)
FusedAdam([mine], lr=1e-2, weight_decay=1.0, adam_w_mode=False).step()
torch.optim.AdamW([other], lr=1e-2, weight_decay=1.0).step()
try:
    close("", mine, other, 1e-4)
except AssertionError:
    NEGATIVE_CONTROL = "Adam with decay in the gradient is refused where AdamW was asked for"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{len(worst)} results on {torch.cuda.get_device_name()} agree with torch")
else:
    raise AssertionError("the comparison accepts another optimizer")
