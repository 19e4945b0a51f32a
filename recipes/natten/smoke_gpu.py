"""Neighborhood attention in one to three dimensions and attention, forward and backward, with the kernels for Ampere and for
Hopper, against plain torch in single precision with a mask, on random inputs.

The bound is as upstream's: no further from the result in single precision than a multiple of what plain torch in the same type
is. A wrong window or scale is hundreds of times further away, which the last lines show on one example.
"""

import itertools
import math

import torch
from natten import attention, na1d, na2d, na3d

NEIGHBORHOOD = {1: na1d, 2: na2d, 3: na3d}
CASES = {
    1: [((200,), (25,), (1,), (False,)), ((200,), (25,), (3,), (True,))],
    2: [((17, 24), (5, 9), (1, 1), (False, False)), ((17, 24), (5, 7), (2, 3), (True, False))],
    3: [((6, 9, 11), (3, 5, 7), (1, 1, 1), (False,) * 3), ((6, 9, 11), (3, 3, 5), (2, 1, 2), (True, False, True))],
}
"By number of dimensions: shape, size of the window, dilation, and whether the window ends at the query."
worst = {}
"By what was compared: the largest error, as a share of the bound."


def window(length, size, dilation, causal):
    """Which keys a query sees: the nearest ones among those with its remainder; at a border the window moves inwards."""
    mask = torch.zeros(length, length, dtype=torch.bool, device="cuda")
    for query in range(length):
        group = range(query % dilation, length, dilation)
        place = query // dilation
        first = max(place - size + 1, 0) if causal else min(max(place - size // 2, 0), len(group) - size)
        last = place + 1 if causal else first + size
        mask[query, list(group)[first:last]] = True
    return mask


def neighborhood(shape, sizes, dilations, causal):
    mask = torch.ones(1, 1, dtype=torch.bool, device="cuda")
    for length, size, dilation, ends in zip(shape, sizes, dilations, causal, strict=True):
        own = window(length, size, dilation, ends)
        rows, columns = mask.shape[0] * length, mask.shape[1] * length
        mask = (mask[:, None, :, None] & own[None, :, None, :]).reshape(rows, columns)
    return mask


def reference(q, k, v, mask):
    """Attention of (batch, tokens, heads, dim)."""
    scores = torch.einsum("bthd,bshd->bhts", q / math.sqrt(q.shape[-1]), k)
    weights = torch.softmax(scores.float().masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def error(found, wanted):
    return (found.float() - wanted.float()).abs().max().item()


def bounded(name, found, plain, exact, factor):
    assert torch.isfinite(found).all(), f"{name}: not finite"
    allowed = factor * error(plain, exact) + 2e-4 * exact.abs().max().item()
    assert error(found, exact) <= allowed, f"{name}: off by {error(found, exact):.2e}, allowed are {allowed:.2e}"
    worst[name] = max(error(found, exact) / allowed, worst.get(name, 0.0))


def inputs(dtype, shape, heads, dim):
    return [torch.randn(2, *shape, heads, dim, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]


def compare(name, function, own, mask):
    """`function` of the tensors `own` and its gradients."""
    flat = [tensor.detach().flatten(1, -3).requires_grad_() for tensor in own]
    wide = [tensor.detach().float().requires_grad_() for tensor in flat]
    found = function(*own)
    plain, exact = reference(*flat, mask), reference(*wide, mask)
    bounded(f"forward {name}", found.flatten(1, -3), plain, exact, 3)
    gradient = torch.randn_like(exact)
    results = torch.autograd.grad(found, own, gradient.to(found.dtype).reshape(found.shape))
    plains = torch.autograd.grad(plain, flat, gradient.to(plain.dtype))
    exacts = torch.autograd.grad(exact, wide, gradient)
    for result, rough, sharp in zip(results, plains, exacts, strict=True):
        bounded(f"backward {name}", result.flatten(1, -3), rough, sharp, 4)


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
count = 0
hopper = torch.cuda.get_device_capability() == (9, 0)
BACKENDS = ("cutlass", "hopper") if hopper else ("cutlass",)
for backend, dtype, dim in itertools.product(BACKENDS, (torch.float16, torch.bfloat16), (32, 64, 128)):
    name = f"{backend} {dtype}"
    for dimensions, cases in CASES.items():
        for shape, sizes, dilations, causal in cases:
            options = {"kernel_size": sizes, "dilation": dilations, "is_causal": causal, "backend": f"{backend}-fna"}
            mask = neighborhood(shape, sizes, dilations, causal)
            own = inputs(dtype, shape, 2, dim)
            apply = NEIGHBORHOOD[dimensions]
            compare(f"{dimensions}d {name}", lambda *three, call=apply, given=options: call(*three, **given), own, mask)
            count += 1
    everything = torch.ones(150, 150, dtype=torch.bool, device="cuda")
    own = inputs(dtype, (150,), 2, dim)
    compare(f"attention {name}", lambda *three, kind=backend: attention(*three, backend=f"{kind}-fmha"), own, everything)
    count += 1

# Negative control: a window of 25 is not one of 23.
own = [tensor.detach() for tensor in inputs(torch.float16, (200,), 2, 64)]
smaller = neighborhood((200,), (23,), (1,), (False,))
exact = reference(*(tensor.float() for tensor in own), smaller)
try:
    bounded("", na1d(*own, kernel_size=25, backend="cutlass-fna"), reference(*own, smaller), exact, 3)
except AssertionError:
    NEGATIVE_CONTROL = "a window that is larger by two keys is refused"
    COMPARISONS = [{"name": f"{name}, share of the bound", "error": share, "tolerance": 1.0} for name, share in worst.items()]
    print(f"{count} cases on {torch.cuda.get_device_name()} agree with torch, forward and backward: {', '.join(BACKENDS)}")
else:
    raise AssertionError("the bound accepts another window")
