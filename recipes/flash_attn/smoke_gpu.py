"""Forward passes against torch's own attention in float32 on random input; this fork has no backward.

Both types, causal and not, every head dimension compiled, one query head per key head and four, and sequences without padding.
"""

import torch
from aphrodite_flash_attn import flash_attn_func, flash_attn_varlen_func


def expected(q, k, v, causal):
    """(batch, length, heads, dim), queries as many as keys."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    wide = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal).transpose(1, 2)


worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, wanted, tolerance):
    """Relative to the value, or absolute where it is below 1."""
    assert torch.isfinite(found).all()
    error = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.enable_flash_sdp(False)  # torch's own copy of the same kernels
count = 0
for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 2e-2)):
    for dim in (32, 64, 96, 128, 160, 192, 224, 256):
        for causal in (False, True):
            for heads in (2, 8):
                q = torch.randn(2, 129, heads, dim, device="cuda", dtype=dtype)
                k, v = (torch.randn(2, 129, 2, dim, device="cuda", dtype=dtype) for _ in range(2))
                found, wanted = flash_attn_func(q, k, v, causal=causal).float(), expected(q, k, v, causal)
                close(f"forward {dtype}", found, wanted, tolerance)
                assert not torch.allclose(found, expected(q, k, v, not causal), atol=tolerance, rtol=tolerance), "any mask"
                count += 1
            starts = torch.tensor([0, 57, 258], device="cuda", dtype=torch.int32)
            q, k, v = (torch.randn(258, 4, dim, device="cuda", dtype=dtype) for _ in range(3))
            found = flash_attn_varlen_func(q, k, v, starts, starts, 201, 201, causal=causal).float()
            for first, last in ((0, 57), (57, 258)):
                wanted = expected(*(tensor[None, first:last] for tensor in (q, k, v)), causal)[0]
                close(f"varlen {dtype}", found[first:last], wanted, tolerance)
            count += 1
NEGATIVE_CONTROL = "the other mask is refused"
COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
print(f"{count} forward passes on {torch.cuda.get_device_name()} agree with torch")
