"""Forward, backward, variable length and split-KV on the GPU against plain torch in float32, on random inputs.

The bound is upstream's own: no further from the float32 result than twice (gradients: three times) what plain torch in the
same type is. A wrong mask, scale or layout is hundreds of times further away, which the last lines show on one example.
"""

import itertools
import math

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

LENGTHS = ((129, 129), (113, 203), (256, 512), (1, 339))
"Of queries and keys: odd, unequal, whole tiles, one query."
DIMENSIONS = (16, 32, 40, 64, 96, 104, 128, 160, 192, 224, 256)
"Of a head: each of the six kernels' own dimension, and smaller ones that five of the kernels fill up."


def reference(q, k, v, causal, keys=None):
    """Softmax attention of (batch, length, heads, dim); the causal mask is aligned to the last query and key, as theirs."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q / math.sqrt(q.shape[-1]), k)
    rows, columns = torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(k.shape[1], device=q.device)
    keys = torch.full((q.shape[0],), k.shape[1], device=q.device) if keys is None else keys
    keys = keys[:, None, None, None]
    hidden = columns >= keys
    if causal:
        hidden = hidden | (columns > rows + keys - q.shape[1])
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def error(found, wanted):
    return (found.float() - wanted.float()).abs().max().item()


worst = {}
"By what was compared: the largest error, as a share of the bound."


def bounded(name, found, plain, exact, factor):
    assert torch.isfinite(found).all(), f"{name}: not finite"
    allowed = factor * error(plain, exact) + 1e-4 * exact.abs().max().item()
    assert error(found, exact) <= allowed, f"{name}: off by {error(found, exact):.2e}, allowed are {allowed:.2e}"
    kind = name.partition(" dim ")[0]
    worst[kind] = max(error(found, exact) / allowed, worst.get(kind, 0.0))


def tensors(dtype, dim, queries, keys, heads, kv_heads):
    shapes = ((2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim))
    return [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]


def forward_and_backward(dtype, dim, causal, queries, keys, heads, kv_heads):
    name = f"{dtype} dim {dim} causal {causal} lengths {queries} {keys} heads {heads} {kv_heads}"
    inputs = tensors(dtype, dim, queries, keys, heads, kv_heads)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = flash_attn_func(*inputs, causal=causal)
    plain, exact = reference(*inputs, causal), reference(*wide, causal)
    bounded(f"forward {name}", found, plain, exact, 2)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, inputs, gradient)
    plains = torch.autograd.grad(plain, inputs, gradient)
    exacts = torch.autograd.grad(exact, wide, gradient.float())
    for letter, *three in zip("qkv", results, plains, exacts, strict=True):
        bounded(f"d{letter} {name}", *three, 3)


def variable_length(dtype, dim, causal):
    """Three sequences in one batch without padding, forward and backward, against each for itself."""
    lengths = (57, 128, 203)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    inputs = [torch.randn(sum(lengths), 4, dim, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]
    found = flash_attn_varlen_func(*inputs, starts, starts, max(lengths), max(lengths), causal=causal)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, inputs, gradient)
    for first, last in itertools.pairwise(starts.tolist()):
        own = [tensor[first:last].detach()[None].requires_grad_() for tensor in inputs]
        wide = [tensor.detach().float().requires_grad_() for tensor in own]
        plain, exact = reference(*own, causal), reference(*wide, causal)
        bounded(f"varlen {dtype} dim {dim}", found[first:last], plain[0], exact[0], 2)
        plains = torch.autograd.grad(plain, own, gradient[None, first:last])
        exacts = torch.autograd.grad(exact, wide, gradient[None, first:last].float())
        for result, rough, sharp in zip(results, plains, exacts, strict=True):
            bounded(f"varlen gradient {dtype} dim {dim}", result[first:last], rough[0], sharp[0], 3)


def split(dtype, dim, causal):
    """The split-KV kernels, which a long cache and few queries use."""
    q, k, v = (tensor.detach() for tensor in tensors(dtype, dim, 3, 1024, 6, 2))
    filled = torch.tensor([777, 1024], device="cuda", dtype=torch.int32)
    for parts in (1, 4):
        found = flash_attn_with_kvcache(q, k, v, cache_seqlens=filled, causal=causal, num_splits=parts)
        plain = reference(q, k, v, causal, filled)
        exact = reference(q.float(), k.float(), v.float(), causal, filled)
        bounded(f"split {parts} {dtype} dim {dim}", found, plain, exact, 2)


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
count = 0
for dtype, dim, causal in itertools.product((torch.float16, torch.bfloat16), DIMENSIONS, (False, True)):
    for queries, keys in LENGTHS:
        forward_and_backward(dtype, dim, causal, queries, keys, 6, 2)
    forward_and_backward(dtype, dim, causal, 128, 128, 4, 4)
    variable_length(dtype, dim, causal)
    split(dtype, dim, causal)
    count += len(LENGTHS) + 3

# Negative control: the causal result is not the result without a mask.
inputs = [tensor.detach() for tensor in tensors(torch.float16, 64, 129, 129, 4, 4)]
exact = reference(*(tensor.float() for tensor in inputs), False)
try:
    bounded("", flash_attn_func(*inputs, causal=True), reference(*inputs, False), exact, 2)
except AssertionError:
    NEGATIVE_CONTROL = "the causal result is refused where no mask was asked for"
    COMPARISONS = [{"name": f"{kind}, share of the bound", "error": share, "tolerance": 1.0} for kind, share in worst.items()]
    print(f"{count} comparisons on {torch.cuda.get_device_name()} agree with torch, forward, backward, varlen and split-KV")
else:
    raise AssertionError("the bound accepts a wrong mask")
